"""Softmax: a removed unit has no share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten


@rule(aten._softmax, aten._log_softmax, aten._safe_softmax)
def softmax(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    dim = args[1] % len(axes)
    trace.reduce([(0, dim)], axes[dim], output_dim=dim)
    trace.softmaxed.append((axes[dim], tuple(a for d, a in enumerate(axes) if d != dim)))
    trace.set(out, axes)
