"""Compensation in the model itself, whose columns that go are zero: exact where zeroing is as good as cutting."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from torch import Tensor

from secateur.compensation.passes import Inputs, in_order, inputs, moments, reading
from secateur.compensation.solving import Compensated, Compensation, Reader
from secateur.discovery import discover
from secateur.errors import PlanError
from secateur.groups import Groups
from secateur.packed import refuse_packed
from secateur.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def compensated(
    model: PreTrainedModel,
    plan: PruningPlan,
    batches: Sequence[Tensor],
    how: Compensation | None = None,
    groups: Groups | None = None,
) -> Iterator[list[Compensated]]:
    """Hold a model whose linear modules make up for what `plan` removes; slice it inside. It is restored afterwards.

    Columns that go are zero inside. Left as they are: the hidden dimension (see `compensate_sliced`), whole layers, and
    units that something else than a linear module reads (stacked experts).

    Args:
        batches: calibration token ids, each [sequences, length].

    Raises:
        PlanError: the plan does not fit, weights are packed or carry adapters, or no module can be compensated.
        NonFiniteError: activations are NaN or infinite.
    """
    how = how or Compensation()
    refuse_packed(model, "compensated", PlanError)
    groups = groups or discover(model)
    plan.check(groups)
    keeps = reading(model, plan, groups, how, hidden=False)
    order = in_order(model, {path: model.get_submodule(path) for path in keeps}, batches)
    readers = [Reader(path, model.get_submodule(path), keeps[path]) for together in order for path in together]
    training, done = model.training, []
    model.eval()
    try:
        shown = track(readers, "compensating", console=Console(file=sys.stderr), transient=True)
        for number, reader in enumerate(shown):
            x_of = partial(inputs, model, reader.module, len(reader.keep))
            y_of = partial(_in_dense, readers[:number], x_of) if how.dense_share else None
            done.append(reader.solve(*moments(reader, batches, x_of, y_of, how.dense_share), how))
        yield done
    finally:
        for reader in readers:
            reader.restore()
        model.train(training)


def _in_dense(before: Sequence[Reader], x_of: Inputs, ids: Tensor) -> Tensor:
    """What goes into a module of the dense model [tokens, in].

    Args:
        before: those that have been compensated already.
        x_of: gives its inputs in the model as it is.
    """
    with ExitStack() as dense:
        for reader in before:
            dense.enter_context(reader.as_before())
        return x_of(ids)
