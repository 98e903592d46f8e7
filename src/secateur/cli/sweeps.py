"""The progress of a sweep, and its table at the end."""

from __future__ import annotations

import sys
import time
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

    The time left takes every run for as long as those that ended since this began took on average.
    """

    def __init__(self, live: Live) -> None:
        self.live = live
        self.told: set[str] = set()
        self.since = time.perf_counter()

    def __call__(self, runs: Sequence[SweepRun]) -> None:
        """Take up how things stand."""
        ended = [run for run in runs if run.state in ("finished", "failed")]
        left = self._left(runs, len(ended))
        for number, run in enumerate(ended, 1):
            if run.folder.name not in self.told:
                self.told.add(run.folder.name)
                how = "finished before" if run.kept else f"{run.state} in {run.seconds:.0f} s"
                self._say(f"- {max(number, len(self.told))} of {len(runs)}: {run.combination.label}: {how}{left}")
        running = [run.combination.label for run in runs if run.state == "running"]
        self.live.update(f"{len(ended)} of {len(runs)} ended{left}; running: {'; '.join(running) or 'none'}")

    def _say(self, line: str) -> None:
        if self.live.console.is_terminal:
            self.live.console.print(line, soft_wrap=True, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _left(self, runs: Sequence[SweepRun], ended: int) -> str:
        """The time left, if there is any to tell."""
        own = sum(run.state in ("finished", "failed") and not run.kept for run in runs)
        if not own or ended == len(runs):
            return ""
        seconds = (time.perf_counter() - self.since) / own * (len(runs) - ended)
        return f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"


def print_sweep(results: dict[str, Any]) -> None:
    """A line for each run: its settings, how it ended, and its headline figures."""
    from secateur.checkpoint.account import STAGES

    runs = results["runs"]
    keys = list(runs[0]["settings"])
    found = {(text, s) for run in runs for text, p in run.get("perplexity", {}).items() for s in p}
    columns = sorted(found, key=lambda at: (at[0], STAGES.index(at[1])))
    heads = [Column(f"{stage}\n{text}", justify="right") for text, stage in columns]
    table = Table(*keys, "state", Column("parameters", justify="right"), *heads)
    for run, label in zip(runs, _labels(runs), strict=True):
        params = run.get("params", {})
        size = params.get("pruned", params.get("final"))
        values = [run.get("perplexity", {}).get(text, {}).get(stage) for text, stage in columns]
        figures = ["" if value is None else f"{value:.3f}" for value in values]
        table.add_row(*label, run["state"], "" if size is None else f"{size:,}", *figures)
    out.print(table)


def _labels(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    from secateur.config import label

    return [[label({key: value}).partition("=")[2] for key, value in run["settings"].items()] for run in runs]
