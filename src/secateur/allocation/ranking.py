"""In which order units go, and how far to go: rank every step, cut at the budget, settle the remainder."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.allocation.costs import Counted
from secateur.allocation.families import Family
from secateur.groups import IndexArray

RankingName = Literal["local", "global", "search"]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Every step of every family (from one count it may keep to the next), in the order in which they are taken.

    The steps of one family come in their own order, so any stretch from the beginning is a valid cut.

    Attributes:
        order: [steps]; the family of each step.
        places: for each family, where its steps stand in `order`.
        counts: the counts of all families, end to end.
        starts: [families]; where each family's counts begin in `counts`.
        measure: what the budget counts.
    """

    order: IndexArray
    places: tuple[IndexArray, ...]
    counts: IndexArray
    starts: IndexArray
    measure: Counted

    def kept(self, taken: IndexArray) -> IndexArray:
        """Units kept in each family after `taken` of its steps."""
        kept: IndexArray = self.counts[self.starts + taken]
        return kept

    def left(self, taken: IndexArray) -> float:
        return self.measure.at(self.kept(taken))

    def first(self, steps: int) -> IndexArray:
        """Steps taken of each family when the first `steps` of the order are."""
        return np.bincount(self.order[:steps], minlength=len(self.places)).astype(np.int64)

    def until(self, target: float) -> int:
        """How many steps may be taken in order before one would pass `target`."""
        below, above = 0, len(self.order)
        while below < above:
            middle = (below + above + 1) // 2
            if self.left(self.first(middle)) >= target:
                below = middle
            else:
                above = middle - 1
        return below

    def settle(self, target: float) -> IndexArray:
        """Units kept in each family so that the measure comes closest to `target`.

        The order is followed up to the step that would pass the target. That step is then once left out, and the gap
        filled with the steps after it that still fit (an FFN channel where a whole head would be too much); and once
        taken, and the surplus given back from the end. Of the two the closer one stays. No single step more or less,
        of any family, would come closer.

        Args:
            target: what should be left of the measure; must be within reach.
        """
        below = self.until(target)
        found = [self._polished(self._walked(self.first(below), target, 1), target)]
        if below < len(self.order):
            found.append(self._polished(self._walked(self.first(below + 1), target, -1), target))
        return self.kept(min(found, key=lambda taken: abs(self.left(taken) - target)))

    def settle_from(self, kept: IndexArray, target: float) -> IndexArray:
        """Units kept in each family so that the measure comes closest to `target`, from counts that are near it.

        Where a coarse step leaves a gap that no single step closes, each family is made to give one back, and finer
        ones fill up.

        Args:
            kept: counts to begin with; single steps are taken or given back from there, in order.
            target: what should be left of the measure.
        """
        ends = np.append(self.starts[1:], len(self.counts))
        taken = np.array(
            [int(np.flatnonzero(self.counts[a:b] == k)[0]) for a, b, k in zip(self.starts, ends, kept, strict=True)],
            dtype=np.int64,
        )
        direction = 1 if self.left(taken) >= target else -1
        found = [self._polished(self._walked(taken, target, direction), target)]
        closed = abs(self.left(found[0]) - target) <= min(self._sizes(found[0])) / 2
        for f in [] if closed else np.flatnonzero(found[0]).tolist():
            trial = found[0].copy()
            trial[f] -= 1
            back = self.left(trial)
            if back > target:
                found.append(self._polished(self._walked(trial, target, 1), target))
        return self.kept(min(found, key=lambda steps: abs(self.left(steps) - target)))

    def _sizes(self, taken: IndexArray) -> list[float]:
        """What the next step of each family that has one would take, and what the last one took."""
        here, found = self.left(taken), []
        for f, places in enumerate(self.places):
            for number in (taken[f] + 1, taken[f] - 1):
                if 0 <= number <= len(places):
                    trial = taken.copy()
                    trial[f] = number
                    found.append(abs(self.left(trial) - here))
        return [size for size in found if size > 0] or [0.0]

    def _walked(self, taken: IndexArray, target: float, direction: int) -> IndexArray:
        """Take further steps in order (direction 1), or give steps back from the end (-1), without passing `target`.

        A step that does not fit, or changes nothing (its block goes already), ends its family's part, so that no unit
        goes before a less important one.
        """
        left = self.left(taken)
        queue = [entry for f in range(len(self.places)) if (entry := self._next(taken, f, direction))]
        heapq.heapify(queue)
        while queue:
            f = heapq.heappop(queue)[1]
            trial = taken.copy()
            trial[f] += direction
            then = self.left(trial)
            if then != left and (then - target) * direction >= 0:
                taken, left = trial, then
                if entry := self._next(taken, f, direction):
                    heapq.heappush(queue, entry)
        return taken

    def _next(self, taken: IndexArray, f: int, direction: int) -> tuple[int, int] | None:
        """(priority, family) of the family's next step in that direction."""
        step = taken[f] if direction > 0 else taken[f] - 1
        return (direction * int(self.places[f][step]), f) if 0 <= step < len(self.places[f]) else None

    def _polished(self, taken: IndexArray, target: float) -> IndexArray:
        """Take or give back single steps for as long as that comes closer to `target`."""
        error = abs(self.left(taken) - target)
        while True:
            trials: list[tuple[float, int, IndexArray]] = []
            for f, places in enumerate(self.places):
                for number in (taken[f] + 1, taken[f] - 1):
                    if 0 <= number <= len(places):
                        trial = taken.copy()
                        trial[f] = number
                        trials.append((abs(self.left(trial) - target), len(trials), trial))
            best = min(trials, default=(error, 0, taken))
            if best[0] >= error:
                return taken
            error, _, taken = best


def rank(families: Sequence[Family], size: Counted, measure: Counted, ranking: Literal["local", "global"]) -> Ranking:
    """Put the steps of all families in order.

    local: by the share of its units that the family has lost halfway through the step, so that at each point of the
    order every family has lost the same share, rounded to the nearest count; steps at equal shares by importance per
    parameter.

    global: by importance per parameter, importance summed over the units that go and divided by the parameters that
    go with them in the uncut model. Units differ in size: a head of LLaMA-7B holds 170 times the parameters of an FFN
    channel, and its score sums as many more terms. LLM-Pruner compares the raw scores, so that its global pruning never
    touches a head. What counts under a parameter budget is the loss per parameter saved.

    Args:
        size: what importance is told per: parameters left, or what the budget counts.
        measure: what the budget counts.
    """
    start = np.array([f.counts[0] for f in families], dtype=np.int64)
    keys: list[NDArray[np.float64]] = []
    ties: list[NDArray[np.float64]] = []
    for f, family in enumerate(families):
        cost = size.drops(start, f, family.counts)
        density = np.full(len(cost), np.inf)
        np.divide(family.step_importance(), cost, out=density, where=cost > 0)
        # a step waits for those before it, even where a block of another size makes it the cheaper one
        density = np.maximum.accumulate(density)
        halfway = 1 - (family.counts[:-1] + family.counts[1:]) / (2 * family.units)
        keys.append(halfway if ranking == "local" else density)
        ties.append(density)
    lengths = np.array([len(k) for k in keys], dtype=np.int64)
    owner = np.repeat(np.arange(len(families)), lengths)
    order = np.lexsort(
        (np.concatenate(ties), np.concatenate(keys))
    )  # stable: what is still equal stays in the order of the model
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]]).astype(np.int64)
    places = tuple(np.split(place, np.cumsum(lengths)[:-1]))
    return Ranking(owner[order], places, np.concatenate([f.counts for f in families]), starts, measure)
