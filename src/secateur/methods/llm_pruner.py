"""LLM-Pruner: on the structural pruning of large language models (Ma et al. 2023, arXiv:2305.11627).

| paper | here |
| --- | --- |
| group G: neurons with in- or out-degree 1 triggered together (3.1) | `Group`, from the traced computation |
| I(W_i), vector-wise importance (Eq. 3) | `Taylor(granularity="vector")` |
| I(W_i^k), element-wise, first order ("Element1"), second with diagonal Fisher ("Element2") (Eq. 5) | `Taylor` |
| aggregation over the group: summation, production, max, last-only (3.2) | `reduction` |
| block-wise, channel-wise, layer-wise | `mode` |

1. Discover the groups of the chosen mode.
2. Score them on a few calibration sequences.
3. Allocate the budget; with several iterations the sparsity grows linearly and the scores are refreshed in between.
4. Slice.

Recovery (step 5 of the paper, LoRA on instructions) is `secateur.recovery`.

Deviations: the budget is a share of *parameters* unless `unit_sparsity` asks for the paper's share of groups; query
heads are summed with the KV head they really share; global ranking divides importance by the parameters removed;
layer-wise pruning chooses layers by importance, the reference's "first N" is `layer_choice="first"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from secateur.allocation import Budget, allocate, check_shares
from secateur.compensation import Compensation
from secateur.cutting import PruneResult, Step, cut
from secateur.discovery import discover
from secateur.errors import BudgetError
from secateur.groups import Groups
from secateur.importance import score
from secateur.plan import PruningPlan
from secateur.schedules import linear
from secateur.surgery import expressible, mask, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["block-wise", "channel-wise", "layer-wise"]


@dataclass(frozen=True)
class LLMPruner:
    """Settings of one run; defaults are the paper's, except that the budget counts parameters.

    Attributes:
        budget: what must be removed.
        mode: which structures: FFN channels and heads, the hidden dimension, or whole layers.
        kinds: the kinds to prune instead of the mode's. Of one that is named here or in `kind_ratios`, something must
            be prunable; what a mode stands for may stay whole.
        kind_ratios: kind -> share of its units to remove; the other kinds meet the budget.
        criterion: an object or function that `score` accepts.
        reduction: how members' scores become the group's.
        ranking: `local` removes the same share everywhere, `global` the least important per parameter.
        iterations: steps over which the sparsity grows, scores refreshed in each.
        uniform: the same widths in every layer, so that stock classes load the result.
        protect: names of groups to leave whole, such as those a knowledge distribution finds most sensitive.
        layer_choice: for layer-wise mode, `importance`, or the reference's `first` (keep the first ones).
        compensation: how the matrices that read what goes make up for it, on the calibration text; ours, None for none.

    Raises:
        BudgetError: a share of `kind_ratios` lies outside [0, 1), or is asked of a kind that `kinds` leaves out.
    """

    budget: Budget | None
    criterion: Any
    mode: Mode = "block-wise"
    kinds: tuple[str, ...] = ()
    reduction: str = "sum"
    ranking: Literal["local", "global"] = "local"
    iterations: int = 1
    uniform: bool = True
    round_to: int = 1
    protect_first: int = 0
    protect_last: int = 0
    protect: tuple[str, ...] = ()
    layer_ratios: Mapping[int, float] | None = None
    kind_ratios: Mapping[str, float] = field(default_factory=dict)
    layer_choice: Literal["importance", "first"] = "importance"
    compensation: Compensation | None = None

    def __post_init__(self) -> None:
        check_shares(self.kind_ratios)
        if self.kinds and (others := [kind for kind in self.kind_ratios if kind not in self.kinds]):
            raise BudgetError(f"a share is asked of {others[0]}, which is not among the kinds to prune: add it to them")


def run(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], settings: LLMPruner, on_step: Step = lambda name: None
) -> PruneResult:
    """Prune `model`, which itself is left as it was.

    Args:
        batches: calibration token ids, each [sequences, length].
        on_step: told the name of each step as it begins: `discover`, `score`, `allocate`, `compensate`, `cut`.

    Raises:
        PlanError: nothing of the mode's kinds, or of a kind named in the settings, can be pruned.
        BudgetError: the budget is out of reach.
        NonFiniteError: a loss or score is NaN or infinite.
    """
    on_step("discover")
    groups = discover(model)
    kinds = settings.kinds or tuple(dict.fromkeys([*kinds_of(settings.mode, groups), *settings.kind_ratios]))
    can = expressible(model, groups, kinds, uniform=settings.uniform)
    named = settings.kinds or tuple(settings.kind_ratios)
    candidates, left_whole = select(model, groups, kinds, can, named=named, uniform=settings.uniform)

    plan = PruningPlan({}, {})
    first: dict[str, torch.Tensor] = {}
    for step in range(1, settings.iterations + 1):
        on_step("score")
        scores = importance(model, groups, candidates, batches, settings, plan)
        first = first or scores
        on_step("allocate")
        plan = allocate(
            candidates,
            scores,
            _share(settings.budget, step, settings.iterations),
            ranking=settings.ranking,
            uniform=settings.uniform,
            round_to=settings.round_to,
            protect_first=settings.protect_first,
            protect_last=settings.protect_last,
            protect=settings.protect,
            layer_ratios=settings.layer_ratios,
            kind_ratios=_ratios(settings.kind_ratios, step, settings.iterations),
            feasible=can.feasible,
            ties=can.ties,
            multiples=can.multiples,
        )
    small, done = cut(model, plan, batches, settings.compensation, groups, on_step)
    return PruneResult(small, plan, candidates, first, left_whole, done)


def kinds_of(mode: Mode, groups: Groups) -> tuple[str, ...]:
    """The kinds a mode prunes."""
    if mode == "channel-wise":
        return ("hidden",)
    if mode == "layer-wise":
        return ("layer",)
    return groups.kinds_in_blocks()


def importance(
    model: PreTrainedModel,
    groups: Groups,
    candidates: Groups,
    batches: Sequence[torch.Tensor],
    settings: LLMPruner,
    plan: PruningPlan,
) -> dict[str, torch.Tensor]:
    """Scores of the candidates in the model as `plan` leaves it; units already removed rank below all others."""
    if settings.mode == "layer-wise" and settings.layer_choice == "first":
        return {g.name: torch.arange(g.units, 0, -1, dtype=torch.float32) for g in candidates}
    with mask(model, plan, groups):
        scores = score(model, candidates, batches, settings.criterion, settings.reduction)
    for name in plan.kept:
        scores[name][list(plan.removed(name))] = -1.0
    return scores


def _share(budget: Budget | None, step: int, steps: int) -> Budget | None:
    """The part of the budget to be met after `step` of `steps`."""
    if budget is None:
        return None
    if budget.param_sparsity is not None:
        return replace(budget, param_sparsity=linear(step, steps, budget.param_sparsity))
    assert budget.unit_sparsity is not None
    return replace(budget, unit_sparsity=linear(step, steps, budget.unit_sparsity))


def _ratios(ratios: Mapping[str, float], step: int, steps: int) -> dict[str, float]:
    """The part of each kind's share to be removed after `step` of `steps`."""
    return {kind: linear(step, steps, share) for kind, share in ratios.items()}
