"""Tasks of a recipe: measured on a checkpoint or on every stage of a run, answers kept until the result is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.checkpoint import Checkpoint
from secateur.config import EvaluationSettings, Recipe
from secateur.errors import EvaluationError
from secateur.evaluation import Prepared, average, prepare, setting, zero_shot
from secateur.pipeline.kept import Kept, beside, key_of
from secateur.pipeline.results import Clock, Results, header, load_model, needs_tokenizer, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HARNESS = "lm_eval"


def prepared_tasks(settings: EvaluationSettings) -> list[Prepared]:
    """The items of the tasks, before a model is loaded.

    Raises:
        SecateurError: a task cannot be run here.
    """
    return prepare(
        settings.tasks,
        Path(settings.task_data) if settings.task_data else None,
        shots=settings.shots,
        allow_code_execution=settings.allow_code_execution,
    )


def add_tasks(
    results: Results,
    source: Checkpoint,
    model: PreTrainedModel,
    settings: EvaluationSettings,
    prepared: Sequence[Prepared],
    clock: Clock,
    kept: Kept,
) -> None:
    """Measure the tasks and file them with their average and protocol."""
    tokenizer = needs_tokenizer(source)
    scores = list(
        zero_shot(
            model,
            tokenizer,
            prepared,
            limit=settings.limit,
            batch_size=settings.batch_size,
            answers=dict(kept.entries),
            on_answer=lambda key, answer: kept.add([key, answer]),
            on_task=clock.begin,
        )
    )
    clock.end()
    results["tasks"] = {score.task: score.to_json() for score in scores}
    if (mean := average(scores)) is not None:
        results["tasks_average"] = mean
    protocol = results["protocol"]
    protocol["tasks"] = setting(tokenizer, settings.limit, settings.batch_size)
    protocol["versions"] = {**protocol["versions"], HARNESS: version(HARNESS)}


def kept_answers(results: Results, model: PreTrainedModel, batch_size: int, file: Path | None, resume: bool) -> Kept:
    """What a model answered before it was interrupted. Answers depend on the model and on how it is run, nothing else.

    Args:
        results: with their header.
        file: for the result.

    Raises:
        EvaluationError: they are another model's.
    """
    facts = {
        "model": results["model"]["sha256"] or results["model"]["source"],
        "commit": getattr(model.config, "_commit_hash", None),
        "adapter": results.get("adapter_sha256"),
        "protocol": {k: v for k, v in results["protocol"].items() if k != "tasks"},
        "batch_size": batch_size,
        "harness": version(HARNESS),
    }
    place = beside(file)
    refusal = EvaluationError(
        f"{place} holds answers of another model or setting, or by other versions; leave out --resume to begin anew, "
        "or choose another --json"
    )
    return Kept(place, key_of(facts), resume, refusal)


Adapt = Callable[[Checkpoint], "PreTrainedModel"]
Stage = Callable[[], tuple[Checkpoint, "PreTrainedModel"]]


def tasks_of_stages(
    results: Results, recipe: Recipe, prepared: Sequence[Prepared], folder: Path, stages: Mapping[str, Stage]
) -> None:
    """Measure the tasks on every stage of a run, and file the scores by task and stage.

    The scores of a stage lie in `<folder>/<stage>.json`, its answers beside that until they are complete; both are
    taken up again when the run is resumed.

    Args:
        stages: name -> loads the model.
    """
    folder.mkdir(exist_ok=True)
    results["tasks"], results["tasks_average"] = {}, {}
    for name, load in stages.items():
        file = folder / f"{name}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else _stage(recipe, prepared, load, file)
        for task, score in found["tasks"].items():
            results["tasks"].setdefault(task, {})[name] = score
        if "tasks_average" in found:
            results["tasks_average"][name] = found["tasks_average"]
    results["protocol"]["tasks"] = found["protocol"]["tasks"]
    results["protocol"]["versions"] = {**results["protocol"]["versions"], HARNESS: version(HARNESS)}


def _stage(recipe: Recipe, prepared: Sequence[Prepared], load: Stage, file: Path) -> Results:
    """The scores of one stage."""
    source, model = load()
    found = header("eval", source, recipe)
    kept = kept_answers(found, model, recipe.evaluation.batch_size, file, True)
    add_tasks(found, source, model, recipe.evaluation, prepared, Clock(), kept)
    write_json(file, found)
    kept.forget()
    return found


def stage(recipe: Recipe, source: Path | None = None, adapt: Adapt | None = None) -> Stage:
    """How to load a stage: the recipe's model, or a folder that the run made; `adapt` puts an adapter on it."""

    def load() -> tuple[Checkpoint, PreTrainedModel]:
        found = load_model(recipe, source)
        return found, adapt(found) if adapt is not None else found.model

    return load
