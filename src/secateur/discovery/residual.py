"""Which children of a layer do nothing but add to what passes through it: followed from operation to operation.

Outside its children, a layer is written as a sum: what entered it, plus what some children put out, each perhaps scaled
or normalised, so that nothing is added where a child puts out zero. What cannot be written so is not known. A layer
whose output is such a sum, with what entered in it once, is the identity without those children. It is none where a
norm acts on the sum (BERT), or where the children themselves add what entered (BLOOM).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
KEEPS = {
    aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.alias, aten.detach, aten.clone,
    aten._to_copy,
}  # fmt: skip
ADDS = {aten.add, aten.add_}
SCALES = {aten.mul, aten.mul_}
DIVIDES = {aten.div, aten.div_}
NOTHING = {aten.zeros, aten.zeros_like, aten.new_zeros}


@dataclass(frozen=True)
class Sum:
    """What a tensor inside a layer is made of.

    Attributes:
        entered: identity of the layer's operand that is part of it, None if none is.
        added: paths of the children whose outputs are part of it; all of them zero, the rest is just the operand.
    """

    entered: int | None = None
    added: frozenset[str] = frozenset()


class LayerFlow:
    """One run of one layer.

    Attributes:
        inside: a child with matrices is running; what it does is not followed.
    """

    def __init__(self, operands: Iterable[Any]) -> None:
        self.inside = False
        self._sums = WeakTensorKeyDictionary()
        for operand in operands:
            if isinstance(operand, Tensor):
                self._sums[operand] = Sum(id(operand))

    def leaves(self, child: str, out: Any) -> None:
        """A child has put out its result."""
        self.inside = False
        if isinstance(leaving := first_of(out), Tensor):
            self._sums[leaving] = Sum(None, frozenset([child]))

    def added(self, entering: Tensor | None, out: Any) -> frozenset[str]:
        """The children that the layer's result adds to `entering`; none if it is no such sum."""
        total = self._sums.get(leaving) if isinstance(leaving := first_of(out), Tensor) else None
        return total.added if total is not None and total.entered == id(entering) else frozenset()

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Learn from one operation."""
        total = None if self.inside else self._result(func.overloadpacket, args, kwargs)
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            written = args[0]  # whatever shares its memory is something else now
            for known in [t for t in self._sums if torch._C._is_alias_of(t, written)]:  # type: ignore[attr-defined]
                del self._sums[known]
        if total is not None:
            self._sums[first_of(out)] = total

    def _result(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sum | None:
        """What the result of an operation is made of, None if that is not known."""
        if op in NOTHING:
            return Sum()
        first, second = (self._sums.get(a) if isinstance(a, Tensor) else None for a in (*args[:2], None, None)[:2])
        if op in KEEPS:
            return first
        if op in ADDS:
            return _added(first, second) if kwargs.get("alpha", 1) == 1 else None
        if op in SCALES:
            return _scaled(first or second) if first is None or second is None else None
        if op in DIVIDES or op is aten._fused_rms_norm or (op is aten.native_layer_norm and args[3] is None):
            return _scaled(first)
        return None


def first_of(out: Any) -> Any:
    """The first of several results, or the only one."""
    return out[0] if isinstance(out, tuple | list) and out else out


def _added(first: Sum | None, second: Sum | None) -> Sum | None:
    if first is None or second is None or None not in (first.entered, second.entered):
        return None
    return Sum(second.entered if first.entered is None else first.entered, first.added | second.added)


def _scaled(total: Sum | None) -> Sum | None:
    """Outputs of children may be scaled; what entered may not."""
    return total if total is not None and total.entered is None else None
