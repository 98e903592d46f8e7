"""Families that a class can only cut together: found by looking at everything that an edit of its sizes shrinks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from secateur.groups import Group, Groups
from secateur.surgery.config_fields import numbers
from secateur.surgery.field_rule import FieldRule, changing_sizes, constant_pins
from secateur.surgery.shapes import Shapes, expected_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

UNTIED_KINDS = ("layer", "sublayer", "head_dim")  # blocks go one by one; a head's width sets the scale of attention
MAX_FIELDS = 3  # fields that change at once
MAX_SHARES = 2  # shares to try
MAX_PINS = 8  # values to write for derived fields
MAX_OPEN = 6  # families that may or may not be part of what an edit shrinks


def tie_shares(groups: Groups) -> list[Fraction]:
    """Shares that many families can keep: about half of their units, or all but one."""
    found: Counter[Fraction] = Counter()
    for members in _families(groups).values():
        units = members[0].units
        found.update({Fraction(units // 2, units), Fraction(max(units - 1, 1), units)} - {Fraction(0), Fraction(1)})
    return [share for share, _ in found.most_common(MAX_SHARES)]


def tie_edits(config: PreTrainedConfig, groups: Groups) -> Iterator[FieldRule]:
    """Edits of a few fields that hold some family's size, without families yet; those that write derived ones last."""
    families = _families(groups)
    sizes = set[int]().union(*(changing_sizes(groups, members[0]) for members in families.values()))
    matching = [name for name, value in numbers(config).items() if value in sizes and value > 1]
    subsets = [s for n in range(1, MAX_FIELDS + 1) for s in itertools.combinations(matching, n)]
    yield from (FieldRule((), fields) for fields in subsets)
    constant = {members[0].units for members in families.values()}
    for pins in itertools.islice(constant_pins(config, groups, constant), MAX_PINS):
        yield from (FieldRule((), fields, pins) for fields in subsets if len(fields) < MAX_FIELDS)


def explaining_families(groups: Groups, shapes: Shapes, share: Fraction) -> tuple[str, ...]:
    """The families whose cut to `share` gives these shapes, nothing if no set of families does."""
    before = expected_shapes(groups, {})
    if shapes.keys() != before.keys():
        return ()
    changed = {
        (name, dim)
        for name, shape in shapes.items()
        if name in groups.shapes
        for dim, size in enumerate(shape)
        if len(shape) != len(before[name]) or size != before[name][dim]
    }
    families = {f: m for f, m in _families(groups).items() if all((share * g.units).denominator == 1 for g in m)}
    on_axes = [{g.family for g in groups.on_axis.get(axis, ()) if g.family in families} for axis in changed]
    if not changed or not all(on_axes):
        return ()
    certain = {next(iter(found)) for found in on_axes if len(found) == 1}
    possible = sorted(set().union(*on_axes) - certain)
    if len(possible) > MAX_OPEN:
        return ()
    for number in range(len(possible) + 1):
        for more in itertools.combinations(possible, number):
            chosen = tuple(f for f in families if f in certain or f in more)
            kept = {g.name: range(int(share * g.units)) for f in chosen for g in families[f]}
            if expected_shapes(groups, kept) == shapes:
                return chosen
    return ()


def _families(groups: Groups) -> dict[str, list[Group]]:
    """The families that may be tied: prunable, and alike in all layers."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.family, []).append(group)
    return {
        family: members
        for family, members in found.items()
        if members[0].kind not in UNTIED_KINDS and all(g.prunable and g.units == members[0].units for g in members)
    }
