"""Reversible removal: zero what a plan removes, and put it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.discovery import discover
from secateur.discovery.reference import bypassed
from secateur.groups import Groups
from secateur.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def mask(model: PreTrainedModel, plan: PruningPlan, groups: Groups | None = None) -> Iterator[None]:
    """Run `model` without the units that `plan` removes, then restore it bit for bit.

    Every position of a removed unit is set to zero in every member; removed layers are bypassed, and removed sublayers
    put out zeros. For FFN channels, heads, KV groups, query heads, layers and sublayers the logits are those of the
    sliced model. For the hidden dimension they are not: norms still average over the zeroed dimensions.
    `Reference.logits` is exact for every kind.

    Raises:
        PlanError: the plan does not fit the model, or removes rows that DoRA adapts.
    """
    groups = groups or discover(model)
    plan.check(groups)
    for name in plan.kept:
        groups.named(name).check_zeroing()
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
    with torch.no_grad(), bypassed(model, groups, plan.kept):
        try:
            for name in plan.kept:
                removed = list(plan.removed(name))
                for member in groups.named(name).members if removed else ():
                    tensor = state[member.parameter].data
                    index = torch.from_numpy(member.index[removed].ravel()).to(tensor.device)
                    saved.append((tensor, member.dim, index, tensor.index_select(member.dim, index)))
                    tensor.index_fill_(member.dim, index, 0)
            with torch.set_grad_enabled(True):
                yield
        finally:
            for tensor, dim, index, values in reversed(saved):
                tensor.index_copy_(dim, index, values)
