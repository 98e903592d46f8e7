"""Budgets of what is measured on the model itself: multiply-accumulates, bytes, seconds.

Each kind is cut by some shares in all layers at once, and the cost of the smaller model is measured; what one group
saves is its part of that, as layers of the same kind are alike. Between the shares the saving is taken to be straight,
and savings of different kinds to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from secateur.allocation.families import Family
from secateur.groups import Group, IndexArray

Removed = Mapping[str, tuple[int, ...]]  # group -> units that go
Cost = Callable[[Sequence[Removed]], Sequence[float]]  # of models without them, the first one whole

SHARES = (0.25, 0.5, 0.75, 1.0)  # of what every group of a kind may lose
Floats = NDArray[np.float64]


class Counted(Protocol):
    """What a budget counts, as it depends on the counts that families keep."""

    def at(self, counts: IndexArray) -> float:
        """The value when every group of family f keeps `counts[f]` steps."""

    def drops(self, counts: IndexArray, family: int, choices: IndexArray) -> NDArray[np.number]:
        """By how much each step from one of `choices` to the next lowers the value, others staying at `counts`."""


@dataclass(frozen=True, eq=False)
class Table:
    """A cost that families save parts of, independently of each other.

    Attributes:
        whole: of the model as it is.
        saved: for each family, what going down to a count saves, [units + 1], by count; never less for a lower one,
            as a smaller model that measured slower says no more than noise.
    """

    whole: float
    saved: tuple[Floats, ...]

    def at(self, counts: IndexArray) -> float:
        return self.whole - sum(float(saved[count]) for saved, count in zip(self.saved, counts, strict=True))

    def drops(self, counts: IndexArray, family: int, choices: IndexArray) -> Floats:
        """See `Counted`."""
        lower: Floats = np.diff(self.saved[family][choices])
        return lower


def table(families: Sequence[Family], cost: Cost) -> Table:
    """Measure what the families save.

    Args:
        cost: asked once, for the whole model and for every kind cut by every share.
    """
    kinds: dict[str, list[Group]] = {}
    for family in families:
        for group in family.groups:
            kinds.setdefault(group.family, []).append(group)
    asked = [(name, share) for name in kinds for share in SHARES]
    whole, *smaller = cost([{}, *({g.name: _last(g, share) for g in kinds[name]} for name, share in asked)])
    curves = {
        name: np.array([0.0, *(whole - c for (kind, _), c in zip(asked, smaller, strict=True) if kind == name)])
        for name in kinds
    }
    saved = []
    for family in families:
        total = np.zeros(family.units + 1)
        for group, scale in zip(family.groups, family.scales, strict=True):
            gone = group.units - np.arange(family.units + 1) * scale
            part = np.interp(gone, [0, *(len(_last(group, s)) for s in SHARES)], curves[group.family])
            total += part / len(kinds[group.family])
        saved.append(np.maximum.accumulate(total[::-1])[::-1])
    return Table(whole, tuple(saved))


def _last(group: Group, share: float) -> tuple[int, ...]:
    """As many of a group's units as are a share of those that may go."""
    free = [unit for unit in range(group.units) if unit not in group.stays]
    most = min(len(free), group.units - max(group.at_least, 1))
    number = round(most * share)
    return tuple(free[len(free) - number :])
