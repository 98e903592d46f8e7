"""Ours: units by a second-order criterion, widths by a search, what stays solved again, the simplest form that is best.

| step | here | from |
| --- | --- | --- |
| D, loss without some units of a family [nats per token] | `evaluation.cut_losses` | measured |
| importance of units | `Taylor(order=2)`, diagonal Fisher | Ma et al. 2023, arXiv:2305.11627, Eq. 5 |
| widths | `allocation.search` | ours; SPDY, arXiv:2201.13096, searches so for a latency |
| W' of what stays | `compensation`, against the dense model | ours; ridge towards W |

1. Discover groups. Of the calibration sequences, every eighth is set aside for step 6, and a quarter of the others
   measures D.
2. Score the units of all groups.
3. Measure what every family costs alone at some of the widths that it may have, and take the widths that cost least
   within the budget: once with the same widths in every layer, once with widths by layer.
4. With several iterations the sparsity grows, and steps 2 and 3 are repeated in the model as it is cut and compensated
   by then.
5. Cut, and solve the matrices that read what went again.
6. Of the two, the one with the same widths is the result, since any loader takes it, unless the loss of the other is
   lower on the sequences set aside by more than `MARGIN` and by two standard errors.

Every part can be replaced or switched off: another criterion, `ranking` local or global, one form only (`uniform`), no
compensation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.allocation import Budget, Cost, Measure, allocate, check_shares
from secateur.allocation.ranking import RankingName
from secateur.benchmark.costs import Workload
from secateur.compensation import Compensated, Compensation, compensated
from secateur.cutting import PruneResult, Step, cut
from secateur.discovery import discover
from secateur.errors import BudgetError, PlanError
from secateur.evaluation.cut_losses import CutLosses, losses_of_rows
from secateur.groups import Groups
from secateur.importance import Taylor, score
from secateur.plan import PruningPlan
from secateur.schedules import linear
from secateur.surgery import expressible, mask, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ASIDE = 8  # one sequence of so many chooses between forms
MEASURES = 4  # one sequence of so many of the others measures what widths cost
MARGIN = 0.02  # nats per token, 2 % of the perplexity


@dataclass(frozen=True)
class Auto:
    """Settings of one run.

    Attributes:
        budget: what must be removed.
        criterion, reduction: see `score`.
        kinds: the kinds to prune; FFN channels and heads if empty.
        ranking: `search`, or `local` or `global` as for LLM-Pruner.
        iterations: steps over which the sparsity grows.
        uniform: the same widths in every layer or not; None for whichever step 6 chooses.
        compensation: None for none.
        workload: what a budget's `cost_sparsity` is a fraction of.
        round_to, protect_first, protect_last, protect, layer_ratios, kind_ratios: see `allocation.Limits`; those that
            layers differ by need `uniform=False`.
    """

    budget: Budget | None
    criterion: Any = field(default_factory=lambda: Taylor(order=2))
    reduction: str = "sum"
    kinds: tuple[str, ...] = ()
    ranking: RankingName = "search"
    iterations: int = 1
    uniform: bool | None = None
    compensation: Compensation | None = field(default_factory=lambda: Compensation("ridge", "dense"))
    workload: Workload | None = None
    round_to: int = 1
    protect_first: int = 0
    protect_last: int = 0
    protect: tuple[str, ...] = ()
    layer_ratios: Mapping[int, float] | None = None
    kind_ratios: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_shares(self.kind_ratios)
        if self.kinds and (others := [kind for kind in self.kind_ratios if kind not in self.kinds]):
            raise BudgetError(f"a share is asked of {others[0]}, which is not among the kinds to prune: add it to them")


def run(
    model: PreTrainedModel, batches: Sequence[Tensor], settings: Auto, on_step: Step = lambda name: None
) -> PruneResult:
    """Prune `model`, which itself is left as it was.

    Args:
        batches: calibration token ids, each [sequences, length].
        on_step: told the name of each step as it begins: `discover`, `score`, `allocate`, `compensate`, `cut`.

    Returns:
        The result; its `choice` has the loss of each form on the sequences set aside, and the difference with its
        standard error, where there was a choice.

    Raises:
        PlanError: nothing of the kinds can be pruned.
        BudgetError: the budget is out of reach.
        NonFiniteError: a loss or score is NaN or infinite.
    """
    on_step("discover")
    groups = discover(model)
    cost = None if settings.workload is None else settings.workload.without(model, groups)
    forms, why = _forms(settings, sum(map(len, batches)))
    rest, aside = _apart(batches, len(forms) > 1)
    found = {
        uniform: _one_form(model, groups, rest, replace(settings, uniform=uniform), cost, on_step) for uniform in forms
    }
    if len(found) == 1:
        chosen = "uniform" if forms[0] else "per_layer"
        return replace(found[forms[0]], choice={"chosen": chosen, "why": why} if why else {})
    on_step("choose")
    same, free = (losses_of_rows(found[uniform].model, aside) for uniform in (True, False))
    gain = same - free
    error = float(gain.std()) / math.sqrt(len(gain))
    better = float(gain.mean()) > max(MARGIN, 2 * error)
    choice = {
        "uniform": float(same.mean()), "per_layer": float(free.mean()), "gain": float(gain.mean()),
        "standard_error": error, "sequences": len(gain), "chosen": "per_layer" if better else "uniform",
    }  # fmt: skip
    return replace(found[not better], choice=choice)


def _forms(settings: Auto, sequences: int) -> tuple[tuple[bool, ...], str]:
    """The forms to make, uniform or not; and why it is only one of them, where that was not asked for."""
    s = settings
    if s.uniform is not None:
        return (s.uniform,), ""
    if s.protect_first or s.protect_last or s.protect or s.layer_ratios:
        return (False,), "some layers are to be cut otherwise than the rest"
    if sequences < 2 * ASIDE:
        return (True,), f"{sequences} calibration sequences are too few to choose by, 2 x {ASIDE} would do (--samples)"
    return (True, False), ""


def _apart(batches: Sequence[Tensor], some: bool) -> tuple[Tensor, Tensor]:
    """Sequences to work with, and those set aside for the choice between forms, if some are to be."""
    rows = torch.cat(list(batches))
    aside = (torch.arange(len(rows)) % ASIDE == ASIDE - 1) & some
    return rows[~aside], rows[aside]


def _one_form(
    model: PreTrainedModel, groups: Groups, rows: Tensor, settings: Auto, cost: Cost | None, on_step: Step
) -> PruneResult:
    """Steps 2 to 5 for one form."""
    uniform = bool(settings.uniform)
    kinds = settings.kinds or tuple(dict.fromkeys([*groups.kinds_in_blocks(), *settings.kind_ratios]))
    can = expressible(model, groups, kinds, uniform=uniform)
    named = settings.kinds or tuple(settings.kind_ratios)
    candidates, left_whole = select(model, groups, kinds, can, named=named, uniform=uniform)
    plan = PruningPlan({}, {})
    first: dict[str, Tensor] = {}
    for step in range(1, settings.iterations + 1):
        on_step("score")
        with _as_cut(model, plan, rows, settings, groups):
            scores = score(model, candidates, [rows], settings.criterion, settings.reduction)
            for name in plan.kept:
                scores[name][list(plan.removed(name))] = -1.0
            first = first or scores
            on_step("allocate")
            plan = allocate(
                candidates,
                scores,
                _share(settings.budget, step, settings.iterations),
                ranking=settings.ranking,
                uniform=uniform,
                round_to=settings.round_to,
                protect_first=settings.protect_first,
                protect_last=settings.protect_last,
                protect=settings.protect,
                layer_ratios=settings.layer_ratios,
                kind_ratios={k: linear(step, settings.iterations, s) for k, s in settings.kind_ratios.items()},
                feasible=can.feasible,
                ties=can.ties,
                multiples=can.multiples,
                beyond=plan if plan.kept else None,
                measure=_measure(model, groups, candidates, rows, settings),
                cost=cost,
            )
    small, done = _cut(model, plan, rows, settings.compensation, groups, on_step)
    return PruneResult(small, plan, candidates, first, left_whole, done)


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


def _as_cut(
    model: PreTrainedModel, plan: PruningPlan, rows: Tensor, settings: Auto, groups: Groups
) -> AbstractContextManager[Any]:
    """The model as a plan leaves it: compensated, masked, or whole."""
    if not plan.kept:
        return nullcontext()
    if settings.compensation is None:
        return mask(model, plan, groups)
    return compensated(model, plan, [rows], settings.compensation, groups)


def _measure(
    model: PreTrainedModel, groups: Groups, candidates: Groups, rows: Tensor, settings: Auto
) -> Measure | None:
    """What a search measures with."""
    return CutLosses(model, groups, candidates, [rows[::MEASURES]]) if settings.ranking == "search" else None


def _share(budget: Budget | None, step: int, steps: int) -> Budget | None:
    """The part of the budget to be met after `step` of `steps`."""
    if budget is None:
        return None
    given = {name: value for name, value in budget.as_dict().items() if value is not None}
    return Budget(**{name: linear(step, steps, value) for name, value in given.items()})
