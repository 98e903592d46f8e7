"""The part of docs/results.md on budgets of other things than parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

COUNTED = {"params": "parameters", "macs": "MACs", "memory": "memory", "latency": "latency"}


def budgets(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """What was asked for of one thing, and what went of all."""
    lines: list[str] = []
    for data in found:
        dense, work = data["dense"], data["protocol"]["workload"]
        lines += [
            f"### {data['model']['name']} ({data['model']['parameters']:,} parameters), budgets",
            "",
            f"Dense: {dense['value']:.3f} on {dense['tokens']:,} tokens of {dense['text']}, windows of "
            f"{dense['seq_len']}. Counted is a pass over {work['batch']} x {work['length']} tokens, "
            f"{data['protocol']['threads']} thread(s). Not trained; seeds: "
            f"{', '.join(map(str, sorted({r['seed'] for r in data['rows']})))}.",
            "",
            "| budget | asked | widths say | " + " | ".join(COUNTED.values()) + " | perplexity |",
            "| --- | ---: | ---: |" + " ---: |" * len(COUNTED) + " ---: |",
        ]
        for r in sorted(data["rows"], key=lambda r: (r["sparsity"], list(COUNTED).index(r["method"]), r["seed"])):
            shares = [f"{r['removed'][what]:.1%}" for what in COUNTED]
            shares = [f"**{s}**" if what == r["method"] else s for what, s in zip(COUNTED, shares, strict=True)]
            said = f"{r['expected']:.1%}" if "expected" in r else ""
            lines.append(
                f"| {COUNTED[r['method']]} | {r['sparsity']:.0%} | {said} | {' | '.join(shares)} | "
                f"{r['perplexity']:.2f} |"
            )
        lines.append("")
    head = [
        "## Budgets of work, memory and time",
        "",
        "`benchmarks/budgets.py`: `auto` where the sparsity is a share of parameters, of multiply-accumulates, of",
        "bytes (weights and cache) or of measured seconds (`--of`), and what each cut takes away of all of them. What",
        "the widths say is the sum by which the budget was met; what went is measured on the cut model. The hidden",
        "dimension is cut for a budget of parameters alone.",
        "",
    ]
    return [*head, *lines] if lines else []
