"""The configuration of a model whose layers differ in width: which field has which value in which layer.

The solver finds which fields follow a family of groups. Here each field is scaled in each layer by the share of units
that this layer keeps; the whole configuration has the largest value, and layers that differ from it are listed in
`per_layer_config`. Sublayers that go are named there too, under `skip`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from secateur.errors import PlanError
from secateur.groups import Group, Groups, Kept
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.shapes import build_on_meta

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedConfig, PreTrainedModel

# What a configuration says about the class that it belongs to, and what is set by whoever makes a new one.
OWN = ("architectures", "transformers_version", "model_type", "base_model_type", "auto_map", "per_layer_config")
Shares = Mapping[tuple[int, str], Fraction]


def is_per_layer(model: PreTrainedModel) -> bool:
    """Whether the model is one whose layers may already differ in width."""
    from secateur.modeling_per_layer import PerLayerModelMixin

    return isinstance(model, PerLayerModelMixin)


def layers_differ(groups: Groups, kept: Kept) -> bool:
    """Whether a family keeps other shares of its units in other layers, or a layer loses a sublayer."""
    if groups.removed_blocks(kept, ("sublayer",)):
        return True
    gone = groups.removed_prefixes(kept)
    shares: dict[str, set[Fraction]] = {}
    for group in groups:
        if not group.name.startswith(gone):
            share = Fraction(len(kept.get(group.name, range(group.units))), group.units)
            shares.setdefault(group.family, set()).add(share)
    return any(len(found) > 1 for found in shares.values())


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class without weights, every layer as wide as the whole configuration says."""
    return build_on_meta(type(model), type(model.config)(**_plain(model.config)))


def per_layer_target(
    model: PreTrainedModel, groups: Groups, solver: ConfigSolver, kept: Kept
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and the configuration for a model that keeps these units.

    Raises:
        PlanError: a family has no field, a value would not be whole, or a sublayer cannot be left out.
        Exception: whatever the configuration class raises for sizes it does not accept.
    """
    from secateur.modeling_per_layer import model_class

    check_class(model)
    values = _plain(model.config)
    staying = list(range(model.config.num_hidden_layers))
    shares: dict[tuple[int, str], Fraction] = defaultdict(lambda: Fraction(1))
    pins: dict[str, int] = {}
    for family in dict.fromkeys(groups.named(n).family for n in kept if groups.named(n).kind != "sublayer"):
        rule = solver.rule(family)
        if rule is None:
            raise PlanError(solver.refusal(family))
        members = [g for g in groups if g.family == family]
        if members[0].kind == "layer":
            staying = sorted(kept[members[0].name])
            values |= {name: [values[name][i] for i in staying] for name in rule.lists}
            values |= {name: len(staying) for name in rule.fields}
            continue
        pins |= rule.pins
        for layer, share in _shares(members, kept, len(model.config.per_layer_config)).items():
            for name in rule.fields:
                shares[layer, name] *= share
    found = _values(model.config, pins, shares)
    values |= pins
    values |= {name: max(of_layers[i] for i in staying) for name, of_layers in found.items()}
    overrides = _carried(model.config, staying)
    for name, of_layers in found.items():
        for new, old in enumerate(staying):
            overrides[new][name] = of_layers[old]
    skips = _skips(model, groups, kept)
    for new, old in enumerate(staying):
        if old in skips:
            overrides[new]["skip"] = sorted({*overrides[new].get("skip", []), *skips[old]})
    target: Any = type(model) if is_per_layer(model) else model_class(type(model))
    config = target.config_class(**values, per_layer_config=overrides)
    config.dtype = model.config.dtype
    return target, config


def check_class(model: PreTrainedModel) -> None:
    """Make sure that there is a class for layers that differ.

    Raises:
        PlanError: there is none.
    """
    import transformers

    if not is_per_layer(model) and getattr(transformers, type(model).__name__, None) is not type(model):
        raise PlanError(
            f"{type(model).__name__} is no class of transformers, and only of those can layers differ in width: prune "
            "with the same widths in every layer (without --per-layer)"
        )


def skip_word(model: PreTrainedModel, group: Group) -> str:
    """The entry of `skip` that leaves out the blocks of a `sublayer` group: `attention` or `mlp`.

    Raises:
        PlanError: none does.
    """
    from secateur.modeling_per_layer import SUBLAYERS, decoder_layers

    check_class(model)
    home, position = group.name.split("/")[0], group.blocks[0].rpartition(".")[2]
    layers = [model.get_submodule(block.rpartition(".")[0]) for block in group.blocks]
    try:
        listed = decoder_layers(model, model.config.num_hidden_layers) is model.get_submodule(home)
    except (AttributeError, ValueError):  # configurations of composites do not say how many layers there are
        listed = False
    for word in SUBLAYERS if listed else ():
        pair = word == "attention"  # what stands in for it returns one
        if pair == (group.results > 0) and all(_sublayer_name(layer, word) == position for layer in layers):
            return word
    raise PlanError(f"{type(layers[0]).__name__} cannot be built without its {position}, so no class could load it")


def _sublayer_name(layer: Module, word: str) -> str | None:
    """What the layer calls this sublayer, None if it has none that can be left out."""
    from secateur.modeling_per_layer import sublayer_name

    try:
        return sublayer_name(layer, word)
    except ValueError:
        return None


def _skips(model: PreTrainedModel, groups: Groups, kept: Kept) -> dict[int, set[str]]:
    """Layer of the uncut model -> the sublayers that it loses."""
    found: dict[int, set[str]] = defaultdict(set)
    for name, units in kept.items():
        group = groups.named(name)
        for block in groups.removed_blocks({name: units}, ("sublayer",)):
            found[group.layer_of(block)].add(skip_word(model, group))
    return found


def _shares(members: list[Group], kept: Kept, layers: int) -> dict[int, Fraction]:
    """Layer -> share of the family's units that stay there."""
    shares: dict[int, Fraction] = {}
    for group in members:
        share = Fraction(len(kept.get(group.name, range(group.units))), group.units)
        for layer in range(layers) if group.layer is None else [group.layer]:
            if shares.setdefault(layer, share) != share:
                raise PlanError(f"{group.family} keeps other numbers of units within layer {layer}; no field says that")
    return shares


def _values(config: PreTrainedConfig, pins: Mapping[str, int], shares: Shares) -> dict[str, list[int]]:
    """Field -> its value in every layer of the uncut model, scaled by the layer's share."""
    found: dict[str, list[int]] = {}
    for name in dict.fromkeys(name for _, name in shares):
        sizes = [
            shares.get((layer, name), Fraction(1)) * (getattr(own, name) or pins[name])
            for layer, own in enumerate(config.per_layer_config)
        ]
        if any(size.denominator != 1 for size in sizes):
            raise PlanError(f"{name} would not be whole in every layer; choose counts that keep it whole")
        found[name] = [int(size) for size in sizes]
    return found


def _carried(config: PreTrainedConfig, staying: list[int]) -> dict[int, dict[str, Any]]:
    """What the layers that stay differ in already, under their new numbers."""
    old = {int(layer): fields for layer, fields in config.to_dict().get("per_layer_config", {}).items()}
    return {new: copy.deepcopy(old.get(layer, {})) for new, layer in enumerate(staying)}


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that make up a uniform configuration."""
    return {name: value for name, value in config.to_dict().items() if name not in OWN}
