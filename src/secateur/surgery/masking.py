"""Reversible removal: zero what a plan removes, and put it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.discovery import discover
from secateur.discovery.reference import bypassed
from secateur.errors import PlanError
from secateur.groups import Groups
from secateur.packed import REMEDY, Packed, packed_weights
from secateur.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def mask(model: PreTrainedModel, plan: PruningPlan, groups: Groups | None = None) -> Iterator[None]:
    """Run `model` without the units that `plan` removes, then restore it bit for bit.

    Every position of a removed unit is set to zero in every member; removed layers are bypassed, and removed sublayers
    put out zeros. Where the matrix of a linear module is packed (quantised), the inputs that its removed columns would
    meet and the results of its removed rows are set to zero instead, each time it runs. For FFN channels, heads, KV
    groups, query heads, layers and sublayers the logits are those of the sliced model. For the hidden dimension they
    are not: norms still average over the zeroed dimensions. `Reference.logits` is exact for every kind.

    Raises:
        PlanError: the plan does not fit the model, removes rows that DoRA adapts, or lies on another packed tensor.
    """
    groups = groups or discover(model)
    plan.check(groups)
    for name in plan.kept:
        groups.named(name).check_zeroing()
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    packed, with_gradients = packed_weights(model), torch.is_grad_enabled()
    saved: list[tuple[Tensor, int, Tensor, Tensor]] = []
    handles: list[RemovableHandle] = []
    with torch.no_grad(), bypassed(model, groups, plan.kept):
        try:
            for name in plan.kept:
                removed = list(plan.removed(name))
                for member in groups.named(name).members if removed else ():
                    tensor = state[member.parameter].data
                    index = torch.from_numpy(member.index[removed].ravel()).to(tensor.device)
                    if member.parameter in packed:
                        handles.append(_around(model, member.parameter, packed, member.dim, index))
                        continue
                    saved.append((tensor, member.dim, index, tensor.index_select(member.dim, index)))
                    tensor.index_fill_(member.dim, index, 0)
            with torch.set_grad_enabled(with_gradients):
                yield
        finally:
            for tensor, dim, index, values in reversed(saved):
                tensor.index_copy_(dim, index, values)
            for handle in handles:
                handle.remove()


def _around(
    model: PreTrainedModel, name: str, packed: Mapping[str, Packed], dim: int, index: Tensor
) -> RemovableHandle:
    """Zero what goes into or comes out of a linear module at some columns or rows of its packed matrix [out, in].

    Raises:
        PlanError: the module is no linear one.
    """
    module = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(module, nn.Linear):
        raise PlanError(f"{packed[name].text} in a module that is not linear, so it cannot be masked: {REMEDY}")

    def before(_: Any, args: Any) -> Any:
        return (args[0].index_fill(-1, index, 0), *args[1:])

    def after(_: Any, args: Any, out: Tensor) -> Tensor:
        return out.index_fill(-1, index, 0)

    if dim == 1:
        return module.register_forward_pre_hook(before)
    return module.register_forward_hook(after)
