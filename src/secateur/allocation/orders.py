"""Which of several orders to cut a group's units in: the one that was measured to cost less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.allocation.search import Measure
from secateur.groups import Group

PARTS = (1 / 2, 1, 3 / 2)  # of the share that is to go: a group may lose less or more of its units


def cheapest_orders(
    groups: Sequence[Group], scores: Mapping[str, Mapping[str, Tensor]], share: float, measure: Measure
) -> dict[str, str]:
    """Group -> the criterion by whose order cuts of that group alone cost least, summed over `PARTS` of a share.

    Args:
        scores: criterion -> group -> importance [units]; of equal costs the first criterion counts.
        share: of the units that may go, about as many as the budget wants.
        measure: the loss without some units [nats per token].
    """
    shares = [min(1.0, part * share) for part in PARTS]
    asked = [(g, name, _lowest(g, scores[name][g.name], part)) for g in groups for name in scores for part in shares]
    losses = measure([{g.name: units} if units else {} for g, _, units in asked])
    costs: dict[str, dict[str, float]] = {g.name: dict.fromkeys(scores, 0.0) for g in groups}
    for (group, name, _), loss in zip(asked, losses, strict=True):
        costs[group.name][name] += loss
    return {group: min(found, key=lambda name: found[name]) for group, found in costs.items()}


def _lowest(group: Group, importance: Tensor, share: float) -> tuple[int, ...]:
    """The units of least importance, as many as a share of those that may go."""
    may_go = [unit for unit in torch.argsort(importance, stable=True).tolist() if unit not in group.stays]
    most = group.units - max(group.at_least, len(group.stays))
    return tuple(sorted(may_go[: round(share * most)]))
