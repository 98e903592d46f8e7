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

from secateur.groups import Groups, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TRIALS = 64
Slot = tuple[str, str]  # (module path with layer numbers replaced by *, attribute)


def cut_modules(
    model: PreTrainedModel, groups: Groups, kept: Kept, accept: Callable[[PreTrainedModel], bool]
) -> tuple[PreTrainedModel, tuple[str, ...]] | None:
    """A copy of `model` with every module cut, and the names of the attributes that had to follow.

    Args:
        accept: whether the logits of a candidate are right.

    Returns:
        None if no combination of attributes is accepted.
    """
    small = _copy_with(model, groups, kept)
    changes = _candidates(small, groups, kept)
    slots = list(dict.fromkeys(slot for slot, *_ in changes))
    subsets = (s for n in range(len(slots), -1, -1) for s in itertools.combinations(slots, n))
    for chosen in itertools.islice(subsets, MAX_TRIALS):
        for slot, module, old, new in changes:
            setattr(module, slot[1], new if slot in chosen else old)
        if accept(small):
            return small, tuple(sorted({name for _, name in chosen}))
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


def _candidates(model: PreTrainedModel, groups: Groups, kept: Kept) -> list[tuple[Slot, nn.Module, Any, Any]]:
    """(slot, module, old value, new value) of every integer attribute equal to a size that the cut changed."""
    found: list[tuple[Slot, nn.Module, Any, Any]] = []
    for path, module in model.named_modules():
        sizes = dict(_changed_sizes(path, groups, kept))
        for name, value in vars(module).items():
            new: Any = None
            if type(value) is int:
                new = sizes.get(value)
            elif isinstance(value, tuple) and len(value) == 1:
                new = (sizes[value[0]],) if value[0] in sizes else None
            if new is not None:
                slot = (re.sub(r"\.\d+(?=\.|$)", ".*", path), name)
                found.append((slot, module, value, new))
    return found


def _changed_sizes(path: str, groups: Groups, kept: Kept) -> Iterator[tuple[int, int]]:
    """Old and new sizes that groups with a member inside a module bring about."""
    prefix = path + "." if path else ""
    positions = groups.kept_positions(kept)
    for parameter, dims in positions.items():
        if parameter.startswith(prefix):
            for dim, keep in dims.items():
                yield groups.shapes[parameter][dim], len(keep)
    if any(not path or p == path for group in groups for m in group.members for p in [m.parameter.rpartition(".")[0]]):
        return
    for name in kept:
        group = groups.named(name)
        inside = [m for m in group.members if m.parameter.startswith(prefix)]
        for member in inside:
            others = [
                (g.units, len(kept.get(g.name, range(g.units))))
                for g in groups
                if g is not group and any((m.parameter, m.dim) == (member.parameter, member.dim) for m in g.members)
            ]
            for n in range(len(others) + 1):
                for subset in itertools.combinations(others, n):
                    old = group.units * int(np.prod([o for o, _ in subset]))
                    new = len(kept[name]) * int(np.prod([k for _, k in subset]))
                    yield old, new
