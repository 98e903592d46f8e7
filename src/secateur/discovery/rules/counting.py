"""Counting and comparing indices: one position of the result per unit they number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.recorder import Trace, freeze_numbered, pointwise, rule

aten = torch.ops.aten


@rule(aten.eq, aten.ne, reads_indices=True)
def compare(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Indices compared with 0, 1, 2, ... make a one-hot code: its axis is the one they number."""
    tensors = [a for a in args[:2] if isinstance(a, torch.Tensor)]
    numbered = [trace.numbered(t) for t in tensors]
    counting = [n is not None and "counting" in n.find().traits for n in numbered]
    if len(tensors) == 2 and numbered[0] is not None and numbered[1] is not None and counting[0] != counting[1]:
        one, other = numbered[0], numbered[1]
        (one if counting[0] else other).find().traits.discard("counting")
        unify(one, other, trace.here)
    else:
        freeze_numbered(trace, tensors)
    pointwise(trace, tensors, [out])


@rule(aten.histc, aten.bincount, reads_indices=True)
def histogram(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """How often each unit is chosen."""
    axis = trace.numbered(args[0])
    if axis is None or axis.size != out.shape[0]:
        freeze_numbered(trace, args[:1])
        axis = Axis(out.shape[0], [Hazard("literal", f"{trace.here} counts values")])
    trace.set(out, [axis])


@rule(aten.clamp, reads_indices=True)
def clamp(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Bounds that hold anyway leave indices as they are."""
    axis = trace.numbered(args[0])
    low, high = (args[i] if len(args) > i else kwargs.get(name) for i, name in ((1, "min"), (2, "max")))
    if axis is not None and low in (0, None) and high in (axis.size - 1, None):
        trace.set_numbered(out, axis)
    else:
        freeze_numbered(trace, [a for a in args if isinstance(a, torch.Tensor)])
    pointwise(trace, [a for a in args if isinstance(a, torch.Tensor)], [out])


@rule(aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.unique_dim)
def places(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """How many results there are depends on values: every operand stays whole."""
    hazard = Hazard("literal", f"the result of {trace.here} depends on every position")
    for axis in trace.dims(args[0]):
        freeze(axis, hazard)
    for result in out if isinstance(out, tuple) else (out,):
        trace.set(result, [Axis(s, [hazard, Hazard("data", "chosen tokens")]) for s in result.shape])
