"""Scores and a budget in, a pruning plan out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from secateur.allocation.costs import Cost, Counted, Removed, Table, table
from secateur.allocation.families import Family, select_families
from secateur.allocation.limits import Feasible, Limits, check_shares
from secateur.allocation.ranking import RankingName, rank
from secateur.allocation.report import provenance
from secateur.allocation.search import Measure, search, tradeoff, within
from secateur.allocation.size import Size, parameters_left, units_left
from secateur.errors import BudgetError
from secateur.groups import Groups, IndexArray
from secateur.plan import PruningPlan

if TYPE_CHECKING:
    from secateur.allocation.families import Scores

__all__ = ["Budget", "Cost", "Measure", "Removed", "allocate", "check_shares", "max_sparsity", "within"]


@dataclass(frozen=True)
class Budget:
    """How much to remove; exactly one of the three.

    Attributes:
        param_sparsity: fraction of all parameters of the model, embeddings and head included.
        unit_sparsity: fraction of the units in the groups that are cut, the meaning the papers give to their ratio
            (LLM-Pruner's 25 % of the groups of 26 of 32 layers leaves 80 % of the parameters).
        cost_sparsity: fraction of what `allocate`'s `cost` measures: multiply-accumulates, bytes, seconds.

    Raises:
        BudgetError: none or both are given, or the fraction lies outside [0, 1).
    """

    param_sparsity: float | None = None
    unit_sparsity: float | None = None
    cost_sparsity: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in self.as_dict().items() if v is not None}
        if len(given) != 1:
            raise BudgetError("a budget is a param_sparsity, a unit_sparsity or a cost_sparsity: give exactly one")
        ((name, value),) = given.items()
        if not 0 <= value < 1:
            raise BudgetError(f"{name} is {value}; expected a fraction in [0, 1), 0.2 to remove 20 %")

    def as_dict(self) -> dict[str, float | None]:
        return {"param_sparsity": self.param_sparsity, "unit_sparsity": self.unit_sparsity} | (
            {} if self.cost_sparsity is None else {"cost_sparsity": self.cost_sparsity}
        )

    @property
    def share(self) -> float:
        """The fraction, whatever it is of."""
        (value,) = (v for v in self.as_dict().values() if v is not None)
        return value


def allocate(
    groups: Groups,
    scores: Scores,
    budget: Budget | None,
    *,
    kinds: Sequence[str] | None = None,
    ranking: RankingName = "local",
    uniform: bool = True,
    round_to: int = 1,
    protect_first: int = 0,
    protect_last: int = 0,
    protect: Collection[str] = (),
    layer_ratios: Mapping[int, float] | None = None,
    kind_ratios: Mapping[str, float] | None = None,
    feasible: Feasible | None = None,
    ties: Sequence[Sequence[str]] = (),
    multiples: Mapping[str, int] | None = None,
    beyond: PruningPlan | None = None,
    settle: bool = True,
    measure: Measure | None = None,
    cost: Cost | None = None,
) -> PruningPlan:
    """Choose the units that stay.

    Within a group the least important units go, of equal ones the first. A parameter budget is met as closely as
    possible: no single unit more or less of any kind (for uniform output, one unit in every layer) would come closer.

    Args:
        groups: all groups of the model; refused ones are never touched.
        scores: group name -> importance of each unit, [units], higher = keep.
        budget: how much to remove; may be None if `kind_ratios` says it for every kind.
        kinds: kinds of groups to cut; default: those that `scores` contains.
        ranking: `local` removes the same share of every group; `global` removes the units with the least importance
            per parameter wherever they are (see `secateur.allocation.ranking.rank` for why per parameter); `search`
            takes the widths that cost least by what `measure` says (see `secateur.allocation.search`), and the scores
            tell which units go only.
        uniform, round_to, protect_first, protect_last, protect, layer_ratios, kind_ratios, feasible, ties, multiples:
            see `Limits`.
        beyond: a plan for the same groups; what it removes goes again, whatever its score.
        settle: False on the way to the budget of a run that takes nothing back: units go in order, up to the one that
            would be too much. Were finer units to make up for a coarse one there, it would never be its turn.
        measure: for `search`: what some units together cost, for many cuts, each by itself.
        cost: for a `cost_sparsity`: what it is a fraction of, of the model without some units, for many cuts.

    Returns:
        The plan; its provenance records these arguments, the sparsity and the share of each kind reached, under
        `allocation`; of a search in which no share is set, or that of the hidden dimension alone, the curve of what
        other budgets are expected to cost with that dimension as it is, too (`search.tradeoff`).

    Raises:
        BudgetError: the budget cannot be reached (the message says what can), a kind has no group to cut, or
            arguments contradict each other.
        PlanError: a group to be cut has no scores or the wrong number of them.
        NonFiniteError: a score is NaN or infinite.
    """
    limits = Limits(
        uniform,
        round_to,
        protect_first,
        protect_last,
        protect,
        layer_ratios,
        kind_ratios or {},
        feasible,
        ties,
        multiples or {},
        beyond.kept if beyond else {},
    )
    kinds = list(dict.fromkeys([groups.named(name).kind for name in scores] if kinds is None else kinds))
    families, counts, priced = _choose(groups, scores, budget, kinds, ranking, limits, settle, measure, cost)
    kept = _kept_units(families, counts)
    if not uniform:
        kept = _without_removed_blocks(groups, kept)
    units = {name: groups.named(name).units for name in kept}
    made = provenance(groups, families, kept, budget.as_dict() if budget else None, kinds, ranking, limits)
    if priced is not None:
        left = priced.at(counts)
        made["cost"] = {"whole": priced.whole, "left": left, "sparsity": 1 - left / priced.whole}
    # What fixed shares cost is not among the curves, and a model that is cut already costs nothing from there on.
    free = [f for f in families if f.kinds != ("hidden",)] if priced is None else families
    if measure is not None and beyond is None and free and not any(f.fixed for f in free):
        made["tradeoff"] = tradeoff(free, priced or parameters_left(groups, free), measure)
    return PruningPlan(kept, units, {"allocation": made})


def _choose(
    groups: Groups,
    scores: Scores,
    budget: Budget | None,
    kinds: Sequence[str],
    ranking: RankingName,
    limits: Limits,
    settle: bool,
    measure: Measure | None,
    cost: Cost | None,
) -> tuple[Sequence[Family], IndexArray, Table | None]:
    """The families to be cut, the steps that each keeps, and the table of costs if these count.

    Arguments and errors as for `allocate`.
    """
    if ranking not in ("local", "global", "search"):
        raise BudgetError(f"ranking is {ranking!r}; expected 'local', 'global' or 'search'")
    if (ranking == "search") != (measure is not None):
        raise BudgetError("a search for widths needs to measure what they cost, and nothing else does: give measure")
    if (budget is not None and budget.cost_sparsity is not None) != (cost is not None):
        raise BudgetError("a cost_sparsity needs to know the cost that it is a fraction of, and nothing else does")
    families: Sequence[Family] = select_families(groups, scores, kinds, limits)
    size = parameters_left(groups, families)
    priced = None if cost is None else table(families, cost)
    families, counts = _expressible_counts(
        families,
        limits,
        lambda choice: _counts(budget, ranking, choice, size, groups.total_parameters, settle, measure, priced),
    )
    assert groups.remaining_parameters(_kept_units(families, counts)) == size.at(counts)
    return families, counts, priced


def max_sparsity(
    groups: Groups,
    kinds: Sequence[str],
    *,
    uniform: bool = True,
    round_to: int = 1,
    protect_first: int = 0,
    protect_last: int = 0,
    protect: Collection[str] = (),
    layer_ratios: Mapping[int, float] | None = None,
    feasible: Feasible | None = None,
    ties: Sequence[Sequence[str]] = (),
    multiples: Mapping[str, int] | None = None,
) -> float:
    """The largest `param_sparsity` that cutting these kinds can reach; arguments as for `allocate`.

    Where blocks differ in size and kind `layer` or `sublayer` is cut, what is left depends on the scores; this assumes
    that the last blocks stay.
    """
    limits = Limits(
        uniform, round_to, protect_first, protect_last, protect, layer_ratios, {}, feasible, ties, multiples or {}
    )
    families = select_families(groups, None, list(dict.fromkeys(kinds)), limits)
    return 1 - parameters_left(groups, families).at(_fewest(families)) / groups.total_parameters


def _fewest(families: Sequence[Family]) -> IndexArray:
    return np.array([f.counts[-1] for f in families], dtype=np.int64)


def _expressible_counts(
    families: Sequence[Family], limits: Limits, choose: Callable[[Sequence[Family]], IndexArray]
) -> tuple[Sequence[Family], IndexArray]:
    """Let `choose` pick counts until the model's class can express them all; what it cannot leaves the choice."""
    while True:
        counts = choose(families)
        narrowed = [
            family if count == family.units or family.expressible(count, limits) else family.without(count, limits)
            for family, count in zip(families, counts.tolist(), strict=True)
        ]
        if all(new is old for new, old in zip(narrowed, families, strict=True)):
            return families, counts
        families = narrowed


def _counts(
    budget: Budget | None,
    ranking: RankingName,
    families: Sequence[Family],
    size: Size,
    parameters: int,
    settle: bool,
    measure: Measure | None,
    priced: Table | None,
) -> IndexArray:
    """Steps that each family keeps.

    Raises:
        BudgetError: the budget is out of reach.
    """
    start = np.array([f.counts[0] for f in families], dtype=np.int64)
    if budget is None:
        if not all(f.fixed for f in families):
            raise BudgetError("say how much to remove: a budget, or a share for every kind that is cut")
        return start
    share = budget.share
    counted: Counted
    whole: float
    if budget.param_sparsity is not None:
        counted, whole = size, parameters
    elif budget.cost_sparsity is not None:
        assert priced is not None
        counted, whole = priced, priced.whole
    else:
        counted = units_left(families)
        whole = counted.at(np.array([f.units for f in families], dtype=np.int64))
        if ranking == "local":
            counts = [f.counts[0] if f.fixed else f.count_for_share(share) for f in families]
            return np.array(counts, dtype=np.int64)
    target = whole * (1 - share)
    slack = 0.5 if priced is None else 1e-9 * whole  # half a parameter: the fraction itself is only exact to rounding
    if counted.at(start) < target - slack:
        if not any(f.fixed for f in families):  # an earlier plan, met to within one unit, went a little further
            return start
        raise BudgetError(
            f"the shares asked for of layers or kinds alone remove {1 - counted.at(start) / whole:.4f}, "
            f"more than the budget's {share:g}"
        )
    fewest = counted.at(_fewest(families))
    if fewest > target + slack:
        kinds = ", ".join(dict.fromkeys(kind for f in families for kind in f.kinds))
        largest = math.floor((1 - fewest / whole) * 1e4) / 1e4
        raise BudgetError(
            f"a sparsity of {share:g} cannot be reached by cutting {kinds}: {_floor(families)}, "
            f"and the largest reachable sparsity is {largest:g}; cut more kinds, or lift protection or rounding"
        )
    if ranking == "search":
        assert measure is not None
        return search(families, counted, target, measure)
    ranked = rank(families, size if priced is None else priced, counted, ranking)
    return ranked.settle(target) if settle else ranked.kept(ranked.first(ranked.until(target)))


def _floor(families: Sequence[Family]) -> str:
    """What keeps units from going."""
    chosen = [f"{g.at_least} of {g.name}" for f in families for g in f.groups[:1] if g.at_least > 1]
    return f"a router chooses {chosen[0]}, so as many stay" if chosen else "at least one unit of every group stays"


def _without_removed_blocks(groups: Groups, kept: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Leave out the groups, and the sublayers, inside blocks that go as a whole."""
    removed = groups.removed_prefixes(kept)
    found: dict[str, tuple[int, ...]] = {}
    for name, units in kept.items():
        group = groups.named(name)
        inside = {u for u, block in enumerate(group.blocks) if block.startswith(removed)}
        left = tuple(sorted(inside.union(units)))
        gone = group.members and all(m.parameter.startswith(removed) for m in group.members)
        if not gone and len(left) < group.units:
            found[name] = left
    return found


def _kept_units(families: Sequence[Family], counts: IndexArray) -> dict[str, tuple[int, ...]]:
    """The units that stay in every group that loses some; `counts` are steps."""
    kept: dict[str, tuple[int, ...]] = {}
    for family, count in zip(families, counts.tolist(), strict=True):
        for group, scale, order in zip(family.groups, family.scales, family.orders, strict=True):
            if count * scale < group.units:
                kept[group.name] = tuple(np.sort(order[group.units - count * scale :]).tolist())
    return kept
