"""Diagonals and triangles of the last two dimensions, which must then keep their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten


@rule(aten.tril, aten.triu)
def triangle(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    for axis in axes[-2:]:
        freeze(axis, Hazard("literal", f"{trace.here} compares its positions with those of another dimension"))
    trace.set(out, axes)


@rule(aten.diagonal)
def diagonal(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """The positions that two dimensions have in common."""
    offset, first, second = (*args[1:], 0, 0, 1)[:3] if len(args) < 4 else args[1:4]
    axes = list(trace.dims(args[0]))
    first, second = first % len(axes), (second if len(args) > 3 else 1) % len(axes)
    if offset == 0 and axes[first].size == axes[second].size:
        unify(axes[first], axes[second], trace.here)
        kept = axes[first]
    else:
        for d in (first, second):
            freeze(axes[d], Hazard("literal", f"{trace.here} picks positions"))
        kept = Axis(out.shape[-1], [*axes[first].find().hazards.values()])
    trace.set(out, [*(a for d, a in enumerate(axes) if d not in (first, second)), kept])


@rule(aten.diag_embed)
def diag_embed(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    *rest, axis = trace.dims(args[0])
    freeze(axis, Hazard("literal", f"{trace.here} puts it on a diagonal"))
    trace.set(out, [*rest, *(Axis(s, [*axis.find().hazards.values()]) for s in out.shape[-2:])])
