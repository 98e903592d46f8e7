"""LoRA-guided importance while a trainer trains: a moving average over steps, of the units that are left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from secateur.importance.lora_guided import LoraGuided, TrueGradients, Variant
from secateur.recovery.gradual import zeros
from secateur.recovery.mixed_precision import loss_scale, unscaled
from secateur.surgery.live import LiveModel


class GuidedAverage:
    """Moving average of the importance of every unit of the uncut model (LoRAPrune, arXiv:2305.18403, Eq. 11).

    Args:
        variant, normalise: see `LoraGuided`.
        past: weight of the past, lambda.

    Attributes:
        values: group -> average, [units]; of units that are gone, the last one.
    """

    def __init__(self, variant: Variant = "lora", normalise: bool = True, past: float = 0.9) -> None:
        self.criterion = LoraGuided(variant, normalise)
        self.past = past
        self.values: dict[str, Tensor] = {}
        self.gradients = TrueGradients()

    def prepare(self, live: LiveModel, names: tuple[str, ...]) -> None:
        """Begin at zero."""
        self.values = zeros(live, names)

    def begin(self, live: LiveModel) -> None:
        """Collect what the variant `grad` needs."""
        if self.criterion.variant == "grad":
            self.gradients.begin(live.base, [live.groups.named(name) for name in self.values])

    def update(self, live: LiveModel, optimizer: Any) -> None:
        """Score what is left, before an optimizer step; a step that mixed precision will skip counts for nothing.

        Raises:
            NonFiniteError: a score is NaN or infinite.
        """
        if not unscaled(optimizer):
            self.skip()
            return
        gradients = self.gradients.taken(loss_scale(optimizer))
        now = self.criterion.scores(live.base, live.built, live.masked.kept, list(self.values), gradients)
        kept = live.plan.kept
        for name, score in now.items():
            left = list(kept[name]) if name in kept else slice(None)
            self.values[name][left] = self.past * self.values[name][left] + (1 - self.past) * score

    def skip(self) -> None:
        """Forget what was collected for a step that is not to count."""
        self.gradients.found.clear()

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Go on with an average of an earlier run."""
        self.values = dict(values)

    def end(self) -> None:
        """Collect no longer."""
        self.gradients.end()
