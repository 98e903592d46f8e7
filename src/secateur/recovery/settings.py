"""Settings of a recovery run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.recovery.reporting import Reporter

Mix = Literal["proportional", "uniform", "dynamic"]


@dataclass(frozen=True)
class RecoverySettings:
    """Settings of a recovery run; defaults are LLM-Pruner's published recipe.

    Attributes:
        rank: of the LoRA factors.
        alpha: numerator of the LoRA scale `alpha / rank`.
        dropout: on the adapters' input; none where stacked experts are adapted, for which peft knows no dropout.
        targets: module names, or what they end with; None adapts whatever can be (`all_targets`).
        learning_rate: peak, after a linear warm-up; falls linearly to 0.
        epochs: passes over the data, unless `steps` says otherwise.
        steps: optimizer steps.
        batch_size: sequences per optimizer step, accumulated from micro-batches.
        micro_batch_size: sequences per forward pass.
        seq_len: tokens per example.
        warmup_steps: at most a tenth of all steps.
        train_on_inputs: learn the prompt of instructions too.
        eval_every: steps between evaluations, None for none.
        save_every: steps between checkpoints.
        gradient_checkpointing: recompute activations to save memory.
        mix: `proportional` pools all examples; `uniform` takes the same number from every source in each round;
            `dynamic` favours the sources on which the model is worst, compared with the dense one (`recovery.rounds`).
        round_steps: optimizer steps of a round; a tenth of all if not given.
        balance: part of a dynamic mix that follows the sizes of the sources.
        patience: rounds without improvement after which a stage of a dynamic mix ends; 0 never ends one early.
        report_to: any of tensorboard, wandb, trackio, through the Trainer's own reports.
        seed: of initialisation, order and dropout.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: Sequence[str] | None = None
    learning_rate: float = 1e-4
    epochs: float = 2.0
    steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int = 4
    seq_len: int = 256
    warmup_steps: int = 100
    train_on_inputs: bool = False
    eval_every: int | None = None
    save_every: int = 200
    gradient_checkpointing: bool = False
    mix: Mix = "proportional"
    round_steps: int | None = None
    balance: float = 0.5
    patience: int = 2
    report_to: Sequence[Reporter] = ()
    seed: int = 42

    @property
    def sequences(self) -> int:
        """Sequences per forward pass: a micro-batch is no larger than a batch."""
        return min(self.micro_batch_size, self.batch_size)

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        return max(1, self.batch_size // self.sequences)

    def steps_for(self, examples: int) -> int:
        """Optimizer steps of a run on so many examples."""
        return self.steps or max(1, int(self.epochs * examples / (self.sequences * self.accumulation)))
