"""A model whose layers differ in width, as a stock model: every layer padded with zeros to the widest.

Padding is slicing backwards. The stock model has groups of its own; in each of its layers the units that the narrow
model has are the first ones, and the positions that slicing would keep are those to which the narrow tensors go. All
else is zero, which for FFN channels and heads is the same as absent. Logits decide whether it is for the model at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.discovery import discover
from secateur.discovery.reference import plain_logits
from secateur.discovery.trace import probe_ids
from secateur.errors import PlanError, SecateurError
from secateur.groups import Group, Groups, Kept
from secateur.surgery.config_fields import NOT_ARGUMENTS, rebuilt, values_of
from secateur.surgery.config_solver import ConfigSolver, scaled_fields
from secateur.surgery.field_rule import HEAD_KINDS, FieldRule
from secateur.surgery.lenient import lenient_targets
from secateur.surgery.per_layer import OWN, is_per_layer
from secateur.surgery.shapes import build_on_meta, shapes_of
from secateur.surgery.slicing import layer_solver, load_tensors
from secateur.surgery.state import tied_names
from secateur.surgery.trial import TOLERANCE
from secateur.surgery.unloaded import twin_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Target = tuple["type[PreTrainedModel]", "PreTrainedConfig"]
Units = Mapping[str, list[Fraction]]  # family -> units in each layer


class _OtherLogitsError(PlanError):
    """A stock class builds the shapes, and zeros are not for it what missing units are."""


def pad(model: PreTrainedModel) -> PreTrainedModel:
    """A stock model with the logits of one whose layers differ in width.

    A model on the meta device gives one on the meta device; that its class computes the same with zeros in place of
    units is then proven on a narrow twin (`unloaded`).

    Raises:
        PlanError: all layers have the same widths, or no stock class computes the same with zeros in place of units.
    """
    if not is_per_layer(model):
        raise PlanError(f"{type(model).__name__} is a stock class with the same widths in every layer: nothing to pad")
    try:
        return _padded(model)
    except SecateurError as error:
        raise PlanError(f"{type(model).__name__} cannot be padded: {error}") from error


def _padded(model: PreTrainedModel) -> PreTrainedModel:
    """The padded model, by the first layer that tells how.

    Raises:
        SecateurError: none does; what the first one lacks.
    """
    reasons: list[SecateurError] = []
    for values in _layers_as_models(model.config):
        try:
            return _padded_like(model, values)
        except _OtherLogitsError:  # the others would lead to the same stock model
            raise
        except SecateurError as error:
            reasons.append(error)
    raise reasons[0]


def _layers_as_models(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The fields of a uniform model with the widths of one layer, for each layer that has all its sublayers."""
    plain = {name: value for name, value in config.to_dict().items() if name not in OWN}
    differing = sorted(_differing(config))
    seen = []
    for own in config.per_layer_config:
        widths = {name: getattr(own, name) for name in differing}
        if not getattr(own, "skip", []) and widths not in seen:
            seen.append(widths)
            yield plain | widths


def _differing(config: PreTrainedConfig) -> set[str]:
    """The fields that some layer has a value of its own for."""
    overrides: Mapping[str, Mapping[str, Any]] = config.to_dict().get("per_layer_config", {})
    return {name for fields in overrides.values() for name in fields if name != "skip"}


def _padded_like(model: PreTrainedModel, values: Mapping[str, Any]) -> PreTrainedModel:
    """The padded model, its rules found on a uniform model with these values."""
    uniform = build_on_meta(type(model), type(model.config)(**values))
    groups = discover(uniform)
    twin = twin_of(uniform, groups) if model.device.type == "meta" else None
    solver = twin.of_model if twin else layer_solver(uniform, groups)
    rules = _rules(solver, groups, _differing(model.config))
    if twin is not None:
        _padded(twin.unequal(set(rules)))
    units = _units_of_layers(model.config, uniform.config, groups, rules)
    wanted = shapes_of(model)
    compared = False
    for target, config in _targets(model, uniform.config, groups, rules, units):
        whole = build_on_meta(target, config)
        there = discover(whole)
        kept = _kept(there, units, wanted)
        if there.remaining_shapes(kept) | _absent(there, wanted) != _listed(there, wanted):
            continue
        if twin is not None:
            return whole
        padded = load_tensors(model, target, config, _scattered(model, there, kept), tied_names(there, {}))
        if same_logits(model, padded):
            return padded
        compared = True
    if compared:
        raise _OtherLogitsError("zeros in place of missing units would change what it computes")
    raise PlanError("no stock class builds layers that wide with all else the same")


def _rules(solver: ConfigSolver, groups: Groups, fields: set[str]) -> dict[str, FieldRule]:
    """Family -> rule, for the families whose fields differ between layers."""
    families = dict.fromkeys(g.family for g in groups.prunable if not g.blocks and g.layer is not None)
    found = {family: rule for family in families if (rule := solver.rule(family)) and fields & set(rule.fields)}
    if missing := fields - {name for rule in found.values() for name in rule.fields}:
        raise PlanError(f"nothing is known that {', '.join(sorted(missing))} sets the width of alone")
    return found


def _units_of_layers(
    config: PreTrainedConfig, uniform: PreTrainedConfig, groups: Groups, rules: Mapping[str, FieldRule]
) -> dict[str, list[Fraction]]:
    """How many units each layer has, from what its fields are in proportion to those of the uniform model.

    A field that only one family scales tells the units of that family, and with these known the next field does.
    """
    size = {g.family: g.units for g in groups}
    fields = dict.fromkeys(name for rule in rules.values() for name in rule.fields)
    found: dict[str, list[Fraction]] = {family: [] for family in rules}
    for own in config.per_layer_config:
        left = {name: Fraction(getattr(own, name), getattr(uniform, name)) for name in fields}
        shares: dict[str, Fraction] = {}
        while len(shares) < len(rules):
            open_ = {name: [f for f in rules if f not in shares and name in rules[f].fields] for name in fields}
            certain = [(name, families[0]) for name, families in open_.items() if len(families) == 1]
            if not certain:
                raise PlanError("the fields of its layers do not tell how many units they have")
            name, family = certain[0]
            shares[family] = left[name]
            for other in rules[family].fields:
                left[other] /= shares[family]
        if any(rest != 1 for rest in left.values()):
            raise PlanError("the fields of its layers contradict each other")
        for family in rules:
            found[family].append(shares[family] * size[family])
    if any(units.denominator != 1 for of_layers in found.values() for units in of_layers):
        raise PlanError("the layers do not have whole numbers of units in common")
    return found


def _targets(
    model: PreTrainedModel, uniform: PreTrainedConfig, groups: Groups, rules: Mapping[str, FieldRule], units: Units
) -> Iterator[Target]:
    """Stock classes and configurations that are wide enough for every layer, the smallest first.

    Where a class refuses a number of heads, more of them are zero.
    """
    size = {g.family: g.units for g in groups}
    heads = [f for f in rules if any(g.kind in HEAD_KINDS for g in groups if g.family == f)]
    most = {family: int(max(of_layers)) for family, of_layers in units.items()}
    base: Any = type(model).base  # type: ignore[attr-defined]
    for more in range(max((most[f] for f in heads), default=0) + 1):
        for family in heads or [""]:
            counts = {f: n + (more if f == family else 0) for f, n in most.items()}
            growth = [(rules[f], Fraction(n, size[f])) for f, n in counts.items()]
            changed = scaled_fields(values_of(uniform), growth, {})
            plain = {k: v for k, v in rebuilt(uniform, changed).to_dict().items() if k not in (*OWN, *NOT_ARGUMENTS)}
            try:
                config = base.config_class(**plain)
            except Exception:  # configuration classes raise what they like for sizes they refuse
                yield from lenient_targets(base.config_class.model_type, plain)
                continue
            config.dtype = model.config.dtype
            yield base, config
            return


def _kept(groups: Groups, units: Units, shapes: Mapping[str, Any]) -> Kept:
    """The units of the padded model that the narrow one has: the first ones; none where it lacks the sublayer."""
    kept: dict[str, range] = {}
    for group in groups:
        if group.family in units and group.layer is not None:
            there = _has(group, shapes)
            kept[group.name] = range(int(units[group.family][group.layer]) if there else 0)
    return kept


def _has(group: Group, shapes: Mapping[str, Any]) -> bool:
    return all(m.parameter in shapes for m in group.members)


def _absent(groups: Groups, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Stand-ins for what the narrow model lacks, so that only what it has is compared."""
    return dict.fromkeys(groups.shapes.keys() - shapes.keys())


def _listed(groups: Groups, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of the narrow model by the names of the padded one, tied ones once."""
    return {name: shapes.get(name) for name in groups.shapes}


def _scattered(model: PreTrainedModel, groups: Groups, kept: Kept) -> dict[str, torch.Tensor]:
    """The tensors of the padded model: those of the narrow one at the kept positions, zero elsewhere."""
    positions = groups.kept_positions(kept)
    state = model.state_dict()
    made: dict[str, torch.Tensor] = {}
    for name, shape in groups.shapes.items():
        if name not in state:
            made[name] = torch.zeros(shape, dtype=model.dtype, device=model.device)
            continue
        narrow = state[name].detach()
        if name not in positions:
            made[name] = narrow
            continue
        full = narrow.new_zeros(shape)
        dims = [positions[name].get(dim, np.arange(size)) for dim, size in enumerate(shape)]
        full[np.ix_(*dims)] = narrow
        made[name] = full
    return made


def same_logits(model: PreTrainedModel, padded: PreTrainedModel) -> bool:
    """Whether the logits of two models agree to rounding on a probe."""
    ids = probe_ids(model)
    try:
        wanted, logits = plain_logits(model, ids), plain_logits(padded, ids)
    except Exception:  # sizes that only the forward pass refuses, each class in its own way
        return False
    return float((logits - wanted).norm() / wanted.norm()) <= TOLERANCE[model.dtype]
