"""Trying a cut: whether a candidate computes what it should, on the model itself or on a small twin of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.discovery import discover
from secateur.discovery.reference import Reference, plain_logits
from secateur.errors import PlanError, first_line
from secateur.groups import Groups, Kept
from secateur.packed import packed_weights
from secateur.surgery.alignment import failure_to_run
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.field_rule import FieldRule, Findings
from secateur.surgery.per_layer import is_per_layer, skeleton
from secateur.surgery.shapes import build_random

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest relative difference (Frobenius norm) of logits that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
NOISE = 0.05  # at least, on every weight; more in the biases of a router would let it choose the same experts always


class LogitCheck:
    """Compares candidates with the original model restricted to the units that stay (run when first needed)."""

    def __init__(self, model: PreTrainedModel, kept: Kept, reference: Reference | None = None) -> None:
        self.model = model
        self.kept = kept
        self.tolerance = TOLERANCE[model.dtype]
        self.difference = float("inf")
        self.failure = ""
        if reference is not None:
            self.reference = reference

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.model)

    @cached_property
    def probe(self) -> tuple[Tensor, Tensor]:
        """Token ids, and the logits on them that candidates must have."""
        return self.reference.without(self.kept)

    def same(self, small: PreTrainedModel) -> bool:
        """Whether the logits agree to rounding.

        `difference` is then the largest absolute one, infinite if the candidate cannot run, and `failure` says why.
        """
        self.difference, self.failure = float("inf"), ""
        try:
            ids, wanted = self.probe
            logits = plain_logits(small, ids)
        except Exception as error:  # sizes that only the forward pass refuses, each class in its own way
            self.failure = first_line(error)
            return False
        self.difference = float((logits - wanted).abs().max())
        relative = float((logits - wanted).norm() / wanted.norm())
        return relative <= self.tolerance


def trial_subject(model: PreTrainedModel, groups: Groups) -> PreTrainedModel:
    """What cuts are tried on: a float64 model of the same class and widths with random weights and few layers.

    At least two layers, and as many of the first ones as it takes to have every family. A model whose class has no
    field for the number of layers is copied instead. No parameter is constant, so that no bias or gain goes unnoticed.

    Raises:
        PlanError: a model whose weights are absent or packed has no field for its layers.
    """
    if is_per_layer(model):
        model = skeleton(model)
        groups = discover(model)
    subject = _shallow(model, groups)
    if subject is None and (any(p.is_meta for p in model.parameters()) or packed_weights(model)):
        raise PlanError(f"{type(model).__name__} has no field for its number of layers, so no small twin can be tried")
    return with_noise(copy.deepcopy(model) if subject is None else subject)


def _shallow(model: PreTrainedModel, groups: Groups) -> PreTrainedModel | None:
    solver = ConfigSolver(model, groups)
    layers = _first_layers(solver)
    if not layers:
        return None
    with suppress(Exception):  # classes raise what they like for too few layers
        return build_random(type(model), solver.edited(model.config, layers))
    return None


def _first_layers(solver: ConfigSolver) -> dict[str, range]:
    """As many of the first layers as it takes to have every family; nothing if there is no field for their number."""
    first = {g.family: g.layer for g in reversed(solver.groups.groups) if g.layer is not None}
    for group in solver.groups:
        if group.kind == "layer" and solver.rule(group.family) is not None:
            return {group.name: range(min(max(2, *(layer + 1 for layer in first.values())), group.units))}
    return {}


def trial_run(model: PreTrainedModel, groups: Groups) -> Callable[[FieldRule, Fraction], str | None]:
    """What `ConfigSolver` asks for as `failure`: the model's class runs without weights, with few layers."""
    bare = ConfigSolver(model, groups)  # by shapes alone

    def failure(rule: FieldRule, share: Fraction) -> str | None:
        layers = _first_layers(bare)
        alone = Findings.of(rule)
        solver = ConfigSolver(model, groups, known=Findings(bare.findings.rules | alone.rules, ties=alone.ties))
        for kept in solver.kept_at(rule.families, share):
            for model_class, config in solver.targets():
                with suppress(Exception):  # classes raise what they like for sizes they refuse
                    return failure_to_run(model_class, solver.edited(config, {**kept, **layers}))
        return None

    return failure


def with_noise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model itself, on the CPU in float64 and evaluation mode, with noise on every parameter and stored buffer."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to("cpu").double().eval()
    stored = model.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.1 * float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * max(spread, NOISE))
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():  # never negative, since some are variances
                buffer.add_(NOISE * torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return model
