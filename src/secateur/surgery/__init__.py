"""Surgery: remove units, reversibly (`mask`) or finally (`slice`), and prove that both mean the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from secateur.groups import Groups
from secateur.surgery.masking import mask
from secateur.surgery.proof import OFFERED_KINDS, Proof, prove
from secateur.surgery.slicing import checked_solver, slice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OFFERED_KINDS", "Proof", "feasible_counts", "inexpressible", "mask", "prove", "slice"]


def feasible_counts(model: PreTrainedModel, groups: Groups) -> Callable[[str, int], bool]:
    """A test for (family, units kept per group): can a stock class be configured for that width in every layer?"""
    solver = checked_solver(model, groups)
    known: dict[tuple[str, int], bool] = {}

    def feasible(family: str, count: int) -> bool:
        if (family, count) not in known:
            known[family, count] = solver.feasible(family, count)
        return known[family, count]

    return feasible


def inexpressible(model: PreTrainedModel, groups: Groups, kinds: Sequence[str]) -> dict[str, str]:
    """Family -> reason, for the families of these kinds whose width no stock class can change alone."""
    solver = checked_solver(model, groups)
    return {f: solver.refusal(f) for f in groups.families(kinds) if solver.rule(f) is None}
