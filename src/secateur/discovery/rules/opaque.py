"""Operators whose structure is of no use: they mix whole dimensions, which then stay whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten


@rule(aten.linalg_solve_triangular, aten.linalg_inv_ex, aten.triangular_solve)
def solve(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Matrices of the last two dimensions; earlier dimensions are a batch."""
    operands = [trace.dims(a) for a in args if isinstance(a, torch.Tensor)]
    for axes in operands:
        for axis in axes[-2:]:
            freeze(axis, Hazard("literal", f"{trace.here} solves equations in it"))
        for a, b in zip(axes[:-2], operands[0][:-2], strict=True):
            unify(a, b, trace.here)
    last = [*operands[0][-2].find().hazards.values()]
    for result in out if isinstance(out, tuple) else (out,):
        batch = operands[0][: max(result.dim() - 2, 0)] if result.dim() >= 2 else []
        trace.set(result, [*batch, *(Axis(s, last) for s in result.shape[len(batch) :])])
