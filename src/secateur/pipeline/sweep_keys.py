"""What tells the runs of a sweep apart: a hash of everything that is known to decide their results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secateur.checkpoint import checkpoint_sha256, local_folder
from secateur.config import Combination, Recipe
from secateur.data import file_sha256
from secateur.errors import KnowledgeError
from secateur.evaluation.tasks import local_files, task_named
from secateur.pipeline.kept import key_of

SHOWN, HASHED = 60, 10  # characters of a run's name: of its settings at most, and of its hash


def keys_of(combinations: Sequence[Combination]) -> list[str]:
    """A hash for each run, over its recipe, the model's weights, texts, items of tasks, and the version of Secateur.

    What lies on the hub goes in by name; local models and files by their bytes, each read once.

    Raises:
        DataError: a text, or a file of a task, is not there.
        KnowledgeError: a knowledge file is not there.
    """
    model, text, knowledge = cache(_model), cache(file_sha256), cache(_knowledge)

    def facts(recipe: Recipe) -> Mapping[str, Any]:
        return {
            "recipe": recipe.model_dump(mode="json"),
            "model": model(recipe.model.source),
            "texts": {name: text(name) for name in texts_of(recipe)},
            "tasks": [text(str(file)) for file in _task_files(recipe)],
            "knowledge": knowledge(recipe.prune.knowledge),
            "secateur": version("secateur"),
        }

    return [key_of(facts(combination.recipe)) for combination in combinations]


def texts_of(recipe: Recipe) -> list[str]:
    """The texts that a recipe reads, by name."""
    scores = recipe.tune is None and not recipe.method.trains
    calibration = [recipe.prune.calibration.source] if scores else []
    return [*calibration, *(recipe.recovery.data if recipe.recovery else ()), *recipe.evaluation.texts]


def _task_files(recipe: Recipe) -> list[Path]:
    """The local files of the tasks that a recipe evaluates."""
    evaluation = recipe.evaluation
    if evaluation.task_data is None:
        return []
    folder = Path(evaluation.task_data)
    return [file for name in evaluation.tasks for file in local_files(task_named(name), folder)]


def name_of(combination: Combination, key: str) -> str:
    """The name of a run's folder: its settings as far as they fit, and the beginning of its hash."""
    parts = [f"{name.rpartition('.')[2]}-{_short(value)}" for name, value in combination.settings.items()]
    readable = re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts))[:SHOWN].strip("-_.")
    return f"{readable}-{key[:HASHED]}"


def _short(value: Any) -> str:
    """A value in a file's name; of a section what it is called, if anything."""
    if isinstance(value, Mapping):
        return str(value.get("name", "-".join(f"{k}-{v}" for k, v in value.items())))
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _model(source: str) -> str | None:
    folder = local_folder(source)
    return None if folder is None else checkpoint_sha256(folder)


def _knowledge(file: str | None) -> str | None:
    if file is None:
        return None
    if not Path(file).is_file():
        raise KnowledgeError(f"{file}: no such file (prune.knowledge); `secateur analyze` writes one")
    return file_sha256(file)
