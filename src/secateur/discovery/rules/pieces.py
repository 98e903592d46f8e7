"""Operators that cut a dimension into consecutive pieces or put pieces together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, concatenation, factorise, freeze, partition, unify
from secateur.discovery.recorder import Trace, freeze_numbered, rule

aten = torch.ops.aten


@rule(aten.slice, carries_indices=True)
def slice_(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """`x[..., start:stop]` cuts the axis in up to three, `x[..., start::step]` picks one place in every block."""
    axes = list(trace.dims(args[0]))
    dim = args[1] if len(args) > 1 else 0
    size, length = axes[dim].size, out.shape[dim]
    start = (args[2] if len(args) > 2 else None) or 0
    start = max(start + size, 0) if start < 0 else min(start, size)
    if len(args) > 4 and args[4] != 1:
        axes[dim] = _every(trace, axes[dim], start, args[4], length)
    elif length != size:
        sizes = [start, length, size - start - length]
        kept = [s for s in sizes if s]
        pieces = iter(partition(axes[dim], kept, trace.here))
        axes[dim] = [next(pieces) if s else Axis(0) for s in sizes][1]
    trace.set(out, axes)


def _every(trace: Trace, axis: Axis, start: int, step: int, length: int) -> Axis:
    """The axis of `x[start::step]`: the blocks of `step` positions, if it takes one position of each."""
    if start < step and length * step == axis.size and length > 1:
        blocks, places = factorise(axis, [length, step], trace.here)
        partition(places, [1] * step, trace.here)
        return blocks
    hazard = Hazard("literal", f"{trace.here} takes every {step}th position")
    freeze(axis, hazard)
    return Axis(length, [*axis.find().hazards.values()])


@rule(aten.select, carries_indices=True)
def select(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """`x[..., i, ...]` picks a literal position: it becomes a piece of one, which can never be removed."""
    axes = list(trace.dims(args[0]))
    dim, index = args[1], args[2]
    axis = axes.pop(dim if dim >= 0 else dim + args[0].dim())
    index = index % axis.size
    partition(axis, [s for s in (index, 1, axis.size - index - 1) if s], trace.here)
    trace.set(out, axes)


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_split, aten.unsafe_chunk, carries_indices=True)
def split(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    axes = trace.dims(args[0])
    pieces = partition(axes[dim], [piece.shape[dim] for piece in out], trace.here)
    for result, piece in zip(out, pieces, strict=True):
        new = list(axes)
        new[dim] = piece
        trace.set(result, new)


@rule(aten.unbind, carries_indices=True)
def unbind(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = list(trace.dims(args[0]))
    dim = args[1] if len(args) > 1 else 0
    axis = axes.pop(dim if dim >= 0 else dim + args[0].dim())
    partition(axis, [1] * axis.size, trace.here)
    for result in out:
        trace.set(result, axes)


@rule(aten.cat, reads_indices=True)
def cat(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    parts = [trace.dims(t) for t in args[0] if t.dim() == out.dim()]
    axes = list(parts[0])
    for other in parts[1:]:
        for d, (a, b) in enumerate(zip(axes, other, strict=True)):
            if d != dim:
                unify(a, b, trace.here)
    axes[dim] = concatenation([p[dim] for p in parts])
    trace.set(out, axes)
    _join_numbers(trace, args[0], out)


def _join_numbers(trace: Trace, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Index tensors put together stay indices if all of them number the same axis."""
    numbered = [trace.numbered(t) for t in tensors]
    first = numbered[0]
    if first is not None and all(n is not None and n.find() is first.find() for n in numbered):
        trace.set_numbered(out, first)
    else:
        freeze_numbered(trace, tensors)


@rule(aten.glu)
def glu(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """One half of an axis gates the other."""
    axes = list(trace.dims(args[0]))
    dim = args[1] if len(args) > 1 else -1
    first, second = partition(axes[dim], [axes[dim].size // 2] * 2, trace.here)
    unify(first, second, trace.here)
    axes[dim] = first
    trace.set(out, axes)


@rule(aten.stack, reads_indices=True)
def stack(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    axes = list(trace.dims(args[0][0]))
    for other in args[0][1:]:
        for a, b in zip(axes, trace.dims(other), strict=True):
            unify(a, b, trace.here)
    axes.insert(dim, concatenation([Axis(1) for _ in args[0]]))
    trace.set(out, axes)
    _join_numbers(trace, args[0], out)
