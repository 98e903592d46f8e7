"""Hooks into the Trainer: stop on a broken loss, tell losses, and measure texts while training."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import NonFiniteError


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
