"""Biases for a model whose class has fields for them, where biases alone are to make up for a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from secateur.checkpoint import Checkpoint
from secateur.config import PruneSettings
from secateur.discovery import discover
from secateur.errors import PlanError
from secateur.groups import Group, Groups
from secateur.pipeline.results import Results
from secateur.plan import PruningPlan
from secateur.surgery.biases import readers_of, share_with_biases, with_biases


def add_biases(
    source: Checkpoint, prune: PruneSettings, replayed: PruningPlan | None, results: Results
) -> tuple[Checkpoint, PruneSettings]:
    """The checkpoint with biases of zero for what reads the units that may go, as far as its class has fields for them.

    They count as parameters, so that more goes: a budget in parameters stays a share of the model without them.

    Raises:
        PlanError: nothing that reads these units has a bias then, or the budget counts what biases take as well.
    """
    dense, groups = source.model, discover(source.model)
    readers = readers_of(_to_be_cut(groups, prune, replayed))
    model, fields = with_biases(dense, readers)
    if not any(getattr(model.get_submodule(path), "bias", None) is not None for path in readers):
        raise PlanError(
            f"nothing to compensate: no linear module that reads what goes has a bias, and {type(dense).__name__} has "
            "no field that gives it one; solve the matrices instead (prune.compensate: ridge, --compensate ridge)"
        )
    if not fields:
        return source, prune
    if prune.counted:
        raise PlanError(
            f"the biases that {' and '.join(fields)} adds are no part of the {prune.counted} that the budget is a "
            "share of; give a share of the parameters, or --compensate ridge"
        )
    results["biases"] = {"fields": list(fields), "parameters": model.num_parameters() - dense.num_parameters()}
    if prune.param_sparsity is not None:
        prune = prune.model_copy(update={"param_sparsity": share_with_biases(prune.param_sparsity, dense, model)})
    return replace(source, model=model), prune


def _to_be_cut(groups: Groups, prune: PruneSettings, replayed: PruningPlan | None) -> Sequence[Group]:
    """The groups that may lose units, but for the hidden dimension, for which biases do not make up."""
    if replayed is not None:
        return [groups.named(name) for name in replayed.kept if groups.named(name).kind != "hidden"]
    named = prune.kinds or (() if prune.budgets else tuple(prune.kind_ratios))
    kinds = named or (*groups.kinds_in_blocks(), *prune.kind_ratios)
    return groups.of_kinds([kind for kind in kinds if kind != "hidden"])
