"""Hooks into the Trainer: stop on a broken loss or where all is done, tell losses, measure texts, keep the folder."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import NonFiniteError, SecateurError

WHOLE = "whole"  # a file in every checkpoint that was written to its end


class StopOnBrokenLoss(TrainerCallback):  # type: ignore[misc]
    """Raise `NonFiniteError` as soon as a logged loss or gradient norm is NaN or infinite."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        for name in ("loss", "grad_norm"):
            value = float((logs or {}).get(name, 0.0))
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"recovery stopped at step {state.global_step}: {name} is {value}; lower the learning rate"
                )


class HasEndedError(Exception):
    """The run that goes on had taken its last step."""


class EndAtLastStep(TrainerCallback):  # type: ignore[misc]
    """Raise `HasEndedError` where a run goes on from its last step: the Trainer would take another one."""

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise HasEndedError


class PrintLosses(TrainerCallback):  # type: ignore[misc]
    """One line on standard error for each logged loss; for logs, in which a moving bar is no use."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "loss" in (logs or {}):
            line = f"- step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.4f}"
            print(line, file=sys.stderr, flush=True)


class MeasureTexts(TrainerCallback):  # type: ignore[misc]
    """Call `evaluate(model)` every so many steps and keep what it returns in the Trainer's log."""

    def __init__(self, evaluate: Callable[[Any], dict[str, float]], every: int) -> None:
        self.evaluate = evaluate
        self.every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step % self.every == 0:
            state.log_history.append({"step": state.global_step, "perplexity": self.evaluate(model)})


class OwnFolder(TrainerCallback):  # type: ignore[misc]
    """The folder of a run: what an earlier one left there goes when training begins, not before.

    To be the Trainer's last callback, since the others may refuse to begin, and write their parts of a checkpoint. One
    that is whole is marked so: a kill may come while it is written.

    Args:
        folder: with training checkpoints; need not exist.
        resume: the run goes on from what is there.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder = folder
        self.resume = resume
        self.new = not folder.exists()
        self.earlier = [] if resume else sorted(folder.rglob("*"), reverse=True)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.resume and not self.new and state.is_world_process_zero:
            for path in self.earlier:  # what other callbacks have begun to write by now stays
                if not path.is_dir() or path.is_symlink():
                    path.unlink(missing_ok=True)
                elif not any(path.iterdir()):
                    path.rmdir()
            self.new = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / WHOLE).touch()

    @contextmanager
    def gone_after_an_error(self) -> Iterator[None]:
        """Remove the folder if the block ends with a user's error, unless checkpoints of an earlier run are in it."""
        try:
            yield
        except SecateurError:
            if self.new:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
