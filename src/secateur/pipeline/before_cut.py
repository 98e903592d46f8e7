"""A part of the steps of recovery taken before the cut, so that what goes is chosen for the data that comes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from secateur.checkpoint import Checkpoint
from secateur.config import Recipe
from secateur.pipeline.results import Clock, Results, add_stage, needs_tokenizer

SEED = 1000  # added to the recipe's, so that training goes on with other examples


def adapt(source: Checkpoint, recipe: Recipe, results: Results, work: Path, resume: bool, clock: Clock) -> Checkpoint:
    """The checkpoint with its model trained for `prune.adapt` of the recovery's steps, on all its data pooled.

    The model itself is trained, in the way of the recovery but from the text alone. Perplexities are filed as the stage
    `adapted`, and the training under `adapted`.

    Args:
        work: folder for training checkpoints.
        resume: go on from the last one of them.

    Raises:
        SecateurError: as for recovery.
    """
    if recipe.recovery is None:
        return source
    clock.end()  # imports are no part of what was measured before
    from secateur.pipeline.training_settings import recovery_settings, training_corpora  # peft takes seconds
    from secateur.recovery import recover
    from secateur.recovery.also_trained import also_trained
    from secateur.recovery.training_data import training_data

    also_trained(source.model, recipe.recovery.also_train)  # what cannot train is told before the cut, not after it
    if not recipe.prune.adapt:
        return source
    corpora, tokenizer = training_corpora(recipe), needs_tokenizer(source)
    wanted = recovery_settings(recipe.recovery, recipe.seed, source.model)
    whole = training_data(corpora, tokenizer, wanted)
    steps = round(recipe.prune.adapt * whole.steps)
    if not steps:
        return source
    settings = replace(
        wanted, steps=steps, mix="proportional", distill=None, eval_every=None, report_to=(), seed=wanted.seed + SEED
    )
    pooled = training_data(corpora, tokenizer, settings) if whole.sources else replace(whole, steps=steps)
    clock.begin("adapt")
    outcome = recover(source.model, tokenizer, pooled, settings, work, resume=resume, in_place=True)
    adapted = replace(source, model=outcome.model)
    clock.begin("evaluate_adapted")
    add_stage(results, "adapted", source, adapted.model, recipe.evaluation)
    results["protocol"]["adapted_steps"] = steps
    results["adapted"] = {
        "steps": steps,
        "settings": asdict(settings),
        "data": [{"source": c.source, "sha256": c.sha256} for c in corpora],
        "log": outcome.log,
    }
    return adapted


def adapted_steps(results: Results) -> int:
    """How many steps a cut model was trained for before the cut, by the results of the cut."""
    steps: int = results.get("adapted", {}).get("steps", 0)
    return steps
