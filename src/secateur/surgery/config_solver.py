"""Which configuration fields to change so that the model's own class builds the cut shapes: found, not listed.

For every family of groups a small search tries the integer fields whose value equals a size that the cut changes,
builds the class on the meta device, and keeps edits that yield exactly the shapes of the cut tensors. Equal shapes do
not imply equal meaning (8 heads of 8 lose a quarter by `head_dim` as well as by `num_attention_heads`), so an edit must
also give the right logits. The edits of several families multiply: if `kv_group` and `query_head` both act on
`num_attention_heads`, it shrinks by both shares.

Some classes tie families: GPT-2 has no `head_dim`, so that heads can go only if the hidden dimension shrinks by the
same share. Such families are found by the same search over two or three families at once.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from secateur.discovery.setting import quiet_transformers
from secateur.errors import PlanError
from secateur.groups import Group, Groups, Kept
from secateur.surgery.config_fields import kept_entries, kept_indices, rebuilt, values_of
from secateur.surgery.field_rule import FieldRule, candidate_rules
from secateur.surgery.state import new_name, renumbering

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Stock classes that accept widths which other classes refuse (head counts that do not divide `hidden_size`). A model
# is saved as one of them only if its own class refuses, and only if names, shapes and logits are all the same.
LENIENT_MODEL_TYPES = ("mistral",)
MAX_TIED = 3  # families cut together; no class is known that ties more
MAX_BUILDS = 4000  # models built without weights in search of rules, until what is left counts as not expressible
UNTIED_KINDS = ("layer", "head_dim")  # layers go one by one; a head's width sets the scale of attention

Shapes = Mapping[str, tuple[int, ...]]
Target = tuple["type[PreTrainedModel]", "PreTrainedConfig"]


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
    gone = tuple(block + "." for block in groups.removed_blocks(kept))
    left = {new_name(n, moved): s for n, s in groups.remaining_shapes(kept).items()}
    tied = {
        new_name(n, moved): left[new_name(of, moved)]
        for n, of in groups.tied.items()
        if not (gone and n.startswith(gone)) and new_name(of, moved) in left
    }
    return left | tied


class ConfigSolver:
    """Finds and applies configuration edits for one model.

    Attributes:
        model_class: the class of the model.
        config: its configuration, never changed.
        accept: for a rule whose shapes fit, the rule with which the logits are right too (weights may have to be
            scaled), or None: (rule, share kept) -> rule.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Groups,
        accept: Callable[[FieldRule, Fraction], FieldRule | None] = lambda rule, share: rule,
        rules: Sequence[FieldRule] = (),
    ) -> None:
        self.model_class = type(model)
        self.config = model.config
        self.groups = groups
        self.accept = accept
        self._families: dict[str, list[Group]] = {}
        for group in groups:
            self._families.setdefault(group.family, []).append(group)
        self._joint = {frozenset(r.families): r for r in rules if len(r.families) > 1}
        self._alone: dict[str, FieldRule | None] = {f: None for families in self._joint for f in families}
        self._alone |= {r.families[0]: r for r in rules if len(r.families) == 1}
        self._tied: dict[str, FieldRule | None] = {f: r for r in self._joint.values() for f in r.families}
        self._misfits: dict[str, tuple[str, ...]] = {}
        self._lenient: list[Target] | None = None
        self._built: dict[str, Shapes | None] = {}

    def rule(self, family: str) -> FieldRule | None:
        """The rule that cuts a family alone, None if no edit of the configuration does."""
        if family not in self._alone:
            self._alone[family] = self._search((family,))
        return self._alone[family]

    def tied_rule(self, family: str) -> FieldRule | None:
        """The rule that cuts a family and the fewest others by the same share, None if there is none."""
        if family not in self._tied:
            self._tied[family] = None
            others = [f for f, members in self._families.items() if f != family and self._may_tie(members[0])]
            others.sort(key=lambda f: self.rule(f) is not None)  # what cannot go alone is the likelier partner
            for number in range(1, MAX_TIED if self._may_tie(self._families[family][0]) else 1):
                for partners in itertools.combinations(others, number):
                    if rule := self.joint_rule((family, *partners)):
                        self._tied[family] = rule
                        return rule
        return self._tied[family]

    def joint_rule(self, families: Sequence[str]) -> FieldRule | None:
        """The rule that cuts just these families by the same share, None if there is none."""
        key = frozenset(families)
        if key not in self._joint and (rule := self._search(tuple(families))):
            self._joint[key] = rule
        return self._joint.get(key)

    def _may_tie(self, group: Group) -> bool:
        return group.prunable and group.kind not in UNTIED_KINDS

    def targets(self) -> Iterator[Target]:
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
        rules = self.rules_for(kept)
        layers = {rule: kept[self._families[rule.families[0]][0].name] for rule, _ in rules if rule.follows_layers}
        return rebuilt(config, _changes(config, rules, layers))

    def feasible(self, family: str, count: int) -> bool:
        """Whether some target class can be configured for `count` units in every group of the family.

        Families tied to it keep the same share.
        """
        share = Fraction(count, self._families[family][0].units)
        rule = self.rule(family) or self.tied_rule(family)
        if rule is None:
            return False
        kept = self._kept_at(rule.families, share)
        for _, config in self.targets() if kept else ():
            try:
                self.edited(config, kept)
            except Exception:  # configuration classes raise what they like
                continue
            return True
        return False

    def refusal(self, family: str) -> str:
        """Why a family cannot be cut alone in every layer."""
        name = type(self.config).__name__
        if family in self._misfits:
            return (
                f"{name} can set the width of {family} ({', '.join(self._misfits[family])}), but the class derives a "
                "constant from it, so the result would compute something else"
            )
        tied = self._tied.get(family)
        if tied is not None:
            partners = " and ".join(f for f in tied.families if f != family)
            kinds = ",".join(dict.fromkeys(self._families[f][0].kind for f in tied.families))
            return (
                f"{name} can set the width of {family} only together with {partners}, all by the same share: "
                f"prune these kinds together (--kinds {kinds})"
            )
        return f"{name} has no field that sets the width of {family} alone, so no class could load the result"

    def _shares(self, kept: Kept) -> dict[str, Fraction]:
        """Family -> share of the units kept in each of its groups, for families that lose any."""
        gone = tuple(block + "." for block in self.groups.removed_blocks(kept))
        shares: dict[str, Fraction] = {}
        for family in dict.fromkeys(self.groups.named(name).family for name in kept):
            members = [g for g in self._families[family] if not g.name.startswith(gone)]
            if not members:
                continue
            found = {Fraction(len(kept.get(g.name, range(g.units))), g.units) for g in members}
            if len(found) > 1:
                raise PlanError(
                    f"{family} keeps {float(min(found)):.0%} to {float(max(found)):.0%} of its units depending on the "
                    "layer; a stock class needs the same number in every layer (prune with uniform widths)"
                )
            share = found.pop()
            if share != 1:
                shares[family] = share
        return shares

    def rules_for(self, kept: Kept) -> list[tuple[FieldRule, Fraction]]:
        """The rules that together cut every family to the share of its units that is kept.

        Raises:
            PlanError: there are none.
        """
        left = self._shares(kept)
        found = []
        for family in sorted(left, key=lambda f: self.rule(f) is not None):
            if family not in left:
                continue
            rule = self.rule(family) or self._tied_rule_within(family, left)
            if rule is None:
                raise PlanError(self.refusal(family))
            found.append((rule, left[family]))
            for f in rule.families:
                del left[f]
        return found

    def _tied_rule_within(self, family: str, shares: Mapping[str, Fraction]) -> FieldRule | None:
        """The rule for the most families of equal share that `family` is tied to."""
        self.tied_rule(family)
        fitting = [
            rule
            for families, rule in self._joint.items()
            if family in families and all(shares.get(f) == shares[family] for f in families)
        ]
        return max(fitting, key=lambda rule: len(rule.families), default=None)

    def _kept_at(self, families: Sequence[str], share: Fraction) -> dict[str, range]:
        """The last units of every group of these families, so that layers that count from the first one change too;
        nothing if some group has no such share."""
        members = [g for f in families for g in self._families[f]]
        if any((share * g.units).denominator != 1 for g in members):
            return {}
        return {g.name: range(g.units - int(share * g.units), g.units) for g in members}

    def _search(self, families: tuple[str, ...]) -> FieldRule | None:
        members = [self._families[f] for f in families]
        if any(g.units != m[0].units for m in members for g in m):
            return None
        step = math.gcd(*(m[0].units for m in members))
        for count in dict.fromkeys([step - 1, step // 2, step // 4, 1]):
            if not 0 < count < step:
                continue
            share = Fraction(count, step)
            kept = self._kept_at(families, share)
            wanted = expected_shapes(self.groups, kept)
            for target in self.targets():
                for rule in candidate_rules(target[1], self.groups, [m[0] for m in members]):
                    if self._shapes(target, rule, share, kept) != wanted:
                        continue
                    if accepted := self.accept(rule, share):
                        return accepted
                    self._misfits.setdefault(families[0], rule.fields)
        return None

    def _shapes(self, target: Target, rule: FieldRule, share: Fraction, kept: Kept) -> Shapes | None:
        """What the target class builds after the rule's edit; None if it refuses."""
        model_class, config = target
        layers = {rule: kept[self._families[rule.families[0]][0].name]}
        try:
            changes = _changes(config, [(rule, share)], layers)
        except PlanError:
            return None
        key = f"{model_class.__name__} {sorted(changes.items())}"
        if key not in self._built:
            if len(self._built) >= MAX_BUILDS:
                return None
            try:
                self._built[key] = shapes_of(build_on_meta(model_class, rebuilt(config, changes)))
            except Exception:  # a candidate that the class refuses is no error
                self._built[key] = None
        return self._built[key]

    def _same_parameters(self) -> Iterator[Target]:
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


def _changes(
    config: PreTrainedConfig,
    rules: Sequence[tuple[FieldRule, Fraction]],
    layers: Mapping[FieldRule, Sequence[int]],
) -> dict[str, Any]:
    """Field -> new value, when each rule's families keep their share (`layers` for rules that remove whole ones).

    Raises:
        PlanError: a field would not stay whole.
    """
    before = values_of(config)
    pinned: dict[str, Any] = {}
    shares: dict[str, Fraction] = {}
    changed: dict[str, Any] = {}
    for rule, share in rules:
        pinned |= rule.pins
        for name in rule.fields:
            shares[name] = shares.get(name, Fraction(1)) * share
        changed |= {name: kept_entries(before[name], layers[rule]) for name in rule.lists}
        changed |= {name: kept_indices(before[name], layers[rule]) for name in rule.indices}
        changed |= {name: sum(i < before[name] for i in layers[rule]) for name in rule.prefixes}
    for name, share in shares.items():
        size = share * int(pinned.get(name) or before[name])
        if size.denominator != 1:
            raise PlanError(f"{name} would become {float(size):.2f}; choose counts that keep it whole")
        changed[name] = int(size)
    return pinned | changed
