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
   least together within the budget: once with the same widths in every layer, once with widths by layer. Either form is
   made with smaller hidden sizes, too, as long as the loss of step 6 falls: widths of the same curves make up the rest
   of the budget.
4. With several iterations the sparsity grows, and steps 2 and 3 are repeated in the model as it is cut and compensated
   by then. Or the units of these widths are chosen again, block by block, in the model as it is cut and compensated
   before each (`reselection`).
5. Cut, and solve the matrices that read what went again.
6. Of the forms the plainest is the result, unless another is surely better on the sequences set aside (`forms.Choice`).

Every part can be replaced or switched off: one criterion, `ranking` local or global, fewer forms (`uniform`, `kinds`),
no compensation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.allocation import Budget, check_shares
from secateur.allocation.ranking import RankingName
from secateur.benchmark.costs import Workload
from secateur.compensation import Compensation
from secateur.cutting import PruneResult, Step
from secateur.discovery import discover
from secateur.errors import BudgetError, NonFiniteError, PlanError, SecateurError
from secateur.groups import Groups
from secateur.importance import CRITERIA
from secateur.methods.auto_steps import Steps
from secateur.methods.forms import FEWEST, FORMS, PER_LAYER, UNIFORM, Choice, Form, Trial, apart, losses_aside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        reselect: choose the units of the widths found again, block by block (`reselection`).
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
    reselect: bool = False
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
        """Whether forms without a part of the hidden dimension are made: where nothing is said that they do not fit."""
        counts = self.budget is not None and self.budget.param_sparsity is not None
        said = self.kinds or self.kind_ratios or not self.hidden
        return counts and self.ranking == "search" and self.iterations == 1 and not said


def run(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    settings: Auto,
    on_step: Step = lambda name: None,
    on_trial: Callable[[Form, Trial], None] = lambda form, trial: None,
) -> PruneResult:
    """Prune `model`, which itself is left as it was.

    Args:
        batches: calibration token ids, each [sequences, length].
        on_step: told the name of each step as it begins: `discover`, `score`, `allocate`, `compensate`, `cut`.
        on_trial: told each model that is compared with others, once it is made.

    Returns:
        The result; its `choice` says which form it has, and where there were several, what `Choice.told` tells.

    Raises:
        PlanError: nothing of the kinds can be pruned.
        BudgetError: the budget is out of reach.
        NonFiniteError: a loss or score is NaN or infinite.
    """
    on_step("discover")
    groups = discover(model)
    forms, why = _forms(settings, groups, sum(map(len, batches)))
    rest, aside = apart(batches, len(forms) > 1)
    choice, best = Choice(), None
    refused: dict[Form, SecateurError] = {}
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(model, groups, rest, settings, Path(folder), on_step)
        for form in forms:
            try:
                shares = steps.shares(form)
            except (PlanError, BudgetError) as error:  # a class may be able to have some forms only
                refused[form] = error.with_traceback(None)  # which would hold the model
                continue
            for share in shares:
                if share is None and choice.tried:  # which is for where nothing else can be made
                    break
                try:
                    result, trial = _made(steps, form, share, aside)
                except (PlanError, BudgetError, NonFiniteError) as error:
                    refused[form] = error.with_traceback(None)
                    continue
                if len(aside):
                    on_trial(form, trial)
                best = result if choice.takes(form, trial) else best
                del result  # which is held no longer if it is not the best
                if choice.tried[form] is not trial:  # the loss falls no more
                    break
    if best is None:
        raise _refusal(refused, forms)
    if len(choice.tried) > 1:
        return replace(best, choice=choice.told())
    why = why or _why_alone(refused, choice)
    return replace(best, choice={"chosen": next(iter(choice.tried)).name, "why": why} if why else {})


def _refusal(refused: Mapping[Form, SecateurError], forms: Sequence[Form]) -> SecateurError:
    """What to tell where no form can be made; where the budget is the matter, cutting the hidden dimension reaches
    furthest."""
    furthest = (error for form, error in refused.items() if form.hidden and isinstance(error, BudgetError))
    return next(furthest, refused[forms[0]])


def _why_alone(refused: Mapping[Form, SecateurError], choice: Choice) -> str:
    """Why there is no other form, without what a user could do about it, who need not."""
    reasons = dict.fromkeys(str(e).partition(";")[0] for form, e in refused.items() if form not in choice.tried)
    return f"no other form is possible: {'; '.join(reasons)}" if reasons else ""


def _made(steps: Steps, form: Form, share: float | None, aside: Tensor) -> tuple[PruneResult, Trial]:
    """The model cut to a form, and its loss on the sequences set aside."""
    result = steps.form(form, share)
    hidden = result.plan.provenance["allocation"]["shares"].get("hidden", {})
    return result, Trial(hidden.get("share", 0.0), losses_aside(result.model, aside))


def _forms(settings: Auto, groups: Groups, sequences: int) -> tuple[list[Form], str]:
    """The forms to make; and why it is only one of them, where that was not asked for."""
    s = settings
    if s.protect_first or s.protect_last or s.protect or s.layer_ratios:
        return [UNIFORM if s.uniform else PER_LAYER], "some layers are to be cut otherwise" if s.uniform is None else ""
    hidden = s.tries_hidden and bool(groups.of_kinds(["hidden"]))
    forms = [f for f in FORMS if s.uniform in (None, f.uniform) and (hidden or not f.hidden)]
    if len(forms) > 1 and sequences < FEWEST:
        return forms[:1], f"{sequences} calibration sequences are too few to choose by, {FEWEST} would do (--samples)"
    return forms, ""
