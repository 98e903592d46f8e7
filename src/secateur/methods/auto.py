"""Ours: units by second-order criteria, widths by a search, what stays solved again, the simplest form that is best.

| step | here | from |
| --- | --- | --- |
| importance of units | `Taylor(order=2)`, diagonal Fisher | Ma et al. 2023, arXiv:2305.11627, Eq. 5 |
| | `Gate`, Fisher of a gate on each unit | ours |
| D, loss without some units, the rest solved again [nats per token] | `evaluation.cut_losses` | measured |
| W' of what stays, for D | `compensation.Database` | SPDY's, arXiv:2201.13096 |
| widths | `allocation.search` | the same, for losses of the model |
| W' of what stays, in the result | `compensation`, halfway to the dense model | ours; QEP's, arXiv:2504.09629 |

1. Discover groups. Of the calibration sequences, every fourth is set aside for step 6, and a quarter of the others
   measures D.
2. Score the units of all groups. Of several criteria each group takes the one by whose order cuts of it alone are
   measured to cost less, unless cuts of all groups cost less by one and the same criterion.
3. Measure what every family costs alone at some of the widths that it may have, and search for the widths that cost
   least together within the budget: once with the same widths in every layer, once with widths by layer. A third form
   is without a part of the hidden dimension, too, for which there is no search: every kind loses the same share.
4. With several iterations the sparsity grows, and steps 2 and 3 are repeated in the model as it is cut and compensated
   by then.
5. Cut, and solve the matrices that read what went again.
6. Of the forms the plainest is the result, unless another is surely better on the sequences set aside (`forms.better`).

Every part can be replaced or switched off: one criterion, `ranking` local or global, fewer forms (`uniform`, `kinds`),
no compensation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.allocation import Budget, Measure, allocate, check_shares
from secateur.allocation.orders import cheapest_orders
from secateur.allocation.ranking import RankingName
from secateur.benchmark.costs import Workload
from secateur.compensation import Compensated, Compensation, Database, compensated
from secateur.cutting import PruneResult, Step, cut
from secateur.discovery import discover
from secateur.errors import BudgetError, NonFiniteError, PlanError, SecateurError
from secateur.evaluation.cut_losses import CutLosses
from secateur.groups import Group, Groups
from secateur.importance import CRITERIA, score
from secateur.methods.forms import FEWEST, HIDDEN, PER_LAYER, UNIFORM, Form, apart, better, losses_aside
from secateur.plan import PruningPlan
from secateur.schedules import linear
from secateur.surgery import expressible, mask, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURES = 4  # one sequence of so many of the others measures what widths cost
TRIED = ("taylor-2", "gate")


@dataclass(frozen=True)
class Auto:
    """Settings of one run.

    Attributes:
        budget: what must be removed.
        criteria: by name, see `score`; of several, each group takes the one that step 2 finds, for which the ranking
            must be `search`.
        reduction: see `score`.
        kinds: the kinds to prune; FFN channels and heads if empty, and the hidden dimension where that is better.
        ranking: `search`, or `local` or `global` as for LLM-Pruner.
        iterations: steps over which the sparsity grows.
        uniform: the same widths in every layer or not; None for what step 6 chooses.
        hidden: whether the hidden dimension may be cut without being among the kinds.
        compensation: None for none.
        workload: what a budget's `cost_sparsity` is a fraction of.
        round_to, protect_first, protect_last, protect, layer_ratios, kind_ratios: see `allocation.Limits`; those that
            layers differ by need `uniform=False`.
    """

    budget: Budget | None
    criteria: Mapping[str, Any] = field(default_factory=lambda: {name: CRITERIA[name] for name in TRIED})
    reduction: str = "sum"
    kinds: tuple[str, ...] = ()
    ranking: RankingName = "search"
    iterations: int = 1
    uniform: bool | None = None
    hidden: bool = True
    compensation: Compensation | None = field(default_factory=lambda: Compensation("ridge", "halfway"))
    workload: Workload | None = None
    round_to: int = 1
    protect_first: int = 0
    protect_last: int = 0
    protect: tuple[str, ...] = ()
    layer_ratios: Mapping[int, float] | None = None
    kind_ratios: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_shares(self.kind_ratios, self.kinds)
        if len(self.criteria) > 1 and self.ranking != "search":
            raise PlanError(f"{', '.join(self.criteria)}: with a ranking that measures nothing, name one criterion")

    @property
    def tries_hidden(self) -> bool:
        """Whether one form is without a part of the hidden dimension: where nothing is said that it does not fit."""
        counts = self.budget is not None and self.budget.param_sparsity is not None
        said = self.kinds or self.kind_ratios or not self.hidden
        return counts and self.ranking == "search" and self.iterations == 1 and not said


def run(
    model: PreTrainedModel, batches: Sequence[Tensor], settings: Auto, on_step: Step = lambda name: None
) -> PruneResult:
    """Prune `model`, which itself is left as it was.

    Args:
        batches: calibration token ids, each [sequences, length].
        on_step: told the name of each step as it begins: `discover`, `score`, `allocate`, `compensate`, `cut`.

    Returns:
        The result; its `choice` says which form it has, and where there were several, what `forms.better` tells.

    Raises:
        PlanError: nothing of the kinds can be pruned.
        BudgetError: the budget is out of reach.
        NonFiniteError: a loss or score is NaN or infinite.
    """
    on_step("discover")
    forms, why = _forms(settings, sum(map(len, batches)))
    rest, aside = apart(batches, len(forms) > 1)
    losses: dict[Form, Tensor] = {}
    refused: dict[Form, SecateurError] = {}
    best: PruneResult | None = None
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(model, discover(model), rest, settings, Path(folder), on_step)
        for form in forms:
            try:
                result = work.form(form)
                losses[form] = losses_aside(result.model, aside)
            except (PlanError, BudgetError, NonFiniteError) as error:  # a class may be able to have some forms only
                refused[form] = error
                continue
            chosen, choice = better(losses)
            best = result if chosen is form else best
            del result  # which is held no longer if it is not the best
    if best is None:  # where a budget is the matter, cutting the hidden dimension reaches furthest
        furthest = refused.get(HIDDEN)
        raise furthest if isinstance(furthest, BudgetError) else refused[forms[0]]
    if len(losses) > 1:
        return replace(best, choice=choice)
    reasons = dict.fromkeys(str(error) for error in refused.values())
    why = why or (f"no other form is possible: {'; '.join(reasons)}" if reasons else "")
    return replace(best, choice={"chosen": chosen.name, "why": why} if why else {})


def _forms(settings: Auto, sequences: int) -> tuple[tuple[Form, ...], str]:
    """The forms to make; and why it is only one of them, where that was not asked for."""
    s = settings
    if s.uniform is False:
        return (PER_LAYER,), ""
    if s.protect_first or s.protect_last or s.protect or s.layer_ratios:
        return (UNIFORM if s.uniform else PER_LAYER,), "" if s.uniform else "some layers are to be cut otherwise"
    forms = (UNIFORM, *((HIDDEN,) if s.tries_hidden else ()), *(() if s.uniform else (PER_LAYER,)))
    if len(forms) > 1 and sequences < FEWEST:
        return (UNIFORM,), f"{sequences} calibration sequences are too few to choose by, {FEWEST} would do (--samples)"
    return forms, ""


class _Work:
    """Steps 2 to 5, with what the forms share."""

    def __init__(
        self, model: PreTrainedModel, groups: Groups, rows: Tensor, settings: Auto, folder: Path, on_step: Step
    ) -> None:
        self.model, self.groups, self.rows, self.settings = model, groups, rows, settings
        self.folder, self.on_step = folder, on_step
        self.cost = settings.workload.without(model, groups) if settings.workload else None
        self.scores: dict[str, Tensor] = {}  # of the whole model
        self.by: dict[str, str] = {}  # the criterion of each group there
        self.measure: Measure | None = None

    def form(self, form: Form) -> PruneResult:
        """The model cut to a form."""
        s, uniform = self.settings, form.uniform
        ranking: RankingName = "local" if form.hidden else s.ranking
        kinds = s.kinds or tuple(dict.fromkeys([*self.groups.kinds_in_blocks(), *s.kind_ratios]))
        kinds += ("hidden",) if form.hidden else ()
        named = s.kinds or tuple(s.kind_ratios) or (("hidden",) if form.hidden else ())
        can = expressible(self.model, self.groups, kinds, uniform=uniform)
        candidates, left_whole = select(self.model, self.groups, kinds, can, named=named, uniform=uniform)
        plan = PruningPlan({}, {})
        for step in range(1, s.iterations + 1):
            with self._as_cut(plan):
                self.on_step("score")
                measure = self._measure(candidates, plan) if ranking == "search" else None
                scores = self._scored(candidates, plan, step / s.iterations, measure)
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
                    kind_ratios={k: linear(step, s.iterations, share) for k, share in s.kind_ratios.items()},
                    feasible=can.feasible,
                    ties=can.ties,
                    multiples=can.multiples,
                    beyond=plan if plan.kept else None,
                    measure=measure,
                    cost=self.cost,
                )
        small, done = _cut(self.model, plan, self.rows, s.compensation, self.groups, self.on_step)
        first = {g.name: self.scores[g.name] for g in candidates}
        by = {g.name: self.by[g.name] for g in candidates if g.name in self.by}
        return PruneResult(small, plan, candidates, first, left_whole, done, criteria=by)

    def _as_cut(self, plan: PruningPlan) -> AbstractContextManager[Any]:
        """The model as a plan leaves it: compensated, masked, or whole."""
        if not plan.kept:
            return nullcontext()
        if self.settings.compensation is None:
            return mask(self.model, plan, self.groups)
        return compensated(self.model, plan, [self.rows], self.settings.compensation, self.groups)

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

    def _measure(self, candidates: Groups, plan: PruningPlan) -> Measure:
        """What a search measures with."""
        if plan.kept or self.measure is None:
            measures = torch.arange(len(self.rows)) % MEASURES == 0
            solves = self.settings.compensation is not None and self.settings.compensation.form == "ridge"
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            solved = Database(self.model, self.groups, [self.rows[~measures]], folder) if solves else None
            measure = CutLosses(self.model, self.groups, candidates, [self.rows[measures]], solved)
            if plan.kept:
                return measure
            self.measure = measure
        return self.measure


def _cut(
    model: PreTrainedModel, plan: PruningPlan, rows: Tensor, wanted: Compensation | None, groups: Groups, on_step: Step
) -> tuple[PreTrainedModel, Sequence[Compensated]]:
    """Step 5; where the dense model is no target, what a matrix put out is, and where nothing can be compensated (what
    goes is read by no linear module), nothing is."""
    forms = () if wanted is None else (wanted, replace(wanted, target="current"))
    for form in dict.fromkeys(forms):
        with suppress(PlanError):
            return cut(model, plan, [rows], form, groups, on_step)
    return cut(model, plan, [rows], None, groups, on_step)


def _share(budget: Budget | None, step: int, steps: int) -> Budget | None:
    """The part of the budget to be met after `step` of `steps`."""
    if budget is None:
        return None
    given = {name: value for name, value in budget.as_dict().items() if value is not None}
    return Budget(**{name: linear(step, steps, value) for name, value in given.items()})
