"""The meaning of "without these units": the original model with every reduction restricted to the units that stay.

Zeroing weights is not enough where a norm averages over the removed dimensions or a softmax over removed experts. Here
the original weights run, and each operation that sums, averages or normalises over an axis sees only the positions that
stay. A sliced model must give these logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from secateur.discovery.axes import Axis, keep_mask, leaves
from secateur.discovery.grouping import build_groups
from secateur.discovery.recorder import Reduction, Trace
from secateur.discovery.residual import first_of
from secateur.discovery.setting import plain_forward
from secateur.discovery.trace import BATCH, FAILURES, SEQ_LEN, entering_states, probe_ids, run_trace
from secateur.errors import DiscoveryError
from secateur.groups import Groups, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten = torch.ops.aten
LONG_PROBE = (2, 60)  # texts and tokens; few models have fewer positions
PROBES = 16  # texts to look for one on which a model runs the same operations with some units and without
NORMS = (aten.native_layer_norm, aten._fused_rms_norm)


class OtherPathError(DiscoveryError):
    """The model runs other operations than when it was traced."""


class RestrictedReductions(TorchDispatchMode):
    """Replays a traced forward pass, every recorded reduction on the kept positions only."""

    def __init__(self, trace: Trace, kept: Mapping[Axis, NDArray[np.bool_]]) -> None:
        super().__init__()
        self.ops = trace.ops
        self.step = 0
        self.restricted: dict[int, list[tuple[Reduction, Tensor]]] = {}
        for reduction in trace.reductions:
            if kept.keys().isdisjoint(leaves(reduction.axis)):
                continue
            mask = keep_mask(reduction.axis, dict(kept))
            if not mask.all():
                self.restricted.setdefault(reduction.step, []).append((reduction, torch.from_numpy(mask)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        events = self.restricted.get(self.step, []) if self._is_next(func) else []
        out = restrict(func, args, kwargs, events) if events else func(*args, **kwargs)
        if any(isinstance(t, Tensor) for t in tree_iter(out)):
            if not self._is_next(func):
                raise OtherPathError(
                    "which operations the model runs depends on values, such as the experts that tokens are sent to, "
                    "and without these units other ones run than when it was traced, so nothing can be compared"
                )
            self.step += 1
        return out

    def _is_next(self, func: Any) -> bool:
        return self.step < len(self.ops) and self.ops[self.step] == str(func)


def restrict(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], events: list[tuple[Reduction, Tensor]]) -> Any:
    """Run one operation on the kept positions; an axis that survives it is filled up with zeros again."""
    new = list(args)
    for reduction, mask in events:
        for position, dim in reduction.inputs:
            operand = new[position]
            if reduction.fill is None:
                new[position] = operand.index_select(dim, mask.nonzero()[:, 0].to(operand.device))
            else:
                removed = (~mask).nonzero()[:, 0].to(operand.device)
                new[position] = operand.index_fill(dim, removed, _representable(reduction.fill, operand.dtype))
        if func.overloadpacket in NORMS:
            new[1] = [int(mask.sum())]
    out = func(*new, **kwargs)
    for reduction, mask in events:
        if reduction.output_dim is None:
            continue
        keep = mask.nonzero()[:, 0]
        first = out[0] if isinstance(out, tuple) else out
        shape = list(first.shape)
        shape[reduction.output_dim] = reduction.axis.size
        full = first.new_zeros(shape).index_copy(reduction.output_dim, keep.to(first.device), first)
        out = (full, *out[1:]) if isinstance(out, tuple) else full
    return out


def _representable(value: float, dtype: torch.dtype) -> float:
    """`value`, or for integers the nearest there is."""
    if dtype.is_floating_point:
        return value
    limits = torch.iinfo(dtype if dtype is not torch.bool else torch.uint8)
    return int(min(max(value, limits.min), limits.max))


@contextmanager
def bypassed(model: PreTrainedModel, groups: Groups, kept: Kept) -> Iterator[None]:
    """Let the hidden states pass removed layers unchanged, and removed sublayers put out zeros."""

    def skip(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        return _with_first(out, entering_states(args, kwargs, out))

    def vanish(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        with _disable_current_modes():  # a replayed trace knows nothing of this operation
            return _with_first(out, torch.zeros_like(first_of(out)))

    hooks = {"layer": skip, "sublayer": vanish}
    handles = [
        model.get_submodule(block).register_forward_hook(hook, with_kwargs=True)
        for kind, hook in hooks.items()
        for block in groups.removed_blocks(kept, (kind,))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_first(out: Any, first: Tensor | None) -> Any:
    """What a module returns, with `first` in place of its first value."""
    return type(out)([first, *out[1:]]) if type(out) in (tuple, list) else first


class Reference:
    """Logits of one model without some of its units; traces the model once, on its own weights.

    Attributes:
        groups: the groups of the model.
        ids: the token ids [batch, length] it was traced on. They are more where the operations that run depend on
            values, such as the experts that some token is sent to, so that as good as all of them run, and where a
            router chooses experts or an indexer tokens: of what only decides a choice, such as a correction bias,
            nothing shows in the logits unless the choice comes out otherwise.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._trace((BATCH, SEQ_LEN))
        if self.trace.chosen or not self._replays():
            self._trace(LONG_PROBE)

    def _trace(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.ids = ids = probe_ids(self.model, shape=shape)
        self.trace = run_trace(self.model, fake=False, ids=ids)
        self.groups, self._leaves = build_groups(self.model, self.trace)

    def _replays(self) -> bool:
        """Whether the same operations run on another text."""
        try:
            self.logits(probe_ids(self.model, seed=1, shape=self.shape), {})
        except DiscoveryError:
            return False
        return True

    def without(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """Token ids [batch, length] and the logits [batch, length, vocab] on them with only the `kept` units.

        The ids are those of the trace, or, where the model takes another path on them without these units, others.

        Raises:
            DiscoveryError: it does so on all ids that were tried, or cannot run without these units.
        """
        for seed in range(PROBES):
            ids = probe_ids(self.model, seed, self.shape)
            with suppress(OtherPathError):
                return ids, self.logits(ids, kept)
        return self.ids, self.logits(self.ids, kept)

    def logits(self, ids: Tensor, kept: Mapping[str, Sequence[int]]) -> Tensor:
        """Logits [batch, length, vocab] with only the `kept` units; `ids` must have the traced shape.

        Raises:
            DiscoveryError: the model took another path than when it was traced, or cannot run without these units.
        """
        masks: dict[Axis, NDArray[np.bool_]] = {}
        for name, units in kept.items():
            if name in self._leaves:
                mask = np.zeros(self.groups.named(name).units, dtype=bool)
                mask[list(units)] = True
                masks[self._leaves[name].find()] = mask
        restricted = RestrictedReductions(self.trace, masks)
        with ExitStack() as stack:
            stack.enter_context(bypassed(self.model, self.groups, kept))
            stack.enter_context(plain_forward(self.model))
            stack.enter_context(restricted)
            try:
                logits: Tensor = self.model(ids, use_cache=False).logits
            except FAILURES as error:
                raise DiscoveryError(f"{type(self.model).__name__} cannot run without these units: {error}") from error
        return logits


def plain_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a model in the same setting as `Reference.logits`."""
    with plain_forward(model):
        logits: Tensor = model(ids, use_cache=False).logits
    return logits
