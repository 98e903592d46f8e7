"""Run a model once under a dispatch mode and learn what every dimension of every parameter is made of.

The model runs on fake tensors (shapes without data), so weights need not exist: a 70B-shaped model on the meta device
takes seconds and no memory. See `rules/` for what each operation teaches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.hooks import RemovableHandle

import secateur.discovery.rules  # noqa: F401  (registers the rules)
from secateur.discovery.axes import Axis, Hazard, freeze
from secateur.discovery.grouping import is_stored
from secateur.discovery.recorder import RULES, Child, Reduction, Trace, Tracer
from secateur.discovery.residual import LayerFlow, first_of
from secateur.discovery.setting import plain_forward, quiet_transformers, unchanged
from secateur.discovery.stand_ins import known_packed, multiply_densely
from secateur.errors import DiscoveryError
from secateur.packed import Packed, refuse_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BATCH", "RULES", "SEQ_LEN", "Reduction", "Trace", "plain_forward", "probe_ids", "quiet_transformers", "run_trace",
]  # fmt: skip

BATCH, SEQ_LEN = 2, 7  # sizes of the probe input; any two small numbers do
LONG = 150  # tokens of the second probe, which reaches what compresses long contexts

VALUE_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
FAILURES = (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, AttributeError)


def probe_ids(model: PreTrainedModel, seed: int = 0, shape: tuple[int, int] = (BATCH, SEQ_LEN)) -> Tensor:
    """Random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, shape, generator=generator).to(model.device)


def run_trace(model: PreTrainedModel, *, fake: bool = True, ids: Tensor | None = None) -> Trace:
    """Trace one forward pass of `model`; linear modules whose weights are packed are traced as what they stand for.

    Args:
        fake: trace on tensors without data; the model may be on the meta device. A forward pass that depends on values
            is traced on the real tensors instead, as always if False.
        ids: token ids [batch, length] to trace real tensors on, by default `probe_ids`.

    Raises:
        DiscoveryError: the forward pass fails, or weights are packed in a way that is not known, or have to be read.
    """
    packed = known_packed(model)
    if not fake:
        refuse_packed(model, "traced on their values", DiscoveryError)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    try:
        if not fake:
            return _traced(model, state, probe_ids(model) if ids is None else ids, warm_up=True)
        with FakeTensorMode(allow_non_fake_inputs=True), unchanged(model):
            multiply_densely(model, packed)
            copies = fake_copies(state, packed, model.dtype)
            return _traced(model, copies, torch.zeros(BATCH, SEQ_LEN, dtype=torch.long))
    except VALUE_DEPENDENT as error:
        if any(t.is_meta for t in state.values()):
            raise DiscoveryError(
                f"the forward pass of {type(model).__name__} depends on values ({error}); "
                "load the weights to discover its groups"
            ) from error
        return run_trace(model, fake=False)
    except FAILURES as error:
        raise DiscoveryError(f"cannot trace {type(model).__name__}: {error}") from error


def _traced(model: PreTrainedModel, state: Mapping[str, Tensor], ids: Tensor, *, warm_up: bool = False) -> Trace:
    """Trace a forward pass over `ids` with `state` in place of the model's own tensors.

    Args:
        warm_up: run once before, for models whose first run does more than the next ones.
    """
    trace = Trace()
    device = next(iter(state.values())).device
    with plain_forward(model):
        if warm_up:
            model(ids, use_cache=False)
        _register(trace, model, state)
        _forward(model, trace, state, ids)
        if trace.unread:
            _reach_further(model, trace, state, device)
    return trace


def _reach_further(model: PreTrainedModel, trace: Trace, state: Mapping[str, Tensor], device: torch.device) -> None:
    """Trace a longer input for what it ties; the reductions recorded stay those of the short one, which is replayed."""
    steps, reductions = len(trace.ops), len(trace.reductions)
    try:
        with unchanged(model):
            _forward(model, trace, state, torch.zeros(1, LONG, dtype=torch.long, device=device))
    except Exception:  # a model may refuse this length in any way it likes; what it never reads then stays unread
        pass
    del trace.ops[steps:], trace.reductions[reductions:], trace.modules[:]
    trace.flows.clear()


def fake_copies(
    state: Mapping[str, Tensor], packed: Mapping[str, Packed] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A tensor without data for every tensor of the state, tied ones staying one; packed ones dense, in `dtype`."""
    packed = packed or {}
    made: dict[int, Tensor] = {}
    for name, t in state.items():
        if id(t) not in made:
            shape = packed[name].shape if name in packed else t.shape
            made[id(t)] = torch.empty(shape, dtype=dtype if name in packed else t.dtype)
    return {name: made[id(t)] for name, t in state.items()}


def _register(trace: Trace, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Give every parameter and buffer its own axes."""
    for name, tensor in state.items():
        if tensor in trace._dims:
            continue
        stored = is_stored(model, name)
        hazards = [] if stored else [Hazard("constant", f"tied to {name}, which the model computes itself")]
        axes = [Axis(s, hazards) for s in tensor.shape]
        trace.set(tensor, axes)
        trace.parameters[name] = axes
        if stored:
            trace.set_origin(tensor, name)


def _forward(model: PreTrainedModel, trace: Trace, state: Mapping[str, Tensor], ids: Tensor) -> None:
    hazard = Hazard("data", "a batch or sequence dimension")
    trace.set(ids, [Axis(s, [hazard]) for s in ids.shape])
    with _observed_modules(model, trace), Tracer(trace):
        logits = torch.func.functional_call(model, dict(state), (ids,), {"use_cache": False}).logits
    for axis in trace.dims(logits):
        freeze(axis, Hazard("output", "the vocabulary the model predicts over"))
    trace.unread = [n for n in trace.parameters if trace.origin(state[n]) and id(state[n]) not in trace.read]


@contextmanager
def _observed_modules(model: PreTrainedModel, trace: Trace) -> Iterator[None]:
    """Know which module runs, and observe every child of a ModuleList: it may be a layer."""
    handles = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: trace.modules.append(path)))
            handles.append(module.register_forward_hook(lambda *_: _pop(trace.modules)))
        if isinstance(module, torch.nn.ModuleList):
            for number, block in enumerate(module):
                handles += _observed_layer(trace, f"{path}.{number}", block)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observed_layer(trace: Trace, path: str, layer: torch.nn.Module) -> list[RemovableHandle]:
    """Note the axes that enter and leave a candidate layer and its children, and follow what the children add."""

    def begin(_: Any, args: Any, kwargs: Any) -> None:
        trace.flows[path] = LayerFlow((*args, *kwargs.values()))

    def end(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        flow, entering = trace.flows.pop(path), entering_states(args, kwargs, out)
        if entering is not None:
            trace.blocks[path] = (trace.dims(entering)[-1], trace.dims(first_of(out))[-1])
        added = flow.added(entering, out)
        trace.added[path] = trace.added.get(path, added) & added

    handles = [
        layer.register_forward_pre_hook(begin, with_kwargs=True),
        layer.register_forward_hook(end, with_kwargs=True),
    ]
    for name, child in layer.named_children():
        if any(parameter.dim() > 1 for parameter in child.parameters()):
            handles += _observed_child(trace, path, name, child)
    return handles


def _observed_child(trace: Trace, layer: str, name: str, child: torch.nn.Module) -> list[RemovableHandle]:
    """Note what enters and leaves a child, and that its result is its own whatever happens inside."""
    path = f"{layer}.{name}"

    def begin(*_: Any) -> None:
        if layer in trace.flows:  # else something other than its layer runs it
            trace.flows[layer].inside = True

    def end(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        if (entering := entering_states(args, kwargs, out)) is not None:
            axes = trace.dims(entering)[-1], trace.dims(first_of(out))[-1]
            trace.children[path] = Child(*axes, len(out) if isinstance(out, tuple | list) else 0)
        if layer in trace.flows:
            trace.flows[layer].leaves(path, out)

    return [child.register_forward_pre_hook(begin), child.register_forward_hook(end, with_kwargs=True)]


def entering_states(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Tensor | None:
    """The hidden states a module was given: the first operand with the shape of what it returns."""
    leaving = first_of(out)
    if not isinstance(leaving, Tensor) or leaving.dim() < 2:
        return None
    operands = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
    return next((t for t in operands if t.shape == leaving.shape), None)


def _pop(modules: list[str]) -> None:
    """Forget the module that has just run; a hook that returns nothing leaves its output alone."""
    modules.pop()
