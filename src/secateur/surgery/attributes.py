"""Cut a model in place of its modules, for widths that no configuration expresses.

Modules keep sizes as plain attributes (`num_heads`, `split_size`, `normalized_shape`). Which of them must follow a cut
is found by trial: attributes equal to a size that changed are candidates, and the first combination whose logits are
right is kept. The result runs and can be compared, but a stock class cannot load it.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from secateur.groups import Group, Groups, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TRIALS = 64
Slot = tuple[str, str]  # (module path with layer numbers replaced by *, attribute)


def cut_modules(
    model: PreTrainedModel, groups: Groups, kept: Kept, accept: Callable[[PreTrainedModel], bool]
) -> tuple[PreTrainedModel, frozenset[Slot]] | None:
    """A copy of `model` with every module cut, and the attributes that had to follow.

    Args:
        accept: whether the logits of a candidate are right.

    Returns:
        None if no combination of attributes is accepted.
    """
    small = _copy_with(model, groups, kept)
    changes = list(size_attributes(small, groups, kept))
    slots = list(dict.fromkeys(slot for slot, *_ in changes))
    subsets = (s for n in range(len(slots), -1, -1) for s in itertools.combinations(slots, n))
    for chosen in itertools.islice(subsets, MAX_TRIALS):
        for slot, module, old, new in changes:
            setattr(module, slot[1], new if slot in chosen else old)
        if accept(small):
            return small, frozenset(chosen)
    return None


def _copy_with(model: PreTrainedModel, groups: Groups, kept: Kept) -> PreTrainedModel:
    """A deep copy with cut tensors in place of the originals (which are never duplicated), without removed blocks."""
    from secateur.modeling_per_layer import NoAttention, NoMLP

    state = dict(model.named_parameters()) | dict(model.named_buffers())
    memo: dict[int, Any] = {}
    for name, dims in groups.kept_positions(kept).items():
        old = state[name]
        new = old.detach()
        for dim, keep in dims.items():
            new = new.index_select(dim, torch.from_numpy(keep).to(new.device))
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    with torch.no_grad():
        small = copy.deepcopy(model, memo)
    for name in kept:
        group = groups.named(name)
        for block in groups.removed_blocks({name: kept[name]}, ("sublayer",)):
            small.set_submodule(block, NoAttention() if group.results else NoMLP())
    for block in reversed(groups.removed_blocks(kept, ("layer",))):
        blocks, _, number = block.rpartition(".")
        del small.get_submodule(blocks)[int(number)]  # type: ignore[operator]
    return small


def size_attributes(
    model: nn.Module, groups: Groups, kept: Kept, path_of: Callable[[str], str] = str
) -> Iterator[tuple[Slot, nn.Module, Any, Any]]:
    """(slot, module, old value, new value) of every integer attribute equal to a size that the cut changes.

    Args:
        path_of: the path by which `groups` knows the module at a path of `model`.
    """
    sizes_at = _ChangedSizes(groups, kept)
    for path, module in model.named_modules():
        path = path_of(path)
        sizes = sizes_at(path)
        for name, value in vars(module).items():
            new: Any = None
            if type(value) is int:
                new = sizes.get(value)
            elif isinstance(value, tuple) and len(value) == 1:
                new = (sizes[value[0]],) if value[0] in sizes else None
            if new is not None:
                yield (re.sub(r"\.\d+(?=\.|$)", ".*", path), name), module, value, new


class _ChangedSizes:
    """Old and new sizes that groups with a member inside a module bring about."""

    def __init__(self, groups: Groups, kept: Kept) -> None:
        self.groups, self.kept = groups, kept
        self.positions = groups.kept_positions(kept)
        self.owners = {m.parameter.rpartition(".")[0] for group in groups for m in group.members}

    def __call__(self, path: str) -> dict[int, int]:
        """Old size -> new size."""
        prefix = path + "." if path else ""
        sizes: dict[int, int] = {}
        for parameter, dims in self.positions.items():
            if parameter.startswith(prefix):
                sizes |= {self.groups.shapes[parameter][dim]: len(keep) for dim, keep in dims.items()}
        if path and path not in self.owners:
            for name in self.kept:
                sizes |= dict(self._of_group(self.groups.named(name), prefix))
        return sizes

    def _of_group(self, group: Group, prefix: str) -> Iterator[tuple[int, int]]:
        """Numbers of units, alone and multiplied by those of groups on the same axes."""
        for member in group.members:
            if not member.parameter.startswith(prefix):
                continue
            on_axis = self.groups.on_axis.get((member.parameter, member.dim), ())
            others = [(g.units, len(self.kept.get(g.name, range(g.units)))) for g in on_axis if g is not group]
            for n in range(len(others) + 1):
                for subset in itertools.combinations(others, n):
                    old = group.units * int(np.prod([o for o, _ in subset]))
                    yield old, len(self.kept[group.name]) * int(np.prod([k for _, k in subset]))
