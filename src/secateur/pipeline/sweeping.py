"""All runs of a sweep: each in a folder of its own, kept when it is finished, gone on with when it is not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from secateur.checkpoint.account import STAGES
from secateur.config import Combination, Sweep
from secateur.errors import CheckpointError, ProcessError
from secateur.pipeline.reporting import check_reporting
from secateur.pipeline.results import SCHEMA, Results, write_json
from secateur.pipeline.sweep_keys import keys_of, name_of
from secateur.pipeline.sweep_processes import Outcome, Share, attempt, share_of
from secateur.processes import OwnProcess

SWEEP_FILE, LOGS = "sweep.json", "logs"
State = Literal["waiting", "running", "finished", "failed"]


@dataclass
class SweepRun:
    """One run of a sweep.

    Attributes:
        combination: its settings and recipe.
        key: hash of what decides its results (`keys_of`).
        folder: the run folder; its name is that of the run.
        log: file with what the run printed.
        state: where it stands.
        kept: whether it was finished already when the sweep began.
        seconds: wall time of this call's part of it; None if there is none.
        outcome: how it ended, if it has.
    """

    combination: Combination
    key: str
    folder: Path
    log: Path
    state: State = "waiting"
    kept: bool = False
    seconds: float | None = None
    outcome: Outcome = field(default_factory=Outcome)

    def to_json(self) -> dict[str, Any]:
        """Its entry in `sweep.json`, with the headline figures if it is finished."""
        return {
            "name": self.folder.name,
            "key": self.key,
            "settings": dict(self.combination.settings),
            "state": self.state,
            "seconds": self.seconds,
            "log": f"{LOGS}/{self.log.name}",
            **({"error": self.outcome.error, "exit_code": self.outcome.exit_code} if self.outcome.error else {}),
            **(headline(json.loads(_results_of(self.folder).read_text())) if self.state == "finished" else {}),
        }


def run_sweep(
    sweep: Sweep,
    output: Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    tell: Callable[[Sequence[SweepRun]], None] = lambda runs: None,
) -> Results:
    """Run every combination of a sweep into a run folder below `output`, several at once if they fit.

    A run that is finished is not run again, one that is not goes on where it was. One that fails does not stop the
    others. `sweep.json` tells of each run what it was given, where it stands, and its headline figures. Each run
    measures its own dense model first.

    Args:
        workers: runs at once; if not given, as `share_of` says.
        overwrite: begin anew in a folder that is not empty.
        tell: called with all runs whenever one of them has begun or ended.

    Returns:
        What `sweep.json` holds in the end.

    Raises:
        SecateurError: the output folder is something else's or in use, a text is not there, or speed is to be measured
            by several runs at once. Nothing is run then.
    """
    _check_folder(output, overwrite)
    combinations = sweep.combinations
    for combination in combinations:
        check_reporting(combination.recipe)
    share = share_of([combination.recipe for combination in combinations], workers)
    keys = keys_of(combinations)
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        if overwrite:
            _empty(output)
        (output / LOGS).mkdir(exist_ok=True)
        runs = [_found(c, key, output) for c, key in zip(combinations, keys, strict=True)]

        def changed() -> None:
            write_json(output / SWEEP_FILE, _record(runs, share))
            tell(runs)

        changed()
        _run_all([run for run in runs if run.state != "finished"], share, changed)
    return _record(runs, share)


def headline(results: Mapping[str, Any]) -> Results:
    """The figures of a run that are compared first: parameters, perplexities by stage, averages over tasks."""
    stages = {
        text: {stage: found[stage] for stage in STAGES if stage in found}
        for text, found in results.get("perplexity", {}).items()
    }
    averages = {name: mean["value"] for name, mean in results.get("tasks_average", {}).items()}
    return {
        "params": results["params"],
        "perplexity": stages,
        **({"tasks_average": averages} if averages else {}),
    }


def _found(combination: Combination, key: str, output: Path) -> SweepRun:
    """A run as an earlier call left it."""
    name = name_of(combination, key)
    run = SweepRun(combination, key, output / name, output / LOGS / f"{name}.log")
    if _results_of(run.folder).is_file():
        run.state, run.kept = "finished", True
    return run


def _results_of(folder: Path) -> Path:
    """The file that a run writes last."""
    return folder / "results.json"


def _record(runs: Sequence[SweepRun], share: Share) -> Results:
    return {
        "schema": SCHEMA,
        "command": "sweep",
        "secateur": version("secateur"),
        "workers": share.workers,
        "threads": share.threads,
        "runs": [run.to_json() for run in runs],
    }


def _run_all(waiting: list[SweepRun], share: Share, changed: Callable[[], None]) -> None:
    """Run what is not finished, so many at once, in order; whatever ends this ends the runs, too.

    Each has a process to itself: a pool breaks as a whole when one of its processes is killed, and a peak of memory
    would be that of all runs before in the same process.
    """
    running: dict[int, tuple[SweepRun, OwnProcess, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < share.workers:
                run = waiting.pop(0)
                process = OwnProcess(attempt, (run.combination.recipe, run.folder), run.log, share.threads)
                running[process.sentinel] = (run, process, time.perf_counter())
                run.state = "running"
            changed()
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                run, process, since = running.pop(sentinel)
                run.seconds = round(time.perf_counter() - since, 3)
                try:
                    run.outcome = process.result()
                except ProcessError as error:
                    run.outcome = Outcome(str(error), error.exit_code)
                run.state = "failed" if run.outcome.error else "finished"
    finally:
        for _, process, _ in running.values():
            process.stop()
    changed()


def _check_folder(output: Path, overwrite: bool) -> None:
    """Raise CheckpointError if a folder holds something that is no sweep."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; choose another folder for the sweep")
    if not overwrite and output.is_dir() and any(output.iterdir()) and not (output / SWEEP_FILE).is_file():
        raise CheckpointError(f"{output} is not empty and holds no sweep; choose another folder or pass --overwrite")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Lock a folder for one sweep at a time.

    Raises:
        CheckpointError: another process has it.
    """
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"a sweep is running in {output}: wait for it, or choose another folder") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
