"""What an allocation did, for the plan's provenance: its arguments, and the share of each kind that really goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.allocation.families import Family
from secateur.allocation.limits import Limits
from secateur.groups import Group, Groups, Kept


def provenance(
    groups: Groups,
    families: Sequence[Family],
    kept: Kept,
    budget: Mapping[str, float | None] | None,
    kinds: Sequence[str],
    ranking: str,
    limits: Limits,
) -> dict[str, Any]:
    """What the decision depends on, and what it comes to, as JSON."""
    left = groups.remaining_parameters(kept)
    # local ranking gives every group the share of units asked of all
    every = (budget or {}).get("unit_sparsity") if ranking == "local" else None
    asked = {kind: limits.kind_ratios.get(kind, every) for kind in kinds}
    return {
        "budget": budget,
        "kinds": list(kinds),
        "ranking": ranking,
        "uniform": limits.uniform,
        "round_to": limits.round_to,
        "protect_first": limits.protect_first,
        "protect_last": limits.protect_last,
        "protect": sorted(limits.protect),
        "layer_ratios": {str(layer): share for layer, share in (limits.layer_ratios or {}).items()},
        "kind_ratios": dict(limits.kind_ratios),
        "shares": shares(groups, [g for f in families for g in f.groups], kept, asked),
        "parameters": groups.total_parameters,
        "parameters_left": left,
        "sparsity": 1 - left / groups.total_parameters,
    }


def shares(
    groups: Groups, cut: Sequence[Group], kept: Kept, asked: Mapping[str, float | None]
) -> dict[str, dict[str, Any]]:
    """Kind -> how much of it goes.

    Args:
        cut: the groups that may lose units.
        asked: kind -> share of its units that was asked for, None if the budget settled it.

    Returns:
        For each kind of `asked`: `asked`; `units` of the groups in `cut`, those inside removed blocks left out; how
        many of them are `removed`, and the `share` they are; and the `parameters` that this kind alone takes away.
    """
    removed = groups.removed_prefixes(kept)
    found = {}
    for kind, share in asked.items():
        outside = {g.name: _outside(g, removed) for g in cut if g.kind == kind}
        units = sum(len(left) for left in outside.values())
        stay = sum(len(left.intersection(kept.get(name, left))) for name, left in outside.items())
        own = {name: kept[name] for name, left in outside.items() if left and name in kept}
        found[kind] = {
            "asked": share,
            "units": units,
            "removed": units - stay,
            "share": round(1 - stay / units, 6) if units else 0.0,
            "parameters": groups.total_parameters - groups.remaining_parameters(own),
        }
    return found


def _outside(group: Group, removed: tuple[str, ...]) -> set[int]:
    """The units that do not lie inside a block that goes."""
    if group.members and all(m.parameter.startswith(removed) for m in group.members):
        return set()
    inside = {u for u, block in enumerate(group.blocks) if block.startswith(removed)}
    return set(range(group.units)) - inside
