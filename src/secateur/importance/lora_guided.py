"""LoRA-guided importance (LoRAPrune, Zhang et al. 2023, arXiv:2305.18403, section 3.2).

| paper | here |
| --- | --- |
| W_0, frozen weight [out, in] | the base layer's weight, unpacked where it is quantised |
| B [out, r], A [r, in] | the LoRA factors; s = alpha / r their scale |
| gradient of the product, estimated from one step of unit length: BA - (B - dB)(A - dA) = dB A + B dA - dB dA | G |
| importance of an element | abs(G (W_0 + s B A)) |
| importance of a structure | sum over its elements in a projection, then over projections |

No gradient of a frozen weight exists at any time: G is formed for a block of columns of one layer, reduced to its sums
over rows and columns, and forgotten; of a quantised weight the same columns are unpacked. Deviations: the paper squares
the element, its code and we take the absolute value; elements of units that are masked already do not count towards the
others (the code lets rows of B that get no gradient any more contribute through dA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from secateur.errors import NonFiniteError, PlanError
from secateur.groups import Group, Groups, Kept
from secateur.packed import packed_weights, unpacked_columns

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from torch.utils.hooks import RemovableHandle

COLUMNS = 1024  # of a weight matrix that are unpacked and scored at a time
Positions = Mapping[tuple[str, int], Tensor]
Variant = Literal["lora", "grad", "magnitude"]


@dataclass(frozen=True)
class LoraGuided:
    """What a unit is worth, from the LoRA factors around frozen weights and their gradients.

    Attributes:
        variant: `lora`, the estimate above; `grad`, with the true gradient of W_0; `magnitude`, with G = 1.
        normalise: divide each projection's scores by their Euclidean norm before they are added up, as the reference
            does, so that a projection with large weights does not decide alone.
    """

    variant: Variant = "lora"
    normalise: bool = True

    def scores(
        self, model: nn.Module, groups: Groups, kept: Kept, names: Sequence[str], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Importance of the units that are left, float32 on the CPU; gradients of the factors must be there.

        Args:
            model: the base with adapters in its modules.
            groups: of the base as it is built now.
            kept: units that are not masked.
            names: the groups to score.
            gradients: for `grad`, the gradient of every weight that carries adapters, by name.

        Raises:
            NonFiniteError: a score is NaN or infinite; names the parameter.
            PlanError: for `lora`, not one factor has a gradient.
        """
        left = groups.after(kept)
        stay = groups.kept_positions(kept)
        chosen = [left.named(name) for name in names]
        found: dict[tuple[str, int], Tensor] = {}
        parameters = dict.fromkeys(m.parameter for g in chosen for m in g.members)
        layers = {p: layer for p in parameters if (layer := adapted_layer(model, p)) is not None}
        if self.variant == "lora" and not any(f.grad is not None for a in layers.values() for f in factors_of(a)[:2]):
            raise PlanError(
                "no adapter has a gradient before the optimizer's step, so nothing can be scored: layer-wise "
                "optimizers and ZeRO leave none there; take another optimizer, or the variant magnitude"
            )
        for parameter, layer in layers.items():
            sums = self._sums(layer, stay.get(parameter, {}), gradients.get(parameter))
            if not all(torch.isfinite(s).all() for s in sums.values()):
                raise NonFiniteError(
                    f"the importance of {parameter} is not finite: lower the learning rate, or train in another dtype"
                )
            found |= {(parameter, dim): values.cpu() for dim, values in sums.items()}
        return {group.name: self._of_group(group, found) for group in chosen}

    def _of_group(self, group: Group, positions: Positions) -> Tensor:
        rows = [
            positions[m.parameter, m.dim][torch.from_numpy(m.index)].sum(1)
            for m in group.members
            if (m.parameter, m.dim) in positions
        ]
        if self.normalise:
            rows = [r / r.norm().clamp_min(torch.finfo(r.dtype).tiny) for r in rows]
        return torch.stack(rows).sum(0)

    def _sums(self, layer: LoraLayer, stay: Mapping[int, Any], gradient: Tensor | None) -> dict[int, Tensor]:
        """Importance summed over each row and column that stays, by dimension of the stored weight."""
        a, b, scale = factors_of(layer)
        base, turned = layer.get_base_layer(), bool(getattr(layer, "fan_in_fan_out", False))
        is_packed = bool(packed_weights(base))
        rows = _positions(stay, 1 if turned else 0, b.shape[0], b.device)
        columns = _positions(stay, 0 if turned else 1, a.shape[1], a.device)
        b_kept, db = b.detach()[rows].float(), _gradient(b)[rows]
        by_row, by_column = torch.zeros(len(rows), device=b.device), []
        for tile in columns.split(COLUMNS):
            a_kept, da = a.detach()[:, tile].float(), _gradient(a)[:, tile]
            if is_packed:
                salience = unpacked_columns(base, tile)[rows]
            else:
                salience = _columns(base.weight.detach(), tile, rows, turned)
            salience += scale * (b_kept @ a_kept)
            if self.variant == "lora":
                salience *= db @ (a_kept - da) + b_kept @ da
            elif self.variant == "grad":
                assert gradient is not None
                salience *= _columns(gradient, tile, rows, turned)
            salience.abs_()
            by_row += salience.sum(1)
            by_column.append(salience.sum(0))
        return {int(turned): by_row, 1 - int(turned): torch.cat(by_column)}


class TrueGradients:
    """Gradients of frozen weights that carry adapters, for the variant `grad`: summed over backward passes, float32.

    They are taken from each weight as soon as they are there, so that no optimizer and no clipping sees them.

    Attributes:
        found: name of a weight -> its gradient so far.
    """

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self._weights: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []

    def begin(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Collect for every weight with adapters on which the groups lie."""
        for name in dict.fromkeys(m.parameter for g in groups for m in g.members):
            layer = adapted_layer(model, name)
            if layer is None:
                continue

            def collect(weight: Tensor, name: str = name) -> None:
                assert weight.grad is not None
                grad = weight.grad.float()
                self.found[name] = self.found[name] + grad if name in self.found else grad
                weight.grad = None

            weight: Tensor = layer.get_base_layer().weight
            self._weights.append(weight.requires_grad_(True))
            self._hooks.append(weight.register_post_accumulate_grad_hook(collect))

    def taken(self, scale: float) -> dict[str, Tensor]:
        """What was found, divided by mixed precision's factor on the loss; it is forgotten here."""
        found = {name: gradient / scale for name, gradient in self.found.items()}
        self.found.clear()
        return found

    def end(self) -> None:
        """Freeze the weights again."""
        while self._hooks:
            self._hooks.pop().remove()
            self._weights.pop().requires_grad_(False)


def adapted_layer(model: nn.Module, parameter: str) -> LoraLayer | None:
    """The module that adapts a weight with LoRA, None if none does."""
    from peft.tuners.lora import LoraLayer as AnyLayer

    path, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(path)
    return module if leaf == "weight" and isinstance(module, AnyLayer) and module.lora_A else None


def check_adapted(model: nn.Module, groups: Sequence[Group]) -> None:
    """Make sure that every group has a weight with adapters, from which it can be scored.

    Raises:
        PlanError: one has none, or its adapters are of a kind whose product is not B A.
    """
    if not any(hasattr(module, "get_delta_weight") for module in model.modules()):
        raise PlanError("the model has no LoRA adapters: wrap it with peft's get_peft_model before it trains")
    for group in groups:
        layers = [layer for m in group.members if (layer := adapted_layer(model, m.parameter)) is not None]
        if not layers:
            raise PlanError(
                f"no LoRA adapter lies on a weight of {group.name}: adapt all linear modules, or prune other kinds"
            )
        for layer in layers:
            if len(layer.active_adapters) != 1:
                raise PlanError(f"{group.name} has {len(layer.active_adapters)} active adapters; expected one")
            if any(layer.use_dora.values()):
                raise PlanError(
                    f"the adapters of {group.name} are DoRA, whose norms run over masked columns too, so that masking "
                    "is not removing: use plain LoRA (use_dora=False)"
                )


def factors_of(layer: LoraLayer) -> tuple[Tensor, Tensor, float]:
    """A [r, in], B [out, r] and the scale of the active adapter."""
    (adapter,) = layer.active_adapters
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, float(layer.scaling[adapter])


def _columns(matrix: Tensor, columns: Tensor, rows: Tensor, turned: bool) -> Tensor:
    """Some columns and rows of a matrix [out, in], or of one that is stored the other way round; a float32 copy."""
    tile = matrix[columns].T if turned else matrix[:, columns]
    return tile[rows].float()  # a copy, by rows if not by type


def _positions(stay: Mapping[int, Any], dim: int, size: int, device: torch.device) -> Tensor:
    return torch.from_numpy(stay[dim]).to(device) if dim in stay else torch.arange(size, device=device)


def _gradient(factor: Tensor) -> Tensor:
    return torch.zeros_like(factor, dtype=torch.float32) if factor.grad is None else factor.grad.float()
