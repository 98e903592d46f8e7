"""Choosing by value: top-k, sorting, the largest. What they choose from becomes numbered by the indices they return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, freeze
from secateur.discovery.recorder import Trace, freeze_numbered, is_data, pointwise, rule

aten = torch.ops.aten


@rule(aten.topk)
def topk(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """The k best along one axis; a removed unit must never be among them."""
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", -1)) % max(args[0].dim(), 1)
    largest = args[3] if len(args) > 3 else kwargs.get("largest", True)
    axes = trace.dims(args[0])
    chosen_from = axes[dim]
    chosen_from.mark(traits={"chosen"})
    trace.chosen.append((chosen_from, out[0].shape[dim]))
    trace.reduce([(0, dim)], chosen_from, fill=float("-inf") if largest else float("inf"))
    new = list(axes)
    new[dim] = Axis(out[0].shape[dim], [h for h in chosen_from.find().hazards.values() if h.cause == "data"])
    for result in out:
        trace.set(result, new)
    trace.set_numbered(out[1], chosen_from)


@rule(aten.argmax, aten.argmin, aten.max, aten.min)
def best(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """The largest or smallest along one axis, or of two tensors, or of everything."""
    if len(args) > 1 and isinstance(args[1], torch.Tensor):
        pointwise(trace, args[:2], [out])
        return
    axes = trace.dims(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    fill = float("-inf") if func.overloadpacket in (aten.argmax, aten.max) else float("inf")
    gone = list(range(len(axes))) if dim is None else [dim % max(len(axes), 1)]
    for d in gone if axes else ():
        trace.reduce([(0, d)], axes[d], fill=fill)
    results = out if isinstance(out, tuple) else (out,)
    kept_dim = bool(axes) and results[0].dim() == len(axes)
    for result in results:
        trace.set(result, [Axis(1) if d in gone else a for d, a in enumerate(axes) if kept_dim or d not in gone])
    if dim is not None and axes and not results[-1].is_floating_point():
        axes[gone[0]].mark(traits={"chosen"})
        trace.set_numbered(results[-1], axes[gone[0]])


@rule(aten.sort, aten.argsort, reads_indices=True)
def sort(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Sorted values number what the unsorted ones did; places in the order number what was sorted."""
    axes = trace.dims(args[0])
    given = args[1] if len(args) > 1 and isinstance(args[1], int) and not isinstance(args[1], bool) else None
    dim = (kwargs.get("dim", -1) if given is None else given) % max(len(axes), 1)
    if not is_data(axes[dim]):
        freeze(axes[dim], Hazard("literal", f"{trace.here} orders all its units"))
    for result in out if isinstance(out, tuple) else (out,):
        trace.set(result, axes)
    if isinstance(out, tuple):
        if (numbered := trace.numbered(args[0])) is not None:
            trace.set_numbered(out[0], numbered)
        trace.set_numbered(out[1], axes[dim])
    else:
        freeze_numbered(trace, args[:1])
