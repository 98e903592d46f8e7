"""Writing to positions given by the values of an index tensor: the counterpart of looking up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.recorder import Trace, freeze_numbered, rule
from secateur.discovery.rules.lookup import address, indexed

aten = torch.ops.aten


@rule(
    aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.scatter_reduce, aten.scatter_reduce_,
    reads_indices=True,
)  # fmt: skip
def scatter(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """`x[..., index[i], ...] = source[..., i, ...]` along one dimension."""
    axes, index = trace.dims(args[0]), trace.dims(args[2])
    dim = args[1] % max(len(axes), 1)
    freeze_numbered(trace, [t for t in (args[0], *args[3:]) if isinstance(t, torch.Tensor)])
    for d, (a, i) in enumerate(zip(axes, index, strict=True)):
        if d == dim:
            address(trace, a, args[2])
            # Several sources may meet in one place, a sum that would have to be restricted: they stay whole.
            freeze(i, Hazard("literal", f"{trace.here} writes it to chosen places"))
        elif a.size == i.size:
            unify(a, i, trace.here)
        else:
            freeze(a, Hazard("literal", f"{trace.here} writes its first positions"))
    if len(args) > 3 and isinstance(args[3], torch.Tensor):
        for s, i in zip(trace.dims(args[3]), index, strict=True):
            unify(s, i, trace.here)
    trace.set(out, axes)


@rule(aten.index_add, aten.index_add_, aten.index_copy, aten.index_copy_, reads_indices=True)
def index_add(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """`x[index[i]] += source[i]` along one dimension."""
    axes, source = trace.dims(args[0]), trace.dims(args[3])
    dim = args[1] % max(len(axes), 1)
    freeze_numbered(trace, [args[0], args[3]])
    address(trace, axes[dim], args[2])
    unify(source[dim], trace.dims(args[2])[0], trace.here)
    freeze(source[dim], Hazard("literal", f"{trace.here} writes it to chosen places"))
    for d, (a, s) in enumerate(zip(axes, source, strict=True)):
        if d != dim:
            unify(a, s, trace.here)
    trace.set(out, axes)


@rule(aten.index_fill, aten.index_fill_, reads_indices=True)
def index_fill(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    freeze_numbered(trace, [args[0]])
    address(trace, axes[args[1]], args[2])
    trace.set(out, axes)


@rule(aten.index_put, aten.index_put_, aten._index_put_impl_, reads_indices=True)
def index_put(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """`x[indices] = values`, values broadcast to what would be looked up."""
    freeze_numbered(trace, [args[0], args[2]])
    values = trace.dims(args[2])
    places = indexed(trace, args[0], args[1])
    for back in range(1, len(values) + 1):
        if places is None:
            freeze(values[-back], Hazard("table", f"written by a mask in {trace.here}"))
        elif back <= len(places) and values[-back].size == places[-back].size:
            unify(values[-back], places[-back], trace.here)
    trace.set(out, trace.dims(args[0]))


@rule(
    aten.select_scatter, aten.slice_scatter, aten.masked_scatter, aten.masked_scatter_,
)  # fmt: skip
def scatter_piece(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Overwrites part of a tensor: both stay whole."""
    hazard = Hazard("literal", f"{trace.here} overwrites part of it")
    for operand in args[:2]:
        for axis in trace.dims(operand):
            freeze(axis, hazard)
    trace.set(out, [Axis(s, [hazard]) for s in out.shape])
