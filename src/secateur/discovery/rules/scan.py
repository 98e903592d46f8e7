"""Running sums and products: each position depends on those before it, so removed ones must be neutral."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten
NEUTRAL = {aten.cumsum: 0.0, aten.cumprod: 1.0, aten.logcumsumexp: float("-inf"), aten.cummax: float("-inf")}


@rule(*NEUTRAL)
def scan(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    dim = args[1] % max(len(axes), 1)
    if axes:
        trace.reduce([(0, dim)], axes[dim], fill=NEUTRAL[func.overloadpacket])
    for result in out if isinstance(out, tuple) else (out,):
        trace.set(result, axes)
