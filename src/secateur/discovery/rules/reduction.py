"""Sums, means and the like: what they reduce over must be restricted to the units that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis
from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten


def _dims(value: Any, rank: int) -> list[int]:
    if value is None:
        return list(range(rank))
    return sorted(d % max(rank, 1) for d in ([value] if isinstance(value, int) else value))


@rule(
    aten.sum, aten.mean, aten.var, aten.std, aten.amax, aten.amin, aten.any, aten.all, aten.prod, aten.logsumexp,
    aten.linalg_vector_norm, aten.var_mean, aten.std_mean,
)  # fmt: skip
def reduce(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    place = 2 if func.overloadpacket is aten.linalg_vector_norm else 1
    given = args[place] if len(args) > place else kwargs.get("dim")
    gone = _dims(given or None if isinstance(given, list) else given, len(axes))
    for d in gone:
        trace.reduce([(0, d)], axes[d])
    for result in out if isinstance(out, tuple) else (out,):
        if result.dim() == len(axes):
            trace.set(result, [Axis(1) if d in gone else a for d, a in enumerate(axes)])
        else:
            trace.set(result, [a for d, a in enumerate(axes) if d not in gone])
