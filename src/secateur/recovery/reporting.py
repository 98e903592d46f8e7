"""Where a training run is watched: the Trainer's own reports to TensorBoard, Weights & Biases and trackio."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_tensorboard_available, is_trackio_available, is_wandb_available

from secateur.errors import RecipeError

if TYPE_CHECKING:
    from transformers import Trainer

Reporter = Literal["tensorboard", "wandb", "trackio"]
INSTALLED = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
PROJECT = "secateur"


def check_reporters(names: Sequence[str]) -> None:
    """Make sure that everything to report to is installed.

    Raises:
        RecipeError: something is not, or is not known.
    """
    for name in names:
        if name not in INSTALLED:
            raise RecipeError(f"--report-to {name}: expected any of {', '.join(INSTALLED)} (recovery.report_to)")
        if not INSTALLED[name]():
            raise RecipeError(f"{name} is not installed: pip install {name}, or leave out --report-to {name} "
                              "(recovery.report_to)")  # fmt: skip


@contextmanager
def logs_in(folder: Path, reporters: Sequence[str]) -> Iterator[None]:
    """While the block runs, TensorBoard and W&B write into a folder, and W&B's project is `secateur`.

    These take their places from the environment alone; what the user has set there wins. A run of W&B that began in
    the block ends with it, so that its files are whole.
    """
    ours = {"TENSORBOARD_LOGGING_DIR": str(folder), "WANDB_DIR": str(folder), "WANDB_PROJECT": PROJECT}
    mine = {name: value for name, value in ours.items() if reporters and name not in os.environ}
    os.environ.update(mine)
    try:
        with _run_of_wandb(folder) if "wandb" in reporters else nullcontext():
            yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


@contextmanager
def _run_of_wandb(folder: Path) -> Iterator[None]:
    """End the run that begins in the block; one that the user has begun goes on."""
    import wandb

    began = wandb.run is None
    if os.environ["WANDB_DIR"] == str(folder):
        folder.mkdir(parents=True, exist_ok=True)  # or it takes another one
    try:
        yield
    finally:
        if began:
            wandb.finish()


class ReportFigures(TrainerCallback):  # type: ignore[misc]
    """Hands the figures of methods, mixes and texts to the Trainer's log, and so to what it reports to.

    To be behind the callbacks that find them. Names are `pruning/sparsity`, `rank/mean`, `mix/<source>/share`,
    `perplexity/<text>` and so on.

    Args:
        trainer: whose log it is.
        callbacks: those of them that have a `history` and say what it is about (`history_of`) are reported.
    """

    def __init__(self, trainer: Trainer, callbacks: Sequence[Any]) -> None:
        self.trainer = trainer
        self.pruning = [callback for callback in callbacks if hasattr(callback, "history_of")]
        self.seen: dict[str, int] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:  # an earlier process has reported these
            self._news(state)
        self._report(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report(state, control)

    def _report(self, state: TrainerState, control: TrainerControl) -> None:
        if figures := self._news(state):
            wanted = control.should_log  # the Trainer's own log of this step, which ours would count as
            self.trainer.log(figures)
            control.should_log = wanted

    def _news(self, state: TrainerState) -> dict[str, float]:
        """Figures that have come since the last time."""
        sources = {callback.history_of: callback.history for callback in self.pruning} | {"": state.log_history}
        found: dict[str, float] = {}
        for name, rows in sources.items():
            for row in rows[self.seen.get(name, 0) :]:
                kept = {k: v for k, v in row.items() if k != "step"} if name else _measured(row)
                found |= flat(kept, name)
        self.seen = {name: len(rows) for name, rows in sources.items()}
        return found


def _measured(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry of the log holds that the Trainer did not report itself."""
    mix = {"mix": entry["mix"]["sources"]} if "mix" in entry else {}
    return mix | ({"perplexity": entry["perplexity"]} if "perplexity" in entry else {})


def flat(figures: Mapping[str, Any], name: str = "") -> dict[str, float]:
    """Numbers at any depth, by the path to them."""
    found: dict[str, float] = {}
    for key, value in figures.items():
        path = f"{name}/{key}" if name else key
        if isinstance(value, Mapping):
            found |= flat(value, path)
        elif isinstance(value, int | float):
            found[path] = value
    return found


def own_entries(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A Trainer's log without what `ReportFigures` added to it."""
    return [dict(entry) for entry in log if not any("/" in key for key in entry)]
