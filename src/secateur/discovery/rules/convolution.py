"""Convolutions over the sequence: depthwise ones keep their channels, dense ones contract them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten


@rule(aten.convolution, aten._convolution)
def convolution(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Input [batch, in, length], weight [out, in / groups, width]."""
    data, weight = trace.dims(args[0]), trace.dims(args[1])
    transposed, groups = args[6], args[8]
    place = Hazard("literal", f"a position within the kernel of {trace.here}")
    for axis in weight[2:]:
        freeze(axis, place)
    channels = weight[0]
    if groups == 1 and not transposed:
        unify(data[1], weight[1], trace.here)
        trace.reduce([(0, 1), (1, 1)], data[1])
        if (name := trace.origin(args[1])) is not None:
            trace.consumed.append((name, weight[1]))
    elif groups == data[1].size == weight[0].size and not transposed:
        unify(data[1], weight[0], trace.here)
        weight[0].mark(traits={"convolved"})
    else:
        for axis in (data[1], *weight):
            freeze(axis, Hazard("literal", f"{trace.here} works on groups of channels"))
        channels = Axis(out.shape[1], [Hazard("literal", f"{trace.here} works on groups of channels")])
    if args[2] is not None:
        unify(channels, trace.dims(args[2])[0], trace.here)
    lengths = []
    for axis, size in zip(data[2:], out.shape[2:], strict=True):
        freeze(axis, place)
        lengths.append(axis if axis.size == size else Axis(size, [*axis.find().hazards.values()]))
    trace.set(out, [data[0], channels, *lengths])
