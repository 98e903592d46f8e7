"""The part of docs/results.md on what each method costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Data = Mapping[str, Any]
FIRST = "llm-pruner"  # what the others are compared to


def costs(found: Iterable[Data]) -> list[str]:
    """Time and memory of every method, to those of LLM-Pruner."""
    lines: list[str] = []
    for data in found:
        p, rows = data["protocol"], {r["method"]: r for r in data["rows"]}
        first = rows[FIRST]
        lines += [
            f"### {data['model']['name']} ({data['model']['parameters']:,} parameters), {p['sparsity']:.0%} removed",
            "",
            f"{p['steps']} steps of {p['batch_size']} x {p['seq_len']} tokens, rank {p['rank']}. LLM-Pruner: the cut "
            f"on {p['samples']} sequences takes {first['cut']['seconds']:.1f} s and {_size(first['cut'])}, "
            f"training {first['trained']['seconds']:.1f} s and {_size(first['trained'])}.",
            "",
            "| method | cut, processor | cut, memory | training, processor | training, memory | both, processor "
            "| both, wall |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for method, r in rows.items():
            both = [f"{_both(r, key) / _both(first, key):.2f}" for key in ("seconds", "wall_seconds")]
            cut = _ratios(r["cut"], first["cut"]) if r["cut"] else ["", ""]
            cells = [method, *cut, *_ratios(r["trained"], first["trained"]), *both]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    head = [
        "## What each method costs",
        "",
        "`benchmarks/method_costs.py`: seconds of the processor, on one thread, and of the clock, and the peak of",
        "resident memory beyond the loaded model, each method in a process of its own, as ratios to LLM-Pruner with",
        "the same recovery. LoRAPrune and LoRAShear cut while they train.",
        "",
    ]
    return [*head, *lines] if lines else []


def _size(part: Data) -> str:
    return f"{part['peak_bytes'] / 2**20:,.0f} MiB"


def _both(row: Data, key: str) -> float:
    return float(row["trained"][key] + (row["cut"][key] if row["cut"] else 0.0))


def _ratios(part: Data, first: Data) -> list[str]:
    return [f"{part[key] / first[key]:.2f}" for key in ("seconds", "peak_bytes")]
