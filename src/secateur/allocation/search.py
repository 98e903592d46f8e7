"""The widths that cost least within a budget, by what the widths of each family were measured to cost.

| symbol | here |
| --- | --- |
| f, a family; n, a count that it may keep | `Family`, `Family.counts` |
| D_f(n), loss with family f cut to n and all else whole [nats per token] | `Measure`, at some counts: `candidates` |
| s_f(n), what the budget counts that goes with it | `Size.drops` |
| c_f, how much heavier the losses of f weigh than when it is cut alone | `together` |
| minimise sum_f c_f D_f(n_f) subject to sum_f s_f(n_f) >= S | `cheapest` |

1. Every family is cut alone to each candidate, which gives D.
2. The problem is a multiple-choice knapsack, solved by dynamic programming over what is saved, at first with all c = 1.
3. That losses of families cut alone add up is an assumption. SPDY (Frantar and Alistarh 2022, arXiv:2201.13096) looks
   for the c whose solution is best as a whole, and so do we: `GENERATIONS` times the best c so far is changed at random
   in `TRIALS` ways, and the loss of every solution is measured.
4. Between candidates D is taken to be straight, and single steps settle what is left of the budget (`Ranking`).

What the budget counts must add up over families: where two kinds share a matrix, it does not, and they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from secateur.allocation.costs import Counted, Removed, Table
from secateur.allocation.families import Family
from secateur.allocation.ranking import rank
from secateur.errors import BudgetError
from secateur.groups import Group, IndexArray

Measure = Callable[[Sequence[Removed]], Sequence[float]]  # losses without them [nats per token], each measured alone
Floats = NDArray[np.float64]

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 15 / 16)  # of what a family may lose
RESOLUTION = 10_000  # parts of what must be saved that dynamic programming tells apart
GENERATIONS, TRIALS = 10, 10
SPREAD = 0.5  # standard deviation of a change of log c
FEW = 0.1  # share of the families that every second trial changes; the others change all


@dataclass(frozen=True, eq=False)
class Curve:
    """What a family costs at some of the counts that it may keep, and what it saves.

    Attributes:
        counts: steps kept, descending from where allocation starts.
        losses: D at each, 0 at the first [nats per token].
        saved: what the budget counts that goes, 0 at the first.
    """

    counts: IndexArray
    losses: Floats
    saved: Floats

    def each_step(self, family: Family) -> Floats:
        """What each step of a family's order costs, from its first on; D is straight between candidates."""
        taken = family.counts[0] - self.counts
        between = np.interp(np.arange(taken[-1] + 1), taken, self.losses)
        importance = np.zeros(family.units)
        before = family.units - family.counts[0]
        importance[before : before + taken[-1]] = np.diff(between)
        return importance


def within(measure: Measure, groups: Sequence[Group]) -> Measure:
    """What the part of a cut costs that lies in these groups."""
    names = {g.name for g in groups}
    return lambda cuts: measure([{name: units for name, units in cut.items() if name in names} for cut in cuts])


def search(families: Sequence[Family], counted: Counted, target: float, measure: Measure) -> IndexArray:
    """Steps that each family keeps so that what is counted comes closest to `target` at the least loss.

    Args:
        counted: what the budget counts.
        target: what should be left of it; must be within reach.
        measure: told what goes, asked once for all candidates.

    Raises:
        BudgetError: what the families save does not add up.
    """
    chosen = curves(families, counted, measure)
    start = np.array([f.counts[0] for f in families], dtype=np.int64)
    kept = together(families, chosen, counted.at(start) - target, measure)
    straight = [replace(f, importance=c.each_step(f)) for f, c in zip(families, chosen, strict=True)]
    return rank(straight, counted, counted, "global").settle_from(kept, target)


def together(families: Sequence[Family], chosen: Sequence[Curve], wanted: float, measure: Measure) -> IndexArray:
    """Step 3: the count of each curve that saves `wanted` at the least loss of the whole."""

    def solution(weights: Floats) -> tuple[int, ...]:
        heavier = [replace(c, losses=c.losses * np.exp(w)) for c, w in zip(chosen, weights, strict=True)]
        return tuple(cheapest(heavier, wanted).tolist())

    def losses(solutions: Sequence[tuple[int, ...]]) -> Sequence[float]:
        parts = [[_removed(f, n) for f, n in zip(families, counts, strict=True)] for counts in solutions]
        return measure([{name: units for part in cut for name, units in part.items()} for cut in parts])

    generator, many = np.random.default_rng(0), len(families)
    best = np.zeros(many)
    kept = solution(best)
    (least,) = losses([kept])
    for _ in range(GENERATIONS):
        changes = generator.normal(0, SPREAD, (TRIALS, many))
        changes[::2] *= generator.random(changes[::2].shape) < max(FEW, 2 / many)
        found = [solution(best + change) for change in changes]
        measured = losses(found)
        first = int(np.argmin(measured))
        if measured[first] < least:
            best, kept, least = best + changes[first], found[first], measured[first]
    return np.array(kept, dtype=np.int64)


def tradeoff(families: Sequence[Family], counted: Counted, measure: Measure) -> list[tuple[float, float]]:
    """What the cheapest widths are expected to cost at other budgets, from the same measurements.

    Returns:
        For each twentieth of what is counted, as far as it can go and its losses are finite: the share that goes (by
        whole candidates, so at least that much), and the sum of the losses of the families [nats per token].
    """
    chosen = curves(families, counted, measure)
    start = counted.at(np.array([f.counts[0] for f in families], dtype=np.int64))
    whole = counted.at(np.array([f.units for f in families], dtype=np.int64))
    found = []
    for share in np.arange(0.05, 1, 0.05):
        wanted = start - whole * (1 - share)
        if wanted <= sum(float(curve.saved[-1]) for curve in chosen):
            kept = cheapest(chosen, wanted)
            loss = sum(float(c.losses[c.counts == k][0]) for c, k in zip(chosen, kept, strict=True))
            if np.isfinite(loss):
                found.append((round(1 - counted.at(kept) / whole, 6), loss))
    return found


def curves(families: Sequence[Family], counted: Counted, measure: Measure) -> list[Curve]:
    """The curve of each family.

    Raises:
        BudgetError: what they save does not add up.
    """
    start = np.array([f.counts[0] for f in families], dtype=np.int64)
    fewest = np.array([f.counts[-1] for f in families], dtype=np.int64)
    tried = [candidates(f) for f in families]
    saved = [np.cumsum([0.0, *counted.drops(start, f, counts)]) for f, counts in enumerate(tried)]
    together = counted.at(start) - counted.at(fewest)
    if not isinstance(counted, Table) and sum(float(s[-1]) for s in saved) != together:
        kinds = ", ".join(dict.fromkeys(kind for f in families for kind in f.kinds))
        raise BudgetError(
            f"a search adds up what each kind saves, and {kinds} share matrices, so that it depends on the others: "
            "search over FFN channels and heads, or take another ranking (--ranking global)"
        )
    asked = [_removed(f, int(count)) for f, counts in zip(families, tried, strict=True) for count in counts]
    losses = np.array(measure(asked), dtype=np.float64)
    parts = np.split(losses, np.cumsum([len(counts) for counts in tried])[:-1])
    return [Curve(c, part - part[0], s) for c, part, s in zip(tried, parts, saved, strict=True)]


def candidates(family: Family) -> IndexArray:
    """The counts of a family to measure at, descending: all of a few, else the ends and those nearest to `SHARES`."""
    counts = family.counts
    if len(counts) <= len(SHARES) + 2:
        return counts
    wanted = counts[0] - (counts[0] - counts[-1]) * np.array(SHARES)
    nearest = np.abs(counts[:, None] - wanted[None, :]).argmin(axis=0)
    picked: IndexArray = counts[np.unique([0, *nearest, len(counts) - 1])]
    return picked


def cheapest(chosen: Sequence[Curve], wanted: float) -> IndexArray:
    """The count of each curve, so that at least `wanted` is saved at the least sum of losses.

    What is saved is rounded down to whole parts of `wanted`, so that the answer is exact where `RESOLUTION` parts tell
    all sums apart, and saves enough in any case. Where rounding down leaves too little, all keep the fewest.
    """
    whole = all(np.equal(np.round(curve.saved), curve.saved).all() for curve in chosen)
    parts = min(RESOLUTION, max(1, int(np.ceil(wanted)))) if whole else RESOLUTION
    losses = np.full(parts + 1, np.inf)  # the least sum at which each number of parts is saved
    losses[0] = 0.0
    steps: list[tuple[IndexArray, list[int], list[int]]] = []
    for curve in chosen:
        moves = [parts if wanted <= 0 else min(parts, int(s * parts / wanted + 1e-9)) for s in curve.saved]
        last = [parts - moved + int(np.argmin(losses[parts - moved :])) for moved in moves]  # several end at the last
        best, choice = np.full(parts + 1, np.inf), np.zeros(parts + 1, dtype=np.int64)
        for number, (loss, moved, cheap) in enumerate(zip(curve.losses, moves, last, strict=True)):
            total = np.append(losses[: parts - moved], losses[cheap]) + loss
            better = total < best[moved:]
            np.copyto(best[moved:], total, where=better)
            np.copyto(choice[moved:], number, where=better)
        losses = best
        steps.append((choice, moves, last))
    if not np.isfinite(losses[parts]):
        return np.array([curve.counts[-1] for curve in chosen], dtype=np.int64)
    at, found = parts, []
    for curve, (choice, moves, last) in zip(reversed(chosen), reversed(steps), strict=True):
        number = int(choice[at])
        found.append(int(curve.counts[number]))
        at = last[number] if at == parts else at - moves[number]
    return np.array(found[::-1], dtype=np.int64)


def _removed(family: Family, count: int) -> Removed:
    """The units that go of each group when `count` steps stay."""
    return {
        group.name: tuple(np.sort(order[: group.units - count * scale]).tolist())
        for group, scale, order in zip(family.groups, family.scales, family.orders, strict=True)
        if count * scale < group.units
    }
