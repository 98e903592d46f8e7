"""Matrix products: the inner axes are equal and summed over, the outer ones survive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten


def contract(trace: Trace, func: Any, args: Sequence[Any], left: int, right: int) -> tuple[list[Axis], list[Axis]]:
    """Tie the last axis of operand `left` to the last but one of operand `right`, and record the reduction."""
    a, b = trace.dims(args[left]), trace.dims(args[right])
    unify(a[-1], b[-2], trace.here)
    trace.reduce([(left, len(a) - 1), (right, len(b) - 2)], a[-1])
    for position, axis in ((left, a[-1]), (right, b[-2])):
        if (name := trace.origin(args[position])) is not None:
            trace.consumed.append((name, axis))
    if len(a) == 3 and trace.origin(args[left]) is None and trace.origin(args[right]) is None:
        trace.paired.append((a[0], a[-1]))
    return a, b


@rule(aten.mm)
def mm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    a, b = contract(trace, func, args, 0, 1)
    trace.set(out, [a[0], b[1]])


@rule(aten.addmm)
def addmm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    a, b = contract(trace, func, args, 1, 2)
    trace.set(out, [a[0], b[1]])
    _add(trace, func, args[0], out)


@rule(aten.bmm)
def bmm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    a, b = contract(trace, func, args, 0, 1)
    unify(a[0], b[0], trace.here)
    trace.set(out, [a[0], a[1], b[2]])


@rule(aten.baddbmm)
def baddbmm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    a, b = contract(trace, func, args, 1, 2)
    unify(a[0], b[0], trace.here)
    trace.set(out, [a[0], a[1], b[2]])
    _add(trace, func, args[0], out)


def _add(trace: Trace, func: Any, term: Any, out: Any) -> None:
    """The added operand (a bias) lies along the last axes of the result."""
    axes = trace.dims(out)
    for back, axis in enumerate(reversed(trace.dims(term)), start=1):
        if axis.size == axes[-back].size:
            unify(axis, axes[-back], trace.here)


@rule(aten.mv, aten.dot, aten.vdot)
def with_vector(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    a, b = trace.dims(args[0]), trace.dims(args[1])
    unify(a[-1], b[0], trace.here)
    trace.reduce([(0, len(a) - 1), (1, 0)], b[0])
    for position in (0, 1):
        if (name := trace.origin(args[position])) is not None:
            trace.consumed.append((name, b[0]))
    trace.set(out, a[:-1])


@rule(aten._grouped_mm, "transformers.grouped_mm_fallback")
def grouped_mm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Rows [tokens, in] that are sorted by expert times matrices [experts, in, out], with one offset per expert."""
    a, b = contract(trace, func, args, 0, 1)
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    if len(a) != 2 or len(b) != 3 or offsets is None:
        for axis in (*a, *b):
            freeze(axis, Hazard("unknown", f"{trace.here} with operands of these ranks has no rule"))
    else:
        unify(trace.dims(offsets)[0], b[0], trace.here)
    trace.set(out, [a[0], b[-1]])
