"""Final removal while a model trains: masked units leave the weights, the LoRA factors and the optimizer's moments.

Parameters stay the objects they are and get smaller data, so that an optimizer and a Trainer that hold them go on with
them. Sizes that modules keep as attributes follow; which ones is found on a narrow twin of the model (`attributes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.discovery.reference import Reference
from secateur.errors import PlanError
from secateur.groups import Groups, IndexArray, Kept
from secateur.packed import packed_weights
from secateur.surgery.attributes import Slot, cut_modules, size_attributes
from secateur.surgery.input_masks import base_of, input_dim
from secateur.surgery.trial import LogitCheck

if TYPE_CHECKING:
    from torch.optim import Optimizer

ADAPTED = ".base_layer"  # what peft appends to the path of a module that it wraps


def attributes_to_follow(reference: Reference, kept: Kept) -> frozenset[Slot]:
    """Attributes of modules that must follow a cut of these groups in place, found on a twin.

    Args:
        kept: units of the twin to keep, of every family that will be cut.

    Raises:
        PlanError: the modules cannot be cut in place, as they read their sizes elsewhere.
    """
    check = LogitCheck(reference.model, kept, reference)
    found = cut_modules(reference.model, reference.groups, kept, check.same)
    if found is None:
        raise PlanError(
            f"the modules of {type(reference.model).__name__} cannot be cut while it trains, since they read sizes "
            "from its configuration: train with masks alone (no compact_every)"
        )
    return found[1]


def check_unpacked(model: nn.Module) -> None:
    """Make sure that all weights can be cut in place.

    Raises:
        PlanError: one is stored in packed form.
    """
    for packed in packed_weights(model).values():
        raise PlanError(f"{packed.text}, and so cannot be cut in place: train with masks alone (no compact_every)")


def compact(
    model: nn.Module, groups: Groups, kept: Kept, slots: frozenset[Slot], optimizer: Optimizer | None = None
) -> None:
    """Remove all units but `kept` from the model itself, its adapters, and the optimizer's state.

    Args:
        model: the base of a model with or without adapters in its modules; changed in place.
        groups: of the base as it is built now.
        slots: what `attributes_to_follow` gives.

    Raises:
        PlanError: a weight is stored in packed form, or the optimizer keeps state of other shapes than its parameters.
    """
    check_unpacked(model)
    changes = list(size_attributes(model, groups, kept, lambda path: path.removesuffix(ADAPTED)))
    cuts = [cut for name, dims in groups.kept_positions(kept).items() for cut in _cuts(model, name, dims)]
    for cut in cuts:
        cut.check(optimizer)
    for cut in cuts:
        cut.apply(optimizer)
    for slot, module, _, new in changes:
        if slot in slots:
            setattr(module, slot[1], new)


@dataclass(frozen=True)
class _Cut:
    """Positions to keep on the dimensions of one tensor of a module."""

    module: nn.Module
    leaf: str
    dims: Mapping[int, IndexArray]

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.module, self.leaf)
        return tensor

    def check(self, optimizer: Optimizer | None) -> None:
        """Make sure that the tensor, and what the optimizer keeps for it, can be cut."""
        tensor = self.tensor
        for key, value in _state(optimizer, tensor).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != tensor.shape:
                raise PlanError(
                    f"the optimizer keeps {key} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(tensor.shape)}, which cannot be cut along: take another optimizer, or masks alone"
                )

    def apply(self, optimizer: Optimizer | None) -> None:
        tensor = self.tensor
        state = _state(optimizer, tensor)
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.dim():
                state[key] = self._kept(value)
        with torch.no_grad():
            if isinstance(tensor, nn.Parameter):
                grad, tensor.grad = tensor.grad, None
                tensor.data = self._kept(tensor.data)
                tensor.grad = None if grad is None else self._kept(grad)
            else:
                setattr(self.module, self.leaf, self._kept(tensor))
        if self.leaf == "weight" and isinstance(self.module, nn.Linear):
            self.module.out_features, self.module.in_features = self.tensor.shape

    def _kept(self, tensor: Tensor) -> Tensor:
        for dim, keep in self.dims.items():
            tensor = tensor.index_select(dim, torch.from_numpy(keep).to(tensor.device))
        return tensor


def _state(optimizer: Optimizer | None, tensor: Tensor) -> dict[str, Any]:
    """What the optimizer keeps for a parameter; nothing for buffers and frozen parameters."""
    state: dict[str, Any] = optimizer.state[tensor] if optimizer is not None and tensor in optimizer.state else {}
    return state


def _cuts(model: nn.Module, name: str, dims: Mapping[int, IndexArray]) -> Sequence[_Cut]:
    """The cuts of one tensor of the base, and of the LoRA factors around it: rows with B, columns with A."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    base = base_of(module)
    cuts = [_Cut(base, leaf, dims)]
    if base is module or leaf != "weight":
        return cuts
    columns = input_dim(base)
    for dim, keep in dims.items():
        factors: Any = module.lora_A if dim == columns else module.lora_B
        for factor in factors.values():
            cuts.append(_Cut(factor, "weight", {1 if dim == columns else 0: keep}))
            if dim != columns and factor.bias is not None:
                cuts.append(_Cut(factor, "bias", {0: keep}))
    return cuts
