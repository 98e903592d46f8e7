"""The part of docs/results.md on the criterion audit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Data = Mapping[str, Any]


def audits(found: Iterable[Data]) -> list[str]:
    """Rank correlation of every criterion with what removal costs, and the verdicts."""
    lines: list[str] = []
    verdicts: list[str] = []
    for data in found:
        dense, name = data["dense"], data["model"]["name"]
        for r in data["agreements"]:
            how = "alone" if r["how"] == "alone" else "sets"
            lines.append(
                f"| {name} | {r['kind']} | {r['removals']} {how} | {r['criterion']} | {_interval(r['spearman'])} | "
                f"{r['overlap']['value']:.0%} ({r['chance']:.0%}) |"
            )
        told = "; ".join(_verdict(v) for v in data["verdicts"])
        verdicts.append(
            f"- {name} (dense {dense['value']:.2f} on {dense['tokens']:,} tokens of {dense['text']}): {told}."
        )
    if not lines:
        return []
    return [
        "## Which criterion to trust",
        "",
        "`benchmarks/audit.py`, what [`secateur audit`](audit.md) measures: units removed alone and in random sets of",
        "a tenth of their kind, on text no criterion has read. Spearman's rank correlation of scores with the",
        "signed change of the loss, with its interval of 95 %; of the cheapest fifth, the share found (by chance).",
        "",
        *verdicts,
        "",
        "| model | kind | removed | criterion | correlation | cheapest fifth |",
        "| --- | --- | ---: | --- | ---: | ---: |",
        *lines,
        "",
    ]


def _interval(figure: Data) -> str:
    return f"{figure['value']:+.2f} ({figure['low']:+.2f} to {figure['high']:+.2f})"


def _verdict(told: Data) -> str:
    if not told["trusted"]:
        return (
            f"{told['kind']}: none ranks better than chance for sure (the best, {told['criterion']}, "
            f"{told['spearman']['value']:+.2f}; a random order may reach {told['luck']:+.2f}"
            f"{', and random scores are as good' if 'random' in told['not_worse'] else ''})"
        )
    others = f", not clearly worse {', '.join(told['not_worse'])}" if told["not_worse"] else ""
    figures = f"{told['spearman']['value']:+.2f}, by luck up to {told['luck']:+.2f}"
    return f"{told['kind']}: {told['criterion']} ({figures}){others}"
