"""What is said of a run in words and figures: its headline, and its table of dense, pruned and recovered models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.evaluation.picture import NAMES
from secateur.report.reading import Run
from secateur.report.schema import Benchmark, Text

NOT_MEASURED = "not measured"
COUNTED = {"macs": "MACs of a pass", "memory": "Bytes of weights and cache", "latency": "Seconds of a pass"}
Tone = Literal["good", "bad", "plain", "missing"]


@dataclass(frozen=True)
class Headline:
    """One of the things to know first.

    Attributes:
        question: what it answers.
        figure: the answer, short.
        detail: what it is made of, and how it was measured.
        tone: whether it is a gain, a cost, or was not measured.
    """

    question: str
    figure: str
    detail: str
    tone: Tone


@dataclass(frozen=True)
class Row:
    """A line of the table: one quantity, a cell for each stage, and how it was measured."""

    name: str
    cells: tuple[str, ...]
    how: str


def title(run: Run) -> str:
    """What was done to which model, in a few words."""
    model = Path(run.steps[0].model.source).name
    if run.sparsity is not None:
        done = f"{run.sparsity:.0%} removed by {run.method}"
        return f"{model}: {done}{', then recovered' if run.last_stage == 'recovered' else ''}"
    return f"{model}: {run.results.command}{f' by {run.method}' if run.method != run.results.command else ''}"


def summary(run: Run) -> str:
    """What was done, in a sentence or two: what went of each kind, by which method, and what was trained."""
    went = " and ".join(f"{s.removed:,} of {s.units:,} {kind_name(kind)}" for kind, s in run.kinds.items() if s.removed)
    told = []
    if run.sparsity is not None:
        told.append(f"{went or 'Units'} were removed from {Path(run.cuts[-1].model.source).name} by {run.method}.")
    for name, training in run.trainings.items():
        done = training.settings
        length = f"{done['steps']:,} steps" if done.get("steps") else f"{done.get('epochs')} epochs"
        data = ", ".join(Path(source.source).name for source in training.data)
        what = "Then it was recovered" if name == "recovery" else "Adapters were trained meanwhile"
        what = what if run.cuts or name == "recovery" else "An adapter was trained and pruned"
        how = "all weights" if done.get("full_weights") else f"LoRA of rank {done.get('rank')}"
        how += f", {whole} whole" if (whole := " and ".join(done.get("also_train", ()))) else ""
        how += ", distilled from the dense model" if done.get("distill") else ""
        told.append(f"{what} with {how}: {length} on {data}.")
    return " ".join(told)


def headlines(run: Run) -> list[Headline]:
    """Smaller by, faster by, worse by."""
    return [smaller(run), faster(run), worse(run)]


def smaller(run: Run) -> Headline:
    """How much of the model, or of the adapter, is gone."""
    question = "Smaller by"
    if run.sparsity is not None:
        params = run.cuts[-1].params
        detail = f"{params['dense']:,.0f} → {params['pruned']:,.0f} parameters"
        if (run.cuts[-1].tier or {}).get("chosen") == "padded":
            detail += ", zeros of padding included"
        if len(run.cuts) > 1:
            detail += f"; this is cut {len(run.cuts)}, of a model that had been cut before"
        return Headline(question, f"{run.sparsity:.1%}", detail, "good")
    params = run.results.params
    if {"initial", "final"} <= set(params):
        detail = f"{params['initial']:,.0f} → {params['final']:,.0f} parameters of the adapter; the model stays whole"
        return Headline(question, f"{1 - params['final'] / params['initial']:.1%}", detail, "good")
    return Headline(question, NOT_MEASURED, "this step removed nothing, or its file does not say", "missing")


def faster(run: Run) -> Headline:
    """What was timed; if nothing was, the multiply-accumulates that were counted, under that name."""
    question, macs = "Faster by", saved_macs(run)
    timed = run.results.benchmark
    if timed is None or timed.ratios is None:
        counted = f"; {macs}" if macs else ""
        return Headline(question, NOT_MEASURED, f"speed was not timed in this run{counted}", "missing")
    prefill, decode = (1 / timed.ratios[f"{phase}_s"] - 1 for phase in ("prefill", "decode"))
    sure = told_apart(timed, "prefill_s")
    noise = "" if sure else "This may be noise: the quartiles of the two models overlap. "
    detail = f"tokens per second of prefill; decoding {percent(decode)}. {noise}{timing_protocol(timed)}."
    tone: Tone = ("good" if prefill > 0 else "bad") if sure else "plain"
    return Headline(
        question if prefill > 0 else "Slower by", f"{abs(prefill):.1%}", f"{detail} {macs}." if macs else detail, tone
    )


def told_apart(timed: Benchmark, phase: str) -> bool:
    """Whether the quartiles of the two models' timings do not overlap; `phase` is `prefill_s` or `decode_s`."""
    if timed.against is None:
        return False
    small, dense = getattr(timed.model, phase), getattr(timed.against, phase)
    return bool(small.q3 < dense.q1 or dense.q3 < small.q1)


def saved_macs(run: Run) -> str:
    """How many multiply-accumulates a prompt takes less; empty if they were not counted."""
    macs = run.macs
    if not {"dense", "pruned"} <= set(macs):
        return ""
    share = macs["pruned"] / macs["dense"] - 1
    return f"{percent(share)} multiply-accumulates (MACs) for {macs['prompt_length']} tokens, counted"


def timing_protocol(timed: Benchmark) -> str:
    """What the timings depend on, in one phrase."""
    p = timed.protocol
    return (
        f"Median of {p.get('repetitions')} turns with the dense model, batch {p.get('batch_size')}, "
        f"{p.get('prompt_length')}-token prompts, {p.get('threads')} thread(s) of {p.get('device')}"
    )


def worse(run: Run) -> Headline:
    """By how much perplexity rose on the first text of which both ends were measured."""
    stage = run.last_stage
    for name, text in run.texts.items():
        before, after = text.dense, text.at(stage) if stage else None
        if before is None or after is None or stage is None:
            continue
        change = after / before - 1
        path = [(s, text.at(s)) for s in run.stages if text.at(s) is not None]
        detail = " → ".join(f"{value:.2f} ({s})" for s, value in path)
        others = len(run.texts) - 1
        more = f"; {others} more {'text' if others == 1 else 'texts'} below" if others else ""
        return Headline(
            "Worse by" if change > 0 else "Better by",
            f"{abs(change):.1%}",
            f"perplexity on {name}, {windows(text)}: {detail}{more}",
            "bad" if change > 0 else "good",
        )
    return _worse_at_tasks(run) or Headline(
        "Worse by", NOT_MEASURED, "no text was evaluated on both the dense and the final model", "missing"
    )


def _worse_at_tasks(run: Run) -> Headline | None:
    """How many points the average of tasks fell, or the only task; None if the two ends were not measured."""
    average, tasks = run.results.tasks_average, run.results.tasks
    scores, what = average, "average of tasks"
    if not average and len(tasks) == 1:
        ((task, scores),) = tasks.items()
        what = f"{next(iter(scores.values()))['metric']} of {task}" if run.last_stage in scores else task
    before, after = scores.get("dense"), scores.get(run.last_stage or "")
    if before is None or after is None:
        return None
    change = after["value"] - before["value"]
    path = [(s, scores[s]) for s in run.stages if s in scores]
    detail = " → ".join(f"{_with_error(score['value'], score.get('stderr'))} ({s})" for s, score in path)
    errors = [score.get("stderr") for score in (before, after)]
    sure = None not in errors and abs(change) > 2 * math.hypot(*errors)
    noise = "" if sure else ". This may be noise: it is less than two standard errors"
    tone: Tone = ("good" if change > 0 else "bad") if sure else "plain"
    name = "Better by" if change > 0 else "Worse by"
    return Headline(name, f"{100 * abs(change):.1f} points", f"{what}: {detail}{noise}", tone)


def windows(text: Text) -> str:
    """How a perplexity was measured."""
    moved = f" moved by {text.stride}" if text.stride else ""
    return f"{text.tokens:,} tokens in windows of {text.seq_len:,}{moved}"


def table(run: Run) -> tuple[list[str], list[Row]]:
    """The stages, and a row for each quantity that was measured of any of them."""
    alone = any(t.value is not None for t in run.texts.values()) or any(
        "metric" in t for t in run.results.tasks.values()
    )
    stages = run.stages or (["value"] if alone else [])
    rows = [*_sizes(run, stages), *_perplexities(run, stages), *_tasks(run, stages), *_speeds(run, stages)]
    return ["model" if stage == "value" else stage for stage in stages], rows


def _sizes(run: Run, stages: list[str]) -> list[Row]:
    """Parameters and multiply-accumulates."""
    rows = []
    params = dict(run.cuts[-1].params) if run.cuts else {}
    params |= {name: value for step in run.since_cut for name, value in step.params.items() if name in stages}
    if "recovered" in stages and "pruned" in params:
        params.setdefault("recovered", params["pruned"])  # what LoRA learned is merged into the weights
    if any(stage in params for stage in stages):
        rows.append(_row("Parameters", stages, params, "{:,.0f}", "tied ones once"))
    macs: dict[str, float] = {stage: count for stage, count in run.macs.items() if stage in stages}
    if macs and "recovered" in stages and "pruned" in macs:
        macs["recovered"] = macs["pruned"]
    if macs:
        rows.append(_row("MACs", stages, macs, "{:,.0f}", f"one prompt of {run.macs['prompt_length']} tokens, counted"))
    return rows + _budget(run, stages)


def _budget(run: Run, stages: list[str]) -> list[Row]:
    """What the budget counted, if not parameters."""
    cost = run.cuts[-1].cost if run.cuts else None
    if cost is None:
        return []
    values = {"dense": cost.dense, "pruned": cost.pruned}
    if cost.what != "latency":
        values["recovered"] = cost.pruned  # counted by shapes, which training leaves alone
    form = "{:.4g}" if cost.what == "latency" else "{:,.0f}"
    how = f"what the budget counts, of a pass over {cost.batch} x {cost.length} tokens"
    return [_row(COUNTED[cost.what], stages, values, form, how)]


def _perplexities(run: Run, stages: list[str]) -> list[Row]:
    return [
        _row(
            f"Perplexity, {name}",
            stages,
            {s: value for s in stages if (value := text.at(s)) is not None},
            "{:.3f}",
            f"{windows(text)}; lower is better",
        )
        for name, text in run.texts.items()
    ]


def _tasks(run: Run, stages: list[str]) -> list[Row]:
    """The metric that stands for each task, with its standard error, and their average."""
    rows = []
    for task, scores in run.results.tasks.items():
        by_stage = {"value": scores} if "metric" in scores else scores
        metric = next(iter(by_stage.values()))["metric"]
        cells = {stage: _with_error(score[metric], score.get(f"{metric}_stderr")) for stage, score in by_stage.items()}
        count = next(iter(by_stage.values()))
        how = f"{metric}, {count['n']:,} of {count['of']:,} items, ± one standard error"
        rows.append(Row(task, tuple(cells.get(stage, NOT_MEASURED) for stage in stages), how))
    average = run.results.tasks_average
    by_stage = {"value": average} if "value" in average else average
    if by_stage:
        cells = {stage: _with_error(mean["value"], mean.get("stderr")) for stage, mean in by_stage.items()}
        first = next(iter(by_stage.values()))
        taken = ", ".join(f"{metric} of {task}" for task, metric in first.get("metrics", {}).items())
        how = f"mean of {first['tasks']} tasks{f' ({taken})' if taken else ''}; higher is better"
        rows.append(Row("Average of tasks", tuple(cells.get(stage, NOT_MEASURED) for stage in stages), how))
    return rows


def _speeds(run: Run, stages: list[str]) -> list[Row]:
    """What `secateur bench` timed, of the dense model and of the last one."""
    timed = run.results.benchmark
    if timed is None:
        return []
    of = {run.last_stage or "value": timed.model} | ({"dense": timed.against} if timed.against else {})
    how = timing_protocol(timed)
    rows = [
        _row("Bytes of weights", stages, {s: m.weight_bytes for s, m in of.items()}, "{:,.0f}", "in memory"),
    ]
    for phase, name in (("prefill", "Prefill"), ("decode", "Decoding")):
        cells = {}
        for stage, m in of.items():
            spread, speed = getattr(m, f"{phase}_s"), getattr(m, f"{phase}_tokens_per_s")
            low, high = (speed * spread.median / q for q in (spread.q3, spread.q1))
            cells[stage] = f"{speed:,.0f} ({low:,.0f}–{high:,.0f})"
        told = f"{name}, tokens per second"
        rows.append(Row(told, tuple(cells.get(s, NOT_MEASURED) for s in stages), f"{how}; quartiles in brackets"))
    return rows


def _row(name: str, stages: list[str], values: dict[str, Any], form: str, how: str) -> Row:
    cells = tuple(form.format(values[stage]) if stage in values else NOT_MEASURED for stage in stages)
    return Row(name, cells, how)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def kind_name(kind: str) -> str:
    """What people call a kind of unit."""
    return NAMES.get(kind, kind.replace("_", " ") + "s")


def percent(change: float) -> str:
    """`+12.3 %`, with a real minus sign."""
    return f"{change:+.1%}".replace("-", "−")
