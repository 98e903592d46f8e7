"""Element-wise operators that torch does not tag as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.discovery.recorder import Trace, pointwise, rule

aten = torch.ops.aten


@rule(aten.masked_fill, aten.masked_fill_, aten.floor_divide, aten.floor_divide_, aten.polar, aten.complex)
def elementwise(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    pointwise(trace, [a for a in args if isinstance(a, torch.Tensor)], [out])
