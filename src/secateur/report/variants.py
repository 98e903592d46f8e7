"""What tells runs of one method apart: the settings in which their recipes differ, seeds and budgets aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.report.reading import Run

SECTIONS = ("method", "prune", "recovery", "tune")
ASIDE = (  # shown in columns of their own, or without influence on the result
    "prune.param_sparsity", "prune.unit_sparsity", "tune.target_rank", "recovery.report_to", "tune.report_to",
    "recovery.save_every", "tune.save_every",
)  # fmt: skip


def variants(runs: Sequence[Run]) -> dict[str, str]:
    """Name of each run -> its method, and the settings in which runs of this method differ.

    `llm-pruner, ranking=global`, or `llm-pruner` where nothing differs. A run whose results hold no recipe has the
    method alone.
    """
    settings = [_settings(run) for run in runs]
    found = {}
    for run, mine in zip(runs, settings, strict=True):
        others = [s for r, s in zip(runs, settings, strict=True) if r.method == run.method and s]
        differ = [key for key in mine if len({repr(s.get(key)) for s in others}) > 1]
        leaves = [key.rpartition(".")[2] for key in differ]
        told = [
            f"{leaf if leaves.count(leaf) == 1 else key}={_told(mine[key])}"
            for key, leaf in zip(differ, leaves, strict=True)
        ]
        found[run.name] = ", ".join([run.method, *told])
    return found


def _settings(run: Run) -> dict[str, Any]:
    """Dotted names of all settings -> values, of the steps that led to the model; the last one's where two have it."""
    found: dict[str, Any] = {}
    for step in run.steps:
        for section in SECTIONS:
            found |= _flat(section, (step.recipe or {}).get(section))
    return {k: v for k, v in found.items() if k not in ASIDE and not k.endswith("seed")}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _flat(f"{name}.{key}", inner).items()}
    return {} if value is None else {name: value}


def _told(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
