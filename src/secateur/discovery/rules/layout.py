"""Operators that rearrange dimensions and lose nothing: views, permutations, broadcasts, copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, factorise, freeze, product
from secateur.discovery.recorder import Trace, pointwise, rule

aten = torch.ops.aten


@rule(
    aten.clone, aten.detach, aten.alias, aten._to_copy, aten.lift_fresh, aten.lift_fresh_copy, aten.contiguous,
    carries_indices=True,
)  # fmt: skip
def copy(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """The result is the operand."""
    trace.set(out, trace.dims(args[0]))


@rule(
    aten.dropout, aten.native_dropout, aten.log_sigmoid_forward, aten.rrelu_with_noise, aten.bernoulli,
    aten.rand_like, aten.randn_like,
)  # fmt: skip
def same(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """The result has the operand's axes."""
    for result in out if isinstance(out, tuple) else (out,):
        if result.shape == args[0].shape:
            trace.set(result, trace.dims(args[0]))


@rule(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, reads_indices=True)
def filled_like(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """The shape of the operand, none of its values."""
    trace.set(out, trace.dims(args[0]))


@rule(aten.copy_)
def copy_into(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    pointwise(trace, args[:2], [out])


@rule(aten.fill_, aten.zero_)
def fill(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """All positions become alike."""
    trace.set(out, trace.dims(args[0]))


@rule(
    aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.unsqueeze, aten.squeeze,
    carries_indices=True,
)  # fmt: skip
def view(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Old and new dimensions are matched by their running products; each match flattens and splits again."""
    old = [a for a in trace.dims(args[0]) if a.size != 1]
    axes: list[Axis] = []
    new = list(out.shape)
    while new:
        size = new.pop(0)
        if size == 1:
            axes.append(Axis(1))
            continue
        sizes, source = [size], [old.pop(0)]
        while math.prod(sizes) != math.prod(a.size for a in source):
            if math.prod(sizes) < math.prod(a.size for a in source):
                sizes.append(new.pop(0))
            else:
                source.append(old.pop(0))
        wanted = [s for s in sizes if s != 1]
        pieces = iter(factorise(product(source), wanted, trace.here))
        axes.extend(Axis(1) if s == 1 else next(pieces) for s in sizes)
    trace.set(out, axes)


@rule(aten.permute, carries_indices=True)
def permute(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    trace.set(out, [axes[d] for d in args[1]])


@rule(aten.transpose, carries_indices=True)
def transpose(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = list(trace.dims(args[0]))
    a, b = args[1], args[2]
    axes[a], axes[b] = axes[b], axes[a]
    trace.set(out, axes)


@rule(aten.t, carries_indices=True)
def t(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    trace.set(out, trace.dims(args[0])[::-1])


@rule(aten.expand, carries_indices=True)
def expand(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """A dimension repeated from size 1 is new, and marked: heads that share keys and values arise here."""
    old = [Axis(1)] * (out.dim() - args[0].dim()) + trace.dims(args[0])
    axes = []
    for axis, size in zip(old, out.shape, strict=True):
        if axis.size == size:
            axes.append(axis)
        else:
            repeated = Axis(size)
            repeated.traits.add("broadcast")
            axes.append(repeated)
    trace.set(out, axes)


@rule(aten.repeat, carries_indices=True)
def repeat(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """A dimension repeated whole is a product of the repetition and itself."""
    old = [Axis(1)] * (out.dim() - args[0].dim()) + trace.dims(args[0])
    trace.set(out, [product([Axis(n), axis]) if n != 1 else axis for axis, n in zip(old, args[1], strict=True)])


@rule(aten.unfold, carries_indices=True)
def unfold(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Windows along one dimension: its positions overlap, so it stays whole."""
    axes = list(trace.dims(args[0]))
    dim = args[1] % len(axes)
    hazard = Hazard("literal", f"{trace.here} cuts windows from it")
    freeze(axes[dim], hazard)
    hazards = [*axes[dim].find().hazards.values()]
    axes[dim] = Axis(out.shape[dim], hazards)
    trace.set(out, [*axes, Axis(out.shape[-1], hazards)])


@rule(aten.flip, aten.roll, carries_indices=True)
def shift(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Positions change places along some dimensions, which stay whole."""
    axes = list(trace.dims(args[0]))
    given = args[1] if func.overloadpacket is aten.flip else (args[2] if len(args) > 2 else kwargs.get("dims"))
    for d in given or range(len(axes)):
        freeze(axes[d], Hazard("literal", f"{trace.here} moves its positions"))
        axes[d] = Axis(axes[d].size, [*axes[d].find().hazards.values()])
    trace.set(out, axes)
