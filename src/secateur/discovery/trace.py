"""Run a model once under a dispatch mode and learn what every dimension of every parameter is made of.

The model runs on fake tensors (shapes without data), so weights need not exist: a 70B-shaped model on the meta device
takes seconds and no memory. See `rules/` for what each operation teaches.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.discovery.axes import Axis, Hazard, freeze, unify
from secateur.errors import DiscoveryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, SEQ_LEN = 2, 7  # sizes of the probe input; any two small numbers do

Rule = Callable[["Trace", Any, Sequence[Any], Mapping[str, Any], Any], None]
RULES: dict[Any, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Register a function as what the tracer learns from these aten operators."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


@dataclass(frozen=True)
class Reduction:
    """One operation that sums, averages or normalises over an axis.

    Attributes:
        step: which operation of the run, counted from 0.
        inputs: (argument position, dimension) of each operand the axis lies on.
        axis: the axis reduced over.
        output_dim: where the axis is in the result, None if it is gone.
    """

    step: int
    inputs: tuple[tuple[int, int], ...]
    axis: Axis
    output_dim: int | None = None


@dataclass
class Trace:
    """What one forward pass taught.

    Attributes:
        parameters: name -> one axis per dimension, for every parameter and buffer.
        reductions: all reducing operations, in order.
        consumed: (parameter, axis) pairs that a contraction sums over.
        softmaxed: (axis reduced over, the other axes) of every softmax.
        ops: name of every operation, in order.
        unread: parameters the forward pass never touched.
        read: identities of all tensors some operation read.
        blocks: module path -> (axis of its input's last dimension, of its output's), for candidate layers.
    """

    parameters: dict[str, list[Axis]] = field(default_factory=dict)
    reductions: list[Reduction] = field(default_factory=list)
    consumed: list[tuple[str, Axis]] = field(default_factory=list)
    softmaxed: list[tuple[Axis, tuple[Axis, ...]]] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    read: set[int] = field(default_factory=set)
    blocks: dict[str, tuple[Axis, Axis]] = field(default_factory=dict)
    _dims: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    _origin: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def dims(self, tensor: Tensor) -> list[Axis]:
        """The axes of a tensor. One that no traced operation made is a constant that cutting would not change."""
        if tensor not in self._dims:
            text = "tied to a constant that the model computes outside its state dict"
            self._dims[tensor] = [Axis(s, [Hazard("constant", text)]) for s in tensor.shape]
        axes: list[Axis] = self._dims[tensor]
        return axes

    def set(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        self._dims[tensor] = list(axes)

    def origin(self, tensor: Tensor) -> str | None:
        """The parameter a tensor is a view or copy of."""
        name: str | None = self._origin.get(tensor)
        return name

    def set_origin(self, tensor: Tensor, parameter: str) -> None:
        self._origin[tensor] = parameter

    def reduce(self, inputs: Sequence[tuple[int, int]], axis: Axis, output_dim: int | None = None) -> None:
        """Record that the current operation reduces over `axis`."""
        self.reductions.append(Reduction(len(self.ops) - 1, tuple(inputs), axis, output_dim))


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
        if not results:
            return out
        trace = self.trace
        trace.read.update(id(t) for t in tensors)
        trace.ops.append(str(func))
        packet = func.overloadpacket
        if packet in RULES:
            RULES[packet](trace, func, args, kwargs, out)
        elif torch.Tag.pointwise in func.tags:
            pointwise(trace, func, tensors, results)
        else:
            unknown(trace, func, tensors, results)
        if len(tensors) == 1 and (name := trace.origin(tensors[0])) is not None:
            for result in results:
                trace.set_origin(result, name)
        return out


def pointwise(trace: Trace, func: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Element-wise operations tie their operands position by position, after broadcasting."""
    shape = results[0].shape
    axes: list[Axis] = []
    for back in range(1, len(shape) + 1):
        size = shape[-back]
        met = [trace.dims(t)[-back] for t in tensors if t.dim() >= back and t.shape[-back] == size]
        axis = met[0] if met else Axis(size)
        for other in met[1:]:
            unify(axis, other, str(func))
        axes.append(axis)
    axes.reverse()
    for result in results:
        if result.shape == shape:
            trace.set(result, axes)


def unknown(trace: Trace, func: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """An operation without a rule freezes everything it touches."""
    hazard = Hazard("unknown", f"the operation {func} has no rule")
    for tensor in tensors:
        for axis in trace.dims(tensor):
            freeze(axis, hazard)
    for result in results:
        trace.set(result, [Axis(s, [hazard]) for s in result.shape])


def run_trace(model: PreTrainedModel, *, fake: bool = True) -> Trace:
    """Trace one forward pass of `model`.

    Args:
        fake: trace on tensors without data; the model may be on the meta device. A forward pass that depends on values
            is traced on the real tensors instead, as always if False.

    Raises:
        DiscoveryError: the forward pass fails.
    """
    import secateur.discovery.rules  # noqa: F401  (registers the rules)

    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    try:
        if not fake:
            return _traced(model, state)
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _traced(model, _fake_copies(state))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        if any(t.is_meta for t in state.values()):
            raise DiscoveryError(
                f"the forward pass of {type(model).__name__} depends on values ({error}); "
                "load the weights to discover its groups"
            ) from error
        return run_trace(model, fake=False)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise DiscoveryError(f"cannot trace {type(model).__name__}: {error}") from error


def _traced(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Trace:
    """Trace a forward pass with `state` in place of the model's own tensors."""
    trace = Trace()
    with plain_forward(model):
        ids = torch.zeros(BATCH, SEQ_LEN, dtype=torch.long, device=next(iter(state.values())).device)
        _register(trace, model, state)
        _forward(model, trace, state, ids)
    return trace


def _fake_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tensor without data for every tensor of the state, tied ones staying one."""
    made: dict[int, Tensor] = {}
    for t in state.values():
        if id(t) not in made:
            made[id(t)] = torch.empty(t.shape, dtype=t.dtype)
    return {name: made[id(t)] for name, t in state.items()}


def _register(trace: Trace, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Give every parameter and buffer its own axes."""
    stored = set(model.state_dict().keys())
    for name, tensor in state.items():
        if tensor in trace._dims:
            continue
        hazards = [] if name in stored else [Hazard("constant", f"tied to {name}, which the model computes itself")]
        axes = [Axis(s, hazards) for s in tensor.shape]
        trace.set(tensor, axes)
        trace.parameters[name] = axes
        if name in stored:
            trace.set_origin(tensor, name)


def _forward(model: PreTrainedModel, trace: Trace, state: Mapping[str, Tensor], ids: Tensor) -> None:
    hazard = Hazard("data", "a batch or sequence dimension")
    trace.set(ids, [Axis(s, [hazard]) for s in ids.shape])
    with _observed_blocks(model, trace), Tracer(trace):
        logits = torch.func.functional_call(model, dict(state), (ids,), {"use_cache": False}).logits
    for axis in trace.dims(logits):
        freeze(axis, Hazard("output", "the vocabulary the model predicts over"))
    trace.unread = [n for n in trace.parameters if trace.origin(state[n]) and id(state[n]) not in trace.read]


@contextmanager
def _observed_blocks(model: PreTrainedModel, trace: Trace) -> Iterator[None]:
    """Note the axes of the hidden states that enter and leave every child of a ModuleList."""
    handles = []
    for path, modules in model.named_modules():
        if not isinstance(modules, torch.nn.ModuleList):
            continue
        for number, block in enumerate(modules):

            def note(_: Any, args: Any, kwargs: Any, out: Any, name: str = f"{path}.{number}") -> None:
                entering = args[0] if args else kwargs.get("hidden_states")
                leaving = out[0] if isinstance(out, tuple) else out
                if isinstance(entering, Tensor) and isinstance(leaving, Tensor) and entering.shape == leaving.shape:
                    trace.blocks[name] = (trace.dims(entering)[-1], trace.dims(leaving)[-1])

            handles.append(block.register_forward_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def plain_forward(model: PreTrainedModel) -> Iterator[None]:
    """The setting in which models are traced and compared.

    Evaluation mode, no gradients, eager attention (so that every operation is visible), and for a float64 model no
    detour through float32. Restored afterwards.
    """
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    _set_attention(model, "eager")
    precision = DoublePrecision() if model.dtype == torch.float64 else nullcontext()
    try:
        with torch.no_grad(), precision, _ListsAsSlices():
            yield
    finally:
        _set_attention(model, attention)
        model.train(training)


class DoublePrecision(TorchDispatchMode):
    """Keeps computations in float64 that a model would do in float32 (norms, rotary codes, softmax)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


class _ListsAsSlices(TorchFunctionMode):
    """Reads `x[..., [-2], :]` as the slice it is: a fake tensor would not know the values of the list."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], tuple(_as_slice(i) for i in args[1]))
        return func(*args, **(kwargs or {}))


def _as_slice(index: Any) -> Any:
    if isinstance(index, list) and index and all(type(i) is int for i in index):
        first, stop = index[0], index[-1] + 1
        if index == list(range(first, stop)):
            return slice(first, stop if stop else None)
    return index


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's log while sizes and settings are tried that it may not like."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Switch the attention implementation; classes that fix theirs at construction keep it, which is fine."""
    with quiet_transformers():
        model.set_attn_implementation(implementation)
