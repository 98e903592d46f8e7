"""Linear modules that read the units of a group: the inputs of their matrices lie on the group's axis."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.errors import PlanError
from secateur.groups import Group, Member


def readers(model: nn.Module, group: Group) -> Sequence[Member]:
    """The members of a group that are inputs of linear modules and read its units.

    Raises:
        PlanError: it has none, or something else reads its units.
    """
    found = [m for m in group.members if m.role == "consumer"]
    for member in found:
        path, _, leaf = member.parameter.rpartition(".")
        if leaf != "weight" or member.dim != input_dim(base_of(model.get_submodule(path))):
            raise PlanError(f"{group.name} is read through {member.parameter}, not the weight of a linear module")
    if not found:
        raise PlanError(f"no linear module reads {group.name}")
    return found


def base_of(module: nn.Module) -> nn.Module:
    """The module that an adapter wraps, or the module itself."""
    get = getattr(module, "get_base_layer", None)
    return get() if callable(get) else module


def input_dim(module: nn.Module) -> int | None:
    """The dimension of a linear module's weight that its inputs lie on, None for any other module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return 0
    return 1 if isinstance(module, nn.Linear) else None


def input_size(module: nn.Module) -> int:
    """How many values a linear module takes, its weight packed or not, adapted or not."""
    base = base_of(module)
    return base.in_features if isinstance(base, nn.Linear) else int(base.weight.shape[0])  # type: ignore[index]
