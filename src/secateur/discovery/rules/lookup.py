"""Operators that look positions up by the values of an index tensor: the looked-up axis is a table and stays whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.trace import Trace, rule

aten = torch.ops.aten


@rule(aten.embedding)
def embedding(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    table, ids = trace.dims(args[0]), trace.dims(args[1])
    freeze(table[0], Hazard("table", "looked up by token or position number"))
    trace.set(out, [*ids, table[1]])


@rule(aten.index, aten._unsafe_index)
def index(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """`x[i, :, j]`: indexed axes are tables; their place is taken by the axes of the index tensors."""
    axes, indices = trace.dims(args[0]), args[1]
    hazard = Hazard("table", f"looked up by {func}")
    used = [d for d, i in enumerate(indices) if i is not None]
    for d in used:
        freeze(axes[d], hazard)
    tensors = [indices[d] for d in used]
    rank = max(t.dim() for t in tensors)
    kept = [a for d, a in enumerate(axes) if d not in used]
    adjacent = used == list(range(used[0], used[-1] + 1))
    place = used[0] if adjacent else 0
    looked_up = [Axis(s, [hazard]) for s in out.shape[place : place + rank]]
    for back, axis in enumerate(reversed(looked_up), start=1):
        for t in tensors:
            if t.dim() >= back and t.shape[-back] == axis.size and t.dtype != torch.bool:
                unify(axis, trace.dims(t)[-back], str(func))
    new = [*kept[:place], *looked_up, *kept[place:]]
    if len(new) != out.dim():
        new = [Axis(s, [hazard]) for s in out.shape]
        for axis in axes:
            freeze(axis, hazard)
    trace.set(out, new)


@rule(aten.index_select)
def index_select(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = list(trace.dims(args[0]))
    freeze(axes[args[1]], Hazard("table", f"looked up by {func}"))
    axes[args[1]] = trace.dims(args[2])[0]
    trace.set(out, axes)


@rule(aten.gather)
def gather(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes, ids = trace.dims(args[0]), trace.dims(args[2])
    freeze(axes[args[1]], Hazard("table", f"looked up by {func}"))
    for d, (a, b) in enumerate(zip(axes, ids, strict=True)):
        if d != args[1] % len(axes) and a.size == b.size:
            unify(a, b, str(func))
    trace.set(out, ids)
