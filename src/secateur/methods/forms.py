"""The forms that a cut model can have, and the choice between them by the loss on sequences set aside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def better(losses: Mapping[Form, Tensor]) -> tuple[Form, dict[str, Any]]:
    """The form to take, and how it was chosen.

    Of those with the same widths in every layer, which any loader takes, it is the one of the least loss. Widths by
    layer must be better than that one by more than `MARGIN` and by two standard errors.

    Args:
        losses: of each sequence set aside, float64 [sequences].

    Returns:
        The form; and the mean loss by name of form, `chosen`, `sequences`, and where there are both kinds `gain`, how
        much lower the loss of widths by layer is than the least of the others, and its `standard_error` [nats per
        token].
    """
    means = {form: float(loss.mean()) for form, loss in losses.items()}
    chosen = min((form for form in losses if form.uniform), key=lambda form: means[form], default=PER_LAYER)
    told: dict[str, Any] = {form.name: mean for form, mean in means.items()}
    if chosen is not PER_LAYER and PER_LAYER in losses:
        gains = losses[chosen] - losses[PER_LAYER]
        gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
        told |= {"gain": gain, "standard_error": error}
        chosen = PER_LAYER if gain > max(MARGIN, 2 * error) else chosen
    return chosen, told | {"sequences": len(losses[chosen]), "chosen": chosen.name}
