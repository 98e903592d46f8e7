"""Adapters trained on a recipe's data with a callback that prunes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint import Checkpoint
from secateur.config import Recipe
from secateur.data import Corpus
from secateur.pipeline.dense import dense_of
from secateur.pipeline.results import Clock, Results, add_stage, needs_tokenizer, values
from secateur.pipeline.training_settings import recovery_settings
from secateur.recovery import RecoverySettings, TrainingData, last_checkpoint, mix_record, train, with_adapters
from secateur.recovery.training_data import training_data

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Training:
    """A model with fresh adapters and everything else that a run needs; all that can be refused has been.

    Attributes:
        source: the checkpoint whose model the adapters are in.
        adapted: the model with them.
        settings: of the run.
        data: to train on.
        pruning: callback of the Trainer.
        dense: gives the dense model, for a dynamic mix.
        work: folder of the training checkpoints.
        resume: go on from the last checkpoint in it.
    """

    source: Checkpoint
    adapted: PeftModel
    settings: RecoverySettings
    data: TrainingData
    pruning: Any
    dense: Callable[[], PreTrainedModel]
    work: Path
    resume: bool


def prepare_training(
    source: Checkpoint, recipe: Recipe, corpora: Sequence[Corpus], pruning: Any, work: Path, resume: bool, clock: Clock
) -> Training:
    """Put fresh adapters into the model itself, and prepare everything; what is measured comes after.

    Args:
        corpora: what to train on.
        pruning: callback of the Trainer with `prepare(model, checkpoint)` and `check_steps(steps)`, which refuse what
            cannot be pruned.
        work: folder of the training checkpoints.
        resume: go on from the last checkpoint in it.

    Raises:
        SecateurError: for anything wrong with the input.
    """
    assert recipe.recovery is not None
    # It must reach its end.
    settings = replace(recovery_settings(recipe.recovery, recipe.seed, source.model), patience=0)
    dense = dense_of(recipe, source) if recipe.recovery.dense else None
    data = training_data(corpora, needs_tokenizer(source), settings)
    clock.begin("discover")
    adapted = with_adapters(source.model, settings, experts=False)
    pruning.prepare(adapted, last_checkpoint(work) if resume else None)
    pruning.check_steps(data.steps)
    load = dense.load if dense else lambda: source.model  # whose adapters do nothing yet
    return Training(source, adapted, settings, data, pruning, load, work, resume)


def measure_dense(training: Training, recipe: Recipe, results: Results, clock: Clock) -> None:
    """Perplexities of the model as if there were no adapters."""
    clock.begin("evaluate_dense")
    with training.adapted.disable_adapter():
        add_stage(results, "dense", training.source, training.source.model, recipe.evaluation)


def train_adapters(training: Training, recipe: Recipe, results: Results, clock: Clock) -> PeftModel:
    """Train; settings, data and log go into the results, under `training`."""
    source, adapted, settings = training.source, training.adapted, training.settings
    initial = adapted.num_parameters(only_trainable=True)
    clock.begin("train")
    log, _ = train(
        adapted,
        needs_tokenizer(source),
        training.data,
        settings,
        training.work,
        callbacks=[training.pruning],
        evaluate=lambda model: values(source, model, recipe.evaluation),
        dense=training.dense,
        resume=training.resume,
    )
    results["training"] = {
        "initial_parameters": initial,
        "settings": asdict(settings),
        "data": [{"source": c.source, "sha256": c.sha256} for c in training.data.corpora],
        "log": [entry for entry in log if "mix" not in entry],
        **({"mix": mix} if (mix := mix_record(log, settings)) else {}),
    }
    return adapted
