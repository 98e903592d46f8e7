"""How far a student is from its teacher, token by token: distributions over the vocabulary, and hidden states.

Distributions are compared by the Kullback-Leibler divergence from teacher to student at a temperature (Hinton, Vinyals
and Dean 2015, arXiv:1503.02531, section 2). Of a teacher of whom only the k largest logits are known, all other tokens
are one more outcome, whose probability is exact on both sides: the `add_tail` of TRL's distillation trainers. That is
the divergence of two coarser distributions, so never more than the full one, and equal to it when k is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST = -1e4  # log-probability that stands for none: tokens that a model rules out by a logit of minus infinity


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher says of N tokens.

    Attributes:
        log_probs: at the temperature, float32: [N, vocabulary], or [N, k] of the likeliest tokens.
        indices: [N, k], which tokens these are; None where all are there.
        rest: [N], log-probability of all other tokens together; None where there are none.
    """

    log_probs: Tensor
    indices: Tensor | None = None
    rest: Tensor | None = None


def soft_targets(logits: Tensor, temperature: float, top_k: int = 0) -> SoftTargets:
    """The distributions that logits stand for.

    Args:
        logits: [N, vocabulary].
        temperature: by which they are divided.
        top_k: keep so many of the likeliest tokens, and the rest as one; 0 keeps all.
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    if not 0 < top_k < scaled.shape[-1]:
        return SoftTargets(scaled - total)
    values, indices = scaled.topk(top_k)
    return SoftTargets(values - total, indices, _rest(scaled, indices) - total.squeeze(-1))


def divergence(logits: Tensor, targets: SoftTargets, temperature: float) -> Tensor:
    """KL(teacher || student) of every token at the temperature [nats], differentiable by the student's logits.

    Args:
        logits: of the student, [N, vocabulary].
        targets: of the teacher, at the same temperature.

    Returns:
        [N], float32.
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    if targets.indices is None or targets.rest is None:
        student, teacher = scaled - total, targets.log_probs
    else:
        chosen = scaled.gather(-1, targets.indices)
        student = torch.cat([chosen, _rest(scaled, targets.indices)[:, None]], -1) - total
        teacher = torch.cat([targets.log_probs, targets.rest[:, None]], -1)
    terms = F.kl_div(student.clamp(min=LEAST), teacher.clamp(min=LEAST), reduction="none", log_target=True)
    return terms.sum(-1)


def _rest(scaled: Tensor, indices: Tensor) -> Tensor:
    """Log of the sum of exponentials of all logits but those at `indices`, [N]; exact where little is left over."""
    return scaled.scatter(-1, indices, LEAST).logsumexp(-1)  # finite even if all others are ruled out


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Squared distance of hidden states relative to the teacher's, mean over layers: ||s - t||^2 / ||t||^2.

    The plain mean squared error of other work depends on the model's scale, and a few tokens with huge activations
    make up nearly all of it; relative to each token's own size one weight does for all models (ours).

    Args:
        student, teacher: states after each layer, [batch, length, width] each.
        tokens: [batch, length], true for those that count.

    Returns:
        [N], float32, for the tokens that count.
    """
    layers = []
    for ours, theirs in zip(student, teacher, strict=True):
        wanted = theirs[tokens].float()
        size = wanted.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        layers.append((ours[tokens].float() - wanted).square().sum(-1) / size)
    return torch.stack(layers).mean(0)
