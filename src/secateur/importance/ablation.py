"""Leave-one-out: what the criteria estimate, measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from secateur.errors import PlanError
from secateur.groups import Group
from secateur.packed import refuse_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def leave_one_out(model: PreTrainedModel, groups: Sequence[Group], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Change of the mean token loss when one unit's weights are zeroed, for every unit of every group.

    A layer is zeroed with all its parameters, which in a residual network leaves the hidden states unchanged. The model
    is restored bit for bit. Costs one forward pass over `batches` per unit.

    Returns:
        Group name -> float32 [units], in nats per token; negative where the model does better without the unit.

    Raises:
        PlanError: a group lies on rows that DoRA adapts, or weights are quantised.
    """
    refuse_packed(model, "zeroed in place", PlanError)
    for group in groups:
        group.check_zeroing()
    training = model.training
    model.eval()
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    base = _loss(model, batches)
    changes = {g.name: torch.zeros(g.units) for g in groups}
    jobs = [(g, u) for g in groups for u in range(g.units)]
    try:
        for group, unit in track(jobs, "leave one out", console=Console(file=sys.stderr), transient=True):
            saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
            for name, dim, index in _places(group, unit, state):
                tensor = state[name].data
                at = index.to(tensor.device)
                saved.append((tensor, dim, at, tensor.index_select(dim, at)))
                tensor.index_fill_(dim, at, 0)
            changes[group.name][unit] = _loss(model, batches) - base
            for tensor, dim, at, values in reversed(saved):
                tensor.index_copy_(dim, at, values)
    finally:
        model.train(training)
    return changes


def _places(group: Group, unit: int, state: dict[str, Tensor]) -> list[tuple[str, int, Tensor]]:
    """(parameter, dimension, positions) of one unit."""
    if group.blocks:
        prefix = group.blocks[unit] + "."
        return [(n, 0, torch.arange(t.shape[0])) for n, t in state.items() if n.startswith(prefix) and t.dim()]
    return [(m.parameter, m.dim, torch.from_numpy(m.index[unit])) for m in group.members]


def _loss(model: PreTrainedModel, batches: Sequence[Tensor]) -> float:
    """Mean token loss over all batches."""
    total, count = 0.0, 0
    for batch in batches:
        ids = batch.to(model.device)
        predicted = ids.shape[0] * (ids.shape[1] - 1)
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * predicted
        count += predicted
    return total / count
