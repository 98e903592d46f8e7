"""What a checkpoint is worth: perplexity, size and speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.benchmark import bench
from secateur.checkpoint import Checkpoint
from secateur.config import Recipe
from secateur.errors import CheckpointError
from secateur.pipeline.results import Results, header, load_model, measured, peak_memory


def evaluate(source: Checkpoint, recipe: Recipe, *, adapter: Path | None = None) -> Results:
    """Perplexity of one checkpoint, with a PEFT adapter on top if given, on every text and length of the recipe.

    Raises:
        CheckpointError: the adapter does not load on this model.
    """
    results = header("eval", source, recipe)
    model = source.model
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"cannot put the adapter {adapter} on {source.source}: {error}") from error
        results["adapter"] = str(adapter)
    results["perplexity"] = {name: p.to_json() for name, p in measured(source, model, recipe.evaluation)}
    results["memory"] = peak_memory()
    return results


def benchmark(recipe: Recipe, against: str | None, settings: Mapping[str, Any]) -> Results:
    """Parameters, MACs, memory and speed of one checkpoint, against a second one in the same process if given."""
    source = load_model(recipe)
    other = load_model(recipe, against).model if against else None
    results = header("bench", source, recipe)
    results["benchmark"] = bench(source.model, against=other, **settings).to_json()
    results["memory"] = peak_memory()
    return results
