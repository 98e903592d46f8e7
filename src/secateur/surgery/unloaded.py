"""Cutting without the weights: the class, the configuration and the scalings of a cut model from shapes alone.

A cut of a loaded model is proven by that model's logits. Here the model is on the meta device, and a *narrow twin* is
used instead: a model of the same class with a fraction of its widths, few layers and random weights, small whatever the
size of the model. Which fields follow a family, and which weights must be scaled, is proven on the twin; so is one cut
of the same families into the same class. What remains to be shown for the model itself are its names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights

from secateur.discovery import discover
from secateur.discovery.reference import Reference
from secateur.discovery.setting import quiet_transformers
from secateur.errors import PlanError
from secateur.groups import Group, Groups, Kept
from secateur.surgery.config_fields import numbers, rebuilt, values_of
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.field_rule import FieldRule
from secateur.surgery.folding import Fold, drifted_scalars
from secateur.surgery.per_layer import is_per_layer, layers_differ, skeleton
from secateur.surgery.rule_cache import RuleCache
from secateur.surgery.shapes import build_on_meta
from secateur.surgery.slicing import candidates, checked_solver, fitting, fitting_per_layer, rebuild_per_layer
from secateur.surgery.trial import LogitCheck, with_noise

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHARES = (Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))  # of the widths, for a twin
LAYERS = 4  # of a twin, so that half of them can go and the others still differ
VOCABULARY = 512
NARROWED = ("hidden", "ffn_channel", "expert_channel", "attention_head", "kv_group", "query_head", "ssm_channel")
FEWEST = 16  # units that a group is narrowed to; hidden dimensions must stay divisible by heads


@dataclass(frozen=True)
class UnloadedCut:
    """What a cut leads to.

    Attributes:
        model: the cut model on the meta device.
        scalings: (fold, factor) of weights to scale, in this order.
    """

    model: PreTrainedModel
    scalings: tuple[tuple[Fold, float], ...] = ()


def unloaded_cut(model: PreTrainedModel, groups: Groups, kept: Kept) -> UnloadedCut:
    """The cut of a model on the meta device, proven on a narrow twin.

    Raises:
        PlanError: no class expresses the cut, or no twin could be made or proves it.
    """
    uniform = skeleton(model) if is_per_layer(model) else model
    of_uniform = groups if uniform is model else discover(uniform)
    reference = Reference(narrow_twin(uniform, of_uniform))
    twin = checked_solver(reference.model, reference.groups, reference)
    cached = RuleCache(uniform, of_uniform)
    solver = ConfigSolver(uniform, of_uniform, lambda rule, _: _as_proven(rule, twin), cached.load(), cached.save)
    families = {groups.named(name).family for name in kept}
    if is_per_layer(model) or layers_differ(groups, kept):
        model_class, config = fitting_per_layer(model, groups, solver, kept)
        sample = _sample(reference.groups, families, uneven=True)
        check = LogitCheck(reference.model, sample, reference)
        rebuild_per_layer(reference.model, reference.groups, twin, sample, check)
        if all(_as_proven(rule, twin) == rule for f in families if (rule := solver.rule(f))):
            return UnloadedCut(build_on_meta(model_class, config))
    else:
        sample = _sample(reference.groups, families)
        check = LogitCheck(reference.model, sample, reference)
        right = {type(small) for small in candidates(reference.model, twin, sample) if check.same(small)}
        for model_class, config, rules in fitting(solver, kept):
            if model_class in right and all(_as_proven(rule, twin) == rule for rule, _ in rules):
                return UnloadedCut(build_on_meta(model_class, config), _scalings(model, model_class, config, rules))
    raise PlanError(f"no class gives the right logits on a small {type(model).__name__} cut in the same kinds")


def narrow_twin(model: PreTrainedModel, groups: Groups) -> PreTrainedModel:
    """A float64 model of the same class with the same families of groups, as narrow as its configuration allows.

    Raises:
        PlanError: no configuration of a smaller model was found.
    """
    families = {g.family for g in groups.prunable}
    model = _few_layers(model, groups)
    groups = discover(model)
    solver = ConfigSolver(model, groups)  # by shapes alone: whatever else a field means, the class is the same
    wide = groups.families(NARROWED)
    narrowed = [f for f in wide if solver.rule(f) or solver.tied_rule(f)]
    for smallest in SHARES:
        kept = {g.name: range(_twin_units(g, smallest)) for g in groups if g.family in narrowed}
        try:
            config = _few_tokens(solver.edited(model.config, kept))
            found = discover(build_on_meta(type(model), config))
        except Exception:  # configuration classes raise what they like for sizes they refuse
            continue
        if {g.family for g in found.prunable} == families:
            with quiet_transformers():
                return with_noise(type(model)._from_config(config, dtype=torch.float32))
    raise PlanError(f"no configuration makes a small {type(model).__name__} with the same groups, to try the cut on")


def _few_layers(model: PreTrainedModel, groups: Groups) -> PreTrainedModel:
    """The model on the meta device with `LAYERS` layers, or as many as it takes to have every family."""
    solver = ConfigSolver(model, groups)
    first = {g.family: g.layer for g in reversed(groups.groups) if g.layer is not None}
    layers = next((g for g in groups if g.kind == "layer" and solver.rule(g.family)), None)
    if layers is None:
        raise PlanError(f"{type(model).__name__} has no field for its number of layers, so no small twin can be made")
    depth = min(max(LAYERS, *(layer + 1 for layer in first.values())), layers.units)
    return build_on_meta(type(model), solver.edited(model.config, {layers.name: range(depth)}))


def _twin_units(group: Group, smallest: Fraction) -> int:
    """The fewest units at this share or a larger one that can be halved."""
    counts = [s * group.units for s in SHARES if s >= smallest]
    fewest = max(FEWEST, 2 * group.at_least)
    return next((int(c) for c in counts if (c / 2).denominator == 1 and c >= fewest), group.units)


def _few_tokens(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small vocabulary, with special tokens inside it."""
    changes = {k: VOCABULARY for k, v in numbers(config).items() if k.endswith("vocab_size") and v > VOCABULARY}
    if changes:
        ids = {k: v for k, v in values_of(config).items() if k.endswith("_token_id")}
        changes |= {k: 0 for k, v in ids.items() if type(v) is int and v >= VOCABULARY}
    return rebuilt(config, changes)


def _as_proven(rule: FieldRule, twin: ConfigSolver) -> FieldRule | None:
    """A rule whose fields are those of a rule proven on the twin, with that one's folds; None if there is none."""
    proven = twin.rule(rule.families[0]) if len(rule.families) == 1 else twin.tied_rule(rule.families[0])
    same = proven is not None and _means_the_same(rule, proven, values_of(twin.config))
    return replace(rule, folds=proven.folds) if proven and same else None


def _means_the_same(rule: FieldRule, proven: FieldRule, twin: Mapping[str, Any]) -> bool:
    """Whether a rule is one proven on a twin, sizes apart: a value to be written may be in the twin already."""
    names = ("families", "fields", "lists", "indices", "prefixes", "suffixes")
    same = all(set(getattr(rule, name)) == set(getattr(proven, name)) for name in names)
    return same and set(proven.pins) <= set(rule.pins) <= {*proven.pins, *(k for k, v in twin.items() if v is not None)}


def _sample(groups: Groups, families: set[str], *, uneven: bool = False) -> Kept:
    """A cut of the twin in the same families: by one share if all their sizes have a common divisor.

    Args:
        uneven: every other layer stays as wide as it is.
    """
    members = [g for g in groups if g.family in families]
    together = _smallest_divisor(math.gcd(*(g.units for g in members)))
    kept: dict[str, Sequence[int]] = {}
    for group in members:
        divisor = together if together > 1 else _smallest_divisor(group.units)
        whole = divisor == 1 or (uneven and group.layer is not None and group.layer % 2 == 0)
        fewer = 0 if whole else group.units // divisor
        kept[group.name] = range(group.units - fewer) if group.stays else range(fewer, group.units)
    return {name: units for name, units in kept.items() if len(units) < groups.named(name).units}


def _smallest_divisor(number: int) -> int:
    """The smallest prime divisor, 1 if there is none."""
    return next((d for d in range(2, number + 1) if number % d == 0), 1)


def _scalings(
    model: PreTrainedModel,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    rules: Sequence[tuple[FieldRule, Fraction]],
) -> tuple[tuple[Fold, float], ...]:
    """The folds of the rules with their factors; scalars that classes compute are computed by both classes."""
    if not any(rule.folds for rule, _ in rules):
        return ()
    before, after = _with_buffers(type(model), model.config), _with_buffers(model_class, config)
    drift = drifted_scalars(before, after)
    return tuple((fold, fold.factor(share, drift)) for rule, share in rules for fold in rule.folds)


def _with_buffers(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose parameters are on the meta device and whose buffers have their values."""
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        return model_class._from_config(config, dtype=config.dtype)
