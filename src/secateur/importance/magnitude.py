"""Importance without data: weight magnitude and chance."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from secateur.importance.reduce import Axis, along

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Magnitude:
    """Sum of abs(w)^p over a unit's weights (no root is taken, as in LLM-Pruner's code)."""

    p: Literal[1, 2] = 2

    def positions(
        self, model: PreTrainedModel, wanted: dict[str, list[int | None]], batches: Sequence[Tensor]
    ) -> dict[Axis, Tensor]:
        parameters = dict(model.named_parameters())
        found: dict[Axis, Tensor] = {}
        for name, dims in wanted.items():
            powers = parameters[name].detach().float().abs().pow(self.p)
            found |= {(name, dim): along(powers, dim) for dim in dims}
        return found


@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1) for every position, the same for the same seed and parameter."""

    seed: int = 0

    def positions(
        self, model: PreTrainedModel, wanted: dict[str, list[int | None]], batches: Sequence[Tensor]
    ) -> dict[Axis, Tensor]:
        parameters = dict(model.named_parameters())
        found: dict[Axis, Tensor] = {}
        for name, dims in wanted.items():
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
            for dim in dims:
                shape = () if dim is None else (parameters[name].shape[dim],)
                found[name, dim] = torch.rand(shape, generator=generator)
        return found
