"""Scalars that a class derives from a size that was cut, put back by scaling weights.

Gemma multiplies embeddings by the square root of `hidden_size`, latent attention by that of a ratio of ranks. A smaller
model of such a class computes with another scalar. Where the scalar stands beside a weight, scaling the weight by the
inverse ratio gives the right result exactly; which weights do is found by trial on a small model, and proven by logits.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.discovery.setting import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POWERS = (Fraction(-1, 2), Fraction(1, 2), Fraction(-1), Fraction(1))  # of the share kept; what scalars depend on
MAX_TENSORS = 60  # names of parameters, layers not told apart; more make the search long


@dataclass(frozen=True)
class Fold:
    """A weight that is scaled when a share of some units is kept.

    Attributes:
        parameter: its name, `*` for the number of a layer.
        power: it is multiplied by the share to this power.
        centred: the gain is 1 plus the weight, and the gain is what is scaled (norms of Gemma).
        scalar: a buffer with one element that the class computes itself; if given, the weight is multiplied by a power
            of its old value through its new one, which is exact whatever precision the class keeps it in.
    """

    parameter: str
    power: Fraction
    centred: bool = False
    scalar: str = ""

    def factor(self, share: Fraction, drift: Mapping[str, float]) -> float:
        base = drift.get(self.scalar, 1.0) if self.scalar else float(share)
        return math.pow(base, self.power)

    def scaled(self, weight: Tensor, factor: float) -> Tensor:
        """The weight, or a part of it, after scaling."""
        return (weight + 1) * factor - 1 if self.centred else weight * factor


def fold(model: PreTrainedModel, small: PreTrainedModel, folds: Sequence[Fold], share: Fraction) -> None:
    """Scale weights of `small`, which was cut from `model`, in place."""
    by_name = {f.parameter: f for f in folds}
    drift = drifted_scalars(model, small) if folds else {}
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if found := by_name.get(pattern(name)):
                factor = found.factor(share, drift)
                parameter.copy_(found.scaled(parameter, factor))


def drifted_scalars(model: PreTrainedModel, small: PreTrainedModel) -> dict[str, float]:
    """Name, `*` for layers -> old through new value of buffers of one element that the class computed anew."""
    before = {pattern(n): b for n, b in model.named_buffers() if b.numel() == 1}
    after = {pattern(n): b for n, b in small.named_buffers() if b.numel() == 1}
    both = {n: (float(before[n]), float(after[n])) for n in after if n in before}
    return {n: old / new for n, (old, new) in both.items() if old != new and old and new}


def pattern(name: str) -> str:
    """A parameter's name with `*` for the numbers in it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


@quiet_transformers()
def find_folds(
    model: PreTrainedModel, small: PreTrainedModel, share: Fraction, same: Callable[[PreTrainedModel], bool]
) -> tuple[Fold, ...] | None:
    """The fewest folds after which `small` computes what it should; it is left as it was.

    Args:
        model: what `small` was cut from.
        share: of the units kept.
        same: whether the logits are right.
    """
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    for folds in _candidates(small, tuple(drifted_scalars(model, small))):
        fold(model, small, folds, share)
        right = same(small)
        with torch.no_grad():
            for name, parameter in small.named_parameters():
                parameter.copy_(before[name])
        if right:
            return folds
    return None


def _candidates(model: PreTrainedModel, scalars: Sequence[str]) -> Iterator[tuple[Fold, ...]]:
    """One weight; or an embedding that is the head too, and a gain that undoes there what the embedding takes up."""
    rank = {pattern(n): p.dim() for n, p in model.named_parameters()}
    if len(rank) > MAX_TENSORS:
        return
    gains = [(name, centred) for name, dim in rank.items() if dim == 1 for centred in (False, True)]
    matrices = [name for name, dim in rank.items() if dim > 1]
    factors = [(power, scalar) for scalar in scalars for power in (Fraction(1), Fraction(-1))]
    factors += [(power, "") for power in POWERS]
    for power, scalar in factors:
        yield from ((Fold(name, power, False, scalar),) for name in matrices)
        yield from ((Fold(name, power, centred, scalar),) for name, centred in gains)
    entry, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and entry.weight is head.weight:
        tied = next(pattern(n) for n, p in model.named_parameters() if p is entry.weight)
        for (power, scalar), (gain, centred) in itertools.product(factors, gains):
            yield Fold(tied, power, False, scalar), Fold(gain, -power, centred, scalar)
