"""What tasks came to: metrics with standard errors, and the average that papers print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.evaluation.tasks import SEVEN, TASKS


@dataclass(frozen=True)
class TaskScore:
    """The result of one task, and everything it depends on but the model.

    Attributes:
        task: its name.
        metrics: all that lm-eval gives, by its names.
        errors: standard errors by the same names; None where lm-eval gives none.
        items: how many were evaluated.
        of: how many there are.
        truncated: items whose prompt had to lose its beginning, as it is longer than the model's positions.
        shots: examples in front of each item.
        version: of lm-eval's definition.
        split: evaluated.
        data: where the items are from: `source` and `sha256`.
        seconds: the task took, those of earlier runs not counted.
        notes: what else was different from lm-eval's definition, by name.
        samples: every item as lm-eval logs it (with `log_samples`); not in the JSON.
    """

    task: str
    metrics: Mapping[str, float]
    errors: Mapping[str, float | None]
    items: int
    of: int
    truncated: int
    shots: int
    version: str
    split: str
    data: Mapping[str, Any]
    seconds: float
    notes: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = field(default=(), repr=False, compare=False)

    @property
    def metric(self) -> str:
        """The name of the metric that stands for the task."""
        return TASKS[self.task].metric

    @property
    def value(self) -> float:
        """Of that metric."""
        return self.metrics[self.metric]

    @property
    def stderr(self) -> float | None:
        """Of that metric."""
        return self.errors.get(self.metric)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.metrics,
            **{f"{name}_stderr": error for name, error in self.errors.items()},
            "metric": self.metric,
            "value": self.value,
            "stderr": self.stderr,
            "n": self.items,
            "of": self.of,
            "truncated": self.truncated,
            "shots": self.shots,
            "version": self.version,
            "split": self.split,
            "data": dict(self.data),
            "seconds": self.seconds,
            **({"notes": dict(self.notes)} if self.notes else {}),
        }


def average(scores: Iterable[TaskScore]) -> dict[str, Any] | None:
    """The mean over those of LLM-Pruner's seven tasks that are there, with the metric it takes of each.

    The standard error is that of a mean of independent figures. None if there are fewer than two.
    """
    names = {task.name for task in SEVEN}
    taken = [score for score in scores if score.task in names]
    if len(taken) < 2:
        return None
    errors = [score.stderr for score in taken]
    known = [error for error in errors if error is not None]
    error = math.sqrt(sum(e**2 for e in known)) / len(taken) if len(known) == len(taken) else None
    return {
        "value": sum(score.value for score in taken) / len(taken),
        "stderr": error,
        "tasks": len(taken),
        "metrics": {score.task: score.metric for score in taken},
    }


def figures(found: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float | None]]:
    """Figures by name, and standard errors by the same names; the filter is part of a name if there are several."""
    metrics: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    for key, value in found.items():
        name, comma, chosen = key.partition(",")
        if not comma:
            continue
        bare = name.removesuffix("_stderr")
        kept = bare if chosen in ("none", "create_test") else f"{bare},{chosen}"
        if bare == name:
            metrics[kept] = float(value)
        else:
            errors[kept] = None if isinstance(value, str) else float(value)
    return metrics, errors
