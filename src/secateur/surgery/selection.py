"""Which groups a run prunes: those of the kinds asked for that can be cut, and why the others stay whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from secateur.errors import PlanError
from secateur.groups import OFFERED_KINDS, Group, Groups
from secateur.surgery.expressible import Expressible, expressible

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def select(
    model: PreTrainedModel,
    groups: Groups,
    kinds: Sequence[str],
    can: Expressible,
    *,
    named: Sequence[str] = (),
    uniform: bool = True,
) -> tuple[Groups, dict[str, str]]:
    """The groups of these kinds that are pruned, and family -> reason for those that must stay whole.

    Args:
        named: the kinds that the user asked for by name.
        uniform: with the same widths in every layer.

    Raises:
        PlanError: none can be pruned, or none of a kind that was asked for by name.
    """
    if hopeless := [kind for kind in named if not _chosen(groups, [kind], can)]:
        raise PlanError(_why_none(hopeless, groups, can) + _offered(model, groups, uniform))
    chosen = _chosen(groups, kinds, can)
    if not chosen:
        raise PlanError(_why_none(kinds, groups, can))
    return replace(groups, groups=chosen), _left_whole(groups, kinds, can)


def _left_whole(groups: Groups, kinds: Sequence[str], can: Expressible) -> dict[str, str]:
    """Family -> why it must stay whole."""
    families = {g.family for g in groups if g.kind in kinds}
    refused = {g.family: g.refusals[0] for g in groups if g.kind in kinds and not g.prunable}
    return refused | {family: reason for family, reason in can.refused.items() if family in families}


def _chosen(groups: Groups, kinds: Sequence[str], can: Expressible) -> tuple[Group, ...]:
    """The groups of these kinds that can be pruned."""
    left_whole = _left_whole(groups, kinds, can)
    return tuple(g for g in groups.of_kinds(kinds) if g.family not in left_whole)


def _why_none(kinds: Sequence[str], groups: Groups, can: Expressible) -> str:
    """Why nothing of these kinds can be pruned, reason by reason with the families it holds for."""
    families: dict[str, list[str]] = {}
    for family, reason in _left_whole(groups, kinds, can).items():
        families.setdefault(reason, []).append(family)
    reasons = []
    for reason, those in families.items():
        unnamed = ", ".join(family for family in those if family not in reason)
        reasons.append(f"{reason} ({unnamed})" if unnamed else reason)
    absent = [kind for kind in kinds if not any(g.kind == kind for g in groups)]
    reasons += [f"the model has no {' or '.join(absent)}"] if absent else []
    return f"no {' or '.join(kinds)} can be pruned: {'; '.join(reasons)}"


def _offered(model: PreTrainedModel, groups: Groups, uniform: bool) -> str:
    """What to choose from instead, closing a message."""
    can = expressible(model, groups, OFFERED_KINDS, uniform=uniform)
    kinds = dict.fromkeys(g.kind for g in _chosen(groups, OFFERED_KINDS, can))
    how = "with the same widths in every layer" if uniform else "layer by layer"
    return f"; this model offers, {how}: {', '.join(kinds) or 'nothing'}"
