"""Trying a cut: whether a candidate computes what it should, on the model itself or on a small twin of it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.discovery import discover
from secateur.discovery.reference import Reference, plain_logits, probe_ids
from secateur.discovery.setting import quiet_transformers
from secateur.errors import PlanError
from secateur.groups import Groups, Kept
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.per_layer import is_per_layer, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_OWN_WEIGHTS = 300_000_000  # parameters; trials on larger models run on a shallow twin

# Largest relative difference (Frobenius norm) of logits that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class LogitCheck:
    """Compares candidates with the original model restricted to the units that stay (run when first needed)."""

    def __init__(self, model: PreTrainedModel, kept: Kept, reference: Reference | None = None) -> None:
        self.model = model
        self.kept = kept
        self.ids = probe_ids(model)
        self.tolerance = TOLERANCE[model.dtype]
        self.difference = float("inf")
        if reference is not None:
            self.reference = reference

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.model)

    @cached_property
    def wanted(self) -> Tensor:
        return self.reference.logits(self.ids, self.kept)

    def same(self, small: PreTrainedModel) -> bool:
        """Whether the logits agree to rounding; `difference` is the largest absolute one."""
        logits = plain_logits(small, self.ids)
        self.difference = float((logits - self.wanted).abs().max())
        relative = float((logits - self.wanted).norm() / self.wanted.norm())
        return relative <= self.tolerance


def is_large(model: PreTrainedModel) -> bool:
    """Whether trials run on a twin: there are no weights, or too many to copy for every trial."""
    return any(p.is_meta for p in model.parameters()) or model.num_parameters() > MAX_OWN_WEIGHTS


def twin(model: PreTrainedModel, groups: Groups) -> PreTrainedModel:
    """A model of the same class and widths with random float32 weights and few layers: at least two, and as many of the
    first ones as it takes to have every family.

    Raises:
        PlanError: the class has no field for the number of layers.
    """
    if is_per_layer(model):
        model = skeleton(model)
        groups = discover(model)
    solver = ConfigSolver(model, groups)
    first = {g.family: g.layer for g in reversed(groups.groups) if g.layer is not None}
    for group in groups:
        if group.kind == "layer" and solver.rule(group.family) is not None:
            depth = min(max(2, *(layer + 1 for layer in first.values())), group.units)
            config = solver.edited(model.config, {group.name: range(depth)})
            with quiet_transformers():
                return type(model)._from_config(config, dtype=torch.float32).eval()
    raise PlanError(f"{type(model).__name__} has no field for its number of layers, so no small twin can be tried")
