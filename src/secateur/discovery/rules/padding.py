"""Padding: new positions before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, concatenation, freeze
from secateur.discovery.recorder import Trace, is_data, rule

aten = torch.ops.aten


@rule(aten.constant_pad_nd)
def pad(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Positions of a constant; their number does not follow a cut, which the check of logits judges."""
    axes = list(trace.dims(args[0]))
    widths = args[1]
    for i in range(len(widths) // 2):
        before, after = widths[2 * i], widths[2 * i + 1]
        d = len(axes) - 1 - i
        if min(before, after) < 0:
            freeze(axes[d], Hazard("literal", f"{trace.here} drops positions"))
            axes[d] = Axis(out.shape[d], [*axes[d].find().hazards.values()])
        elif before or after:
            hazards = [Hazard("data", "padding of a sequence")] if is_data(axes[d]) else []
            axes[d] = concatenation([Axis(before, hazards), axes[d], Axis(after, hazards)])
    trace.set(out, axes)


@rule(aten.reflection_pad1d, aten.replication_pad1d)
def mirror(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    *rest, axis = trace.dims(args[0])
    freeze(axis, Hazard("literal", f"{trace.here} repeats positions"))
    trace.set(out, [*rest, Axis(out.shape[-1], [*axis.find().hazards.values()])])
