"""How LoRA moves the frozen weights of a unit: norms and products, from the factors alone (LoRAShear, section 1.4).

| paper (Chen et al. 2023, arXiv:2310.18356) | here |
| --- | --- |
| [x]_g, frozen weights of a unit | the rows that put it out: its `producer` members, biases included |
| gamma, B, A | scale alpha / r and factors of the adapter around a weight; no displacement where none is |
| [gamma B A]_g, its displacement, which stands for minus the gradient | rows of gamma B A |

No product B A is formed: of a row w and its row b of B, <w, gamma b A> = gamma <w A^T, b>, and |gamma b A|^2 =
gamma^2 b A A^T b^T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import NonFiniteError, PlanError
from secateur.groups import Group, Member
from secateur.importance.lora_guided import adapted_layer, factors_of

GUIDED = "guided"
PROXIES = ("magnitude", "cosine", "first", "second", GUIDED)


@dataclass(frozen=True)
class Displacement:
    """Of every unit of a group, all [units]: |x|^2, <x, gamma B A> and |gamma B A|^2."""

    squared: Tensor
    along: Tensor
    moved: Tensor


def producers(group: Group) -> tuple[Member, ...]:
    """The members that put a group's units out.

    Raises:
        PlanError: there is none.
    """
    found = tuple(m for m in group.members if m.role == "producer")
    if not found:
        raise PlanError(f"no weight puts {group.name} out, so nothing can be pushed to zero; prune other kinds")
    return found


@torch.no_grad()
def displacement(model: nn.Module, group: Group) -> Displacement:
    """Norms and products of a group's units.

    Args:
        model: the base, with or without adapters in its modules.

    Raises:
        NonFiniteError: one is NaN or infinite; names the parameter.
    """
    total: Tensor | None = None
    for member in producers(group):
        sums = _row_sums(model, member)
        if not torch.isfinite(sums).all():
            raise NonFiniteError(f"{member.parameter} or its adapter is not finite: lower the learning rate")
        index = torch.from_numpy(member.index).to(sums.device)
        units = sums[:, index].sum(2)
        total = units if total is None else total + units.to(total)
    assert total is not None
    return Displacement(*total)


def saliency(
    found: Mapping[str, Displacement], proxies: Sequence[str], guided: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Importance of every unit of every group, float32 on the CPU, higher = keep.

    `magnitude` is |x|; `cosine` 1 + cos(x, gamma B A), low where training pushes a unit to zero already, and 0 where it
    is zero; `first` is |<x, gamma B A>| and `second` half its square, the first terms of a Taylor series with the
    displacement in the gradient's place: alone they rank alike. `guided`, ours, is what the argument holds:
    LoRA-guided importance, whose gradient is that of the factors. Each is divided by its Euclidean norm over all units,
    and their mean is taken, as in the sibling code of the paper's authors; the paper itself only speaks of proxies.

    Args:
        found: displacement of each group.
        proxies: which.
        guided: group -> importance of each unit, for the proxy of this name.
    """
    names, sizes = list(found), [len(d.squared) for d in found.values()]
    squared, along, moved = (
        torch.cat([getattr(d, part).double().cpu() for d in found.values()]) for part in ("squared", "along", "moved")
    )
    tiny = torch.finfo(torch.float64).tiny
    values = {
        "magnitude": squared.sqrt(),
        "cosine": (1 + along / (squared * moved).sqrt().clamp_min(tiny)) * (squared > 0),
        "first": along.abs(),
        "second": along.square() / 2,
    }
    if guided:
        values[GUIDED] = torch.cat([guided[name].double() for name in names])
    scores = sum(values[name] / values[name].norm().clamp_min(tiny) for name in proxies) / len(proxies)
    assert isinstance(scores, Tensor)
    return dict(zip(names, scores.float().split(sizes), strict=True))


def _row_sums(model: nn.Module, member: Member) -> Tensor:
    """The three quantities of each position on the member's dimension, [3, positions], float32 or float64."""
    path, _, leaf = member.parameter.rpartition(".")
    module = model.get_submodule(path)
    layer = adapted_layer(model, member.parameter)
    wrapped: Any = getattr(module, "get_base_layer", None)  # of an adapter, which a bias has around it, too
    tensor: Tensor = getattr(wrapped() if wrapped else module, leaf)
    precise = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    rows = tensor.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).to(precise)
    squared = rows.square().sum(1)
    if layer is None:
        return torch.stack([squared, torch.zeros_like(squared), torch.zeros_like(squared)])
    a, b, scale = factors_of(layer)
    a, b = a.to(precise), b.to(precise)
    along = scale * ((rows @ a.T) * b).sum(1)
    moved = scale**2 * ((b @ (a @ a.T)) * b).sum(1)
    return torch.stack([squared, along, moved])
