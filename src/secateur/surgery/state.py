"""The tensors of a cut model: index what stays, renumber the layers that follow a removed one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.groups import Groups, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def renumbering(groups: Groups, kept: Kept) -> dict[str, str]:
    """Module path of every layer that stays -> its path in the cut model."""
    moved: dict[str, str] = {}
    for name, units in kept.items():
        group = groups.named(name)
        for new, old in enumerate(sorted(units) if group.kind == "layer" else ()):
            moved[group.blocks[old]] = f"{group.blocks[old].rpartition('.')[0]}.{new}"
    return moved


def new_name(name: str, moved: dict[str, str]) -> str:
    """The name of a parameter after the layers were renumbered."""
    for old, new in moved.items():
        if name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def cut_tensors(model: PreTrainedModel, groups: Groups, kept: Kept) -> Iterator[tuple[str, Tensor]]:
    """(new name, tensor) of every parameter and buffer that stays; uncut tensors are the model's own, not copies."""
    positions = groups.kept_positions(kept)
    moved = renumbering(groups, kept)
    gone = groups.removed_prefixes(kept)
    state = model.state_dict()
    for name in groups.shapes:
        if name.startswith(gone):
            continue
        tensor = state[name]
        for dim, keep in positions.get(name, {}).items():
            tensor = tensor.index_select(dim, torch.from_numpy(keep).to(tensor.device))
        yield new_name(name, moved), tensor


def tied_names(groups: Groups, kept: Kept) -> dict[str, str]:
    """Further names of each parameter of the cut model -> the name it is listed under."""
    moved = renumbering(groups, kept)
    gone = groups.removed_prefixes(kept)
    return {
        new_name(name, moved): new_name(of, moved)
        for name, of in groups.tied.items()
        if not (name.startswith(gone) or of.startswith(gone))
    }
