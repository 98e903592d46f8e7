"""Matrix products: the inner axes are equal and summed over, the outer ones survive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, unify
from secateur.discovery.trace import Trace, rule

aten = torch.ops.aten


def contract(trace: Trace, func: Any, args: Sequence[Any], left: int, right: int) -> tuple[list[Axis], list[Axis]]:
    """Tie the last axis of operand `left` to the last but one of operand `right`, and record the reduction."""
    a, b = trace.dims(args[left]), trace.dims(args[right])
    unify(a[-1], b[-2], str(func))
    trace.reduce([(left, len(a) - 1), (right, len(b) - 2)], a[-1])
    for position, axis in ((left, a[-1]), (right, b[-2])):
        if (name := trace.origin(args[position])) is not None:
            trace.consumed.append((name, axis))
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
    unify(a[0], b[0], str(func))
    trace.set(out, [a[0], a[1], b[2]])


@rule(aten.baddbmm)
def baddbmm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    a, b = contract(trace, func, args, 1, 2)
    unify(a[0], b[0], str(func))
    trace.set(out, [a[0], a[1], b[2]])
    _add(trace, func, args[0], out)


def _add(trace: Trace, func: Any, term: Any, out: Any) -> None:
    """The added operand (a bias) lies along the last axes of the result."""
    axes = trace.dims(out)
    for back, axis in enumerate(reversed(trace.dims(term)), start=1):
        if axis.size == axes[-back].size:
            unify(axis, axes[-back], str(func))


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_attention_math, aten._scaled_dot_product_fused_attention_overrideable,
)  # fmt: skip
def attention(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Fused attention of q [b, H, s, D], k [b, H, t, D], v [b, H, t, Dv]: classes that cannot run eagerly use it."""
    q, k, v = (trace.dims(a) for a in args[:3])
    for a, b in ((q[0], k[0]), (q[0], v[0]), (q[1], k[1]), (q[1], v[1]), (q[3], k[3]), (k[2], v[2])):
        unify(a, b, str(func))
    trace.reduce([(0, 3), (1, 3)], q[3])
    trace.softmaxed.append((k[2], (q[0], q[1], q[2])))
    trace.set(out[0], [q[0], q[1], q[2], v[3]])
    for extra in out[1:]:
        if isinstance(extra, torch.Tensor):
            trace.set(extra, [Axis(s) for s in extra.shape])
