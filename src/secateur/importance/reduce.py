"""From scores per position to scores per unit: positions add up within a member, members are brought together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from secateur.errors import NonFiniteError
from secateur.groups import Group

Axis = tuple[str, int | None]  # (parameter, dimension); None for a parameter as a whole
PositionScores = Mapping[Axis, Tensor]

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda stacked: stacked.sum(0),
    "mean": lambda stacked: stacked.mean(0),
    "max": lambda stacked: stacked.amax(0),
    "prod": lambda stacked: stacked.prod(0),
    "first": lambda stacked: stacked[0],
}


def axes_of(groups: list[Group], parameters: Mapping[str, Tensor]) -> dict[str, list[int | None]]:
    """The dimensions of each parameter that the groups need scores for; None where a layer needs it whole."""
    wanted: dict[str, list[int | None]] = {}
    for group in groups:
        for m in group.members:
            if m.parameter in parameters and m.dim not in wanted.setdefault(m.parameter, []):
                wanted[m.parameter].append(m.dim)
        for block in group.blocks:
            for name in parameters:
                if name.startswith(block + ".") and None not in wanted.setdefault(name, []):
                    wanted[name].append(None)
    return wanted


def along(salience: Tensor, dim: int | None) -> Tensor:
    """Sum a parameter's salience over all dimensions but `dim`: [size of dim], or one number for None."""
    if dim is None:
        return salience.sum()
    others = [d for d in range(salience.dim()) if d != dim]
    return salience.sum(others) if others else salience


def group_scores(groups: list[Group], positions: PositionScores, reduction: str) -> dict[str, Tensor]:
    """Group name -> fp32 importance [units] on the CPU.

    A unit's score in one member is the sum over the unit's positions there (a KV group's rows of `q_proj` are those of
    the query heads that really share it); `reduction` then acts across members.

    Raises:
        NonFiniteError: a score is NaN or infinite; names the parameter.
    """
    for (name, _), values in positions.items():
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"the importance of {name} is not finite; check the calibration data and the dtype")
    reduce = REDUCTIONS[reduction]
    scores = {}
    for group in groups:
        if group.blocks:
            per_block = []
            for block in group.blocks:
                own = [v for (n, d), v in positions.items() if d is None and n.startswith(block + ".")]
                per_block.append(reduce(torch.stack(own)))
            scores[group.name] = torch.stack(per_block).float().cpu()
        else:
            rows = [
                positions[m.parameter, m.dim].cpu()[torch.from_numpy(m.index)].sum(1)
                for m in group.members
                if (m.parameter, m.dim) in positions
            ]
            scores[group.name] = reduce(torch.stack(rows)).float()
    return scores
