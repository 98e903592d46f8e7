"""The progress of a sweep, and its table at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from secateur.cli.common import out

if TYPE_CHECKING:
    from secateur.config import Sweep
    from secateur.pipeline import SweepRun


def run_sweep(sweep: Sweep, output: Path, workers: int | None, overwrite: bool) -> None:
    """Run a sweep, show how far it is, and print its table.

    Raises:
        SweepError: runs failed.
    """
    from secateur import pipeline
    from secateur.errors import SweepError

    with Live(console=Console(stderr=True), refresh_per_second=1, transient=True) as live:
        shown = Progress(live)
        results = pipeline.run_sweep(sweep, output, workers=workers, overwrite=overwrite, tell=shown)
    print_sweep(results)
    out.print(f"sweep folder: {output}")
    failed = [run for run in results["runs"] if run["state"] == "failed"]
    if failed:
        told = "\n".join(f"{run['name']}: {run['error']}" for run in failed)
        code = min(run["exit_code"] for run in failed)
        raise SweepError(f"{len(failed)} of {len(results['runs'])} runs failed\n{told}", code)


class Progress:
    """Tells of every run that ends, and on a terminal which of how many run and how long it may take.

    The time left takes every run for as long as those took on average that ended since this began, and as many at once
    as there were at most.
    """

    def __init__(self, live: Live) -> None:
        self.live = live
        self.told: set[str] = set()
        self.most = 1

    def __call__(self, runs: Sequence[SweepRun]) -> None:
        """Take up how things stand."""
        ended = [run for run in runs if run.state in ("finished", "failed")]
        running = [run.combination.label for run in runs if run.state == "running"]
        self.most = max(self.most, len(running))
        left = self._left(runs, len(ended))
        for run in ended:
            if run.folder.name not in self.told:
                self.told.add(run.folder.name)
                how = "finished before" if run.kept else f"{run.state} in {run.seconds:.0f} s"
                self._say(f"- {len(self.told)} of {len(runs)}: {run.combination.label}: {how}{left}")
        self.live.update(f"{len(ended)} of {len(runs)} ended{left}; running: {'; '.join(running) or 'none'}")

    def _say(self, line: str) -> None:
        if self.live.console.is_terminal:
            self.live.console.print(line, soft_wrap=True, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _left(self, runs: Sequence[SweepRun], ended: int) -> str:
        """The time left, if there is any to tell."""
        took = [run.seconds for run in runs if run.seconds is not None]
        if not took or ended == len(runs):
            return ""
        seconds = sum(took) / len(took) * (len(runs) - ended) / self.most
        return f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"


def print_sweep(results: dict[str, Any]) -> None:
    """A line for each run: its settings, how it ended, and its headline figures."""
    from secateur.checkpoint.account import STAGES
    from secateur.config import label

    runs = results["runs"]
    found = {(text, s) for run in runs for text, p in run.get("perplexity", {}).items() for s in p}
    columns = sorted(found, key=lambda at: (at[0], STAGES.index(at[1])))
    figures = [Column(f"{stage}\n{text}", justify="right", no_wrap=True) for text, stage in columns]
    settings = [Column(key, overflow="fold") for key in runs[0]["settings"]]
    table = Table(
        *settings, Column("state", no_wrap=True), Column("parameters", justify="right", no_wrap=True), *figures
    )
    for run in runs:
        values = [label({key: value}).partition("=")[2] for key, value in run["settings"].items()]
        params = run.get("params", {})
        size = params.get("pruned", params.get("final"))
        measured = [run.get("perplexity", {}).get(text, {}).get(stage) for text, stage in columns]
        cells = ["" if value is None else f"{value:.3f}" for value in measured]
        table.add_row(*values, run["state"], "" if size is None else f"{size:,}", *cells)
    out.print(table)
