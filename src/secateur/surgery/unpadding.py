"""A padded model with layers of their own widths again: the way back from `padding`.

Units that are zero in every tensor add nothing, so a stock model without them computes the same. Training keeps them
zero, since the gradient of each of their tensors is a product with another one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.discovery import discover
from secateur.errors import PlanError
from secateur.groups import Group, Groups
from secateur.plan import PruningPlan
from secateur.surgery.expressible import expressible
from secateur.surgery.padding import same_logits
from secateur.surgery.slicing import slice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Kinds whose zero units are as good as absent; a router would still choose a zero expert.
KINDS = ("ffn_channel", "attention_head", "kv_group", "query_head", "value_dim", "expert_channel", "ssm_channel")


def unpad(model: PreTrainedModel) -> PreTrainedModel:
    """A model without the units of single layers that are all zeros, with the same logits.

    Raises:
        PlanError: there are none, or no class computes the same without them.
    """
    groups = discover(model)
    kept = _not_zero(groups, model.state_dict())
    refused = expressible(model, groups, list({groups.named(n).kind for n in kept}), uniform=False).refused
    kept = {name: units for name, units in kept.items() if groups.named(name).family not in refused}
    if not kept:
        raise PlanError("no unit of any layer is all zeros, so there is nothing to leave out")
    small = slice(model, PruningPlan(kept, {name: groups.named(name).units for name in kept}), groups)
    if not same_logits(model, small):
        raise PlanError(f"{type(small).__name__} without the units that are all zeros computes something else")
    return small


def _not_zero(groups: Groups, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Units to keep, for the groups in which others are all zeros; whole sublayers where they can go."""
    kept = {}
    for group in groups.of_kinds(("sublayer",)):
        staying = [u for u, block in enumerate(group.blocks) if u in group.stays or not _all_zero(block, state)]
        if 0 < len(staying) < group.units:
            kept[group.name] = tuple(staying)
    gone = groups.removed_prefixes(kept)
    alive: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for group in groups.of_kinds(KINDS):
        if group.layer is None or group.name.startswith(gone):
            continue
        units = _alive(group, state, alive)
        if len(units) < group.units:
            kept[group.name] = units
    return kept


def _all_zero(block: str, state: Mapping[str, Tensor]) -> bool:
    return not any(bool(tensor.any()) for name, tensor in state.items() if name.startswith(block + "."))


def _alive(
    group: Group, state: Mapping[str, Tensor], known: dict[tuple[str, int], NDArray[np.bool_]]
) -> tuple[int, ...]:
    """The units with an entry that is not zero, and the first ones where so many must stay.

    Args:
        known: (parameter, dim) -> which positions have one; filled as it is found out.
    """
    found = np.zeros(group.units, dtype=bool)
    for m in group.members:
        axis = (m.parameter, m.dim)
        if axis not in known:
            rows = state[m.parameter].movedim(m.dim, 0)
            known[axis] = (rows != 0).reshape(len(rows), -1).any(1).cpu().numpy()
        found |= known[axis][m.index].any(axis=1)
    found[list(group.stays)] = True
    missing = max(0, group.at_least - int(found.sum()))
    found[np.flatnonzero(~found)[:missing]] = True
    return tuple(int(u) for u in np.flatnonzero(found))
