"""The demo: the main job on the bundled model, shown as one table, one continued sentence per model, and a report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secateur import pipeline
from secateur.config import load_recipe

SPARSITIES = (0.2, 0.5)


def run_demo(output: Path, console: Console) -> dict[str, Any]:
    """Prune and recover the bundled model at every sparsity of `SPARSITIES`: a run folder for each, and a report.

    Returns:
        The rows of the table that is printed, also written to `output/demo.json`.
    """
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    folders = []
    for sparsity in SPARSITIES:
        folder = output / f"sparsity-{sparsity:.0%}".replace("%", "")
        folders.append(folder)
        recipe = load_recipe("demo", [f"prune.param_sparsity={sparsity}"])
        console.print(f"[bold]{sparsity:.0%} of the parameters[/bold]")
        results = pipeline.run_recipe(recipe, folder, overwrite=True)
        if not rows:
            rows.append(_row("dense", str(recipe.model.source), results, "dense", ["dense"]))
        rows.append(
            _row(f"{sparsity:.0%} removed", str(folder / "recovered"), results, "pruned", ["pruned", "recovered"])
        )
    _show(rows, results, console)
    told = {"schema": 1, "command": "demo", "rows": rows, "protocol": results["protocol"]}
    pipeline.write_json(output / "demo.json", told)
    page = pipeline.write_report(folders, output)
    console.print(f"{time.perf_counter() - started:.0f} s; run folders in {output}; open {page} in a browser")
    return told


def _row(name: str, folder: str, results: dict[str, Any], size: str, stages: list[str]) -> dict[str, Any]:
    """One line of the table: a model, with what the run measured of it and what it makes of the first prompt.

    Its speed is told beside that of the dense model in the same run: those of two runs do not compare.
    """
    perplexity = next(iter(results["perplexity"].values()))
    return {
        "model": name,
        "folder": folder,
        "parameters": results["params"][size],
        **{stage: perplexity[stage] for stage in stages},
        "speed": 1.0 if size == "dense" else round(1 / results["benchmark"]["ratios"]["prefill_s"], 3),
        "prompt": results["samples"]["prompts"][0],
        "continuation": " ".join(results["samples"]["continuations"][stages[-1]][0].split()),
    }


def _show(rows: list[dict[str, Any]], results: dict[str, Any], console: Console) -> None:
    perplexity, timed = next(iter(results["perplexity"].values())), results["benchmark"]["protocol"]
    table = Table("model", "parameters", "dense", "pruned", "recovered", "speed", title="perplexity and speed")
    for row in rows:
        figures = [f"{row[k]:.2f}" if row.get(k) else "" for k in ("dense", "pruned", "recovered")]
        table.add_row(row["model"], f"{row['parameters']:,}", *figures, f"{row['speed']:.2f}x")
    console.print(table)
    console.print(
        f"Perplexity on {perplexity['tokens']:,} tokens of books by authors the model never saw, "
        f"{perplexity['seq_len']}-token windows; speed of prefill ({timed['prompt_length']} tokens) to the dense "
        "model's in the same run, this machine."
    )
    for row in rows:
        told = f"{escape(row['prompt'])} [italic]{escape(row['continuation'])}[/italic]"
        console.print(f"\n[bold]{row['model']}[/bold]: {told}", soft_wrap=True)
    console.print()
