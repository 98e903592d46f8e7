"""The forms that a cut model can have, and the choice between them by the loss on sequences set aside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import NonFiniteError
from secateur.evaluation.cut_losses import losses_of_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ASIDE = 4  # one sequence of so many is set aside
FEWEST = 16  # sequences, so that there is a choice
MARGIN = 0.02  # nats per token, 2 % of the perplexity


@dataclass(frozen=True)
class Form:
    """What is cut, and how.

    Attributes:
        name: in results.
        uniform: the same widths in every layer, which any loader takes.
        hidden: the hidden dimension, too.
    """

    name: str
    uniform: bool
    hidden: bool = False


UNIFORM, HIDDEN, PER_LAYER = Form("uniform", True), Form("hidden", True, hidden=True), Form("per_layer", False)


def apart(batches: Sequence[Tensor], some: bool) -> tuple[Tensor, Tensor]:
    """Sequences to work with, and those set aside for the choice, if some are to be."""
    rows = torch.cat(list(batches))
    aside = (torch.arange(len(rows)) % ASIDE == ASIDE - 1) & some
    return rows[~aside], rows[aside]


def losses_aside(model: PreTrainedModel, aside: Tensor) -> Tensor:
    """The loss of each sequence set aside, float64 [sequences].

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    losses = losses_of_rows(model, aside)
    if not torch.isfinite(losses).all():
        raise NonFiniteError(
            "the cut model's loss on the sequences set aside is not finite; check the dtype of the model"
        )
    return losses


def better(losses: Mapping[Form, Tensor]) -> tuple[Form, dict[str, Any]]:
    """The form to take, and how it was chosen.

    The plainest is the first of them: any loader takes the same widths in every layer, and a hidden size as before is
    what kernels and packed formats like. A later one must be better than the best before it by more than `MARGIN` and
    by two standard errors.

    Args:
        losses: form -> loss of each sequence set aside, float64 [sequences]; plainer forms first.

    Returns:
        The form; and the mean loss by name of form, `chosen`, `sequences`, and of the last form `gain`, how much lower
        its loss is than that of the best before it, and the `standard_error` of that [nats per token].
    """
    chosen, *others = losses
    told: dict[str, Any] = {form.name: float(loss.mean()) for form, loss in losses.items()}
    for form in others:
        gains = losses[chosen] - losses[form]
        gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
        told |= {"gain": gain, "standard_error": error}
        chosen = form if gain > max(MARGIN, 2 * error) else chosen
    return chosen, told | {"sequences": len(losses[chosen]), "chosen": chosen.name}
