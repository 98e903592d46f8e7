"""Adapters trained on a recipe's data with a callback that prunes meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint import Checkpoint
from secateur.config import Recipe
from secateur.data import Corpus, load_corpus
from secateur.pipeline.dense import dense_of
from secateur.pipeline.recovering import recovery_settings
from secateur.pipeline.results import Clock, Results, needs_tokenizer, values
from secateur.recovery import last_checkpoint, mix_record, train, with_adapters

if TYPE_CHECKING:
    from peft import PeftModel


def training_corpora(recipe: Recipe) -> list[Corpus]:
    """What a recipe trains on, read before anything is measured.

    Raises:
        DataError: it cannot be read.
    """
    assert recipe.recovery is not None
    return [load_corpus(name, field=recipe.recovery.field) for name in recipe.recovery.data]


def train_adapters(
    source: Checkpoint,
    recipe: Recipe,
    corpora: Sequence[Corpus],
    pruning: Any,
    work: Path,
    resume: bool,
    clock: Clock,
    results: Results,
) -> PeftModel:
    """Train fresh adapters in the model itself; settings, data and log go into the results, under `training`.

    Args:
        corpora: what to train on.
        pruning: callback of the Trainer with `prepare(model, checkpoint)`, which refuses what cannot be pruned.
        work: folder of the training checkpoints.
        resume: go on from the last checkpoint in it.
    """
    assert recipe.recovery is not None
    settings = replace(recovery_settings(recipe.recovery, recipe.seed), patience=0)  # it must reach its end
    dense = dense_of(recipe, source) if recipe.recovery.dense else None
    clock.begin("discover")
    adapted = with_adapters(source.model, settings, experts=False)
    initial = adapted.num_parameters(only_trainable=True)
    pruning.prepare(adapted, last_checkpoint(work) if resume else None)
    clock.begin("train")
    log, _ = train(
        adapted,
        needs_tokenizer(source),
        corpora,
        settings,
        work,
        callbacks=[pruning],
        evaluate=lambda model: values(source, model, recipe.evaluation),
        dense=dense.load if dense else lambda: source.model,  # whose adapters do nothing yet
        resume=resume,
    )
    results["training"] = {
        "initial_parameters": initial,
        "settings": asdict(settings),
        "data": [{"source": c.source, "sha256": c.sha256} for c in corpora],
        "log": [entry for entry in log if "mix" not in entry],
        **({"mix": mix} if (mix := mix_record(log, settings)) else {}),
    }
    return adapted
