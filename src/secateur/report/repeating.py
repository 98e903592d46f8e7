"""What a reader needs to repeat a run: command, recipe, hashes of models and texts, versions, time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from secateur.report.reading import Run

BY_RECIPE = ("run", "prune", "tune")  # commands that a recipe repeats as a whole
UNKNOWN = "not known"


@dataclass(frozen=True)
class Repeat:
    """How to do it again.

    Attributes:
        command: to type; None if the results do not hold the settings.
        note: what to know about the command.
        recipe: YAML; empty if the results hold none.
        inputs: what goes in (part, source, sha256).
        facts: name -> value: seed, dtype, device, versions, seconds, memory.
    """

    command: str | None
    note: str
    recipe: str
    inputs: list[tuple[str, str, str]]
    facts: dict[str, str]


def repeating(run: Run) -> Repeat:
    """What the results of a run say about how to repeat it."""
    results = run.results
    recipe = yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True) if results.recipe else ""
    command, note = None, "The results do not hold the recipe; they were written by an older version or by hand."
    if results.plan is not None:
        command = f"secateur prune {results.model.source} -o again --plan plan.json"
        note = "The units are those of a plan that was given: plan.json lies beside the checkpoint."
    elif recipe and results.command in BY_RECIPE:
        command, note = "secateur run recipe.yaml -o again", "Save the recipe below as recipe.yaml."
    elif recipe:
        note = f"The settings of `secateur {results.command}`, as a recipe; the steps before it are told above."
    elif results.command in ("eval", "bench", "analyze", "export"):
        note = f"Made by `secateur {results.command}`; its settings are in the results file."
    return Repeat(command, note, recipe, list(dict.fromkeys(_inputs(run))), _facts(run))


def _inputs(run: Run) -> Iterator[tuple[str, str, str]]:
    """Everything that was read, by its hash."""
    first = run.steps[0].model
    yield "model", first.source, first.sha256 or "a name on the hub"
    for step in run.since_cut:
        if found := step.protocol.calibration:
            much = f", {found.samples} x {found.seq_len} tokens" if found.samples else ""
            yield "calibration", f"{found.source}{much}", found.sha256 or UNKNOWN
    for name, training in run.trainings.items():
        for data in training.data:
            yield f"{name} data", data.source, data.sha256 or UNKNOWN
    for name, text in run.texts.items():
        yield "evaluation", name, text.text_sha256


def _facts(run: Run) -> dict[str, str]:
    p, results = run.results.protocol, run.results
    facts = {"seed": p.seed, "dtype": p.dtype, "device": p.device, **p.versions}
    told = {name: str(value) for name, value in facts.items() if value is not None}
    if results.timing:
        told["seconds"] = ", ".join(f"{name.removesuffix('_s')} {spent:,.1f}" for name, spent in results.timing.items())
    for name, peak in results.memory.items():
        if peak is not None:
            told[name.removesuffix("_bytes").replace("_", " ")] = f"{peak / 2**20:,.0f} MiB"
    return told
