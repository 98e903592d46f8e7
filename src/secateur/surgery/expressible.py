"""What a stock class can be configured for: known before units are chosen, so that every plan can be saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

from secateur.errors import PlanError
from secateur.groups import Group, Groups
from secateur.surgery.adapters import Adapted, is_adapted
from secateur.surgery.per_layer import skip_word
from secateur.surgery.slicing import layer_solver

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.surgery.config_solver import ConfigSolver


@dataclass(frozen=True)
class Expressible:
    """The cuts that the configuration of a model can follow.

    Attributes:
        feasible: (family, units kept in every group) -> whether there is a configuration for it; families tied to it
            keep the same share.
        ties: families that the class can only cut together, by the same share of their units.
        refused: family -> why it must stay whole.
        multiples: family -> what the units kept must be a multiple of for the class to run, where that is not 1.
    """

    feasible: Callable[[str, int], bool]
    ties: tuple[tuple[str, ...], ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)

    def in_multiples(self, groups: Iterable[Group], width: int) -> Expressible:
        """The same where the widths of all matrices that these groups lie on must be multiples of `width`."""
        found = dict(self.multiples)
        for group in groups:
            for member in group.members:
                units = width // math.gcd(width, member.index.shape[1])
                found[group.family] = math.lcm(found.get(group.family, 1), units)
        return replace(self, multiples=found)


def expressible(model: PreTrainedModel, groups: Groups, kinds: Sequence[str], *, uniform: bool = True) -> Expressible:
    """Which families of these kinds can be cut.

    Args:
        uniform: with the same widths in every layer, as stock classes need it; otherwise in each layer by itself, where
            ties are no way out: what they tie to may span all layers.
    """
    if is_adapted(model):
        return _of_base(Adapted(model, groups), kinds, uniform)
    solver = layer_solver(model, groups)
    families = groups.families(kinds)
    ties: list[tuple[str, ...]] = []
    refused: dict[str, str] = {}
    for family, members in families.items():
        if members[0].kind == "sublayer":
            if reason := _whole(model, members[0], uniform):
                refused[family] = reason
            continue
        if uniform and len({g.units for g in members}) > 1:
            refused[family] = f"the layers differ in the width of {family} already, so it is cut with --per-layer only"
        if family in refused or solver.rule(family) is not None or any(family in tie for tie in ties):
            continue
        rule = solver.tied_rule(family) if uniform else None
        if rule is None or not families.keys() >= set(rule.families) or not _joined(ties, rule.families, solver):
            refused[family] = solver.refusal(family)
    multiples = {family: of for family in families if family not in refused and (of := solver.step(family).of) > 1}
    feasible = cache(solver.feasible) if uniform else lambda family, count: True
    return Expressible(feasible, tuple(ties), refused, multiples)


def _whole(model: PreTrainedModel, sublayers: Group, uniform: bool) -> str | None:
    """Why these sublayers cannot be left out of single layers, None if they can."""
    if uniform:
        return f"{sublayers.name} can only be left out of single layers: prune with --per-layer (or --tier per-layer)"
    try:
        skip_word(model, sublayers)
    except PlanError as error:
        return str(error)
    return None


def _of_base(adapted: Adapted, kinds: Sequence[str], uniform: bool) -> Expressible:
    """What the base of a model with adapters can be configured for; ranks are free."""
    inner = expressible(adapted.base, adapted.base_groups, kinds, uniform=uniform)
    family_in_base = {
        adapted.groups.named(name).family: adapted.base_groups.named(base).family
        for name, base in adapted.in_base.items()
    }
    back = {base: family for family, base in family_in_base.items()}
    return Expressible(
        lambda family, count: family not in family_in_base or inner.feasible(family_in_base[family], count),
        tuple(tuple(back[family] for family in tie) for tie in inner.ties),
        {back[family]: reason for family, reason in inner.refused.items() if family in back},
        {back[family]: of for family, of in inner.multiples.items() if family in back},
    )


def _joined(ties: list[tuple[str, ...]], families: tuple[str, ...], solver: ConfigSolver) -> bool:
    """Add a tie; one that overlaps with others must hold for all of them at once."""
    overlapping = [tie for tie in ties if set(tie) & set(families)]
    united = tuple(dict.fromkeys([*families, *(f for tie in overlapping for f in tie)]))
    if overlapping and solver.joint_rule(united) is None:
        return False
    ties[:] = [tie for tie in ties if tie not in overlapping]
    ties.append(united)
    return True
