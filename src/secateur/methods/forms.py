"""The forms that a cut model can have, and the choice between them by the loss on sequences set aside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from secateur.errors import NonFiniteError
from secateur.evaluation.cut_losses import losses_of_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ASIDE = 4  # one sequence of so many is set aside
FEWEST = 16  # sequences, so that there is a choice
MARGIN = 0.02  # nats per token, 2 % of the perplexity
OF_HIDDEN = (1 / 4, 1 / 2, 3 / 4, 1)  # of the budget's share, what the hidden dimension may lose
SLICES = 32  # of the hidden dimension: whole ones go, so that 4,096 stays a multiple of 128
SHORT = 0.005  # of all parameters: a cut that falls further short of the budget is compared with no other


@dataclass(frozen=True)
class Form:
    """What is cut, and how.

    Attributes:
        name: in results.
        words: for the user.
        uniform: the same widths in every layer, which any loader takes.
        hidden: the hidden dimension, too.
    """

    name: str
    words: str
    uniform: bool
    hidden: bool = False


UNIFORM = Form("uniform", "the same widths in every layer", uniform=True)
HIDDEN = Form("hidden", "the same widths in every layer and a smaller hidden size", uniform=True, hidden=True)
PER_LAYER = Form("per_layer", "widths by layer", uniform=False)
HIDDEN_PER_LAYER = Form("hidden_per_layer", "widths by layer and a smaller hidden size", uniform=False, hidden=True)
FORMS = (UNIFORM, HIDDEN, PER_LAYER, HIDDEN_PER_LAYER)  # plainer ones first


def apart(batches: Sequence[Tensor], some: bool) -> tuple[Tensor, Tensor]:
    """Sequences to work with, and those set aside for the choice, if some are to be."""
    rows = torch.cat(list(batches))
    aside = (torch.arange(len(rows)) % ASIDE == ASIDE - 1) & some
    return rows[~aside], rows[aside]


def hidden_shares(units: int, sparsity: float) -> list[float]:
    """The shares of the hidden dimension to try to leave out, ascending.

    Args:
        units: what it can be cut by: dimensions, or heads where these are tied to it.
    """
    slice_ = max(1, units // SLICES)
    slices = {int(part * sparsity * units / slice_) for part in OF_HIDDEN}
    return [number * slice_ / units for number in sorted(slices) if 0 < number * slice_ < units]


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


class Trial(NamedTuple):
    """A model that was made.

    Attributes:
        share: of the hidden dimension that went.
        losses: of each sequence set aside, float64 [sequences].
    """

    share: float
    losses: Tensor


@dataclass
class Choice:
    """The best of the models made so far, plainer forms first.

    The plainest is the first: any loader takes the same widths in every layer, and a hidden size as before is what
    kernels and packed formats like. A later form must be better than the one taken before it by more than `MARGIN` and
    by two standard errors; between hidden sizes in one form the loss alone decides.
    """

    taken: tuple[Form, Trial] | None = None
    tried: dict[Form, Trial] = field(default_factory=dict)  # of each form the best

    def takes(self, form: Form, trial: Trial) -> bool:
        """Whether this is the best now; `tried` holds it if it is the best of its form."""
        if form in self.tried and gained(self.tried[form], trial)[0] <= 0:
            return False
        self.tried[form] = trial
        if self.taken is not None:
            gain, error = gained(self.taken[1], trial)
            if gain <= (0 if form is self.taken[0] else max(MARGIN, 2 * error)):
                return False
        self.taken = form, trial
        return True

    def told(self) -> dict[str, Any]:
        """For the results: the least mean loss by name of form [nats per token], `chosen`, `sequences`; where the
        hidden dimension was cut, `hidden_shares` by name of form; and `gain`, how much lower the loss of what was
        chosen is than that of the form `over`, with the `standard_error` of that. This is the plainest form, or where
        that was chosen, the best of the others."""
        assert self.taken is not None
        chosen, (plainest, *others) = self.taken[0], self.tried
        found: dict[str, Any] = {form.name: float(trial.losses.mean()) for form, trial in self.tried.items()}
        shares = {form.name: trial.share for form, trial in self.tried.items() if form.hidden}
        if others:
            over = plainest if chosen is not plainest else min(others, key=lambda form: found[form.name])
            gain, error = gained(self.tried[over], self.taken[1])
            found |= {"gain": gain, "standard_error": error, "over": over.name}
        found |= {"hidden_shares": shares} if shares else {}
        return found | {"sequences": len(self.taken[1].losses), "chosen": chosen.name}


def gain_in_words(choice: Mapping[str, Any]) -> str:
    """How the perplexity of what was chosen compares with that of another form; empty if it is the only one.

    Args:
        choice: as `Choice.told` has it.
    """
    if "over" not in choice:
        return ""
    change, words = math.exp(-choice["gain"]) - 1, next(form.words for form in FORMS if form.name == choice["over"])
    side = "lower" if change < 0 else "higher"
    return f"{abs(change):.1%} {side} than with {words}, standard error {choice['standard_error']:.1%}"


def gained(before: Trial, now: Trial) -> tuple[float, float]:
    """How much lower the loss is, and the standard error of that [nats per token]."""
    gains = before.losses - now.losses
    return float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
