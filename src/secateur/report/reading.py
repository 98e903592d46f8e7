"""Runs as a report sees them: read from run folders and --json files, each with the steps that led to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secateur.checkpoint.account import PROTOCOL, STAGES
from secateur.errors import ReportError
from secateur.report.schema import Importance, Results, Samples, Share, Text, Training, Width

SCHEMA = 1
RESULTS = "results.json"
WANTED = (
    f"expected a run folder with a {RESULTS}, or a file that --json wrote, of schema {SCHEMA} "
    "(secateur run, prune, recover, tune, eval, bench, analyze or export)"
)


@dataclass(frozen=True)
class Run:
    """One results file.

    Attributes:
        name: short and unique among the runs read together.
        place: the folder or file it was read from.
        results: of the last step.
    """

    name: str
    place: Path
    results: Results

    @cached_property
    def steps(self) -> list[Results]:
        """The steps that led to the model, those before this one included, the first one first."""
        found, step = [self.results], self.results.before
        while step is not None:
            found.insert(0, step)
            step = step.before
        return found

    @property
    def cuts(self) -> list[Results]:
        """The steps that removed parameters."""
        return [step for step in self.steps if "sparsity" in step.params]

    @property
    def since_cut(self) -> list[Results]:
        """The last cut and what came after it: what the figures of dense, pruned and recovered models are of."""
        last = next((n for n in reversed(range(len(self.steps))) if "sparsity" in self.steps[n].params), 0)
        return self.steps[last:]

    @property
    def method(self) -> str:
        """The method's name; the command's for what has none."""
        for step in reversed(self.since_cut):
            if found := step.method or step.protocol.method:
                return found
            if step.plan is not None:
                return "a given plan"
        return self.results.command

    @property
    def sparsity(self) -> float | None:
        """Share of the parameters that the last cut removed."""
        return self.cuts[-1].params["sparsity"] if self.cuts else None

    @property
    def adapter(self) -> tuple[int, int] | None:
        """Parameters of an adapter before and after it was made smaller; None if the run did no such thing."""
        params = self.results.params
        return (int(params["initial"]), int(params["final"])) if {"initial", "final"} <= set(params) else None

    @property
    def share(self) -> float | None:
        """Share of parameters removed, of the model or else of the adapter."""
        if self.sparsity is None and self.adapter:
            return 1 - self.adapter[1] / self.adapter[0]
        return self.sparsity

    @cached_property
    def texts(self) -> dict[str, Text]:
        """Perplexities since the last cut by name of the text, the stages of all steps side by side.

        Figures of a text that was measured in another way later are kept apart under `name (2)`.
        """
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for step in self.since_cut:
            for name, facts in step.perplexity.items():
                row = rows.setdefault((name, *(getattr(facts, key) for key in PROTOCOL)), facts.model_dump())
                row |= {stage: facts.at(stage) for stage in (*STAGES, "value") if facts.at(stage) is not None}
        found: dict[str, Text] = {}
        for (name, *_), row in rows.items():
            number = sum(other == name or other.startswith(f"{name} (") for other in found)
            found[f"{name} ({number + 1})" if number else name] = Text.model_validate(row)
        return found

    @property
    def stages(self) -> list[str]:
        """The stages of which something was measured, in their order."""
        seen = {stage for text in self.texts.values() for stage in STAGES if text.at(stage) is not None}
        for step in self.since_cut:
            seen |= {stage for stage in ("dense", "pruned") if stage in step.params or stage in step.macs}
            seen |= set(step.samples.continuations) if step.samples else set()
            seen |= {stage for scores in step.tasks.values() if "metric" not in scores for stage in scores}
        return [stage for stage in STAGES if stage in seen]

    @property
    def last_stage(self) -> str | None:
        """What the run ended with; None if nothing was made."""
        made = [stage for stage in self.stages if stage != "dense"]
        return made[-1] if made else None

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates by stage, and the `prompt_length` they are of."""
        return {name: count for step in self.since_cut for name, count in step.macs.items()}

    @property
    def samples(self) -> Samples | None:
        """Continuations of all stages, of the prompts that the last step was given."""
        told = [step.samples for step in self.since_cut if step.samples is not None]
        if not told:
            return None
        same = [s for s in told if (s.prompts, s.new_tokens) == (told[-1].prompts, told[-1].new_tokens)]
        made = {stage: texts for s in same for stage, texts in s.continuations.items()}
        return told[-1].model_copy(update={"continuations": {s: made[s] for s in STAGES if s in made}})

    @property
    def widths(self) -> Sequence[Width]:
        return next((step.widths for step in reversed(self.steps) if step.widths), ())

    @property
    def importance(self) -> Sequence[Importance]:
        return next((step.importance for step in reversed(self.steps) if step.importance), ())

    @property
    def kinds(self) -> Mapping[str, Share]:
        return next((step.kinds for step in reversed(self.steps) if step.kinds), {})

    @property
    def trainings(self) -> dict[str, Training]:
        """The trainings since the last cut: while it was cut, and recovery."""
        found: dict[str, Training] = {}
        for step in self.since_cut:
            found |= {name: run for name in ("training", "recovery") if (run := getattr(step, name)) is not None}
        return found


def read_runs(places: Sequence[Path]) -> list[Run]:
    """Read results, one run for each run folder and file; a folder of run folders gives all of these.

    Raises:
        ReportError: there is nothing to read, or it does not follow the schema.
    """
    files = [file for place in places for file in _files(place)]
    if not files:
        raise ReportError(f"nothing to read: {WANTED}")
    seen: dict[Path, Path] = {}
    for file in files:
        if file.resolve() in seen:
            raise ReportError(f"{file} is given twice; name every run once")
        seen[file.resolve()] = file
    names = _names([file.parent if file.name == RESULTS else file for file in files])
    return [
        Run(name, file.parent if file.name == RESULTS else file, _read(file))
        for name, file in zip(names, files, strict=True)
    ]


def _files(place: Path) -> list[Path]:
    """The results files that a place stands for.

    Raises:
        ReportError: it has none.
    """
    if not place.exists():
        raise ReportError(f"{place} does not exist; {WANTED}")
    if place.is_file():
        return [place]
    if (place / RESULTS).is_file():
        return [place / RESULTS]
    inside = sorted(place.glob(f"*/{RESULTS}"))
    if not inside:
        raise ReportError(f"{place} has no {RESULTS}, and no folder in it has one; {WANTED}")
    return inside


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [place.resolve().with_suffix("").parts if place.is_file() else place.resolve().parts for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [place.name for place in places]  # a file and a folder of the same name


def _read(file: Path) -> Results:
    """A results file.

    Raises:
        ReportError: it cannot be read, or is none.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{file} cannot be read: {error}; {WANTED}") from error
    except ValueError as error:
        raise ReportError(f"{file} is no JSON, or cut short ({error}); {WANTED}") from error
    if not isinstance(data, dict) or "schema" not in data or "command" not in data:
        raise ReportError(f"{file} is no results file: it lacks `schema` and `command`; {WANTED}")
    if data["schema"] != SCHEMA:
        raise ReportError(f"{file} has results schema {data['schema']!r}; expected {SCHEMA}, which this version reads")
    try:
        return Results.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ReportError(f"{file}: {where}: {first['msg']} (it is {_short(first['input'])}); {WANTED}") from error


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
