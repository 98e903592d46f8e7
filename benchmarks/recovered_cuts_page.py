"""The part of docs/results.md on what is left of a better cut after recovery."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

CRITERIA = ("taylor-1", "taylor-2", "gate")
FORMS = {
    "": "not compensated",
    "+ridge": "`+ridge`",
    "+ridge-halfway": "`+ridge-halfway`",
    "+ridge-dense": "`+ridge-dense`",
}
WIDTHS = {"": "equal", ":uniform=false,ranking=global": "by layer, global ranking"}


def recovered_cuts(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Perplexity after recovery by criterion, widths and compensation."""
    lines: list[str] = []
    for data in found:
        p = data["protocol"]
        for sparsity in sorted({r["sparsity"] for r in data["rows"]}):
            rows = [r for r in data["rows"] if r["sparsity"] == sparsity]
            lines += [
                f"### {data['model']['name']}, {sparsity:.0%} removed, recovered",
                "",
                f"{p['steps']} steps of {p['batch_size']} x {p['seq_len']} tokens, {p['adapt']:.0%} of them before the "
                f"cut, rank {p['rank']}. Dense: "
                f"{data['dense']['mean']:.2f}. `auto`: {_mean(rows, 'auto')}. Seeds: "
                f"{', '.join(map(str, sorted({r['seed'] for r in rows})))}.",
                "",
                "| criterion | widths | " + " | ".join(FORMS.values()) + " |",
                "| --- | --- |" + " ---: |" * len(FORMS),
            ]
            for criterion in CRITERIA:
                for settings, name in WIDTHS.items():
                    cells = [_mean(rows, criterion + form + settings) for form in FORMS]
                    lines.append(f"| {criterion} | {name} | " + " | ".join(cells) + " |")
            lines.append("")
    head = [
        "## What recovery leaves of a better cut",
        "",
        "`benchmarks/lorashear.py`: cuts by every criterion, with and without compensation, in the place of `auto`'s,",
        "and all else as for `auto`: the same steps, norms and embeddings beside the adapters. Geometric mean of the",
        "perplexities on five sources.",
        "",
    ]
    return [*head, *lines] if lines else []


def _mean(rows: list[Mapping[str, Any]], method: str) -> str:
    """The mean over seeds, or nothing where it was not measured."""
    values = [r["mean"] for r in rows if r["method"] == method]
    return f"{statistics.mean(values):.2f}" if values else ""
