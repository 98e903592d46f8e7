"""The setting in which models are traced and compared: every operation visible, every run alike."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Which implementation of attention and of experts shows its single operations. Grouped products of experts cannot run
# on fake float32 tensors; batched ones can.
VISIBLE = {"_attn_implementation_internal": "eager", "_experts_implementation_internal": "batched_mm"}

CONVERSIONS = (Tensor.to, Tensor.type)


@contextmanager
def plain_forward(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients, plain operations, and for a float64 model no detour through float32.

    Restored afterwards.
    """
    training, default = model.training, torch.get_default_dtype()
    calls = _PlainDoubleCalls() if model.dtype == torch.float64 else _PlainCalls()
    model.eval()
    try:
        if model.dtype == torch.float64:
            torch.set_default_dtype(torch.float64)
        with visible_implementations(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), calls:
            yield
    finally:
        torch.set_default_dtype(default)
        model.train(training)


@contextmanager
def visible_implementations(model: PreTrainedModel) -> Iterator[None]:
    """Switch to implementations made of single operations; classes that fix theirs keep it, which is fine."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    saved = [(c, name, vars(c)[name]) for c in configs for name in VISIBLE if name in vars(c)]
    try:
        with quiet_transformers():
            model.set_attn_implementation("eager")
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("batched_mm")
        yield
    finally:
        for config, name, value in saved:
            setattr(config, name, value)


class _PlainCalls(TorchFunctionMode):
    """Rewrites three calls into operations that can be seen, and work the same with and without data.

    `x[..., [-2], :]` becomes the slice it is (a fake tensor would not know the values of the list), a one-hot code the
    comparison it is (with data, it would also check its values), and a list of values its single literal positions
    (it would be read behind the back of every rule).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], tuple(_as_slice(i) for i in args[1]))
        if func is torch.nn.functional.one_hot:
            classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
            if classes > 0:
                return (args[0].unsqueeze(-1) == torch.arange(classes, device=args[0].device)).to(torch.int64)
        if func is Tensor.tolist and args[0].dim() > 0:
            return [piece.tolist() for piece in args[0].unbind()]
        if func is Tensor.tolist:
            return args[0].item()
        return func(*args, **kwargs)


class _PlainDoubleCalls(_PlainCalls):
    """Also keeps computations in float64 that a model would do in float32 (norms, rotary codes, softmax).

    What says so by its arguments, that is; conversions inside TorchScript are not seen.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            func, args = Tensor.to, (*args, torch.float32)
        asked = any(value is torch.float32 for value in (*args, *kwargs.values()))
        if not asked or func is Tensor.view or (func in CONVERSIONS and args[0].dtype == torch.float32):
            return super().__torch_function__(func, types, args, kwargs)
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        out = super().__torch_function__(func, types, args, kwargs)
        # a conversion gives a copy, which may be changed in place
        return out.clone() if any(out is value for value in args) else out


def _as_slice(index: Any) -> Any:
    if isinstance(index, list) and index and all(type(i) is int for i in index):
        first, stop = index[0], index[-1] + 1
        if index == list(range(first, stop)):
            return slice(first, stop if stop else None)
    return index


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Undo what a forward pass leaves behind in the modules: caches, and flags such as "already rescaled"."""
    tables = ("_buffers", "_parameters", "_modules")
    saved = [(m, dict(vars(m)), [(t, dict(vars(m)[t])) for t in tables]) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for table, entries in contents:
                vars(module)[table].clear()
                vars(module)[table].update(entries)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's log while sizes and settings are tried that it may not like.

    A logger's level takes long to change where there are thousands of loggers, so what tries much is quiet as a whole.
    """
    logger = logging.getLogger("transformers")
    level = logger.level
    loud = level < logging.CRITICAL
    if loud:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if loud:
            logger.setLevel(level)
