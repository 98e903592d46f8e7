"""Fused attention: classes that cannot run eagerly call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, unify
from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_attention_math, aten._scaled_dot_product_fused_attention_overrideable,
)  # fmt: skip
def attention(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Attention of q [b, H, s, D], k [b, H, t, D], v [b, H, t, Dv]."""
    q, k, v = (trace.dims(a) for a in args[:3])
    for a, b in ((q[0], k[0]), (q[0], v[0]), (q[1], k[1]), (q[1], v[1]), (q[3], k[3]), (k[2], v[2])):
        unify(a, b, trace.here)
    trace.reduce([(0, 3), (1, 3)], q[3])
    trace.reduce([(1, 2), (2, 2)], k[2])
    trace.softmaxed.append((k[2], (q[0], q[1], q[2])))
    trace.paired.append((q[1], q[3]))
    trace.set(out[0], [q[0], q[1], q[2], v[3]])
    for extra in out[1:]:
        if isinstance(extra, torch.Tensor):
            trace.set(extra, [Axis(s) for s in extra.shape])
