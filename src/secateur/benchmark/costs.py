"""What a cut saves, measured on the smaller model: multiply-accumulates, bytes, seconds. For `allocation.costs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from secateur.benchmark.clock import now
from secateur.benchmark.macs import count_macs, shapes_only
from secateur.errors import BudgetError
from secateur.groups import Groups
from secateur.plan import PruningPlan
from secateur.surgery import slice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.allocation.costs import Cost, Removed

What = Literal["macs", "memory", "latency"]
REPEATS = 7


@dataclass(frozen=True)
class Workload:
    """What the model is used for.

    Attributes:
        what: `macs` of a forward pass, `memory` of weights and of the cache after it [bytes], or its `latency`
            [seconds], the least of several.
        batch: sequences.
        length: tokens of each.
    """

    what: What
    batch: int = 1
    length: int = 128

    def of(self, *models: PreTrainedModel) -> list[float]:
        """The cost of each model; seconds are taken in turn, so that other work on the machine meets all alike.

        Raises:
            BudgetError: a model has fewer positions than the workload has tokens.
        """
        for model in models:
            positions = getattr(model.config, "max_position_embeddings", None)
            if positions is not None and self.length > positions:
                raise BudgetError(
                    f"the workload has {self.length} tokens, and the model takes {positions}: give a shorter one"
                )
        measures: dict[str, Callable[[Sequence[PreTrainedModel]], list[float]]] = {
            "macs": lambda found: [float(self.batch * count_macs(m, self.length)) for m in found],
            "memory": lambda found: [self._bytes(m) for m in found],
            "latency": self._seconds,
        }
        return measures[self.what](models)

    def without(self, model: PreTrainedModel, groups: Groups) -> Cost:
        """The costs of a model without some units, none of them measured twice."""
        known: dict[tuple[tuple[str, tuple[int, ...]], ...], float] = {}

        def cost(cuts: Sequence[Removed]) -> list[float]:
            if () not in known:
                (known[()],) = self.of(model)
            keys = [tuple(sorted(cut.items())) for cut in cuts]
            for key, cut in zip(keys, cuts, strict=True):
                if key not in known:
                    known[key] = self._smaller(_without(model, groups, cut), model, known[()])
            return [known[key] for key in keys]

        return cost

    def _smaller(self, small: PreTrainedModel, model: PreTrainedModel, whole: float) -> float:
        """The cost of a cut model; of seconds, that of the whole one times the ratio to it, measured in turn."""
        if self.what != "latency":
            return self.of(small)[0]
        dense, seconds = self.of(model, small)
        return whole * seconds / dense

    def _bytes(self, model: PreTrainedModel) -> float:
        weights = sum(t.numel() * t.element_size() for t in {id(t): t for t in model.parameters()}.values())
        with shapes_only(model) as run:
            cache = run(self.batch, self.length, use_cache=True).past_key_values
        layers = getattr(cache, "layers", ())
        kept = [t for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        size = torch.empty((), dtype=model.dtype).element_size()
        return float(weights + sum(t.numel() * size for t in kept))

    @torch.no_grad()
    def _seconds(self, models: Sequence[PreTrainedModel]) -> list[float]:
        device = models[0].device
        ids = torch.zeros(self.batch, self.length, dtype=torch.long, device=device)
        training = [model.training for model in models]
        taken: list[list[float]] = [[] for _ in models]
        try:
            for _ in range(REPEATS + 1):  # the first warms up
                for model, seconds in zip(models, taken, strict=True):
                    model.eval()
                    begin = now(device)
                    model(input_ids=ids, use_cache=False)
                    seconds.append(now(device) - begin)
        finally:
            for model, before in zip(models, training, strict=True):
                model.train(before)
        return [min(seconds[1:]) for seconds in taken]


def _without(model: PreTrainedModel, groups: Groups, cut: Removed) -> PreTrainedModel:
    units = {name: groups.named(name).units for name in cut}
    kept = {name: tuple(u for u in range(units[name]) if u not in set(gone)) for name, gone in cut.items()}
    return slice(model, PruningPlan(kept, units), groups, reloadable=False)
