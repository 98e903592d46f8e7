"""Importance of a unit's gate: a factor of 1 on its activation wherever a matrix reads it. Ours.

| symbol | here |
| --- | --- |
| z_u, the gate of unit u; 1 in the model, 0 once it is gone | one number on all its positions, wherever they are read |
| L_b, mean token loss of sequence b, which has T_b predicted tokens | `backward`, one sequence at a time |
| g_bu = dL_b/dz_u = sum over tokens and readers of x_u dL_b/dx_u | `Gates.of` |
| first order, abs(mean_b g_bu): the loss is linear in the gate | `Gate(order=1)` |
| Fisher, mean_b T_b g_bu^2 / 2: the loss curves as its Fisher information says, and 1 is its minimum | `Gate()` |
| both, abs(-mean_b g_bu + mean_b T_b g_bu^2 / 2) | `Gate(order="mixed")` |

All three are in nats per token. The Fisher information of the log-likelihood of a whole sequence is the expectation of
(T_b g_bu)^2; per token it is T_b g_bu^2. Where gradients of tokens are no more than noise around zero, the squares
estimate what weights' squares do (`Taylor(order=2)`), but of the unit as a whole: contributions of its weights that
cancel do cancel here.

No gradient of a weight is formed where linear modules read a unit, so that frozen and packed weights do, and memory is
what back-propagation to activations takes. The gate's gradient is also sum_o W_ou G_ou over the column of a matrix W
with gradient G, and is taken from there where something else than a linear module reads the unit (stacked experts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from secateur.errors import NonFiniteError, PlanError
from secateur.groups import Group
from secateur.importance.reduce import Axis, along
from secateur.importance.streaming import backward
from secateur.packed import packed_weights, refuse_packed
from secateur.readers import base_of, input_dim, input_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Gate:
    """Loss change if a unit's activation were zero.

    Attributes:
        order: `fisher`, 1 or `mixed`.
        gradient_checkpointing: recompute activations to save memory.
    """

    order: Literal["fisher", 1, "mixed"] = "fisher"
    gradient_checkpointing: bool = False

    def units(self, model: PreTrainedModel, groups: Sequence[Group], batches: Sequence[Tensor]) -> dict[str, Tensor]:
        """Group name -> importance [units], float32 on the CPU; 0 where the text never reaches (idle experts).

        Args:
            batches: calibration token ids, each [sequences, length].

        Raises:
            PlanError: nothing reads the units of a group (whole layers), or packed weights do that are not linear.
            NonFiniteError: a loss or score is NaN or infinite.
        """
        gates = Gates(model, groups)
        first = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in groups}
        second = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in groups}
        sequences = [row[None] for batch in batches for row in batch]
        lengths = iter([row.shape[1] - 1 for row in sequences])

        def take() -> None:
            length = next(lengths)
            for group in groups:
                found = gates.of(group)
                first[group.name] += found
                second[group.name] += length * found.square()
            gates.clear()

        with gates.open():
            backward(
                model,
                gates.matrices,
                sequences,
                gates.visit,
                on_batch=take,
                gradient_checkpointing=self.gradient_checkpointing,
            )
        number = max(1, len(sequences))
        return {name: self._score(first[name] / number, second[name] / number, name) for name in first}

    def _score(self, gradient: Tensor, curvature: Tensor, name: str) -> Tensor:
        loss = {"fisher": curvature / 2, 1: gradient.abs(), "mixed": (curvature / 2 - gradient).abs()}[self.order]
        if not torch.isfinite(loss).all():
            raise NonFiniteError(f"the importance of {name} is not finite; check the calibration data and the dtype")
        return loss.float()


class Gates:
    """The gates of all units of some groups in a model.

    Attributes:
        matrices: parameters whose own gradients stand in, since no linear module reads them.
    """

    def __init__(self, model: PreTrainedModel, groups: Sequence[Group]) -> None:
        """Find out what reads the groups' units.

        Raises:
            PlanError: see `Gate.units`.
        """
        self.model = model
        self.modules: dict[str, nn.Module] = {}  # parameter -> the linear module whose inputs its columns meet
        matrices: dict[str, list[int]] = {}
        for group in groups:
            members = [m for m in group.members if m.role == "consumer"]
            if not members:
                raise PlanError(
                    f"{group.name}: no matrix reads its units, so they have no gate; take another criterion for "
                    f"the kind {group.kind} (--criterion taylor-1)"
                )
            for m in members:
                module = model.get_submodule(m.parameter.rpartition(".")[0])
                if m.parameter.endswith(".weight") and m.dim == input_dim(base_of(module)):
                    self.modules[m.parameter] = module
                elif m.dim not in matrices.setdefault(m.parameter, []):
                    matrices[m.parameter].append(m.dim)
        if set(matrices) & set(packed_weights(model)):
            refuse_packed(model, "scored by gates where no linear module reads them", PlanError)
        self.matrices: Mapping[str, Sequence[int]] = matrices
        self._values: dict[str, Tensor] = {}
        self._sums: dict[Axis, Tensor] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Put a gate on the inputs of every module that reads units."""
        handles = []
        for name, module in self.modules.items():
            self._values[name] = torch.ones(input_size(module), device=_device(module), requires_grad=True)
            handles.append(module.register_forward_pre_hook(_passing(self._values[name])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def visit(self, name: str, weight: Tensor, grad: Tensor) -> None:
        """Take a matrix's gradient."""
        for dim in self.matrices[name]:
            part = along(weight.double() * grad.double(), dim)
            self._sums[name, dim] = self._sums.get((name, dim), torch.zeros_like(part)) + part

    def of(self, group: Group) -> Tensor:
        """The gradient of the loss by the gates of a group since they were cleared, float64 on the CPU [units]."""
        total = torch.zeros(group.units, dtype=torch.float64)
        for m in group.members:
            if m.role == "consumer":
                gate = self._values.get(m.parameter)
                found = self._sums.get((m.parameter, m.dim)) if gate is None else gate.grad
                if found is not None:
                    total += found.double().cpu()[torch.from_numpy(m.index)].sum(1)
        return total

    def clear(self) -> None:
        """Forget all gradients."""
        self._sums.clear()
        for gate in self._values.values():
            gate.grad = None


class _Gated(torch.autograd.Function):
    """x, with the gate's gradient summed over all but the last dimension in float32 or better."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        return grad, (x.to(wide) * grad.to(wide)).flatten(0, -2).sum(0).float()


def _passing(gate: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_Gated.apply(args[0], gate), *args[1:])

    return hook


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
