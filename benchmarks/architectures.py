"""Every causal language model type of transformers: what is discovered, proven, cut, saved and loaded.

    python benchmarks/architectures.py [--only llama,gpt2] [--part 1/4] [--again] [--jobs 2]

writes one file per model type to benchmarks/results/architectures. What a file holds already is not done again, so an
interrupted run goes on where it stopped. Each model runs in a process of its own with a time limit; see
`architecture_checks.py` for what is checked. When a run began and ended, its wall time and the load of the machine go
to benchmarks/results/architectures_runs.json: those of the last run, and of the last complete one (`--again`, over all
types). `python benchmarks/architectures_page.py` turns the files into docs/architectures.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import zoo
from architecture_checks import examine, missing_stages
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from secateur.pipeline import PACKAGES, write_json

RESULTS = Path(__file__).parent / "results" / "architectures"
RUNS = RESULTS.parent / "architectures_runs.json"
TIME_LIMIT = 300.0  # seconds per model


def chosen_types(only: str | None, part: str | None) -> list[str]:
    """The model types to run over.

    Raises:
        SystemExit: a type is unknown, or the part is not one.
    """
    types = zoo.model_types()
    if only:
        wanted = only.split(",")
        if unknown := sorted(set(wanted) - set(types)):
            raise SystemExit(f"not a causal language model type: {', '.join(unknown)}")
        types = [t for t in types if t in wanted]
    if part:
        number, _, count = part.partition("/")
        if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
            raise SystemExit(f"--part is {part!r}; expected for example 1/4")
        types = types[int(number) - 1 :: int(count)]
    return types


class Clock:
    """When a run began and ended, and how busy the machine was."""

    def __init__(self) -> None:
        self.start = datetime.now(UTC)
        self.before = os.getloadavg()[0]
        self.loads: list[float] = []

    def tick(self) -> None:
        """Note the load of the last minute."""
        self.loads.append(os.getloadavg()[0])

    def to_json(self) -> dict[str, Any]:
        """Times in UTC; load averages count what runs and waits, the workers of the run among it."""
        end = datetime.now(UTC)
        return {
            "start": self.start.isoformat(timespec="seconds"),
            "end": end.isoformat(timespec="seconds"),
            "wall_s": round((end - self.start).total_seconds(), 1),
            "cpus": os.cpu_count(),
            "load_average": {"before": self.before, "mean": round(sum(self.loads) / max(len(self.loads), 1), 2)},
        }


def note_run(clock: Clock, facts: dict[str, Any], *, complete: bool) -> None:
    """Write down a finished run."""
    known = json.loads(RUNS.read_text()) if RUNS.exists() else {}
    run = clock.to_json() | facts
    write_json(RUNS, known | {"schema": 1, "last": run} | ({"complete": run} if complete else {}))


class Worker:
    """One model type in a process of its own, which writes what it knows after each stage."""

    def __init__(self, model_type: str, target: Path, again: bool) -> None:
        self.model_type = model_type
        self.target = target
        self.start = time.monotonic()
        self.folder = tempfile.TemporaryDirectory(prefix="secateur-sweep-")
        self.known = Path(self.folder.name) / "known.json"
        if target.exists() and not again:
            shutil.copy(target, self.known)
        self.log = Path(self.folder.name) / "log"
        cache = {"XDG_CACHE_HOME": self.folder.name}  # nothing known from earlier runs
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker", model_type, "--output", str(self.known)],
                env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ | cache,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt reaches the parent alone, which ends its workers
            )

    def done(self, limit: float) -> bool:
        """Whether it has ended, if need be by the time limit; if so, its result is in place."""
        stopped = ""
        if self.process.poll() is None:
            if time.monotonic() - self.start < limit:
                return False
            stopped = f"stopped after {limit:.0f} s"
        elif self.process.returncode:
            stopped = f"ended with code {self.process.returncode}: {self.log.read_text()[-500:].strip()}"
        known = json.loads(self.known.read_text()) if self.known.exists() else {"model_type": self.model_type}
        if stopped:
            known["stopped"] = stopped
        write_json(self.target, known)
        self.end()
        return True

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def complete(file: Path) -> bool:
    """Whether a model type has all its results."""
    return file.exists() and not missing_stages(json.loads(file.read_text()))


def sweep(types: Sequence[str], folder: Path, jobs: int, limit: float, again: bool, clock: Clock) -> None:
    """Run `jobs` workers at a time until every type has its results."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running = list(reversed(types)), list[Worker]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("architectures", total=len(types))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    model_type = waiting.pop()
                    running.append(Worker(model_type, folder / f"{model_type}.json", again))
                progress.update(task, description=", ".join(w.model_type for w in running))
                for worker in [w for w in running if w.done(limit)]:
                    running.remove(worker)
                    progress.advance(task)
                clock.tick()
                time.sleep(0.1)
        finally:
            for worker in running:
                worker.end()


def work(model_type: str, output: Path) -> None:
    """What a worker does."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    versions = {name: version(name) for name in PACKAGES}
    known = json.loads(output.read_text()) if output.exists() else {}
    for record in examine(model_type, known if known.get("versions") == versions else {}):
        write_json(output, record | {"versions": versions})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--part", help="for example 2/4: the second quarter, every fourth type")
    parser.add_argument("--again", action="store_true", help="run types that have a result already, too")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds per model")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.output)
        return
    types = chosen_types(args.only, args.part)
    todo = [t for t in types if args.again or not complete(args.output / f"{t}.json")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended then, too
    clock = Clock()
    try:
        sweep(todo, args.output, args.jobs, args.limit, args.again, clock)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from here") from None
    if args.output == RESULTS:
        note_run(clock, {"types": len(todo), "jobs": args.jobs}, complete=todo == zoo.model_types())


if __name__ == "__main__":
    main()
