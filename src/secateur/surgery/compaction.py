"""Final removal while a model trains: masked units leave the weights, the LoRA factors and the optimizer's moments.

Sizes that modules keep as attributes follow; which ones is found on a narrow twin of the model (`attributes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from secateur.discovery.reference import Reference
from secateur.errors import PlanError
from secateur.groups import Groups, IndexArray, Kept
from secateur.packed import packed_weights
from secateur.readers import base_of, input_dim
from secateur.surgery.attributes import Slot, cut_modules, size_attributes
from secateur.surgery.cuts import Cut
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
    check_state(model, groups, kept, optimizer)
    changes = list(size_attributes(model, groups, kept, lambda path: path.removesuffix(ADAPTED)))
    for cut in _all_cuts(model, groups, kept):
        cut.apply(optimizer)
    for slot, module, _, new in changes:
        if slot in slots:
            setattr(module, slot[1], new)


def check_state(model: nn.Module, groups: Groups, kept: Kept, optimizer: Optimizer | None) -> None:
    """Make sure that what the optimizer keeps can be cut with all units but `kept`; arguments as for `compact`.

    Raises:
        PlanError: it keeps state of other shapes than its parameters.
    """
    for cut in _all_cuts(model, groups, kept):
        cut.check(optimizer, "take another optimizer, or masks alone (no compact_every)")


def _all_cuts(model: nn.Module, groups: Groups, kept: Kept) -> list[Cut]:
    return [cut for name, dims in groups.kept_positions(kept).items() for cut in _cuts(model, name, dims)]


def _cuts(model: nn.Module, name: str, dims: Mapping[int, IndexArray]) -> Sequence[Cut]:
    """The cuts of one tensor of the base, and of the LoRA factors around it: rows with B, columns with A."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    base = base_of(module)
    cuts = [Cut(base, leaf, dims)]
    if base is module or leaf != "weight":
        return cuts
    columns = input_dim(base)
    for dim, keep in dims.items():
        factors: Any = module.lora_A if dim == columns else module.lora_B
        for factor in factors.values():
            cuts.append(Cut(factor, "weight", {1 if dim == columns else 0: keep}))
            if dim != columns and factor.bias is not None:
                cuts.append(Cut(factor, "bias", {0: keep}))
    return cuts
