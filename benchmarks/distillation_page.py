"""The part of docs/results.md on distillation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NAMES = {"lora": "LoRA", "full": "all weights"}
Data = Mapping[str, Any]


def distillation(found: Iterable[Data]) -> list[str]:
    """What the dense model adds to the text, by settings."""
    lines: list[str] = []
    for data in found:
        p, dense = data["protocol"], data["dense"]
        lines += [
            f"### {data['model']['name']} ({data['model']['parameters']:,} parameters), {p['data']['file']}",
            "",
            f"Dense: {dense['value']:.3f} on {dense['tokens']:,} tokens of {dense['text']}, windows of "
            f"{dense['seq_len']}. {p['steps']} steps of {p['batch_size']} x {p['seq_len']} tokens, drawn from "
            f"{p['examples']:,} windows; rank {p['rank']}, learning rate {p['learning_rate']:g} (all weights: "
            f"{p['full_learning_rate']:g}).",
            "",
            "| removed | trained | learns from | seeds | perplexity | to the text alone | divergence [nats] |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        ]
        rows = data["rows"]
        for sparsity in sorted({r["sparsity"] for r in rows}):
            for method in dict.fromkeys(r["method"] for r in sorted(rows, key=lambda r: _place(r["method"]))):
                mine = [r for r in rows if (r["sparsity"], r["method"]) == (sparsity, method)]
                if mine:
                    lines.append(_line(method, mine, [r for r in rows if r["sparsity"] == sparsity]))
        lines.append("")
    head = [
        "## Recovery from the text, and from the dense model",
        "",
        "`benchmarks/distillation.py`: one model, cut by LLM-Pruner, trained on the same examples in the same order,",
        "so that rows of a seed differ in their loss alone; means over seeds and standard deviations. The ratio is",
        "to the same training without distillation on the same seeds; the divergence is from the dense model, on text",
        "that is not trained on.",
        "",
    ]
    return [*head, *lines] if lines else []


def _line(method: str, mine: Sequence[Data], rows: Sequence[Data]) -> str:
    """A row of the table; `rows` are those of the same sparsity."""
    name, _, given = method.partition(":")
    options = [option for option in given.split(",") if option]
    rates = [option for option in options if option.startswith("learning_rate=")]
    base = name + (f":{','.join(rates)}" if rates else "")
    plain = {r["seed"]: r["perplexity"] for r in rows if r["method"] == base}
    ratios = [r["perplexity"] / plain[r["seed"]] for r in mine if r["seed"] in plain]
    told = [option for option in options if option not in rates]
    learns = f"text and dense model ({', '.join(told)})" if told else "text"
    cells = [
        f"{statistics.mean(r['reached'] for r in mine):.2%}",
        ", ".join([NAMES[name], *(rate.replace("_", " ").replace("=", " ") for rate in rates)]),
        learns,
        str(len(mine)),
        _spread([r["perplexity"] for r in mine], 2),
        _spread(ratios, 3) if told and ratios else "",
        _spread([r["kl"] for r in mine], 3),
    ]
    return f"| {' | '.join(cells)} |"


def _place(method: str) -> tuple[int, str]:
    """Where a row stands: by what is trained, then by settings."""
    name, _, given = method.partition(":")
    return list(NAMES).index(name), given


def _spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the standard deviation over seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
