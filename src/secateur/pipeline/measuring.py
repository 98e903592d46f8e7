"""What a checkpoint is worth: perplexity, accuracy on tasks, size and speed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.benchmark import bench
from secateur.checkpoint import Checkpoint
from secateur.config import Recipe
from secateur.errors import CheckpointError, EvaluationError
from secateur.pipeline.kept import check_output, key_of
from secateur.pipeline.results import Clock, Results, header, load_model, measured, peak_memory, write_json
from secateur.pipeline.tasks import add_tasks, kept_answers, prepared_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(
    recipe: Recipe, *, adapter: Path | None = None, json_file: Path | None = None, resume: bool = False
) -> Results:
    """Perplexity of the recipe's model on every text and length, and its scores on every task.

    While tasks run, every answer is appended to `<json_file>.work`, which goes when the result is written; `resume`
    asks the model only what has no answer there. A result that is complete is taken as it is.

    Args:
        adapter: a PEFT folder to put on top of the model.
        json_file: file for the result.

    Raises:
        SecateurError: for anything wrong with the input; nothing is written then.
    """
    check_output(json_file, resume, EvaluationError)
    prepared = prepared_tasks(recipe.evaluation)
    clock = Clock()
    clock.begin("load")
    source = load_model(recipe)
    results = header("eval", source, recipe)
    model = source.model
    if adapter is not None:
        model = with_adapter(source, adapter)
        results |= {"adapter": str(adapter), "adapter_sha256": adapter_sha256(adapter)}
    settings = recipe.evaluation.model_dump(mode="json")
    results["key"] = key_of({**results, "evaluation": settings, "data": [item.data for item in prepared]})
    if resume and json_file is not None and json_file.exists() and (done := _complete(json_file, results["key"])):
        return done
    kept = kept_answers(results, model, recipe.evaluation.batch_size, json_file, resume) if prepared else None
    if recipe.evaluation.texts:
        clock.begin("perplexity")
    results["perplexity"] = {name: p.to_json() for name, p in measured(source, model, recipe.evaluation)}
    if kept is not None:
        add_tasks(results, source, model, recipe.evaluation, prepared, clock, kept)
    clock.end()
    results["timing"], results["memory"] = clock.seconds, peak_memory()
    if json_file is not None:
        write_json(json_file, results)
    if kept is not None:
        kept.forget()
    return results


def with_adapter(source: Checkpoint, adapter: Path) -> PreTrainedModel:
    """The model with a PEFT adapter merged into it.

    Raises:
        CheckpointError: the adapter does not load on this model.
    """
    from peft import PeftModel

    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(source.model, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"cannot put the adapter {adapter} on {source.source}: {error}") from error
    return merged


def adapter_sha256(folder: Path) -> str:
    """Hash of the configuration and the weights of an adapter."""
    digest = hashlib.sha256()
    for file in [folder / "adapter_config.json", *sorted(folder.glob("adapter_model.*"))]:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _complete(file: Path, key: str) -> Results | None:
    """The result that a file holds, if it is the one asked for."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("key") == key else None


def benchmark(recipe: Recipe, against: str | None, settings: Mapping[str, Any]) -> Results:
    """Parameters, MACs, memory and speed of one checkpoint, against a second one in the same process if given."""
    source = load_model(recipe)
    other = load_model(recipe, against).model if against else None
    results = header("bench", source, recipe)
    results["benchmark"] = bench(source.model, against=other, **settings).to_json()
    results["memory"] = peak_memory()
    return results
