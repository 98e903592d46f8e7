"""Importance: how much is lost if a unit goes. Scores are per unit, higher means keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from secateur.errors import PlanError
from secateur.groups import Group
from secateur.importance.ablation import leave_one_out
from secateur.importance.gates import Gate
from secateur.importance.magnitude import Magnitude, Random
from secateur.importance.reduce import REDUCTIONS, Axis, axes_of, group_scores
from secateur.importance.taylor import Taylor, gradients
from secateur.packed import refuse_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CRITERIA", "REDUCTIONS", "Criterion", "Gate", "Magnitude", "Random", "Taylor", "leave_one_out",
    "score",
]  # fmt: skip


class Criterion(Protocol):
    """Anything that scores positions of parameters."""

    def positions(
        self, model: PreTrainedModel, wanted: dict[str, list[int | None]], batches: Sequence[Tensor]
    ) -> dict[Axis, Tensor]:
        """(parameter, dimension) -> importance of each position, for the wanted dimensions of each parameter."""


GroupCriterion = Callable[[Group, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]

CRITERIA: dict[str, Criterion | Gate] = {
    "random": Random(),
    "l1": Magnitude(p=1),
    "l2": Magnitude(p=2),
    "taylor-vector": Taylor(granularity="vector"),
    "taylor-1": Taylor(order=1),
    "taylor-2": Taylor(order=2),
    "taylor-mixed": Taylor(order="mixed"),
    "gate": Gate(),
    "gate-1": Gate(order=1),
    "gate-mixed": Gate(order="mixed"),
}


def score(
    model: PreTrainedModel,
    groups: Sequence[Group],
    batches: Sequence[Tensor],
    criterion: Criterion | Gate | GroupCriterion,
    reduction: str = "sum",
) -> dict[str, Tensor]:
    """Importance of every unit of `groups`.

    Args:
        batches: calibration token ids, each [sequences, length]; every token but the first of a sequence is a label.
        criterion: one of this package's, or a function (group, weights, gradients) -> scores [units]. For a function
            the gradients of all scored parameters are held at once.
        reduction: how members' scores become the group's: sum, mean, max, prod or first (the first member alone).

    Returns:
        Group name -> float32 CPU tensor [units]; higher means keep.

    Raises:
        NonFiniteError: a loss or score is NaN or infinite.
        PlanError: weights are quantised, so that they have no gradients and other values than are stored, or what
            `Gate` refuses.
        ValueError: no such reduction, or one for a criterion that scores units as a whole.
    """
    if isinstance(criterion, Gate):
        if reduction != "sum":
            raise ValueError(f"gates score units as a whole, so there is nothing to reduce by {reduction}")
        return criterion.units(model, list(groups), batches)
    refuse_packed(model, "scored by these criteria", PlanError)
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; known: {', '.join(REDUCTIONS)}")
    chosen = list(groups)
    parameters = dict(model.named_parameters())
    wanted = axes_of(chosen, parameters)
    if hasattr(criterion, "positions"):
        return group_scores(chosen, criterion.positions(model, wanted, batches), reduction)
    grads = gradients(model, list(wanted), batches)
    weights = {n: parameters[n].detach() for n in wanted}
    return {g.name: criterion(g, weights, grads).detach().float().cpu() for g in chosen}
