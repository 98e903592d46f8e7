"""Fused norms: statistics over the last axis, gain and bias along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten


@rule(aten.native_layer_norm, aten._fused_rms_norm)
def layer_norm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    if len(args[1]) != 1:
        for d in range(len(axes) - len(args[1]), len(axes)):
            freeze(axes[d], Hazard("literal", f"{trace.here} normalises over several dimensions"))
    inputs = [(0, len(axes) - 1)]
    for position in (2, 3) if func.overloadpacket is aten.native_layer_norm else (2,):
        if args[position] is not None:
            unify(axes[-1], trace.dims(args[position])[-1], trace.here)
            inputs.append((position, 0))
    trace.reduce(inputs, axes[-1], output_dim=len(axes) - 1)
    trace.set(out[0], axes)
    for statistic in out[1:]:
        trace.set(statistic, [*axes[:-1], Axis(1)] if statistic.dim() == len(axes) else axes[:-1])


@rule(aten.native_group_norm)
def group_norm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Statistics over groups of consecutive channels, which the class cuts anew: channels stay whole."""
    axes = trace.dims(args[0])
    freeze(axes[1], Hazard("literal", f"{trace.here} normalises over groups of channels"))
    for position in (1, 2):
        if args[position] is not None:
            unify(axes[1], trace.dims(args[position])[0], trace.here)
    trace.set(out[0], axes)
    for statistic in out[1:]:
        trace.set(statistic, [axes[0], Axis(statistic.shape[1])])


@rule(aten.native_batch_norm, aten._native_batch_norm_legit_no_training)
def batch_norm(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    for operand in args[1:5]:
        if isinstance(operand, torch.Tensor):
            unify(axes[1], trace.dims(operand)[0], trace.here)
    trace.set(out[0], axes)
    for statistic in out[1:]:
        trace.set(statistic, [axes[1]] if statistic.numel() else [Axis(s) for s in statistic.shape])
