"""Verbs that tell of what was measured before: report, compare. They read results and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from secateur.cli.common import Json, out

Runs = Annotated[
    list[Path],
    typer.Argument(help="Run folders (with results.json, or holding such folders), and files that --json wrote."),
]
Png = Annotated[Path | None, typer.Option("--png", help="Also write every figure as a PNG file into this folder.")]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="Also write it as Markdown to this file.")]


def report(
    runs: Runs,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; report.html in the first folder if not given.")
    ] = None,
    png: Png = None,
    markdown: Markdown = None,
) -> None:
    """One HTML page that tells what was cut, what it cost, and whether to trust it; of several runs, a comparison.

    secateur report runs/llama-7b

    secateur report runs/a runs/b -o compared.html --markdown compared.md --png figures
    """
    from secateur import report as reports

    found = reports.read_runs(runs)
    file = output or (runs[0] if runs[0].is_dir() else runs[0].parent) / reports.PAGE
    reports.write_text(file, reports.page(found))
    written = [file]
    if markdown is not None:
        reports.write_text(markdown, reports.markdown(found))
        written.append(markdown)
    if png is not None:
        written += reports.write_pngs(reports.drawn(found), png)
    for name in written:
        out.print(f"written to {name}", soft_wrap=True)


def compare(runs: Runs, png: Png = None, markdown: Markdown = None, json: Json = None) -> None:
    """One table over methods, ratios and seeds, and with --png one set of curves; nothing is measured again.

    secateur compare runs/a runs/b runs/c --json compared.json --png figures

    The same as a page: secateur report runs/a runs/b runs/c -o compared.html
    """
    from secateur import pipeline
    from secateur import report as reports

    found = reports.read_runs(runs)
    compared = reports.compare(found)
    head, rows = reports.comparison_table(compared)
    table = Table(*(Column(name, overflow="fold") for name in head))
    for row in rows:
        table.add_row(*("-" if cell == reports.NOT_MEASURED else cell for cell in row))
    out.print(table)
    out.print("-: not measured; prefill and decoding: tokens per second over the dense model's", soft_wrap=True)
    for mean in compared.means:
        out.print(
            f"{mean.method}, {mean.sparsity:.1%} removed, {mean.text}, {mean.stage}: {mean.mean:.2f} ± "
            f"{mean.deviation:.2f} ({len(mean.seeds)} seeds)",
            soft_wrap=True,
        )
    for warning in compared.warnings:
        out.print(f"take care: {warning}", soft_wrap=True)
    if json is not None:
        pipeline.write_json(json, compared.to_json())
    if markdown is not None:
        reports.write_text(markdown, "\n".join(reports.comparison_markdown(compared)))
    if png is not None:
        figures = [(picture.name, picture) for picture in reports.comparison_pictures(found)]
        for name in reports.write_pngs(figures, png):
            out.print(f"written to {name}", soft_wrap=True)
