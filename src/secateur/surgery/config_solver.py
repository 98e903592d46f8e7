"""Which configuration fields to change so that the model's own class builds the cut shapes: found, not listed.

For every family of groups a small search tries the integer fields whose value equals a size that the cut changes,
builds the class on the meta device, and keeps edits that yield exactly the shapes of the cut tensors. Equal shapes do
not imply equal meaning (8 heads of 8 lose a quarter by `head_dim` as well as by `num_attention_heads`), so an edit must
also give the right logits. The edits of several families multiply: if `kv_group` and `query_head` both act on
`num_attention_heads`, it shrinks by both shares.

Some classes tie families: GPT-2 has no `head_dim`, so that heads can go only if the hidden dimension shrinks by the
same share. What an edit shrinks besides the family one is after tells what the class ties to it (`ties.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

from secateur.discovery.setting import quiet_transformers
from secateur.errors import PlanError
from secateur.groups import Group, Groups, Kept
from secateur.surgery.alignment import Step, smallest_step
from secateur.surgery.config_fields import kept_entries, kept_indices, rebuilt, values_of
from secateur.surgery.field_rule import FieldRule, Findings, candidate_rules
from secateur.surgery.lenient import lenient_targets
from secateur.surgery.shapes import Shapes, built_shapes, expected_shapes
from secateur.surgery.ties import explaining_families, tie_edits, tie_shares

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MAX_TIE_EDITS = 250
MAX_BUILDS = 1500  # models built without weights in search of rules, until what is left counts as not expressible

Target = tuple["type[PreTrainedModel]", "PreTrainedConfig"]


class ConfigSolver:
    """Finds and applies configuration edits for one model.

    Attributes:
        model_class: the class of the model.
        config: its configuration, never changed.
        accept: for a rule whose shapes fit, the rule with which the logits are right too (weights may have to be
            scaled), or None: (rule, share kept) -> rule. Raises PlanError if nothing could be compared.
        failure: what the class says when it runs after a rule's edit, empty if it runs, None if it refuses the edit.
        findings: what is known so far.
        on_change: told of the findings when there are more.
        hints: rules found for other configurations of the class, which are tried first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Groups,
        accept: Callable[[FieldRule, Fraction], FieldRule | None] = lambda rule, share: rule,
        known: Findings | None = None,
        failure: Callable[[FieldRule, Fraction], str | None] = lambda rule, share: "",
        on_change: Callable[[Findings], None] | None = None,
        hints: Sequence[FieldRule] = (),
    ) -> None:
        self.model_class = type(model)
        self.config = model.config
        self.groups = groups
        self.accept = accept
        self.failure = failure
        self.findings = known or Findings()
        self.on_change = on_change or (lambda findings: None)
        self.hints = hints
        self._families: dict[str, list[Group]] = {}
        for group in groups:
            self._families.setdefault(group.family, []).append(group)
        self._lenient: list[Target] | None = None
        self._read: dict[int, dict[str, Any]] = {}  # configurations are not hashable; targets live as long as this
        self._built: dict[str, Shapes | None] = {}

    def rule(self, family: str) -> FieldRule | None:
        """The rule that cuts a family alone, None if no edit of the configuration does."""
        return self.joint_rule((family,))

    def joint_rule(self, families: Sequence[str]) -> FieldRule | None:
        """The rule that cuts just these families by the same share, None if there is none."""
        key = frozenset(families)
        if key not in self.findings.rules:
            self.findings.rules[key] = self._search(tuple(families))
            self.on_change(self.findings)
        return self.findings.rules[key]

    def tied_rule(self, family: str) -> FieldRule | None:
        """The rule that cuts a family and the fewest others by the same share, None if there is none."""
        if family not in self.findings.ties:
            self.findings.ties[family] = None
            for rule, share in itertools.chain(self._hinted_ties(family), self._ties_of(family)):
                if accepted := self._accepted(family, rule, share):
                    self.findings.rules[frozenset(rule.families)] = accepted
                    self.findings.ties[family] = frozenset(rule.families)
                    break
            self.on_change(self.findings)
        tied = self.findings.ties[family]
        return None if tied is None else self.findings.rules[tied]

    def _hinted_ties(self, family: str) -> Iterator[tuple[FieldRule, Fraction]]:
        """Ties of other configurations that have the right shapes here too."""
        mine = (self.model_class, self.config)
        ties = [rule for rule in self.hints if len(rule.families) > 1 and family in rule.families]
        for rule, share in itertools.product(ties, tie_shares(self.groups)):
            shapes = self._shapes(mine, rule, share, {})
            if shapes and set(explaining_families(self.groups, shapes, share)) == set(rule.families):
                yield replace(rule, folds=()), share

    def _ties_of(self, family: str) -> Iterator[tuple[FieldRule, Fraction]]:
        yield from (tie for tie in self._possible_ties if family in tie[0].families)

    @cached_property
    def _possible_ties(self) -> list[tuple[FieldRule, Fraction]]:
        """Edits that shrink several families by one share and nothing else, the fewest families first."""
        found: list[tuple[FieldRule, Fraction]] = []
        mine = (self.model_class, self.config)
        edits = list(itertools.islice(tie_edits(self.config, self.groups), MAX_TIE_EDITS))
        for share in tie_shares(self.groups):
            for edit in edits:
                shapes = self._shapes(mine, edit, share, {})
                families = explaining_families(self.groups, shapes, share) if shapes else ()
                if len(families) > 1:
                    found.append((replace(edit, families=families), share))
        return sorted(found, key=lambda tie: (len(tie[0].families), len(tie[0].pins)))

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
        return rebuilt(config, scaled_fields(self._values(config), rules, layers))

    def feasible(self, family: str, count: int) -> bool:
        """Whether some target class can be configured for `count` units in every group of the family, and runs.

        Families tied to it keep the same share.
        """
        share = Fraction(count, self._families[family][0].units)
        rule = self.rule(family) or self.tied_rule(family)
        if rule is None or not self.aligned(family, count):
            return False
        for kept in self.kept_at(rule.families, share):
            for _, config in self.targets():
                try:
                    self.edited(config, kept)
                except Exception:  # configuration classes raise what they like
                    continue
                return True
        return False

    def aligned(self, family: str, count: int) -> bool:
        """Whether the class runs with `count` units of a family, as far as that is a matter of alignment."""
        return any(count == g.units for g in self._families[family]) or count % self.step(family).of == 0

    def step(self, family: str) -> Step:
        """What the family's counts must be multiples of; nothing is known of families without a rule."""
        group = self._families[family][0]
        rule = None if group.blocks else self.rule(family)
        if rule is None and (tied := self.findings.ties.get(family)):
            rule = self.findings.rules[tied]
        if rule is None:
            return Step()
        if family not in self.findings.steps:
            self.findings.steps[family] = smallest_step(group.units, lambda share: self.failure(rule, share))
            self.on_change(self.findings)
        return self.findings.steps[family]

    def check_alignment(self, kept: Kept) -> None:
        """Make sure that the class runs with as many units as are kept.

        Raises:
            PlanError: it does not.
        """
        for name, units in kept.items():
            family = self.groups.named(name).family
            if not self.aligned(family, len(units)):
                step = self.step(family)
                raise PlanError(
                    f"{self.model_class.__name__} does not run with {len(units)} units of {name} ({step.reason}): keep "
                    f"a multiple of {step.of}"
                )

    def refusal(self, family: str) -> str:
        """Why a family cannot be cut alone in every layer."""
        name = type(self.config).__name__
        tied = self.findings.ties.get(family)
        if tied is not None:
            partners = " and ".join(sorted(tied - {family}))
            kinds = ",".join(dict.fromkeys(self._families[f][0].kind for f in sorted(tied)))
            return (
                f"{name} can set the width of {family} only together with {partners}, all by the same share: "
                f"prune these kinds together (--kinds {kinds})"
            )
        if family in self.findings.misfits:
            return f"{name} can set the width of {family} {self.findings.misfits[family]}"
        return f"{name} has no field that sets the width of {family} alone, so no class could load the result"

    def _values(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Every field of a target's configuration, read once."""
        if id(config) not in self._read:
            self._read[id(config)] = values_of(config)
        return self._read[id(config)]

    def _shares(self, kept: Kept) -> dict[str, Fraction]:
        """Family -> share of the units kept in each of its groups, for families that lose any."""
        gone = self.groups.removed_prefixes(kept)
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
            for families, rule in self.findings.rules.items()
            if rule and family in families and all(shares.get(f) == shares[family] for f in families)
        ]
        return max(fitting, key=lambda rule: len(rule.families), default=None)

    def kept_at(self, families: Sequence[str], share: Fraction) -> Iterator[dict[str, range]]:
        """Units of every group of these families to try a rule with; nothing if some group has no such share.

        The last units, so that what counts layers from the first one changes too. Then the first ones, since classes
        may refuse a pattern of layers that does not begin as it did.
        """
        members = [g for f in families for g in self._families[f]]
        if any((share * g.units).denominator != 1 for g in members):
            return
        yield {g.name: range(g.units - int(share * g.units), g.units) for g in members}
        if any(g.blocks for g in members):
            yield {g.name: range(int(share * g.units)) for g in members}

    @quiet_transformers()
    def _search(self, families: tuple[str, ...]) -> FieldRule | None:
        members = [self._families[f] for f in families]
        if any(g.units != m[0].units for m in members for g in m):
            return None
        step = math.gcd(*(m[0].units for m in members))
        for count in dict.fromkeys([step - 1, step // 2, step // 4, 1]):
            if not 0 < count < step:
                continue
            share = Fraction(count, step)
            for kept in self.kept_at(families, share):
                wanted = expected_shapes(self.groups, kept)
                for target in self.targets():
                    for rule in self._candidates(target[1], members):
                        if self._shapes(target, rule, share, kept) != wanted:
                            continue
                        if accepted := self._accepted(families[0], rule, share):
                            return accepted
        return None

    def _accepted(self, family: str, rule: FieldRule, share: Fraction) -> FieldRule | None:
        """The rule with which the logits are right too, or None; then what speaks against it is remembered."""
        reason = "the class derives a constant from it, so the result would compute something else"
        try:
            if accepted := self.accept(rule, share):
                return accepted
        except PlanError as error:
            reason = str(error)
        self.findings.misfits.setdefault(family, f"({', '.join(rule.fields)}), but {reason}")
        return None

    def _candidates(self, config: PreTrainedConfig, members: Sequence[list[Group]]) -> Iterator[FieldRule]:
        """Rules to try for these families: those of other configurations first."""
        families = tuple(m[0].family for m in members)
        hinted = (rule for rule in self.hints if set(rule.families) == set(families))
        yield from (replace(rule, families=families, folds=()) for rule in hinted)
        yield from candidate_rules(config, self.groups, [m[0] for m in members])

    def _shapes(self, target: Target, rule: FieldRule, share: Fraction, kept: Kept) -> Shapes | None:
        """What the target class builds after the rule's edit; None if it refuses."""
        model_class, config = target
        layers = {rule: kept[self._families[rule.families[0]][0].name]} if rule.follows_layers else {}
        if not self._values(config).keys() >= rule.reads:
            return None
        try:
            changes = scaled_fields(self._values(config), [(rule, share)], layers)
        except PlanError:
            return None
        key = f"{model_class.__name__} {sorted(changes.items())}"
        if key not in self._built:
            if len(self._built) >= MAX_BUILDS:
                return None
            try:
                self._built[key] = built_shapes(model_class, rebuilt(config, changes))
            except Exception:  # a candidate that the class refuses is no error
                self._built[key] = None
        return self._built[key]

    def _same_parameters(self) -> Iterator[Target]:
        for model_class, config in lenient_targets(self.config.model_type, self.config.to_dict()):
            config.dtype = self.config.dtype
            try:
                same = built_shapes(model_class, config) == expected_shapes(self.groups, {})
            except Exception:  # a class that cannot take these sizes is no alternative
                continue
            if same:
                yield model_class, config


def scaled_fields(
    before: Mapping[str, Any],
    rules: Sequence[tuple[FieldRule, Fraction]],
    layers: Mapping[FieldRule, Sequence[int]],
) -> dict[str, Any]:
    """Field -> new value, from the old ones, when each rule's families keep their share.

    Args:
        layers: the layers that stay, for rules that remove some.

    Raises:
        PlanError: a field would not stay whole, or is not set.
    """
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
        changed |= {name: _last(before[name], before[rule.fields[0]], layers[rule]) for name in rule.suffixes}
    for name, share in shares.items():
        value = pinned.get(name) or before[name]
        if value is None:
            raise PlanError(f"{name} is not set, so no share of it can be kept")
        size = share * int(value)
        if size.denominator != 1:
            raise PlanError(f"{name} would become {float(size):.2f}; choose counts that keep it whole")
        changed[name] = int(size)
    return pinned | changed


def _last(count: int, depth: int, layers: Sequence[int]) -> int:
    """How many of the last `count` of `depth` layers stay."""
    return sum(i >= depth - count for i in layers)
