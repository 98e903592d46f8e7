"""Counts that a class can really run: some operations want sizes, or strides, that are multiples of a number.

A configuration may be accepted and the forward pass still refused. The latents of DeepSeek-V2, for example, lie in one
row with the rotated part of the keys, which is read as complex numbers: an odd rank puts them at odd distances, which
torch does not read in float32, while conversions from other precisions hide it. What the class says is found out on
tensors without data, in float32, so that what is cut runs in whatever precision it is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur.discovery.setting import plain_forward
from secateur.discovery.trace import BATCH, SEQ_LEN, fake_copies
from secateur.errors import first_line
from secateur.surgery.shapes import build_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

STEPS = (1, 2, 4, 8, 16)  # what the number of units may have to be a multiple of
TRIES = 3  # counts to try for each, as classes may refuse the configuration of some


@dataclass(frozen=True)
class Step:
    """What the number of units that a family keeps must be a multiple of.

    Attributes:
        of: the number, 1 if any count runs or it is not known.
        reason: what the class says to other counts.
    """

    of: int = 1
    reason: str = ""


def smallest_step(units: int, failure: Callable[[Fraction], str | None]) -> Step:
    """The smallest of `STEPS` whose odd multiples run; 1 if none does, since the reason then is another.

    Args:
        failure: share of the units kept -> what is said when the class runs with it, empty if it does, None if it has
            no configuration for it.
    """
    reason = ""
    for step in STEPS:
        counts = list(range(step, units, 2 * step))[: -TRIES - 1 : -1]
        said = next((f for c in counts if (f := failure(Fraction(c, units))) is not None), None)
        if said == "":
            return Step(step, reason) if reason else Step()
        if said and not reason:
            if failure(Fraction(1)) != "":  # the uncut model does not run here either, so nothing is known
                return Step()
            reason = said
    return Step()


def failure_to_run(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """What a class says when a model of this configuration runs on tensors without data, empty if it runs.

    Raises:
        Exception: whatever the class raises for sizes it cannot be built with.
    """
    model = build_on_meta(model_class, config).float()
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    try:
        with _quiet_torch(), FakeTensorMode(allow_non_fake_inputs=True), plain_forward(model):
            ids = torch.zeros(BATCH, SEQ_LEN, dtype=torch.long)
            torch.func.functional_call(model, fake_copies(state), (ids,), {"use_cache": False})
    except Exception as error:  # classes fail in any way they like
        return first_line(error)
    return ""


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Torch reports failures on tensors without data also by its log; here they are an answer."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
