"""Training in rounds, before each of which the mix of sources is chosen anew (LoRAShear, Chen et al. 2023, Alg. 5).

1. Hold out a part of every source and measure the dense model's loss on it, once.
2. Before each round: measure the model in training, find out how much worse it is on each source, and draw the round's
   examples by `mixing.shares`.
3. Plain text is one stage, instructions are the next. A stage ends when its rounds are used up or the worst source has
   stopped improving; the rounds that it did not use go to the next one, and after the last one training ends.

A round is an epoch to the Trainer, so that optimizer, schedule, checkpoints and the order of data after a kill are the
Trainer's own: the schedule runs once over all steps. What each round was lies in the Trainer's log, from which a run
goes on. Stages, their lengths, rounds of a tenth of all steps and all numbers are ours; the paper gives none.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import CheckpointError, RecipeError
from secateur.recovery.examples import Example
from secateur.recovery.mixing import counts, degradation, drawn, rounds_by_stage, shares, stalled
from secateur.recovery.sources import Source, held_out_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.recovery.settings import RecoverySettings

ROUNDS = 10  # unless `round_steps` says otherwise
TEXT, INSTRUCTIONS, ALL = "text", "instructions", "all"
ANOTHER_MIX = (
    "the training to go on with had another mix, other sources or other rounds: give the options that it was begun "
    "with, or begin anew without --resume"
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Sources that are trained on together.

    Attributes:
        name: `text`, `instructions`, or `all`.
        sources: which.
        rounds: how many it may take, what earlier stages left over not counted.
    """

    name: str
    sources: Sequence[Source]
    rounds: int

    def worst(self, row: Row) -> float:
        """max_s D_s over the stage's sources, as measured before a round."""
        return max(float(row["sources"][source.name]["degradation"]) for source in self.sources)


def rounds_of(settings: RecoverySettings, steps: int) -> tuple[int, int]:
    """Steps of a round, and how many rounds a run of `steps` has."""
    length = min(settings.round_steps or math.ceil(steps / ROUNDS), steps)
    return length, math.ceil(steps / length)


def check_stages(sources: Sequence[Source], settings: RecoverySettings, steps: int) -> None:
    """Make sure that there is a round for every stage.

    Raises:
        RecipeError: text and instructions are to follow one another, and there is only one round.
    """
    length, rounds = rounds_of(settings, steps)
    if settings.mix != "uniform" and len({source.is_instructions for source in sources}) > rounds:
        raise RecipeError(
            f"text and instructions are trained on one after the other, and there is one round of {length} steps: give "
            "more --steps (recovery.steps) or fewer --round-steps (recovery.round_steps)"
        )


class Subset(Dataset[Example]):
    """The examples of the running round; as long for the Trainer as a whole round, though the last may be shorter."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.examples: list[Example] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Example:
        return self.examples[number % len(self.examples)]  # past the end only for a batch that is never trained on


class Rounds(TrainerCallback):  # type: ignore[misc]
    """Chooses what is trained on: the Trainer reads `data` in its order, which changes where a round ends.

    Args:
        sources: two or more.
        settings: of the recovery; `mix` is `uniform` or `dynamic`.
        steps: optimizer steps of the whole run.
        sequences: examples per optimizer step.
        pruned_at: step after which no more units go, if a method prunes meanwhile. Text and instructions then follow
            one another from the next round on, and are one stage until then: there is nothing to recover from before.

    Raises:
        RecipeError: there are two stages and only one round.
    """

    def __init__(
        self, sources: Sequence[Source], settings: RecoverySettings, steps: int, sequences: int, pruned_at: int = 0
    ) -> None:
        self.sources, self.settings, self.steps, self.sequences = sources, settings, steps, sequences
        check_stages(sources, settings, steps)
        self.round_steps, self.rounds = rounds_of(settings, steps)
        self.stages = self._stages(math.ceil(pruned_at / self.round_steps))
        self.dense: dict[str, float] = {}
        self.rows: list[Row] = []
        self.data = Subset(self.round_steps * sequences)

    def measure_dense(self, load: Callable[[], PreTrainedModel] | None) -> None:
        """Step 1, for a dynamic mix: the dense model is loaded, measured, and let go.

        Raises:
            RecipeError: nothing says which the dense model is.
        """
        if self.settings.mix != "dynamic":
            return
        if load is None:
            raise RecipeError("a dynamic mix compares with the dense model: name it with --dense (recovery.dense)")
        model = load()
        self.dense = self._losses(model)
        del model
        gc.collect()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step == 0:
            self._begin_round(state, model)
        else:
            self._go_on(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        step = state.global_step
        if step > self.steps or (step % self.round_steps and step != self.steps):
            return
        if not self._begin_round(state, model) and step < self.steps:
            control.should_training_stop = True
            control.should_save = False  # the Trainer would train on from a checkpoint made here

    def _begin_round(self, state: TrainerState, model: Any) -> bool:
        """Step 2; False if training has come to its end, of which the row tells why."""
        row = self._measured(model, state.global_step)
        stage = self._stage(row)
        if stage is None or state.global_step >= self.steps:
            row |= {"stage": None, "ended": "converged" if stage is None else "all steps done"}
        else:
            steps = min(self.round_steps, self.steps - state.global_step)
            row |= {"stage": stage.name, "steps": steps}
            self._share_out(row, stage, steps * self.sequences)
            self.rows.append(row)
            self._fill()
        state.log_history.append({"step": state.global_step, "mix": row})
        self._tell(row)
        return row["stage"] is not None

    def _measured(self, model: Any, step: int) -> Row:
        """Losses on every source's held-out part, and degradations where the dense model's are known."""
        found: dict[str, Row] = {}
        for source, now in zip(self.sources, self._losses(model).values(), strict=True):
            figures: Row = {"loss": now, "held_out": len(source.held_out), "share": 0.0, "examples": 0}
            if self.dense:
                dense = self.dense[source.name]
                figures |= {"dense_loss": dense, "degradation": degradation(now, dense)}
            found[source.name] = figures
        return {"round": len(self.rows) + 1, "step": step, "sources": found}

    def _losses(self, model: Any) -> dict[str, float]:
        batch = self.settings.micro_batch_size
        return {source.name: held_out_loss(model, source, batch) for source in self.sources}

    def _stages(self, pruning: int) -> list[Stage]:
        """Step 3; a uniform mix has one stage.

        Args:
            pruning: rounds in which units still go.
        """
        kinds = {False: TEXT, True: INSTRUCTIONS}
        parts = {name: [s for s in self.sources if s.is_instructions == kind] for kind, name in kinds.items()}
        parts = {name: sources for name, sources in parts.items() if sources}
        if self.settings.mix == "uniform":
            return [Stage(ALL, self.sources, self.rounds)]
        before = min(pruning, self.rounds - len(parts)) if len(parts) > 1 else 0
        sizes = [sum(len(s.train) for s in sources) for sources in parts.values()]
        lengths = rounds_by_stage(self.rounds - before, sizes)
        first = [Stage(ALL, self.sources, before)] if before else []
        return first + [Stage(name, sources, n) for (name, sources), n in zip(parts.items(), lengths, strict=True)]

    def _stage(self, now: Row) -> Stage | None:
        """The stage of the next round, by what was measured before earlier rounds and now; None after the last."""
        if not self.rows:
            return self.stages[0]
        number = [stage.name for stage in self.stages].index(self.rows[-1]["stage"])
        stage, is_last = self.stages[number], number + 1 == len(self.stages)
        done = [row for row in self.rows if row["stage"] == stage.name]
        used_up = not is_last and len(done) >= stage.rounds
        if used_up or (self.dense and stalled([stage.worst(row) for row in [*done, now]], self.settings.patience)):
            return None if is_last else self.stages[number + 1]
        return stage

    def _share_out(self, row: Row, stage: Stage, total: int) -> None:
        """Add to a row what share each source of a stage has, and how many examples these are."""
        sizes = [len(source.train) for source in stage.sources]
        measured = [row["sources"][source.name] for source in stage.sources]
        wanted = [1 / len(sizes)] * len(sizes)
        if self.dense:
            wanted = shares([figures["degradation"] for figures in measured], sizes, self.settings.balance)
        for figures, share, number in zip(measured, wanted, counts(wanted, total), strict=True):
            figures |= {"share": share, "examples": number}

    def _fill(self) -> None:
        """Draw the examples of the last row's round, and shuffle them."""
        *earlier, row = self.rows
        seed, examples = self.settings.seed, []
        for place, source in enumerate(self.sources):
            before = sum(r["sources"][source.name]["examples"] for r in earlier)
            number = row["sources"][source.name]["examples"]
            examples += [source.train[i] for i in drawn(len(source.train), before, number, (seed, 0, place))]
        order = np.random.default_rng((seed, 1, len(earlier))).permutation(len(examples))
        self.data.examples = [examples[i] for i in order]

    def _go_on(self, state: TrainerState) -> None:
        """Take up the round in which the checkpoint was made that the Trainer goes on from."""
        found = [entry["mix"] for entry in state.log_history if "mix" in entry]
        self.rows = [row for row in found if row["stage"] is not None]
        names = [source.name for source in self.sources]
        fits = bool(self.rows) and state.global_step <= self.rows[-1]["step"] + self.rows[-1]["steps"]
        fits = fits and all(list(row["sources"]) == names for row in self.rows)
        if not fits or any(row["step"] != i * self.round_steps for i, row in enumerate(self.rows)):
            raise CheckpointError(ANOTHER_MIX)
        first = self.rows[0]["sources"]
        self.dense = {name: figures["dense_loss"] for name, figures in first.items() if "dense_loss" in figures}
        self._fill()

    def _tell(self, row: Row) -> None:
        """One line on standard error."""
        head = f"mix, round {row['round']} of {self.rounds} ({row['stage']})" if row["stage"] else row["ended"]
        parts = "; ".join(_in_words(name, figures) for name, figures in row["sources"].items())
        print(f"- step {row['step']} of {self.steps}: {head}: {parts}", file=sys.stderr, flush=True)


def _in_words(name: str, figures: Row) -> str:
    against_dense = "degradation" in figures
    told = f"{figures['degradation']:.1%} worse than dense" if against_dense else f"{figures['loss']:.3f} nats"
    return f"{name} {told}" + (f", share {figures['share']:.0%}" if figures["examples"] else "")


def check_pooled(checkpoint: Path | str) -> None:
    """Make sure that the run which left a training checkpoint pooled its data.

    Raises:
        CheckpointError: it was trained in rounds.
    """
    from transformers.trainer import TRAINER_STATE_NAME

    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if any("mix" in entry for entry in state.log_history):
        raise CheckpointError(ANOTHER_MIX)


def mix_record(log: Sequence[Mapping[str, Any]], settings: RecoverySettings) -> dict[str, Any] | None:
    """What `results.json` holds of a mix, from the Trainer's log; None where the log tells of none.

    Returns:
        The settings that matter; `rounds` in their order, each with its `step` (steps done before it), `stage`, `steps`
        and `sources`; and what was measured in the `end`, with the reason that training `ended`.
    """
    rows = [entry["mix"] for entry in log if "mix" in entry]
    if not rows:
        return None
    facts = {"kind": settings.mix, "balance": settings.balance, "patience": settings.patience}
    return {
        **(facts if settings.mix == "dynamic" else {"kind": settings.mix}),
        "rounds": [row for row in rows if row["stage"] is not None],
        "end": next((row for row in rows if row["stage"] is None), None),
    }
