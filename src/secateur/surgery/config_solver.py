"""Which configuration fields to change so that the model's own class builds the cut shapes: found, not listed.

For every family of groups a small search tries the integer fields whose value equals a size that the cut changes,
builds the class on the meta device, and keeps edits that yield exactly the shapes of the cut tensors. Equal shapes do
not imply equal meaning (8 heads of 8 lose a quarter by `head_dim` as well as by `num_attention_heads`), so an edit must
also give the right logits. The edits of several families multiply: if `kv_group` and `query_head` both act on
`num_attention_heads`, it shrinks by both shares.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.discovery.trace import quiet_transformers
from secateur.errors import PlanError
from secateur.groups import Group, Groups, Kept
from secateur.surgery.state import new_name, renumbering

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Stock classes that accept widths which other classes refuse (head counts that do not divide `hidden_size`). A model
# is saved as one of them only if its own class refuses, and only if names, shapes and logits are all the same.
LENIENT_MODEL_TYPES = ("mistral",)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FieldRule:
    """How the configuration follows one family.

    Attributes:
        fields: fields that shrink in proportion to the units kept.
        pins: fields that must be written although they do not change, such as a `head_dim` the class would derive.
        lists: fields with one entry per layer, from which the entries of removed layers go.
    """

    fields: tuple[str, ...]
    pins: Mapping[str, int] = field(default_factory=dict)
    lists: tuple[str, ...] = ()


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """An instance without weights.

    Raises:
        Exception: whatever the class raises for sizes it does not accept.
    """
    with quiet_transformers(), torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config))


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shape of every entry of the state dict."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def expected_shapes(groups: Groups, kept: Kept) -> dict[str, tuple[int, ...]]:
    """Shape of every entry of the cut model's state dict, tied names included."""
    moved = renumbering(groups, kept)
    left = {new_name(n, moved): s for n, s in groups.remaining_shapes(kept).items()}
    tied = {new_name(n, moved): left[new_name(of, moved)] for n, of in groups.tied.items()}
    return left | tied


class ConfigSolver:
    """Finds and applies configuration edits for one model.

    Attributes:
        model_class: the class of the model.
        config: its configuration, never changed.
        accept: whether a rule whose shapes fit also gives the right logits: (family, rule, units kept) -> bool.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Groups,
        accept: Callable[[str, FieldRule, int], bool] = lambda family, rule, count: True,
        rules: Mapping[str, FieldRule] | None = None,
    ) -> None:
        self.model_class = type(model)
        self.config = model.config
        self.groups = groups
        self.accept = accept
        self._rules: dict[str, FieldRule | None] = dict(rules or {})
        self._misfits: dict[str, tuple[str, ...]] = {}
        self._lenient: list[tuple[type[PreTrainedModel], PreTrainedConfig]] | None = None

    def rule(self, family: str) -> FieldRule | None:
        """The rule of a family, None if no edit of the configuration yields its shapes."""
        if family not in self._rules:
            self._rules[family] = self._search(family)
        return self._rules[family]

    def targets(self) -> Iterator[tuple[type[PreTrainedModel], PreTrainedConfig]]:
        """The model's own class and configuration, then lenient classes with the same parameters."""
        yield self.model_class, self.config
        if self._lenient is None:
            self._lenient = list(self._same_parameters())
        yield from self._lenient

    def edited(self, config: PreTrainedConfig, kept: Kept) -> PreTrainedConfig:
        """A copy of `config` with the edits of every family in `kept`.

        Raises:
            PlanError: a family cannot be expressed, or its groups keep different numbers of units.
            Exception: whatever the configuration class raises for sizes it does not accept.
        """
        shares: dict[str, Fraction] = {}
        values: dict[str, Any] = {}
        for family, count in self._counts(kept).items():
            rule = self.rule(family)
            if rule is None:
                raise PlanError(self.refusal(family))
            units = self._groups(family)[0].units
            values |= rule.pins
            for name in rule.fields:
                shares[name] = shares.get(name, Fraction(1)) * Fraction(count, units)
            for name in rule.lists:
                layers = kept[self._groups(family)[0].name]
                values[name] = [getattr(config, name)[i] for i in layers]
        for name, share in shares.items():
            size = share * (values.get(name) or getattr(config, name))
            if size.denominator != 1:
                raise PlanError(f"{name} would become {float(size):.2f}; choose counts that keep it whole")
            values[name] = int(size)
        return _rebuilt(config, values)

    def feasible(self, family: str, count: int) -> bool:
        """Whether some target class can be configured for `count` units in every group of the family."""
        kept = {g.name: range(count) for g in self._groups(family)}
        for _, config in self.targets():
            try:
                self.edited(config, kept)
            except Exception:  # configuration classes raise what they like
                continue
            return True
        return False

    def refusal(self, family: str) -> str:
        """Why a family cannot be cut uniformly."""
        name = type(self.config).__name__
        if family in self._misfits:
            return (
                f"{name} can set the width of {family} ({', '.join(self._misfits[family])}), but the class derives a "
                "constant from it, so the result would compute something else"
            )
        return f"{name} has no field that sets the width of {family} alone, so no stock class could load the result"

    def _groups(self, family: str) -> list[Group]:
        return [g for g in self.groups if g.family == family]

    def _counts(self, kept: Kept) -> dict[str, int]:
        """Family -> units kept in each of its groups, for families that lose any."""
        by_family: dict[str, set[int]] = {}
        for name in kept:
            by_family.setdefault(self.groups.named(name).family, set())
        counts: dict[str, int] = {}
        for family in by_family:
            members = self._groups(family)
            found = {len(kept.get(g.name, range(g.units))) for g in members}
            if len(found) > 1:
                raise PlanError(
                    f"{family} keeps {min(found)} to {max(found)} units depending on the layer; a stock class needs "
                    "the same number in every layer (prune with uniform widths)"
                )
            if found != {members[0].units}:
                counts[family] = found.pop()
        return counts

    def _search(self, family: str) -> FieldRule | None:
        members = self._groups(family)
        units = members[0].units
        if any(g.units != units for g in members):
            return None
        for count in dict.fromkeys([units - 1, units // 2, units // 4, 1]):
            if not 0 < count < units:
                continue
            kept = {g.name: range(count) for g in members}
            wanted = expected_shapes(self.groups, kept)
            for model_class, config in self.targets():
                for rule in self._candidates(config, members[0], count):
                    if not self._fits(model_class, config, rule, members[0], count, wanted):
                        continue
                    if self.accept(family, rule, count):
                        return rule
                    self._misfits[family] = rule.fields
        return None

    def _fits(
        self,
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        rule: FieldRule,
        group: Group,
        count: int,
        wanted: Shapes,
    ) -> bool:
        values: dict[str, Any] = dict(rule.pins)
        for name in rule.fields:
            values[name] = (values.get(name) or getattr(config, name)) * count // group.units
        for name in rule.lists:
            values[name] = getattr(config, name)[:count]
        try:
            return shapes_of(build_on_meta(model_class, _rebuilt(config, values))) == dict(wanted)
        except Exception:  # a candidate that the class refuses is no error
            return False

    def _candidates(self, config: PreTrainedConfig, group: Group, count: int) -> Iterator[FieldRule]:
        """Edits worth trying, the smallest first: fields equal to a changed size, and pins for derived ones."""
        sizes, constant = self._sizes(group)
        numbers = {k: v for k, v in config.to_dict().items() if type(v) is int and not k.endswith("_token_id")}
        matching = [k for k, v in numbers.items() if v in sizes and (v * count) % group.units == 0]
        lists = tuple(k for k, v in config.to_dict().items() if group.blocks and _per_layer(v, group.units))
        unset = [k for k, v in config.to_dict().items() if v is None]
        derived = [{}, *({"head_dim": c} for c in sorted(constant)), *({k: s} for k in unset for s in sorted(sizes))]
        subsets = [s for n in range(len(matching) + 1) for s in itertools.combinations(matching, n)]
        for pins in derived:
            for fields in subsets:
                extra = tuple(k for k, v in pins.items() if v in sizes and k not in fields and k != "head_dim")
                if fields or extra:
                    yield FieldRule((*fields, *extra), pins, lists)

    def _sizes(self, group: Group) -> tuple[set[int], set[int]]:
        """Sizes that shrink with the group (from its axes and those that share them), and head widths that stay."""
        if group.blocks:
            return {group.units}, set()
        sizes = {group.units}
        for member in group.members:
            full = self.groups.shapes[member.parameter][member.dim]
            others = [
                g.units
                for g in self.groups
                if g is not group and any((m.parameter, m.dim) == (member.parameter, member.dim) for m in g.members)
            ]
            for n in range(len(others) + 1):
                sizes |= {group.units * int(np.prod(s)) for s in itertools.combinations(others, n)}
            if member.index.size == full:
                sizes.add(full)
        return sizes, self._head_widths()

    def _head_widths(self) -> set[int]:
        """Positions of one head on the axes that count heads."""
        widths = set()
        for group in self.groups:
            if group.kind in ("attention_head", "kv_group", "query_head"):
                for m in group.members:
                    heads = [g.units for g in self.groups if g.kind in ("kv_group", "query_head") and g is not group
                             and any((o.parameter, o.dim) == (m.parameter, m.dim) for o in g.members)]  # fmt: skip
                    widths.add(m.index.shape[1] // int(np.prod(heads)))
        return widths

    def _same_parameters(self) -> Iterator[tuple[type[PreTrainedModel], PreTrainedConfig]]:
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

        for model_type in LENIENT_MODEL_TYPES:
            if model_type == self.config.model_type:
                continue
            config_class = CONFIG_MAPPING[model_type]
            known = set(config_class().to_dict()) - {"model_type", "architectures", "transformers_version"}
            values = {k: v for k, v in self.config.to_dict().items() if k in known}
            if "sliding_window" in known:
                values["sliding_window"] = getattr(self.config, "sliding_window", None)
            try:
                config = config_class(**values)
                config.dtype = self.config.dtype
                model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
                same = shapes_of(build_on_meta(model_class, config)) == expected_shapes(self.groups, {})
            except Exception:  # a class that cannot take these sizes is no alternative
                continue
            if same:
                yield model_class, config


def _per_layer(value: Any, layers: int) -> bool:
    return isinstance(value, list) and len(value) == layers


def _rebuilt(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    """A new configuration with `values` in place, validated by its class."""
    data = config.to_dict()
    for name in ("architectures", "transformers_version", "model_type"):
        data.pop(name, None)
    aliases: Mapping[str, str] = getattr(type(config), "attribute_map", {})
    with quiet_transformers():
        new = type(config)(**{**data, **{aliases.get(k, k): v for k, v in values.items()}})
    new.dtype = config.dtype
    return new
