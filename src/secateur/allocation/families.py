"""What may be cut: groups, in families that lose the same share of their units, and the counts they may keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from secateur.allocation.limits import Limits
from secateur.errors import BudgetError, NonFiniteError, PlanError
from secateur.groups import Group, Groups, IndexArray

if TYPE_CHECKING:
    import torch

    Scores = Mapping[str, torch.Tensor]

ROUNDED_KINDS = (
    "ffn_channel",
    "expert_channel",
    "hidden",
)  # widths of matrices; head counts gain nothing from rounding
GROUPED_ALIGNMENT = 8  # grouped matrix products want rows of whole 16 bytes, 8 numbers in half precision


@dataclass(frozen=True, eq=False)
class Family:
    """Groups that lose the same share of their units: those of all layers for uniform output, else a single group.

    Units go in steps. A step takes one unit of each group, as a rule; where the model's class ties families (8 hidden
    dimensions go with each head), it takes as many of each as keeps the shares equal. Counts are counts of steps.

    Attributes:
        name: `Group.family` of the first group.
        groups: the groups.
        scales: units of each group in a step.
        counts: how many steps each group may keep, descending; the first is where allocation starts.
        orders: for each group, its units in order of removal.
        importance: [steps]; entry k is what removing the k-th step of every group's order costs.
        fixed: the count was set by `layer_ratios` or `kind_ratios`.
    """

    name: str
    groups: tuple[Group, ...]
    scales: tuple[int, ...]
    counts: IndexArray
    orders: tuple[IndexArray, ...]
    importance: NDArray[np.float64]
    fixed: bool = False

    def without(self, count: int, limits: Limits) -> Family:
        """The family without a count that the class cannot express, nor those around it up to the next it can."""
        at = int(np.flatnonzero(self.counts == count)[0])
        first, last = at, at + 1
        while first > 1 and not self.expressible(int(self.counts[first - 1]), limits):
            first -= 1
        while not self.expressible(int(self.counts[last]), limits):
            last += 1
        return replace(self, counts=np.concatenate([self.counts[:first], self.counts[last:]]))

    def expressible(self, count: int, limits: Limits) -> bool:
        """Whether the model's class can be configured for this count."""
        return limits.expressible(self.name, count * self.scales[0])

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(g.kind for g in self.groups))

    @property
    def units(self) -> int:
        """Steps before the cut."""
        return self.groups[0].units // self.scales[0]

    def step_importance(self) -> NDArray[np.float64]:
        """Importance lost by each step from one count to the next, [counts - 1]."""
        if len(self.counts) < 2:
            return np.zeros(0)
        gone = self.importance[self.units - self.counts[0] : self.units - self.counts[-1]]
        return np.add.reduceat(gone, self.counts[0] - self.counts[:-1])

    def count_for_share(self, share: float, limits: Limits | None = None) -> int:
        """The count closest to losing `share` of the units; of two equally close, the larger.

        Args:
            limits: if given, only counts that the class can express are chosen from.

        Raises:
            BudgetError: even the smallest count misses the share by a whole unit or more.
        """
        wanted = self.units * (1 - share)
        if self.counts[-1] - wanted > 1 - 1e-9:
            raise BudgetError(
                f"a share of {share:g} of {self.name} cannot be removed: {self.counts[-1]} of its {self.units} units "
                f"must stay, so the largest reachable share is {1 - self.counts[-1] / self.units:.4g}"
            )
        by_distance: list[int] = self.counts[np.argsort(np.abs(self.counts - wanted), kind="stable")].tolist()
        return next(c for c in by_distance if limits is None or c == self.units or self.expressible(c, limits))


def select_families(groups: Groups, scores: Scores | None, kinds: Sequence[str], limits: Limits) -> list[Family]:
    """The families of these kinds that may be cut, in the order of the model.

    Args:
        scores: importance of every group to be cut, higher = keep; None if only the counts are of interest.

    Raises:
        BudgetError: a kind has no group to cut, or the limits contradict uniform output.
        PlanError: a group has no scores, or too few.
        NonFiniteError: a score is NaN or infinite.
    """
    if not kinds:
        raise BudgetError("no kinds to cut are given, and no scores from which to tell them")
    protects = (limits.protect_first or limits.protect_last) and set(kinds) != {"layer"}
    if limits.uniform and (protects or limits.layer_ratios):
        raise BudgetError(
            "protect_first, protect_last and layer_ratios give layers different widths, which uniform output cannot "
            "have; use per-layer output (uniform=False, --per-layer)"
        )
    if limits.uniform and "sublayer" in kinds:
        raise BudgetError(
            "sublayers are left out of single layers, which uniform output cannot do; use per-layer output "
            "(uniform=False, --per-layer)"
        )
    if limits.uniform and (single := [g.name for g in groups.of_kinds(kinds) if g.name in limits.protect]):
        raise BudgetError(
            f"single groups are to be left whole ({single[0]}), which gives layers different widths, and these uniform "
            "output cannot have; use per-layer output (uniform=False, --per-layer)"
        )
    _check_ratios(groups, kinds, limits)
    chosen = _sets_of_groups(groups, kinds, limits)
    stay = {g.blocks[u] for members in chosen for g in members for u in g.stays}
    return [_family(members, scores, limits, groups, stay) for members in chosen]


def _family(members: list[Group], scores: Scores | None, limits: Limits, groups: Groups, stay: Set[str]) -> Family:
    """Args as for `select_families`; `stay` are paths of blocks that must stay, with the layers they are in."""
    steps = math.gcd(*(g.units for g in members))
    scales = tuple(g.units // steps for g in members)
    values = [_checked_scores(g, scores) for g in members]
    protected = [_protected_blocks(g, limits, groups, stay) for g in members]
    left = [list(limits.beyond.get(g.name, range(g.units))) for g in members]
    orders = [_removal_order(v, p, u) for v, p, u in zip(values, protected, left, strict=True)]
    importance = np.sum([v[o].reshape(steps, -1).sum(1) for v, o in zip(values, orders, strict=True)], axis=0)
    counts = np.arange(min(len(u) // scale for u, scale in zip(left, scales, strict=True)), 0, -1, dtype=np.int64)
    family = Family(members[0].family, tuple(members), scales, counts, tuple(orders), importance)
    counts = _allowed_counts(family, limits, groups, max(len(p) for p in protected))
    return _with_ratio(replace(family, counts=counts), limits)


def _sets_of_groups(groups: Groups, kinds: Sequence[str], limits: Limits) -> list[list[Group]]:
    """The groups to be cut, those that must lose the same number of units together."""
    found: list[list[Group]] = []
    last_layer = max((g.layer for g in groups if g.layer is not None), default=0)
    for kind in kinds:
        families = groups.families([kind])
        if limits.uniform:
            # a layer that cannot be cut would stay wider than the others
            refused = {g.family for g in groups if not g.prunable}
            sets = [members for name, members in families.items() if name not in refused]
        else:
            sets = [[g] for members in families.values() for g in members if not _protected(g, last_layer, limits)]
        if not sets:
            reasons = [f"{g.name}: {g.refusals[0]}" for g in groups if g.kind == kind and not g.prunable]
            others = sorted({g.kind for g in groups.prunable})
            why = reasons[0] if reasons else "every layer is protected" if families else f"it has {', '.join(others)}"
            raise BudgetError(f"the model has no {kind} groups to cut ({why}); choose other kinds of groups")
        found += sets
    for members in found:
        if len({g.units for g in members}) > 1:
            sizes = ", ".join(f"{g.name} has {g.units} units" for g in members[:3])
            raise BudgetError(f"layers differ already ({sizes}); use per-layer output (uniform=False, --per-layer)")
    return _united(found, limits.ties) if limits.uniform else found


def _united(found: list[list[Group]], ties: Sequence[Sequence[str]]) -> list[list[Group]]:
    """The sets with those of tied families made one, in the place of the first."""
    tie_of = {family: tuple(tie) for tie in ties for family in tie}
    united: dict[tuple[str, ...], list[Group]] = {}
    for members in found:
        united.setdefault(tie_of.get(members[0].family, (members[0].family,)), []).extend(members)
    return list(united.values())


def _protected(group: Group, last_layer: int, limits: Limits) -> bool:
    if group.name in limits.protect:
        return True
    layer = group.layer
    if group.blocks or layer is None or layer in (limits.layer_ratios or {}):
        return False
    return layer < limits.protect_first or layer > last_layer - limits.protect_last


def _protected_blocks(group: Group, limits: Limits, groups: Groups, stay: Set[str]) -> IndexArray:
    """Units of a `layer` or `sublayer` group that must stay: those in protected layers, and those around `stay` or a
    protected group."""
    if not group.blocks:
        return np.zeros(0, dtype=np.int64)
    home = group.name.partition("/")[0] + "."
    last = max(group.layer_of(name) for name in groups.shapes if name.startswith(home))
    found = []
    for unit, block in enumerate(group.blocks):
        layer = group.layer_of(block)
        inside = any(path == block or path.startswith((block + ".", block + "/")) for path in {*stay, *limits.protect})
        if inside or layer < limits.protect_first or layer > last - limits.protect_last:
            found.append(unit)
    return np.array(found, dtype=np.int64)


def _allowed_counts(family: Family, limits: Limits, groups: Groups, protected: int) -> IndexArray:
    """Counts from where allocation starts down to the fewest that are possible. The class is asked about that one only:
    there may be tens of thousands, and each answer takes it milliseconds."""
    allowed = family.counts >= max(1, protected)
    for group, scale in zip(family.groups, family.scales, strict=True):
        rounding = limits.round_to if group.kind in ROUNDED_KINDS else 1
        step = math.lcm(rounding, _alignment(group, groups), limits.multiples.get(group.family, 1))
        allowed &= (family.counts * scale % step == 0) & (family.counts * scale >= group.at_least)
    fewer = family.counts[1:][allowed[1:]].tolist()
    while fewer and not family.expressible(fewer[-1], limits):
        fewer.pop()
    return np.array([family.counts[0], *fewer], dtype=np.int64)


def _alignment(group: Group, groups: Groups) -> int:
    """What the width must be a multiple of: it is that of stacked matrices (those of experts), or any other."""
    stacked = any(m.dim > 0 and len(groups.shapes[m.parameter]) == 3 for m in group.members)
    return GROUPED_ALIGNMENT if stacked and group.kind in ROUNDED_KINDS else 1


def _checked_scores(group: Group, scores: Scores | None) -> NDArray[np.float64]:
    if scores is None:
        return np.zeros(group.units)
    if group.name not in scores:
        raise PlanError(f"{group.name} has no scores; score every group of the kinds to be cut")
    values: NDArray[np.float64] = scores[group.name].detach().double().cpu().numpy()
    if values.shape != (group.units,):
        raise PlanError(
            f"the scores of {group.name} have shape {values.shape}; expected one for each of its {group.units} units"
        )
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"{group.name}: {np.count_nonzero(~np.isfinite(values))} of {group.units} scores are NaN or infinite; "
            "check the calibration text and the dtype of the model"
        )
    return values


def _removal_order(values: NDArray[np.float64], last: IndexArray, left: Sequence[int]) -> IndexArray:
    """Units by ascending importance, equal ones by number; those not `left` first, those in `last` at the end."""
    order = np.argsort(values, kind="stable")
    late, early = np.isin(order, last), ~np.isin(order, left)
    return np.concatenate([order[early], order[~early & ~late], order[late]])


def _with_ratio(family: Family, limits: Limits) -> Family:
    layer = family.groups[0].layer
    share = None if layer is None else (limits.layer_ratios or {}).get(layer)
    asked = {limits.kind_ratios[kind] for kind in family.kinds if kind in limits.kind_ratios}
    if len(asked) > 1:
        raise BudgetError(
            f"{' and '.join(family.kinds)} can only be cut by the same share in this model; ask for one share for them"
        )
    if share is None and not asked:
        return family
    count = family.count_for_share(asked.pop() if share is None else share, limits)
    return replace(family, counts=np.array([count], dtype=np.int64), fixed=True)


def _check_ratios(groups: Groups, kinds: Sequence[str], limits: Limits) -> None:
    for kind in limits.kind_ratios:
        if kind not in kinds:
            raise BudgetError(
                f"a share is asked of kind {kind}, which is not among those that are cut ({', '.join(kinds)}): add it"
            )
    layers = {g.layer for g in groups}
    for layer in limits.layer_ratios or {}:
        if layer not in layers:
            raise BudgetError(f"layer_ratios names layer {layer}, which the model does not have")
