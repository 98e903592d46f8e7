"""Steps 2 to 5 of `auto`: the model cut to a form. What the forms share is measured once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.allocation import Budget, Measure, allocate, within
from secateur.allocation.families import select_families
from secateur.allocation.limits import Limits
from secateur.allocation.orders import cheapest_orders
from secateur.compensation import Compensated, Compensation, Database, compensated
from secateur.cutting import PruneResult, Step, cut
from secateur.errors import BudgetError, PlanError
from secateur.evaluation.cut_losses import CutLosses
from secateur.groups import Group, Groups
from secateur.importance import score
from secateur.methods.forms import SHORT, Form, hidden_shares
from secateur.methods.reselection import reselected
from secateur.plan import PruningPlan
from secateur.schedules import linear
from secateur.surgery import Expressible, expressible, mask, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.allocation.ranking import RankingName
    from secateur.methods.auto import Auto

MEASURES = 4  # one sequence of so many of the others measures what widths cost


class Steps:
    """Steps 2 to 5, with what the forms share."""

    def __init__(
        self, model: PreTrainedModel, groups: Groups, rows: Tensor, settings: Auto, folder: Path, on_step: Step
    ) -> None:
        self.model, self.groups, self.rows, self.settings = model, groups, rows, settings
        self.folder, self.on_step = folder, on_step
        self.cost = settings.workload.without(model, groups) if settings.workload else None
        self.kinds = settings.kinds or tuple(dict.fromkeys([*groups.kinds_in_blocks(), *settings.kind_ratios]))
        self.scores: dict[str, Tensor] = {}  # of the whole model
        self.by: dict[str, str] = {}  # the criterion of each group there
        self.measure: Measure | None = None
        self.candidates: dict[Form, tuple[Groups, Mapping[str, str], Expressible]] = {}

    def shares(self, form: Form) -> list[float | None]:
        """What to leave out of the hidden dimension, in turn. The last is None: as much as of all else.

        Raises:
            PlanError: the class cannot have this form.
            BudgetError: nor can the model, as its layers differ already.
        """
        if not form.hidden:
            return [0.0]
        assert self.settings.budget is not None  # `tries_hidden`
        candidates, _, can = self._candidates(form)
        limits = Limits(
            form.uniform, self.settings.round_to, feasible=can.feasible, ties=can.ties, multiples=can.multiples
        )
        families = select_families(candidates, None, list(dict.fromkeys(g.kind for g in candidates)), limits)
        family = next(f for f in families if "hidden" in f.kinds)
        counts = []
        for share in hidden_shares(family.units, self.settings.budget.share):
            with suppress(BudgetError):  # more than can go
                counts.append(family.count_for_share(share, limits))
        return [*(1 - count / family.units for count in dict.fromkeys(counts) if count < family.units), None]

    def form(self, form: Form, share: float | None) -> PruneResult:
        """The model cut to a form.

        Args:
            share: of the hidden dimension that goes; None for as much as of all other kinds.
        """
        s, uniform = self.settings, form.uniform
        candidates, left_whole, can = self._candidates(form)
        searched = replace(candidates, groups=tuple(g for g in candidates if not form.hidden or g.kind != "hidden"))
        ranking: RankingName = "local" if share is None else s.ranking
        shares = s.kind_ratios if not form.hidden else {} if share is None else {"hidden": share}
        plan, tradeoff = PruningPlan({}, {}), None
        for step in range(1, s.iterations + 1):
            with self._as_cut(plan):
                self.on_step("score")
                measure = self._measure(plan) if ranking == "search" else None
                scores = self._scored(searched, plan, step / s.iterations, measure)
                scores |= self._scored(candidates, plan, 1.0, None) if form.hidden else {}
                self.on_step("allocate")
                plan = allocate(
                    candidates,
                    scores,
                    _share(s.budget, step, s.iterations),
                    ranking=ranking,
                    uniform=uniform,
                    round_to=s.round_to,
                    protect_first=s.protect_first,
                    protect_last=s.protect_last,
                    protect=s.protect,
                    layer_ratios=s.layer_ratios,
                    kind_ratios={kind: linear(step, s.iterations, part) for kind, part in shares.items()},
                    feasible=can.feasible,
                    ties=can.ties,
                    multiples=can.multiples,
                    beyond=plan if plan.kept else None,
                    measure=measure and within(measure, searched),
                    cost=self.cost,
                )
                tradeoff = tradeoff or plan.provenance["allocation"].get("tradeoff")
        if tradeoff is not None:  # that of the whole model
            plan.provenance["allocation"]["tradeoff"] = tradeoff
        if form.hidden and share is not None:
            _record_tried(plan, s.budget)
        if s.reselect:
            self.on_step("score")
            plan = reselected(plan, searched, self._scored_again, self._as_cut_further)
        small, done, fallback = self._cut(plan)
        first = {g.name: self.scores[g.name] for g in candidates}
        by = {g.name: self.by[g.name] for g in candidates if g.name in self.by}
        return PruneResult(small, plan, candidates, first, left_whole, done, fallback, criteria=by)

    def _candidates(self, form: Form) -> tuple[Groups, Mapping[str, str], Expressible]:
        """The groups of a form, those that must stay whole and why, and what the class can have."""
        if form not in self.candidates:
            hidden = ("hidden",) if form.hidden else ()
            kinds, named = (*self.kinds, *hidden), self.settings.kinds or (*self.settings.kind_ratios, *hidden)
            can = expressible(self.model, self.groups, kinds, uniform=form.uniform)
            found = select(self.model, self.groups, kinds, can, named=named, uniform=form.uniform)
            self.candidates[form] = (*found, can)
        return self.candidates[form]

    def _as_cut(self, plan: PruningPlan) -> AbstractContextManager[object]:
        """The model as a plan leaves it: compensated, masked, or whole."""
        return self._cut_in_place(plan, _ways(self.settings.compensation)) if plan.kept else nullcontext()

    def _as_cut_further(self, plan: PruningPlan) -> AbstractContextManager[object]:
        """The model, in which other units may be gone already, without those of a plan, too. What the dense model puts
        out is not to be had there, and so no target."""
        return self._cut_in_place(plan, _ways(self.settings.compensation)[-1:])

    @contextmanager
    def _cut_in_place(self, plan: PruningPlan, ways: Sequence[Compensation]) -> Iterator[None]:
        """The model compensated in the first of these ways that is possible, masked if none is."""
        with ExitStack() as stack:
            for how in ways:
                with suppress(PlanError):
                    stack.enter_context(compensated(self.model, plan, [self.rows], how, self.groups))
                    break
            else:
                stack.enter_context(mask(self.model, plan, self.groups))
            yield

    def _cut(self, plan: PruningPlan) -> tuple[PreTrainedModel, Sequence[Compensated], str]:
        """Step 5: the cut model, what was solved again in it, and why that is not as asked.

        Raises:
            PlanError: biases were to be mended, and there are none.
        """
        refused = ""
        for how in _ways(self.settings.compensation):
            try:
                return (*cut(self.model, plan, [self.rows], how, self.groups, self.on_step), refused)
            except PlanError as error:
                if how.form == "bias":
                    raise
                refused = refused or str(error)
        return (*cut(self.model, plan, [self.rows], None, self.groups, self.on_step), refused)

    def _scored(self, candidates: Groups, plan: PruningPlan, part: float, measure: Measure | None) -> dict[str, Tensor]:
        """Importance in the model as it is now; units already removed rank below all others.

        Args:
            part: of the budget that is to be met now.
        """
        if not plan.kept:
            new = [g for g in candidates if g.name not in self.scores]
            scores, by = self._best_scores(new, part, measure) if new else ({}, {})
            self.scores, self.by = self.scores | scores, self.by | by
            return {g.name: self.scores[g.name] for g in candidates}
        scores, _ = self._best_scores(candidates, part, measure)
        for name in plan.kept:
            scores[name][list(plan.removed(name))] = -1.0
        return scores

    def _best_scores(
        self, groups: Sequence[Group], part: float, measure: Measure | None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Step 2: importance by group, and the criterion found for each; where nothing is measured, the first that can
        score these groups."""
        found, refused = {}, []
        for name, criterion in self.settings.criteria.items():
            try:
                found[name] = score(self.model, groups, [self.rows], criterion, self.settings.reduction)
            except PlanError as error:
                refused.append(error)
        if not found:
            raise refused[0]
        if measure is None or len(found) == 1:
            ((first, scores), *_) = found.items()
            return scores, {} if measure is None else dict.fromkeys(scores, first)
        share = self.settings.budget.share if self.settings.budget else 0.5
        by = cheapest_orders(groups, found, part * share, measure)
        return {name: found[criterion][name] for name, criterion in by.items()}, by

    def _scored_again(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Importance in the model as it is now, each group by the criterion that it had before."""
        found: dict[str, Tensor] = {}
        first = next(iter(self.settings.criteria))
        for name, criterion in self.settings.criteria.items():
            chosen = [g for g in groups if self.by.get(g.name, first) == name]
            found |= score(self.model, chosen, [self.rows], criterion, self.settings.reduction) if chosen else {}
        return found

    def _measure(self, plan: PruningPlan) -> Measure:
        """What a search measures with."""
        if plan.kept or self.measure is None:
            measures = torch.arange(len(self.rows)) % MEASURES == 0
            solves = self.settings.compensation is not None and self.settings.compensation.form == "ridge"
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            solved = Database(self.model, self.groups, [self.rows[~measures]], folder) if solves else None
            measure = CutLosses(
                self.model, self.groups, self.groups.of_kinds(self.kinds), [self.rows[measures]], solved
            )
            if plan.kept:
                return measure
            self.measure = measure
        return self.measure


def _ways(wanted: Compensation | None) -> list[Compensation]:
    """How to compensate, and how where that is not possible: the dense model may be no target."""
    if wanted is None:
        return []
    return list(dict.fromkeys([wanted, replace(wanted, target="current")]))


def _record_tried(plan: PruningPlan, budget: Budget | None) -> None:
    """Record that nobody asked for a hidden size that is tried, and make sure that its widths meet the budget.

    Raises:
        BudgetError: they do not, as only coarse units are left to cut.
    """
    made = plan.provenance["allocation"]
    made["kind_ratios"], made["shares"]["hidden"]["asked"] = {}, None
    if budget is not None and budget.share - made["sparsity"] > SHORT:
        raise BudgetError(f"with this hidden size whole units come to a sparsity of {made['sparsity']:.4f} only")


def _share(budget: Budget | None, step: int, steps: int) -> Budget | None:
    """The part of the budget to be met after `step` of `steps`."""
    if budget is None:
        return None
    given = {name: value for name, value in budget.as_dict().items() if value is not None}
    return Budget(**{name: linear(step, steps, value) for name, value in given.items()})
