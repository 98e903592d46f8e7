"""The last step of methods that cut at once: slice, with or without compensation, and what is handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.compensation import Compensated, Compensation, compensate_sliced, compensated, cuts_hidden
from secateur.discovery import discover
from secateur.groups import Groups
from secateur.plan import PruningPlan
from secateur.surgery import slice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Step = Callable[[str], None]


@dataclass(frozen=True)
class PruneResult:
    """The cut model, the plan that cuts it, and what was left whole.

    Attributes:
        model: the smaller model.
        plan: units kept.
        groups: those of the original that could lose units.
        scores: importance per group in the whole model, at the first iteration [units].
        left_whole: family -> why it was not pruned although its kind was to be.
        compensated: the matrices that make up for what went.
        fallback: why that is not as asked; empty if it is.
        choice: what was tried and how it was chosen from, where a method does; see there.
        criteria: group -> name of the criterion that its scores are of, where a method chooses one for each.
    """

    model: PreTrainedModel
    plan: PruningPlan
    groups: Groups
    scores: Mapping[str, Tensor]
    left_whole: Mapping[str, str] = field(default_factory=dict)
    compensated: Sequence[Compensated] = ()
    fallback: str = ""
    choice: Mapping[str, Any] = field(default_factory=dict)
    criteria: Mapping[str, str] = field(default_factory=dict)


def cut(
    model: PreTrainedModel,
    plan: PruningPlan,
    batches: Sequence[Tensor],
    compensation: Compensation | None,
    groups: Groups | None = None,
    on_step: Step = lambda name: None,
) -> tuple[PreTrainedModel, Sequence[Compensated]]:
    """The model without the units that a plan removes, compensated or not; `model` is left as it was.

    If the plan cuts the hidden dimension and the target is `dense` or `halfway`, matrices are solved in the cut model,
    those that read that dimension among them; all else is solved in `model` before it is cut, where they stay as they
    are.
    """
    if compensation is None:
        on_step("cut")
        return slice(model, plan, groups), ()
    groups = groups or discover(model)
    if compensation.form == "ridge" and compensation.dense_share and cuts_hidden(plan, groups):
        on_step("cut")
        small = slice(model, plan, groups)
        on_step("compensate")
        return small, compensate_sliced(small, model, plan, batches, groups, compensation)
    on_step("compensate")
    with compensated(model, plan, batches, compensation, groups) as done:
        on_step("cut")
        return slice(model, plan, groups), done
