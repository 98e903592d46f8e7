"""Scores of units in short: for every group, how they are spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.groups import Group

QUANTILES = {"least": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75, "most": 1.0}


def summary(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each group: `group`, `kind`, `layer`, `units`, and mean, quartiles and extremes of their scores.

    Args:
        groups: those without scores are left out.
        scores: importance of each unit, in whatever the criterion gives.
    """
    rows = []
    for group in (g for g in groups if g.name in scores):
        found = scores[group.name].detach().to("cpu", torch.float64)
        spread = torch.quantile(found, torch.tensor(list(QUANTILES.values()), dtype=torch.float64)).tolist()
        row = {"group": group.name, "kind": group.kind, "layer": group.layer, "units": group.units}
        rows.append(row | {"mean": float(found.mean())} | dict(zip(QUANTILES, spread, strict=True)))
    return rows
