"""Operators that make tensors from nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard
from secateur.discovery.trace import Trace, rule

aten = torch.ops.aten


@rule(aten.arange, aten.linspace, aten.eye)
def counting(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Every position has its own value, computed again after a cut: what is tied to it must stay whole."""
    hazard = Hazard("constant", f"tied to a constant that {func} makes anew (as rotary, alibi and position codes do)")
    trace.set(out, [Axis(s, [hazard]) for s in out.shape])


@rule(
    aten.zeros, aten.ones, aten.full, aten.empty, aten.scalar_tensor, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty, aten.empty_strided, aten.new_empty_strided,
)  # fmt: skip
def filling(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """All positions alike: nothing is learnt."""
    trace.set(out, [Axis(s) for s in out.shape])
