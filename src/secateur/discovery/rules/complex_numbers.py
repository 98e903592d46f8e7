"""Complex numbers: pairs of real ones, which cannot lose one half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.axes import Axis, Hazard, concatenation, partition
from secateur.discovery.recorder import Trace, rule

aten = torch.ops.aten


@rule(aten.view_as_complex)
def view_as_complex(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = trace.dims(args[0])
    partition(axes[-1], [1, 1], trace.here)
    trace.set(out, axes[:-1])


@rule(aten.view_as_real)
def view_as_real(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    half = Hazard("literal", "the real or imaginary part of a complex number")
    trace.set(out, [*trace.dims(args[0]), concatenation([Axis(1, [half]), Axis(1, [half])])])
