"""Taylor importance of LLM-Pruner (Ma et al. 2023, arXiv:2305.11627).

| paper | here |
| --- | --- |
| Eq. 3, vector-wise | `Taylor(granularity="vector")`: per position p of an axis, abs(sum of W G over the rest) |
| Eq. 5, first order ("Element1") | `Taylor(order=1)`: sum of abs(W G) |
| Eq. 5, second order ("Element2") | `Taylor(order=2)`: sum of W^2 F, F the diagonal Fisher |
| Eq. 5, both | `Taylor(order="mixed")`: sum of abs(W G - W^2 F / 2) |

G is the gradient of the mean token loss over the whole calibration set [nats per token], F the mean over *sequences* of
the squared gradient of each sequence's mean loss, in float32 (the reference's float16 squares underflow). Scores
estimate a loss change in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from secateur.importance.reduce import Axis, along
from secateur.importance.streaming import backward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNKS = 4  # parts of the model whose gradients are held in turn where a formula needs them whole


@dataclass(frozen=True)
class Taylor:
    """Loss change if a unit's weights were zero.

    Attributes:
        order: 1, 2 (diagonal Fisher) or `mixed`.
        granularity: `element` or, for order 1, `vector`.
        gradient_checkpointing: recompute activations to save memory.

    Memory: vector, second order, and first order on a single batch hold no gradient beyond the parameter in hand. First
    order on several batches and `mixed` are not linear in what one backward pass gives; they are computed exactly in
    `CHUNKS` passes, each of which holds float32 sums for a quarter of the scored parameters.
    """

    order: Literal[1, 2, "mixed"] = 1
    granularity: Literal["element", "vector"] = "element"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.granularity == "vector" and self.order != 1:
            raise ValueError("vector-wise Taylor importance is of first order")

    def positions(
        self, model: PreTrainedModel, wanted: dict[str, list[int | None]], batches: Sequence[Tensor]
    ) -> dict[Axis, Tensor]:
        """Importance of every position of every wanted axis, float32; 0 where the text never reaches (idle experts)."""
        found = self._reached(model, wanted, batches)
        parameters = dict(model.named_parameters())
        for name, dim in ((n, d) for n, dims in wanted.items() for d in dims):
            if (name, dim) not in found:
                found[name, dim] = along(torch.zeros_like(parameters[name], dtype=torch.float32), dim)
        return found

    def _reached(
        self, model: PreTrainedModel, wanted: dict[str, list[int | None]], batches: Sequence[Tensor]
    ) -> dict[Axis, Tensor]:
        """Importance where there are gradients."""
        sequences = [row[None] for batch in batches for row in batch]
        if self.order == "mixed":
            return self._whole(model, wanted, sequences, second_order=True)
        if self.order == 1 and self.granularity == "element" and len(batches) > 1:
            return self._whole(model, wanted, batches, second_order=False)

        found: dict[Axis, Tensor] = {}

        def visit(name: str, weight: Tensor, grad: Tensor) -> None:
            salience = weight.float() * grad.float()
            if self.order == 2:
                salience = salience.square()
            elif self.granularity == "element":
                salience = salience.abs()
            for dim in wanted[name]:
                part = along(salience, dim)
                found[name, dim] = found[name, dim] + part if (name, dim) in found else part

        passes = sequences if self.order == 2 else batches
        shares = [1.0] * len(passes) if self.order == 2 else _shares(batches)
        backward(model, wanted, passes, visit, weights=shares, gradient_checkpointing=self.gradient_checkpointing)
        if self.order == 2:
            return {axis: values / len(sequences) for axis, values in found.items()}
        return {axis: values.abs() for axis, values in found.items()}

    def _whole(
        self,
        model: PreTrainedModel,
        wanted: dict[str, list[int | None]],
        batches: Sequence[Tensor],
        *,
        second_order: bool,
    ) -> dict[Axis, Tensor]:
        """Exact element-wise scores whose formula needs the summed gradient of each parameter."""
        found: dict[Axis, Tensor] = {}
        names = list(wanted)
        shares = _shares(batches)
        parameters = dict(model.named_parameters())
        for start in range(min(CHUNKS, len(names))):
            chunk = names[start::CHUNKS]
            first: dict[str, Tensor] = {}
            fisher: dict[str, Tensor] = {}

            def visit(name: str, weight: Tensor, grad: Tensor, first=first, fisher=fisher) -> None:  # type: ignore[no-untyped-def]
                g = grad.float()
                first[name] = first[name].add_(g) if name in first else g.clone()
                if second_order:
                    square = (g * len(batches)).square() / len(batches)  # the pass was weighted by 1 / len(batches)
                    fisher[name] = fisher[name].add_(square) if name in fisher else square

            backward(model, chunk, batches, visit, weights=shares, gradient_checkpointing=self.gradient_checkpointing)
            for name in first:
                weight = parameters[name].detach().float()
                salience = weight * first[name]
                if second_order:
                    salience = salience - 0.5 * weight.square() * fisher[name]
                for dim in wanted[name]:
                    found[name, dim] = along(salience.abs(), dim)
        return found


def _shares(batches: Sequence[Tensor]) -> list[float]:
    """Each batch's share of the predicted tokens, so that weighted losses add up to the mean over the whole set."""
    predicted = [b.shape[0] * (b.shape[1] - 1) for b in batches]
    return [n / sum(predicted) for n in predicted]


def gradients(model: PreTrainedModel, names: list[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Whole gradients of the mean token loss, float32; for criteria of the user's own."""
    found: dict[str, Tensor] = {}

    def visit(name: str, weight: Tensor, grad: Tensor) -> None:
        found[name] = found[name].add_(grad.float()) if name in found else grad.float().clone()

    backward(model, names, batches, visit, weights=_shares(batches))
    parameters = dict(model.named_parameters())
    return {n: found[n] if n in found else torch.zeros_like(parameters[n], dtype=torch.float32) for n in names}
