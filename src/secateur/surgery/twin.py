"""Narrow twins: a model of the same class with a fraction of the widths, few layers and random weights.

What a field of the configuration means, and which weights must be scaled when it changes, is a matter of the class and
its switches, not of its widths. On a twin it is found out in seconds and megabytes, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from secateur.discovery import discover
from secateur.errors import PlanError
from secateur.groups import Group, Groups
from secateur.surgery.config_fields import numbers, rebuilt, values_of
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.field_rule import FieldRule
from secateur.surgery.shapes import build_on_meta, build_random
from secateur.surgery.trial import with_noise

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHARES = (Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))  # of the widths, for a twin
LAYERS = 4  # of a twin, so that half of them can go and the others still differ
VOCABULARY = 512
NARROWED = ("hidden", "ffn_channel", "expert_channel", "attention_head", "kv_group", "query_head", "ssm_channel")
FEWEST = 16  # units that a group is narrowed to; hidden dimensions must stay divisible by heads


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
            return with_noise(build_random(type(model), config))
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


def proven_on(twin: ConfigSolver, families: Sequence[str]) -> FieldRule | None:
    """The rule for just these families that is proven on a twin, if there is one."""
    rule = twin.rule(families[0]) if len(families) == 1 else twin.tied_rule(families[0])
    return rule if rule and set(rule.families) == set(families) else None


def as_proven(rule: FieldRule, proven: FieldRule, twin: ConfigSolver) -> FieldRule | None:
    """A rule whose fields are those of a rule proven on a twin, with that one's folds; None if they are others."""
    return replace(rule, folds=proven.folds) if _means_the_same(rule, proven, values_of(twin.config)) else None


def _means_the_same(rule: FieldRule, proven: FieldRule, twin: Mapping[str, Any]) -> bool:
    """Whether a rule is one proven on a twin, sizes apart: a value to be written may be in the twin already."""
    names = ("families", "fields", "lists", "indices", "prefixes", "suffixes")
    same = all(set(getattr(rule, name)) == set(getattr(proven, name)) for name in names)
    return same and set(proven.pins) <= set(rule.pins) <= {*proven.pins, *(k for k, v in twin.items() if v is not None)}
