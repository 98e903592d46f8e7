"""A dispatch mode that applies the rule of every operation, and the record it fills."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.discovery.residual import LayerFlow

Rule = Callable[["Trace", Any, Sequence[Any], Mapping[str, Any], Any], None]
RULES: dict[Any, Rule] = {}
CARRIES_INDICES: set[Any] = set()
READS_INDICES: set[Any] = set()

aten = torch.ops.aten
READS_VALUES = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}  # operators that end in Python numbers
# Element-wise operators that are no activation function; powers and roots belong to norms.
LINEAR = {
    aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.pow, aten.sqrt, aten.rsqrt, aten.reciprocal,
    aten.abs, aten.where, aten.masked_fill, aten.add_, aten.sub_, aten.mul_, aten.div_, aten.neg_, aten.masked_fill_,
    aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_max, aten.copysign, aten.square,
}  # fmt: skip


def rule(*ops: Any, carries_indices: bool = False, reads_indices: bool = False) -> Callable[[Rule], Rule]:
    """Register a function as what the tracer learns from these aten operators.

    Args:
        ops: operators; those that another library defines when it is imported, by name (`library.operator`).
        carries_indices: the operators move integers without computing with them, so that the values of the result
            number the same units as those of the first operand.
        reads_indices: the rule itself looks at which units the values of its operands number. With neither, such units
            can no longer be renumbered, and are frozen.
    """

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        CARRIES_INDICES.update(ops if carries_indices else ())
        READS_INDICES.update(ops if reads_indices else ())
        return function

    return register


@dataclass(frozen=True)
class Reduction:
    """One operation whose result at one position depends on an axis as a whole: a sum, a norm, a softmax, a top-k.

    Attributes:
        step: which operation of the run, counted from 0.
        inputs: (argument position, dimension) of each operand the axis lies on.
        axis: the axis reduced over.
        output_dim: where the axis is in the result, None if it is gone.
        fill: what to overwrite removed positions with, where leaving them out would renumber the others.
    """

    step: int
    inputs: tuple[tuple[int, int], ...]
    axis: Axis
    output_dim: int | None = None
    fill: float | None = None


@dataclass(frozen=True)
class Child:
    """A child of a candidate layer, with matrices of its own.

    Attributes:
        entering: axis of the last dimension of the hidden states it is given.
        leaving: axis of the last dimension of its first result.
        results: how many values it returns in a tuple, 0 if it returns just a tensor.
    """

    entering: Axis
    leaving: Axis
    results: int


@dataclass
class Trace:
    """What one forward pass taught.

    Attributes:
        parameters: name -> one axis per dimension, for every parameter and buffer.
        reductions: all reducing operations, in order.
        consumed: (parameter, axis) pairs that a contraction sums over.
        softmaxed: (axis reduced over, the other axes) of every softmax.
        paired: (batch axis, inner axis) of every product of two activations.
        chosen: (axis chosen from, how many are chosen) of every top-k.
        ops: name of every operation, in order.
        unread: parameters the forward pass never touched.
        read: identities of all tensors some operation read.
        blocks: module path -> (axis of its input's last dimension, of its output's), for candidate layers.
        children: module path -> what enters and leaves it, for the children of candidate layers.
        added: module path of a candidate layer -> paths of the children that do nothing but add to what enters it.
        flows: module path -> what is known of this run, for the candidate layers being run.
        modules: paths of the modules being run, outermost first.
    """

    parameters: dict[str, list[Axis]] = field(default_factory=dict)
    reductions: list[Reduction] = field(default_factory=list)
    consumed: list[tuple[str, Axis]] = field(default_factory=list)
    softmaxed: list[tuple[Axis, tuple[Axis, ...]]] = field(default_factory=list)
    paired: list[tuple[Axis, Axis]] = field(default_factory=list)
    chosen: list[tuple[Axis, int]] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    read: set[int] = field(default_factory=set)
    blocks: dict[str, tuple[Axis, Axis]] = field(default_factory=dict)
    children: dict[str, Child] = field(default_factory=dict)
    added: dict[str, frozenset[str]] = field(default_factory=dict)
    flows: dict[str, LayerFlow] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    _dims: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    _origin: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    _numbered: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    @property
    def here(self) -> str:
        """The current operation and the module it runs in, for reasons a user reads."""
        op = self.ops[-1] if self.ops else "the input"
        return f"{op} in {self.modules[-1]}" if self.modules else op

    def dims(self, tensor: Tensor) -> list[Axis]:
        """The axes of a tensor. One that no traced operation made is a constant that cutting would not change."""
        if tensor not in self._dims:
            text = "tied to a constant that the model computes outside its state dict"
            self._dims[tensor] = [Axis(s, [Hazard("constant", text)]) for s in tensor.shape]
        axes: list[Axis] = self._dims[tensor]
        return axes

    def set(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Say what the dimensions of a tensor are made of."""
        self._dims[tensor] = list(axes)

    def origin(self, tensor: Tensor) -> str | None:
        """The parameter a tensor is a view or copy of."""
        name: str | None = self._origin.get(tensor)
        return name

    def set_origin(self, tensor: Tensor, parameter: str) -> None:
        self._origin[tensor] = parameter

    def numbered(self, tensor: Tensor) -> Axis | None:
        """The axis whose positions the values of an index tensor number."""
        axis: Axis | None = self._numbered.get(tensor)
        return axis

    def set_numbered(self, tensor: Tensor, axis: Axis) -> None:
        self._numbered[tensor] = axis

    def reduce(
        self,
        inputs: Sequence[tuple[int, int]],
        axis: Axis,
        output_dim: int | None = None,
        fill: float | None = None,
    ) -> None:
        """Record that the current operation reduces over `axis`."""
        self.reductions.append(Reduction(len(self.ops) - 1, tuple(inputs), axis, output_dim, fill))


def is_data(axis: Axis) -> bool:
    """Whether an axis counts tokens or sequences, in part at least."""
    axis = axis.find()
    return "data" in axis.hazards or any(is_data(part) for part in axis.parts)


class Tracer(TorchDispatchMode):
    """Applies the rule of every operation to `trace`."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        trace, packet = self.trace, func.overloadpacket
        trace.read.update(id(t) for t in tensors)
        if not results:
            if packet in READS_VALUES:
                freeze_numbered(trace, tensors)
            return out
        trace.ops.append(str(func))
        for flow in trace.flows.values():
            flow.follow(func, args, kwargs, out)
        if packet not in CARRIES_INDICES and packet not in READS_INDICES:
            freeze_numbered(trace, tensors)
        if known := RULES.get(packet) or RULES.get(str(packet)):
            known(trace, func, args, kwargs, out)
        elif torch.Tag.pointwise in func.tags:
            pointwise(trace, tensors, results)
            if packet not in LINEAR:
                for axis in trace.dims(results[0]):
                    axis.mark(traits={"activated"})
        else:
            unknown(trace, func, tensors, results)
        if packet in CARRIES_INDICES and (numbered := trace.numbered(tensors[0])) is not None:
            for result in results:
                trace.set_numbered(result, numbered)
        if len(tensors) == 1 and (name := trace.origin(tensors[0])) is not None:
            for result in results:
                trace.set_origin(result, name)
        return out


def freeze_numbered(trace: Trace, tensors: Sequence[Tensor]) -> None:
    """Numbers of units that are computed with: cutting would renumber the units, and change what is computed."""
    for tensor in tensors:
        axis = trace.numbered(tensor)
        if axis is None:
            continue
        if "counting" in axis.find().traits:
            text = "tied to a constant that aten.arange makes anew (as rotary, alibi and position codes do)"
            freeze(axis, Hazard("constant", f"{text}, used by {trace.here}"))
        else:
            freeze(axis, Hazard("literal", f"{trace.here} computes with the numbers of its units"))


def pointwise(trace: Trace, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Element-wise operations tie their operands position by position, after broadcasting."""
    shape = results[0].shape
    axes: list[Axis] = []
    operands = [(t, trace.dims(t)) for t in tensors]
    for back in range(1, len(shape) + 1):
        size = shape[-back]
        met = [dims[-back] for t, dims in operands if t.dim() >= back and t.shape[-back] == size]
        axis = met[0] if met else Axis(size)
        for other in met[1:]:
            if other is not axis:
                unify(axis, other, trace.here)
        axes.append(axis)
    axes.reverse()
    for result in results:
        if result.shape == shape:
            trace.set(result, axes)


def unknown(trace: Trace, func: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """An operation without a rule freezes everything it touches."""
    hazard = Hazard("unknown", f"the operation {trace.here} has no rule")
    for tensor in tensors:
        for axis in trace.dims(tensor):
            freeze(axis, hazard)
    for result in results:
        trace.set(result, [Axis(s, [hazard]) for s in result.shape])
