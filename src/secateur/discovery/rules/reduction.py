"""Sums, means, norms and softmax: what they reduce over must be restricted to the units that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.trace import Trace, rule

aten = torch.ops.aten


def _dims(value: Any, rank: int) -> list[int]:
    if value is None:
        return list(range(rank))
    return sorted(d % rank for d in ([value] if isinstance(value, int) else value))


@rule(aten.sum, aten.mean, aten.var, aten.std, aten.amax, aten.amin, aten.linalg_vector_norm)
def reduce(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    place = 2 if func.overloadpacket is aten.linalg_vector_norm else 1
    given = args[place] if len(args) > place else kwargs.get("dim")
    gone = _dims(given or None if isinstance(given, list) else given, len(axes))
    for d in gone:
        trace.reduce([(0, d)], axes[d])
    if out.dim() == len(axes):
        trace.set(out, [Axis(1) if d in gone else a for d, a in enumerate(axes)])
    else:
        trace.set(out, [a for d, a in enumerate(axes) if d not in gone])


@rule(aten.any, aten.all, aten.max, aten.min, aten.argmax, aten.cumsum, aten.topk, aten.sort)
def ordered(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Operations whose result depends on positions or on every value: their axis stays whole."""
    axes = trace.dims(args[0])
    hazard = Hazard("literal", f"{func} looks at every position")
    given = args[1] if len(args) > 1 and isinstance(args[1], int) else kwargs.get("dim")
    if func.overloadpacket is aten.topk:
        given = args[2] if len(args) > 2 else -1
    gone = _dims(given, len(axes))
    for d in gone:
        freeze(axes[d], hazard)
    for result in out if isinstance(out, tuple) else (out,):
        if result.dim() == len(axes):
            new = [a if a.size == s else Axis(s, [hazard]) for a, s in zip(axes, result.shape, strict=True)]
        else:
            new = [a for d, a in enumerate(axes) if d not in gone]
        trace.set(result, new)


@rule(aten._softmax, aten._log_softmax, aten._safe_softmax)
def softmax(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    dim = args[1] % len(axes)
    trace.reduce([(0, dim)], axes[dim], output_dim=dim)
    trace.softmaxed.append((axes[dim], tuple(a for d, a in enumerate(axes) if d != dim)))
    trace.set(out, axes)


@rule(aten.native_layer_norm)
def layer_norm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Statistics over the last axis; gain and bias lie along it."""
    axes = trace.dims(args[0])
    if len(args[1]) != 1:
        for d in range(len(axes) - len(args[1]), len(axes)):
            freeze(axes[d], Hazard("unknown", f"{func} over several dimensions"))
    inputs = [(0, len(axes) - 1)]
    for position in (2, 3):
        if args[position] is not None:
            unify(axes[-1], trace.dims(args[position])[-1], str(func))
            inputs.append((position, 0))
    trace.reduce(inputs, axes[-1], output_dim=len(axes) - 1)
    trace.set(out[0], axes)
    for statistic in out[1:]:
        trace.set(statistic, [*axes[:-1], Axis(1)] if statistic.dim() == len(axes) else axes[:-1])
