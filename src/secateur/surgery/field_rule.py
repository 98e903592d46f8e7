"""How a configuration follows a cut: the rule, and the rules worth trying."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from secateur.groups import Group, Groups
from secateur.surgery.alignment import Step
from secateur.surgery.config_fields import index_lists, numbers, per_layer_lists, unset_numbers
from secateur.surgery.folding import Fold

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HEAD_KINDS = ("attention_head", "kv_group", "query_head")
MAX_FIELDS = 4  # fields that change at once


@dataclass(frozen=True)
class FieldRule:
    """How the configuration follows some families that keep the same share of their units.

    Attributes:
        families: the families cut together; as a rule just one.
        fields: fields that shrink in proportion to the units kept.
        pins: fields that must be written although they do not change, such as a `head_dim` the class would derive.
        lists: fields with one entry per layer, from which the entries of removed layers go.
        indices: fields that list numbers of layers.
        prefixes: fields that say how many of the first layers are of a kind.
        suffixes: fields that say how many of the last layers are of a kind.
        folds: weights to scale, because the class derives a scalar from a field that changes.
    """

    families: tuple[str, ...]
    fields: tuple[str, ...]
    pins: Mapping[str, int] = field(default_factory=dict, hash=False)
    lists: tuple[str, ...] = ()
    indices: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    folds: tuple[Fold, ...] = ()

    @property
    def reads(self) -> set[str]:
        """The fields that must be there; what is written with `pins` need not."""
        return {*self.fields, *self.lists, *self.indices, *self.prefixes, *self.suffixes} - self.pins.keys()

    @property
    def follows_layers(self) -> bool:
        return bool(self.lists or self.indices or self.prefixes or self.suffixes)


@dataclass
class Findings:
    """What a search brought to light.

    Attributes:
        rules: families -> the rule that cuts just them, None where there is none.
        misfits: family -> fields that give it the right shapes, and why they will not do all the same.
        ties: family -> the fewest families it can be cut with, itself among them, None if there are none.
        steps: family -> what its counts must be multiples of for the class to run.
    """

    rules: dict[frozenset[str], FieldRule | None] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)
    ties: dict[str, frozenset[str] | None] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)

    @classmethod
    def of(cls, rule: FieldRule) -> Findings:
        """Just one rule; what it ties has none of its own."""
        alone: dict[frozenset[str], FieldRule | None] = {frozenset([family]): None for family in rule.families}
        ties: dict[str, frozenset[str] | None] = {family: frozenset(rule.families) for family in rule.families}
        return cls(alone | {frozenset(rule.families): rule}, ties=ties)


def candidate_rules(config: PreTrainedConfig, groups: Groups, cut: Sequence[Group]) -> Iterator[FieldRule]:
    """Rules worth trying for cutting these groups (one of each family) by one share, the smallest edits first."""
    families = tuple(g.family for g in cut)
    if cut[0].blocks:
        yield from _layer_rules(config, families, cut[0].units)
        return
    sizes = set[int]().union(*(changing_sizes(groups, g) for g in cut))
    constant = {g.units for g in groups.prunable if g.family not in families and not g.blocks}
    matching = [name for name, value in numbers(config).items() if value in sizes]
    subsets = [s for n in range(min(len(matching), MAX_FIELDS) + 1) for s in itertools.combinations(matching, n)]
    for pins, scaled in _pins(config, groups, sizes, constant):
        for fields in subsets:
            chosen = (*fields, *(name for name in scaled if name not in fields))
            if chosen:
                yield FieldRule(families, chosen, pins)


def _pins(
    config: PreTrainedConfig, groups: Groups, sizes: set[int], constant: set[int]
) -> Iterator[tuple[dict[str, int], tuple[str, ...]]]:
    """(values to write for fields the class would derive, those of them that shrink with the cut).

    Heads that keep their width come first: a `head_dim` that shrinks with them has the right shapes at some shares too.
    """
    yield {}, ()
    yield from ((pins, ()) for pins in _head_dims(groups))
    for name in unset_numbers(config):
        yield from (({name: size}, (name,)) for size in sorted(sizes))
    yield from ((pins, ()) for pins in _other_constants(config, constant))


def constant_pins(config: PreTrainedConfig, groups: Groups, constant: set[int]) -> Iterator[dict[str, int]]:
    """Values to write for fields that the class would otherwise derive from those that change."""
    yield from _head_dims(groups)
    yield from _other_constants(config, constant)


def _head_dims(groups: Groups) -> Iterator[dict[str, int]]:
    yield from ({"head_dim": width} for width in sorted(head_widths(groups)))


def _other_constants(config: PreTrainedConfig, constant: set[int]) -> Iterator[dict[str, int]]:
    for name in unset_numbers(config):
        yield from ({name: size} for size in sorted(constant))


def _layer_rules(config: PreTrainedConfig, families: tuple[str, ...], layers: int) -> Iterator[FieldRule]:
    matching = [name for name, value in numbers(config).items() if value == layers]
    lists = per_layer_lists(config, layers)
    words = tuple(k for k, v in lists.items() if all(isinstance(entry, str) for entry in v))
    listed = tuple(name for name in index_lists(config, layers) if name not in lists)
    counts = [name for name, value in numbers(config).items() if 0 < value < layers]
    for fields in [s for n in (1, 2) for s in itertools.combinations(matching, n)]:
        # numbers may be as many as there are layers by chance
        for cut, indices in dict.fromkeys([(tuple(lists), listed), (tuple(lists), ()), (words, listed), (words, ())]):
            for prefixes in [(), *((name,) for name in counts)]:
                yield FieldRule(families, fields, {}, cut, indices, prefixes)
            for name in counts:
                yield FieldRule(families, fields, {}, cut, indices, suffixes=(name,))


def changing_sizes(groups: Groups, group: Group) -> set[int]:
    """Sizes that shrink with a group: of its axes, and products with the groups that share them."""
    sizes = {group.units}
    for member in group.members:
        others = [g.units for g in _sharing(groups, group, member.parameter, member.dim)]
        for n in range(len(others) + 1):
            sizes |= {group.units * int(np.prod(s)) for s in itertools.combinations(others, n)}
        full = groups.shapes[member.parameter][member.dim]
        if member.index.size == full:
            sizes.add(full)
    return sizes


def head_widths(groups: Groups) -> set[int]:
    """Positions of one head on the axes that count heads."""
    widths = set()
    for group in groups:
        if group.kind in HEAD_KINDS:
            for m in group.members:
                heads = [g.units for g in _sharing(groups, group, m.parameter, m.dim) if g.kind in HEAD_KINDS]
                widths.add(m.index.shape[1] // int(np.prod(heads)))
    return widths


def _sharing(groups: Groups, group: Group, parameter: str, dim: int) -> list[Group]:
    """The other groups that lie on an axis."""
    return [g for g in groups.on_axis[parameter, dim] if g is not group]
