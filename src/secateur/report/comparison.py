"""Several runs side by side: one table over methods, ratios and seeds, and one set of curves, from results only."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.report.facts import NOT_MEASURED, saved_macs
from secateur.report.figures import Picture, legend, new_figure, plain_log, styles
from secateur.report.reading import Run
from secateur.report.schema import Text
from secateur.report.svg import styled
from secateur.report.variants import variants

Measured = tuple[Any, ...]  # what a perplexity was measured on and how


@dataclass(frozen=True)
class Line:
    """One run in the table.

    Attributes:
        run: its name.
        model: what it began with.
        method: its name, and the settings in which its runs differ (`variants`).
        sparsity: share of all parameters removed; of an adapter's, where the run made one smaller; None if none were.
        of_adapter: whether it was an adapter that was made smaller.
        seed: of the run.
        parameters: of what is left, model or adapter; None if none was cut.
        perplexity: text -> stage -> perplexity.
        tasks: task -> its metric, and its value at the last stage.
        tasks_average: of the last stage.
        prefill_speedup, decode_speedup: tokens per second over the dense model's, timed in turn with it.
        macs: what a prompt takes less, in words; empty if not counted.
        last_stage: what the run ended with.
    """

    run: str
    model: str
    method: str
    sparsity: float | None
    of_adapter: bool
    seed: int | None
    parameters: int | None
    perplexity: dict[str, dict[str, float]]
    tasks: dict[str, tuple[str, float]]
    tasks_average: float | None
    prefill_speedup: float | None
    decode_speedup: float | None
    macs: str
    last_stage: str | None


@dataclass(frozen=True)
class Mean:
    """Runs that differ in their seed only.

    Attributes:
        method, sparsity: that they share; the method with the settings in which its runs differ.
        text: measured on.
        stage: that they ended with.
        seeds: of the runs.
        mean, deviation: of the perplexities; sample standard deviation.
    """

    method: str
    sparsity: float
    text: str
    stage: str
    seeds: tuple[int | None, ...]
    mean: float
    deviation: float


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        lines: one for each run, in the order given.
        means: over seeds, where there are several.
        warnings: what keeps figures of different runs from being compared.
    """

    lines: tuple[Line, ...]
    means: tuple[Mean, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"schema": 1, "command": "compare", **asdict(self)}


def compare(runs: Sequence[Run]) -> Comparison:
    """Set runs side by side; a knowledge distribution is no run of a method, and left out."""
    methods = [run for run in runs if run.results.knowledge is None]
    named = variants(methods)
    return Comparison(
        tuple(_line(run, named[run.name]) for run in methods), tuple(_means(methods)), tuple(_warnings(methods))
    )


def _line(run: Run, variant: str) -> Line:
    results, stages = run.results, (*run.stages, "value")
    timed = results.benchmark.ratios if results.benchmark else None
    average = results.tasks_average.get(run.last_stage or "", results.tasks_average)
    scores = {task: found.get(run.last_stage or "", found) for task, found in results.tasks.items()}
    return Line(
        run=run.name,
        model=run.steps[0].model.source,
        method=variant,
        sparsity=run.share,
        of_adapter=run.adapter is not None,
        seed=results.protocol.seed,
        parameters=int(run.cuts[-1].params["pruned"]) if run.cuts else run.adapter[1] if run.adapter else None,
        perplexity={
            name: {stage: value for stage in stages if (value := text.at(stage)) is not None}
            for name, text in run.texts.items()
        },
        tasks={task: (score["metric"], score["value"]) for task, score in scores.items() if "metric" in score},
        tasks_average=average.get("value"),
        prefill_speedup=1 / timed["prefill_s"] if timed else None,
        decode_speedup=1 / timed["decode_s"] if timed else None,
        macs=saved_macs(run),
        last_stage=run.last_stage,
    )


def _measured(text: Text) -> Measured:
    return (text.text, text.text_sha256, text.tokens, text.seq_len, text.stride, text.bos)


def _same(runs: Sequence[Run]) -> dict[str, list[tuple[Run, Text]]]:
    """Name of a text -> the runs that measured it in the way that most of them did."""
    found: dict[str, dict[Measured, list[tuple[Run, Text]]]] = {}
    for run in runs:
        for name, text in run.texts.items():
            found.setdefault(name, {}).setdefault(_measured(text), []).append((run, text))
    return {name: max(ways.values(), key=len) for name, ways in found.items()}


def _warnings(runs: Sequence[Run]) -> Iterator[str]:
    """Differences of protocol between the runs."""
    hashes = {run.steps[0].model.sha256 for run in runs if run.cuts}
    if len(hashes) > 1:
        yield "The runs began with different models (by their hashes): their figures do not compare."
    for name, same in _same(runs).items():
        others = [run.name for run in runs if name in run.texts and run not in [r for r, _ in same]]
        if others:
            yield (
                f"{name} was measured in another way (text, tokens, windows) by {', '.join(others)}: those figures are "
                "left out of the curves."
            )
    for what in ("dtype", "device"):
        values = {value for run in runs if (value := getattr(run.results.protocol, what)) is not None}
        if len(values) > 1:
            yield f"The runs differ in {what}: {', '.join(sorted(values))}."
    for package in ("torch", "transformers", "secateur"):
        seen = {v for run in runs if (v := run.results.protocol.versions.get(package)) is not None}
        if len(seen) > 1:
            yield f"The runs were made with different versions of {package}: {', '.join(sorted(seen))}."


def _means(runs: Sequence[Run]) -> Iterator[Mean]:
    """Means over runs with several seeds, alike in method, settings, ratio (to a tenth of a percent) and protocol."""
    named = variants(runs)
    for name, same in _same(runs).items():
        alike: dict[tuple[str, float, str, str | None], list[tuple[int | None, float]]] = {}
        for run, text in same:
            if run.share is not None and run.last_stage and (value := text.at(run.last_stage)) is not None:
                key = (named[run.name], round(run.share, 3), run.last_stage, run.steps[0].model.sha256)
                alike.setdefault(key, []).append((run.results.protocol.seed, value))
        for (method, sparsity, stage, _), found in alike.items():
            seeds, values = zip(*found, strict=True)
            if len(set(seeds)) > 1:
                yield Mean(method, sparsity, name, stage, seeds, statistics.mean(values), statistics.stdev(values))


def comparison_pictures(runs: Sequence[Run]) -> list[Picture]:
    """For each text the perplexity against the share of parameters removed, a line for each method.

    Adapters that were made smaller have figures of their own: their share is one of the adapter's parameters.
    """
    models, adapters = (
        [r for r in runs if r.sparsity is not None],
        [r for r in runs if r.sparsity is None and r.adapter],
    )
    named = variants(runs)
    with styled():
        return [
            picture
            for alike in (models, adapters)
            for name, same in _same(alike).items()
            for picture in _curves(name, same, named)
        ]


def _curves(name: str, same: Sequence[tuple[Run, Text]], named: Mapping[str, str]) -> Iterator[Picture]:
    """One text. Points of a method with the same settings are joined in order of sparsity, seeds by their mean."""
    points: dict[str, dict[str, dict[float, list[float]]]] = {}
    for run, text in same:
        for stage in (s for s in run.stages if s != "dense" and text.at(s) is not None):
            at = points.setdefault(named[run.name], {}).setdefault(stage, {})
            at.setdefault(round(run.share or 0.0, 3), []).append(text.at(stage) or 0.0)
    if not points:
        return
    of_adapters = same[0][0].sparsity is None  # without any of it there is no adapter, and the dense model is no point
    dense = [] if of_adapters else [text.dense for _, text in same if text.dense is not None]
    figure, (axes,) = new_figure(height=3.0)
    for (method, stages), style in zip(points.items(), styles(list(points)).values(), strict=True):
        for number, (stage, at) in enumerate(reversed(stages.items())):
            line = sorted((100 * share, values) for share, values in at.items())
            if dense:
                line.insert(0, (0.0, [statistics.mean(dense)]))
            shares, means = [s for s, _ in line], [statistics.mean(v) for _, v in line]
            look = style | ({"linestyle": ":", "markerfacecolor": "none"} if number else {})
            axes.plot(shares, means, label=f"{method}, {stage}", **look)
            spread = [[m - min(v) for m, (_, v) in zip(means, line, strict=True)],
                      [max(v) - m for m, (_, v) in zip(means, line, strict=True)]]  # fmt: skip
            axes.errorbar(shares, means, spread, fmt="none", ecolor=style["color"], capsize=3)
    of_what = "of the adapter " if of_adapters else ""
    axes.set(xlabel=f"parameters {of_what}removed [%]", ylabel=f"perplexity on {name}")
    axes.set_xlim(left=-2)
    if max(max(v) for s in points.values() for at in s.values() for v in at.values()) > 10 * min(
        [*dense, float("inf")]
    ):
        plain_log(axes)
    legend(figure, axes, columns=1)
    text = same[0][1]
    told = (
        f"{text.tokens:,} tokens in windows of {text.seq_len:,}. Points are runs, of several seeds their mean with the "
        "least and the most; between the points nothing was measured."
    )
    kind = "adapters-" if of_adapters else ""
    title = f"Perplexity on {name} against {'the size of adapters' if of_adapters else 'sparsity'}"
    yield Picture(f"compared-{kind}{name}", title, told, figure)


def cell(value: float | None, form: str) -> str:
    """A figure, or that there is none."""
    return NOT_MEASURED if value is None else form.format(value)


def comparison_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows, as text: the run, what it removed and how, perplexities by text and stage, tasks and speed.

    Speed is tokens per second divided by the dense model's.
    """
    columns = [
        (name, stage)
        for name in dict.fromkeys(n for line in found.lines for n in line.perplexity)
        for stage in dict.fromkeys(s for line in found.lines for s in line.perplexity.get(name, {}))
    ]
    average = any(line.tasks_average is not None for line in found.lines)
    tasks = list(dict.fromkeys((task, metric) for line in found.lines for task, (metric, _) in line.tasks.items()))
    names = [f"{name} {'' if stage == 'value' else stage}".strip() for name, stage in columns]
    head = [
        "run",
        "method",
        "seed",
        "removed",
        "parameters",
        *names,
        *(f"{task} {metric}" for task, metric in tasks),
        *(["tasks"] if average else []),
        "prefill to dense",
        "decoding to dense",
    ]
    rows = []
    for line in found.lines:
        figures = [cell(line.perplexity.get(name, {}).get(stage), "{:.2f}") for name, stage in columns]
        of_tasks = [(line.tasks.get(task, ("", None)), metric) for task, metric in tasks]
        rows.append(
            [
                line.run,
                line.method,
                cell(line.seed, "{}"),
                _removed(line),
                cell(line.parameters, "{:,}"),
                *figures,
                *(cell(value if metric == of else None, "{:.3f}") for (metric, value), of in of_tasks),
                *([cell(line.tasks_average, "{:.3f}")] if average else []),
                cell(line.prefill_speedup, "{:.2f}"),
                cell(line.decode_speedup, "{:.2f}"),
            ]
        )
    return head, rows


def _removed(line: Line) -> str:
    if line.sparsity is None:
        return "nothing"
    return f"{line.sparsity:.1%}{' of the adapter' if line.of_adapter else ''}"
