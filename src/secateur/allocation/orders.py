"""Which of several orders to cut units in: what was measured to cost least, group by group and then as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.allocation.search import Measure
from secateur.groups import Group

PARTS = (1 / 2, 1, 3 / 2)  # of the share that is to go: a group may lose less or more of its units
By = dict[str, str]  # group -> criterion


def cheapest_orders(
    groups: Sequence[Group], scores: Mapping[str, Mapping[str, Tensor]], share: float, measure: Measure
) -> By:
    """The criterion by whose order each group is to be cut.

    1. Of each group, the one by whose order cuts of it alone cost least, summed over `PARTS` of a share.
    2. What is best alone need not be best where all is cut, so that cuts of all groups are measured as well, by these
       orders and by each criterion for all groups: the cheapest counts.

    Args:
        scores: criterion -> group -> importance [units]; of equal costs the first criterion counts.
        share: of the units that may go, about as many as the budget wants.
        measure: the loss without some units [nats per token].
    """
    alone = _cheapest_alone(groups, scores, share, measure)
    choices = [alone, *(dict.fromkeys(alone, name) for name in scores)]
    shares = [part * share for part in PARTS]
    cuts = [_lowest(groups, scores, by, part) for by in choices for part in shares]
    losses = measure(cuts)
    costs = [sum(losses[i : i + len(shares)]) for i in range(0, len(losses), len(shares))]
    return choices[costs.index(min(costs))]


def _cheapest_alone(
    groups: Sequence[Group], scores: Mapping[str, Mapping[str, Tensor]], share: float, measure: Measure
) -> By:
    """Step 1."""
    asked = [(group, name, part * share) for group in groups for name in scores for part in PARTS]
    losses = measure([_lowest([group], scores, {group.name: name}, part) for group, name, part in asked])
    costs: dict[str, dict[str, float]] = {group.name: dict.fromkeys(scores, 0.0) for group in groups}
    for (group, name, _), loss in zip(asked, losses, strict=True):
        costs[group.name][name] += loss
    return {group: min(found, key=lambda name: found[name]) for group, found in costs.items()}


def _lowest(
    groups: Sequence[Group], scores: Mapping[str, Mapping[str, Tensor]], by: By, share: float
) -> dict[str, tuple[int, ...]]:
    """The units of least importance of each group, as many as a share of those that may go."""
    found = {}
    for group in groups:
        order = torch.argsort(scores[by[group.name]][group.name], stable=True).tolist()
        may_go = [unit for unit in order if unit not in group.stays]
        most = group.units - max(group.at_least, len(group.stays))
        if gone := may_go[: round(min(1.0, share) * most)]:
            found[group.name] = tuple(sorted(gone))
    return found
