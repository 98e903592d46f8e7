"""The part of docs/results.md on LoRAPrune, from the result files of `benchmarks/loraprune*.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NAMES = {
    "llm-pruner": "LLM-Pruner, then recovery",
    "random": "random units, then recovery",
    "lora": "LoRAPrune",
    "grad": "LoRAPrune, exact gradient",
    "lora-replayed": "LoRAPrune's units cut at once, then recovery",
    "magnitude": "LoRAPrune, magnitude",
}
Data = Mapping[str, Any]


def comparison(found: Iterable[Data]) -> list[str]:
    """Perplexity of every method after the same training, over seeds."""
    lines = [
        "## LoRAPrune beside LLM-Pruner",
        "",
        "`benchmarks/loraprune.py`: every row trains LoRA adapters on the same tokens with the same settings, the",
        "one-shot methods after the cut and LoRAPrune while it prunes; block-wise, uniform widths, local ranking.",
        "Perplexity is the mean over seeds, and the spread its standard deviation; the ratio is to LLM-Pruner, seed by",
        "seed.",
        "",
    ]
    for data in found:
        protocol, dense = data["protocol"], data["dense"]
        training, schedule = protocol["training"], protocol["schedule"]
        lines += [
            f"### {data['model']['name']} ({data['model']['parameters']:,} parameters)",
            "",
            f"Dense: {dense['value']:.3f} on {dense['tokens']:,} tokens of {dense['text']}, windows of "
            f"{dense['seq_len']}. Training: {training['steps']:,} steps of {training['batch_size']} x "
            f"{training['seq_len']} tokens of {training['file']}, rank {training['rank']}, learning rate "
            f"{training['learning_rate']}; masks every {schedule['frequency']} steps, ramp from "
            f"{schedule['warmup']:.0%} to {1 - schedule['cooldown']:.0%} of the run.",
            "",
            "| removed | method | seeds | perplexity | spread | ratio |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
        ]
        rows: Sequence[Data] = data["rows"]
        for sparsity in sorted({r["sparsity"] for r in rows}):
            base = {
                r["seed"]: r["perplexity"] for r in rows if (r["sparsity"], r["method"]) == (sparsity, "llm-pruner")
            }
            for method in (m for m in NAMES if any(r["method"] == m for r in rows)):
                mine = [r for r in rows if (r["sparsity"], r["method"]) == (sparsity, method)]
                lines += [_row(mine, base)] if mine else []
        lines.append("")
    return lines if len(lines) > 6 else []


def _row(rows: Sequence[Data], base: Mapping[int, float]) -> str:
    values = [r["perplexity"] for r in rows]
    spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    ratios = [r["perplexity"] / base[r["seed"]] for r in rows if r["seed"] in base]
    ratio = f"{statistics.mean(ratios):.3f}" if ratios else ""
    reached = statistics.mean(r["reached"] for r in rows)
    name = NAMES[rows[0]["method"]]
    return f"| {reached:.2%} | {name} | {len(rows)} | {statistics.mean(values):.3f} | {spread} | {ratio} |"


def agreement(found: Iterable[Data]) -> list[str]:
    """Rank correlation with the exact gradient's importance."""
    lines = [
        "## How well LoRA's gradients stand in for the exact one",
        "",
        "`benchmarks/loraprune_agreement.py`: Spearman's rank correlation of the units of a group, between the running",
        "average of the importance by LoRA's gradients (or by magnitude alone) and that by the true gradient of W_0,",
        "on the same batches; mean over the groups of a kind, and in brackets the least.",
        "",
        "| model | kind | groups | step | LoRA | magnitude |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for data in found:
        by_place: dict[tuple[Any, ...], dict[str, Data]] = {}
        for r in data["rows"]:
            by_place.setdefault((r["kind"], r["groups"], r["step"]), {})[r["criterion"]] = r
        for (kind, groups, step), r in by_place.items():
            figures = [f"{r[c]['mean']:.3f} ({r[c]['least']:.3f})" for c in ("lora", "magnitude")]
            lines.append(f"| {data['model']['name']} | {kind} | {groups} | {step} | {figures[0]} | {figures[1]} |")
    return [*lines, ""] if len(lines) > 8 else []


def memory(found: Iterable[Data]) -> list[str]:
    """Peak memory with full gradients, and without."""
    lines: list[str] = []
    for data in found:
        protocol, rows = data["protocol"], data["rows"]
        lines += [
            "## What LoRA-guided importance saves in memory",
            "",
            f"`benchmarks/loraprune_memory.py`: a random Llama of {rows[0]['parameters']:,} parameters on "
            f"{protocol['device']}, {protocol['samples']} x {protocol['seq_len']} tokens. `full_gradients` is one "
            "scoring step of LLM-Pruner, the others are training steps of LoRA adapters that score on the way. The "
            "peak counts the weights; embeddings and head are not packed; ratios are to `full_gradients` of the same "
            "dtype with the same activations, in the same run.",
            "",
            "| dtype | activations | way | weights | peak | ratio of peaks | seconds |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for r in rows:
            how = f"| {r['dtype']} | {'recomputed' if r['recompute'] else 'held'} | {r['way']} |"
            if "failed" in r:
                lines.append(f"{how} | | | {r['failed']} |")
                continue
            sizes = [f"{r[name] / 2**20:,.0f} MiB" for name in ("weights_bytes", "peak_bytes")]
            ratio = f"{r['peak_ratio']:.2f}" if "peak_ratio" in r else ""  # none where `full_gradients` did not fit
            lines.append(f"{how} {sizes[0]} | {sizes[1]} | {ratio} | {r['seconds']:.2f} |")
        lines.append("")
    return lines


def compaction(found: Iterable[Data]) -> list[str]:
    """Training with compaction beside training with masks alone."""
    lines: list[str] = []
    for data in found:
        p, median = data["protocol"], data["median"]
        lines += [
            "## Compaction while training",
            "",
            f"`benchmarks/loraprune_compaction.py`: a random Llama of {p['parameters']:,} parameters, {p['steps']} "
            f"steps of {p['batch_size']} x {p['seq_len']} tokens to {p['sparsity']:.0%} fewer parameters, "
            f"{p['threads']} thread(s), {len(data['rows'])} rounds, masks alone and compaction in turn. Ratios are "
            f"compaction to masks alone; median: training {median['train_seconds_ratio']:.2f}, a step at the final "
            f"sparsity "
            f"{median['final_step_seconds_ratio']:.2f}, the optimizer's moments {median['moment_bytes_ratio']:.2f}.",
            "",
            "| round | masks alone | compaction | ratio | step at the end | largest difference of losses |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for number, r in enumerate(data["rows"], 1):
            lines.append(
                f"| {number} | {r['masked']['train_seconds']:.1f} s | {r['compacted']['train_seconds']:.1f} s | "
                f"{r['train_seconds_ratio']:.2f} | {r['final_step_seconds_ratio']:.2f} | "
                f"{r['largest_difference_of_losses']:.0e} |"
            )
        lines.append("")
    return lines
