"""The part of docs/results.md on LoRAShear."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NAMES = {
    "llm-pruner": "LLM-Pruner, static recovery",
    "llm-pruner-dynamic": "LLM-Pruner, dynamic recovery",
    "auto": "auto",
    "loraprune": "LoRAPrune, static",
    "loraprune+knowledge": "LoRAPrune, static, sensitive groups left whole",
    "lorashear": "LoRAShear, static",
    "lorashear-dynamic": "LoRAShear, dynamic",
    "lorashear+knowledge": "LoRAShear, static, sensitive groups left whole",
    "lorashear-dynamic+knowledge": "LoRAShear, dynamic, sensitive groups left whole",
    "lorashear-random": "LoRAShear, random units",
    "lorashear-unfloored": "LoRAShear, lambda without a floor",
}
Data = Mapping[str, Any]


def compared(found: Iterable[Data]) -> list[str]:
    """Perplexities by method on every source."""
    lines: list[str] = []
    for data in found:
        p, sources = data["protocol"], list(data["dense"]["perplexity"])
        lines += [
            f"### {data['model']['name']} ({data['model']['parameters']:,} parameters), five sources",
            "",
            f"{p['steps']} steps of {p['batch_size']} x {p['seq_len']} tokens, rank {p['rank']}, learning rate "
            f"{p['learning_rate']}, on up to {p['characters']:,} characters of each source, measured on "
            f"{p['held_out']:,} others; units go between {p['warmup']:.0%} and {1 - p['cooldown']:.0%} of the run.",
            "",
            "| removed | method | seeds | " + " | ".join(sources) + " | mean | worst to dense |",
            "| --- | --- | ---: |" + " ---: |" * (len(sources) + 2),
            _line("", "dense", data["dense"]["perplexity"], [data["dense"]["mean"]], [1.0]),
        ]
        rows = data["rows"]
        for sparsity in sorted({r["sparsity"] for r in rows}):
            for method in sorted({r["method"] for r in rows}, key=_place):
                mine = [r for r in rows if (r["sparsity"], r["method"]) == (sparsity, method)]
                if mine:
                    average = {s: statistics.mean(r["perplexity"][s] for r in mine) for s in sources}
                    overall, worst = ([r[key] for r in mine] for key in ("mean", "worst_ratio"))
                    removed = f"{statistics.mean(r['reached'] for r in mine):.2%}"
                    lines.append(_line(removed, _name(method), average, overall, worst))
        lines.append("")
    head = [
        "## LoRAShear, and what recovers on what",
        "",
        "`benchmarks/lorashear.py`: every row trains on the same number of tokens; `auto` trains norms and embeddings",
        "beside the adapters (`also_train`), the others as published do not; `adapt` is the share of the steps that",
        "come before the cut. `mean` is the geometric mean over sources, `worst to dense` the largest ratio of a",
        "source's perplexity to the dense model's; means over seeds and their standard deviations.",
        "",
    ]
    return [*head, *lines] if lines else []


def _name(method: str) -> str:
    """What a row is called, with the settings that it changes."""
    base, _, given = method.partition(":")
    return NAMES[base] + (f", {given}" if given else "")


def _place(method: str) -> tuple[int, str]:
    """Where a row stands: by method, then by settings."""
    base, _, given = method.partition(":")
    return list(NAMES).index(base), given


def _line(removed: str, name: str, values: Mapping[str, float], means: Sequence[float], worst: Sequence[float]) -> str:
    """A row; `means` and `worst` by seed."""
    figures = " | ".join(f"{value:.2f}" for value in values.values())
    return f"| {removed} | {name} | {len(means)} | {figures} | {_spread(means, 2)} | {_spread(worst, 3)} |"


def _spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
