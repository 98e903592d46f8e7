"""The dense model as a teacher that is in memory and asked at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from secateur.errors import NonFiniteError
from secateur.recovery.divergence import SoftTargets, soft_targets
from secateur.recovery.examples import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.recovery.settings import Distillation

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of a batch.

    Attributes:
        targets: for the N tokens that predict a labelled one, row by row.
        states: hidden states to compare with, [batch, length, width] each; none if they were not asked for.
    """

    targets: SoftTargets
    states: Sequence[Tensor] = ()


class Teacher(Protocol):
    """Says of a batch (`input_ids`, `attention_mask`, `labels`, each [batch, length]) what is to be learnt."""

    def __call__(self, batch: Batch) -> Lesson: ...


class OnlineTeacher:
    """A model in memory, asked without gradients and without dropout.

    Args:
        model: in its own dtype.
        settings: of the distillation.
        autocast: run it in bfloat16 as the student's forward pass is, so that equal models say the same.
        layers: numbers of the hidden states to give, 0 being that before the first layer.
    """

    def __init__(self, model: PreTrainedModel, settings: Distillation, autocast: bool, layers: Sequence[int]) -> None:
        self.model, self.settings, self.autocast, self.layers = model, settings, autocast, layers

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Lesson:
        """Raise `NonFiniteError` if a logit is NaN."""
        device, labels = self.model.device, batch["labels"]
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with evaluating(self.model), torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            out = self.model(**inputs, use_cache=False, output_hidden_states=bool(self.layers))
        chosen = out.logits[labelled(labels).to(device)].to(labels.device)
        targets = soft_targets(chosen, self.settings.temperature, self.settings.top_k)
        if bool(targets.log_probs.isnan().any()):
            raise NonFiniteError("logits of the dense model are NaN: load it in another dtype (--dtype float32)")
        return Lesson(targets, [out.hidden_states[n].to(labels.device) for n in self.layers])


def labelled(labels: Tensor) -> Tensor:
    """Which positions predict a labelled token: [batch, length], false in the last column."""
    return torch.cat([labels[:, 1:] != IGNORED, torch.zeros_like(labels[:, :1], dtype=torch.bool)], 1)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A model without dropout while the block runs."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
