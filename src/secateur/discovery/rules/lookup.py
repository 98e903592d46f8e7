"""Looking positions up by the values of an index tensor.

If the values number the units of another axis (the experts a router chose), the axis looked up is that axis. Otherwise
it is a table, and stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.recorder import Trace, freeze_numbered, rule

aten = torch.ops.aten


def address(trace: Trace, axis: Axis, index: Tensor) -> None:
    """Learn that the values of `index` are positions of `axis`."""
    numbered = trace.numbered(index)
    if numbered is None or "counting" in numbered.find().traits:
        freeze(axis, Hazard("table", f"looked up by {trace.here}"))
        freeze_numbered(trace, [index])
    else:
        unify(axis, numbered, trace.here)


def carry(trace: Trace, operand: Tensor, out: Tensor) -> None:
    """What is looked up in a parameter is the parameter; what is looked up among indices numbers the same."""
    if (name := trace.origin(operand)) is not None:
        trace.set_origin(out, name)
    if (axis := trace.numbered(operand)) is not None:
        trace.set_numbered(out, axis)


@rule(aten.embedding, reads_indices=True)
def embedding(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    table, ids = trace.dims(args[0]), trace.dims(args[1])
    freeze(table[0], Hazard("table", "looked up by token or position number"))
    freeze_numbered(trace, [args[1]])
    trace.set(out, [*ids, table[1]])


def indexed(trace: Trace, operand: Tensor, indices: Sequence[Tensor | None]) -> list[Axis] | None:
    """The axes of `operand[indices]`: indexed axes give way to those of the index tensors.

    Returns:
        None if the indexing is of another form; the operand is then frozen.
    """
    axes = trace.dims(operand)
    used = [d for d, i in enumerate(indices) if i is not None]
    tensors = [i for i in indices if i is not None]
    if len(tensors) == 1 and tensors[0].dtype == torch.bool:
        return _masked(trace, axes, used[0], tensors[0])
    if not tensors or any(t.dtype in (torch.bool, torch.uint8) for t in tensors):
        for axis in axes:
            freeze(axis, Hazard("table", f"looked up by a mask in {trace.here}"))
        return None
    for d, index in zip(used, tensors, strict=True):
        address(trace, axes[d], index)
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    looked_up: list[Axis] = []
    for back in range(len(shape), 0, -1):
        met = [trace.dims(t)[-back] for t in tensors if t.dim() >= back and t.shape[-back] == shape[-back]]
        for other in met[1:]:
            unify(met[0], other, trace.here)
        looked_up.append(met[0])
    kept = [a for d, a in enumerate(axes) if d not in used]
    place = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return [*kept[:place], *looked_up, *kept[place:]]


def _masked(trace: Trace, axes: list[Axis], first: int, mask: Tensor) -> list[Axis]:
    """The axes of `operand[mask]`: those under the mask become one whose length depends on values."""
    hazard = Hazard("table", f"looked up by a mask in {trace.here}")
    for axis in (*axes[first : first + mask.dim()], *trace.dims(mask)):
        freeze(axis, hazard)
    return [*axes[:first], Axis(0, [hazard, Hazard("data", "chosen tokens")]), *axes[first + mask.dim() :]]


@rule(aten.index, aten._unsafe_index, reads_indices=True)
def index(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    new = indexed(trace, args[0], args[1])
    if new is None:
        hazard = Hazard("table", f"looked up by {trace.here}")
        freeze_numbered(trace, [args[0]])
        new = [Axis(s, [hazard]) for s in out.shape]
    else:
        carry(trace, args[0], out)
        new = [Axis(s, [*a.find().hazards.values()]) if a.size != s else a for a, s in zip(new, out.shape, strict=True)]
    trace.set(out, new)


@rule(aten.index_select, reads_indices=True)
def index_select(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = list(trace.dims(args[0]))
    address(trace, axes[args[1]], args[2])
    axes[args[1]] = trace.dims(args[2])[0]
    carry(trace, args[0], out)
    trace.set(out, axes)


@rule(aten.gather, reads_indices=True)
def gather(trace: Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes, ids = trace.dims(args[0]), trace.dims(args[2])
    dim = args[1] % max(len(axes), 1)
    for d, (a, b) in enumerate(zip(axes, ids, strict=True)):
        if d == dim:
            address(trace, a, args[2])
        elif a.size == b.size:
            unify(a, b, trace.here)
        else:
            freeze(a, Hazard("literal", f"{trace.here} reads its first positions"))
    carry(trace, args[0], out)
    trace.set(out, ids)
