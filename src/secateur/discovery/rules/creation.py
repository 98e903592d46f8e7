"""Operators that make tensors from nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard
from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten


@rule(aten.arange)
def counting(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """0, 1, 2, ... numbers its own axis: harmless where it is compared with indices, a constant anywhere else."""
    overload = func._overloadname
    start = args[0] if overload in ("start", "start_step") else 0
    step = args[2] if overload == "start_step" and len(args) > 2 else 1
    if start != 0 or step != 1:
        constant(trace, func, args, kwargs, out)
        return
    axis = Axis(out.shape[0])
    axis.traits.add("counting")
    trace.set(out, [axis])
    trace.set_numbered(out, axis)


@rule(
    aten.linspace, aten.logspace, aten.rand, aten.randn, aten.randint, aten.randperm, aten.tril_indices,
    aten.triu_indices, aten.hann_window,
)  # fmt: skip
def constant(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Every position has its own value, computed again after a cut: what is tied to it must stay whole."""
    text = f"tied to a constant that {trace.here} makes anew (as rotary, alibi and position codes do)"
    trace.set(out, [Axis(s, [Hazard("constant", text)]) for s in out.shape])


@rule(aten.eye)
def identity(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """A square identity without some rows and the same columns is one again."""
    if out.shape[0] != out.shape[1]:
        constant(trace, func, args, kwargs, out)
        return
    axis = Axis(out.shape[0])
    trace.set(out, [axis, axis])


@rule(
    aten.zeros, aten.ones, aten.full, aten.empty, aten.scalar_tensor, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty, aten.empty_strided, aten.new_empty_strided,
)  # fmt: skip
def filling(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """All positions alike: nothing is learnt."""
    trace.set(out, [Axis(s) for s in out.shape])
