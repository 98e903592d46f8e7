"""Backward passes in which every weight gradient is used and freed before the next one exists."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from secateur.errors import NonFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Visit = Callable[[str, Tensor, Tensor], None]  # (name, weight, gradient), both of the parameter's shape
QUICK = 20_000_000_000  # parameters x tokens; below that no progress bar is worth it


def backward(
    model: PreTrainedModel,
    names: Iterable[str],
    batches: Sequence[Tensor],
    visit: Visit,
    *,
    weights: Sequence[float] | None = None,
    on_batch: Callable[[], None] = lambda: None,
    gradient_checkpointing: bool = False,
) -> None:
    """Back-propagate the mean token loss of each batch and show every gradient to `visit`, parameter by parameter.

    A hook fires as soon as a parameter's gradient is complete; the gradient is dropped when `visit` returns, so at any
    time only the one in hand exists. Flags of the model are restored.

    Args:
        names: the parameters whose gradients are wanted.
        batches: token ids, each [sequences, length].
        weights: factor on each batch's loss; 1 if not given.
        on_batch: called when all gradients of a batch have been shown.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    with _gradients_of(model, set(names), visit, gradient_checkpointing):
        tokens = sum(b.numel() for b in batches)
        quick = model.num_parameters() * tokens < QUICK
        shown = track(batches, "scoring", console=Console(file=sys.stderr), disable=quick, transient=True)
        for number, batch in enumerate(shown):
            ids = batch.to(model.device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if not torch.isfinite(loss):
                cause = broken_parameter(model) or "the weights are finite, so check the calibration data and the dtype"
                raise NonFiniteError(f"the loss on calibration batch {number} is {float(loss)}: {cause}")
            if loss.requires_grad:  # else nothing in it depends on the parameters: experts that no token reaches
                (loss * (weights[number] if weights else 1.0)).backward()
            on_batch()


def broken_parameter(model: PreTrainedModel) -> str | None:
    """Which parameter holds NaN or infinite values, as the cause of a broken loss; None if all are finite."""
    names = (n for n, p in model.named_parameters() if not torch.isfinite(p).all())
    name = next(names, None)
    return name and f"{name} holds values that are NaN or infinite"


@contextmanager
def _gradients_of(
    model: PreTrainedModel, names: set[str], visit: Visit, gradient_checkpointing: bool
) -> Iterator[None]:
    parameters = dict(model.named_parameters())
    flags = {n: p.requires_grad for n, p in parameters.items()}
    training = model.training
    handles = []

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            with torch.no_grad():
                visit(name, parameter.detach(), parameter.grad)
            parameter.grad = None

        return hook

    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
        if name in names:
            handles.append(parameter.register_post_accumulate_grad_hook(hook_for(name)))
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # layers recompute only in training mode; decoder models of today have no dropout
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        if gradient_checkpointing:
            model.gradient_checkpointing_disable()
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(flags[name])
        model.train(training)
