"""Units on their way to zero while a model trains: frozen rows scaled down, LoRA's product absorbed, moments cleared.

The weights of a unit here are the rows that put it out (its `producer` members, biases included). When they are zero,
rows of B included, nothing that reads the unit gets anything but zeros, so that cutting it changes no logit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.groups import Group, Member
from secateur.importance.displacement import producers
from secateur.importance.lora_guided import adapted_layer, factors_of
from secateur.readers import base_of

if TYPE_CHECKING:
    from torch.optim import Optimizer


@torch.no_grad()
def scale_units(
    model: nn.Module, group: Group, factors: Tensor, optimizer: Optimizer | None = None, *, absorb: bool
) -> None:
    """Multiply the weights of a group's units by `factors`, in place.

    Args:
        model: the base, its linear modules with or without adapters.
        factors: [units]; a unit with the factor 1 is left alone.
        optimizer: its state of the rows of B around rows that become zero is cleared. Of rows whose product is only
            absorbed it stays: they train on, and an Adam whose second moments are cleared and whose count of steps is
            not would take steps that are several times too long.
        absorb: add gamma B A to the rows that are scaled (to those that become zero, not), and set B to zero there;
            else the rows of B are scaled too.
    """
    units = torch.nonzero(factors != 1).flatten().cpu()
    if not len(units):
        return
    for member in producers(group):
        rows = torch.from_numpy(member.index)[units].flatten()
        by = factors.cpu()[units].repeat_interleave(member.index.shape[1])
        _scale_rows(model, member, rows, by, optimizer, absorb)


@torch.no_grad()
def merge_and_restart(model: nn.Module) -> None:
    """Add gamma B A to every adapted weight and set B to zero; A stays.

    What an optimizer keeps of B stays, too: the function is the same as before, and so are its gradients by B. An Adam
    that begins anew would take its first steps at full length, after every merge.
    """
    for module in model.modules():
        if not hasattr(module, "get_delta_weight") or not getattr(module, "lora_A", None):
            continue
        (adapter,) = module.active_adapters  # type: ignore[misc]
        weight: Tensor = base_of(module).weight  # type: ignore[assignment]
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(wide) + module.get_delta_weight(adapter).to(wide))  # type: ignore[operator]
        module.lora_B[adapter].weight.zero_()  # type: ignore[index, union-attr, operator]


def producer_tensors(model: nn.Module, groups: list[Group]) -> dict[str, Tensor]:
    """The frozen tensors that units of these groups are put out by, by name; those in use, not copies."""
    names = dict.fromkeys(m.parameter for group in groups for m in producers(group))
    return {name: _tensor(model, name) for name in names}


def adapted_weights(model: nn.Module) -> dict[str, Tensor]:
    """The frozen weights around which adapters lie, by the name that the base gives them."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and getattr(module, "lora_A", None):
            found[f"{path}.weight"] = base_of(module).weight  # type: ignore[assignment]
    return found


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(base_of(model.get_submodule(path)), leaf)
    return tensor


def _scale_rows(
    model: nn.Module, member: Member, rows: Tensor, by: Tensor, optimizer: Optimizer | None, absorb: bool
) -> None:
    """Rows `rows` of a member's dimension times `by`, and those of B as in `scale_units`; rounded once, at the end."""
    tensor = _tensor(model, member.parameter).movedim(member.dim, 0)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    rows, by = rows.to(tensor.device), by.to(tensor.device, wide)
    new = tensor[rows].to(wide) * by.reshape(-1, *[1] * (tensor.dim() - 1))
    layer: Any = adapted_layer(model, member.parameter)
    if layer is not None:
        a, b, scale = factors_of(layer)
        if absorb:
            new = new + scale * (b[rows].to(wide) @ a.to(wide)) * (by != 0)[:, None]
        b[rows] = torch.zeros_like(b[rows]) if absorb else (b[rows].to(wide) * by[:, None]).to(b)
        _clear(optimizer, b, rows[by == 0])
    tensor[rows] = new.to(tensor)


def check_clearable(model: nn.Module, groups: list[Group], optimizer: Optimizer) -> None:
    """Make sure that what the optimizer keeps of rows of B can be cleared when units of these groups are zero.

    Raises:
        PlanError: it keeps numbers that do not stand for those of B one by one.
    """
    for member in (m for group in groups for m in producers(group)):
        layer: Any = adapted_layer(model, member.parameter)
        for key, value in _kept_for(optimizer, factors_of(layer)[1]).items() if layer is not None else ():
            if isinstance(value, Tensor) and value.dim() and not _row_by_row(value, factors_of(layer)[1]):
                raise PlanError(
                    f"the optimizer keeps {key} of shape {tuple(value.shape)} and {value.dtype} for a factor of shape "
                    f"{tuple(factors_of(layer)[1].shape)}, which cannot be cleared row by row when units go: take "
                    "another optimizer (optim='adamw_torch')"
                )


def _clear(optimizer: Optimizer | None, parameter: Tensor, rows: Tensor) -> None:
    """Forget what the optimizer keeps of these rows; of moments stacked in front, too (AdEMAMix has two in one)."""
    for value in _kept_for(optimizer, parameter).values():
        if isinstance(value, Tensor) and _row_by_row(value, parameter):
            value[..., rows, :] = 0


def _kept_for(optimizer: Optimizer | None, parameter: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state[parameter] if optimizer is not None and parameter in optimizer.state else {}
    return state


def _row_by_row(value: Tensor, parameter: Tensor) -> bool:
    """Whether numbers kept for a matrix are those of its rows, in one matrix or several; codes of 8 bits are not."""
    return value.is_floating_point() and value.shape[-2:] == parameter.shape
