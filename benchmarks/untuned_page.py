"""The part of docs/results.md on cut models that were not trained."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

Data = Mapping[str, Any]


def untuned(found: Iterable[Data]) -> list[str]:
    """Perplexity of every criterion, with and without compensation."""
    lines: list[str] = []
    for data in found:
        dense, calibration = data["dense"], data["protocol"]["calibration"]
        lines += [
            f"### {data['model']['name']} ({data['model']['parameters']:,} parameters), not trained",
            "",
            f"Dense: {dense['value']:.3f} on {dense['tokens']:,} tokens of {dense['text']}, windows of "
            f"{dense['seq_len']}. Calibration: {calibration['samples']} x {calibration['seq_len']} tokens of "
            f"{calibration['file']}.",
            "",
            "| removed | method | seeds | perplexity | spread | to taylor-1 | matrices off by (before) |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        rows = data["rows"]
        for sparsity in sorted({r["sparsity"] for r in rows}):
            base = {r["seed"]: r["perplexity"] for r in rows if (r["sparsity"], r["method"]) == (sparsity, "taylor-1")}
            for method in dict.fromkeys(r["method"] for r in rows):
                lines += _line([r for r in rows if (r["sparsity"], r["method"]) == (sparsity, method)], base)
        lines.append("")
    head = [
        "## Without training: criteria and compensation",
        "",
        "`benchmarks/untuned.py`: block-wise, uniform widths, local ranking; `auto` is [our method](auto.md) as it is,",
        "or with a part replaced. `+ridge` solves the matrices that read what goes again for what they put out before,",
        "`+ridge-dense` for what the dense model puts out, `+ridge-halfway` for the mean of the two, `+bias` mends",
        "biases alone ([how](how-it-works.md#compensate-what-stays-takes-over)); how far their results are off is the",
        "squared error over the squares, on sequences that were not solved for, mean over matrices. Seeds draw the",
        "calibration text.",
        "",
    ]
    return [*head, *lines] if lines else []


def _line(rows: list[Data], base: Mapping[int, float]) -> list[str]:
    if not rows:
        return []
    values = [r["perplexity"] for r in rows]
    spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    ratios = [r["perplexity"] / base[r["seed"]] for r in rows if r["seed"] in base]
    ratio = f"{statistics.mean(ratios):.2f}" if ratios else ""
    off = ""
    if "off" in rows[0]:
        before, after = (statistics.mean(r["off"][key] for r in rows) for key in ("before", "after"))
        off = f"{after:.1%} ({before:.1%})"
    return [
        f"| {statistics.mean(r['reached'] for r in rows):.2%} | {rows[0]['method']} | {len(rows)} | "
        f"{statistics.mean(values):.2f} | {spread} | {ratio} | {off} |"
    ]
