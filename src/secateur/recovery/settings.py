"""Settings of a recovery run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.errors import RecipeError
from secateur.recovery.reporting import Reporter

Mix = Literal["proportional", "uniform", "dynamic"]
AlsoTrained = Literal["norms", "embeddings"]


@dataclass(frozen=True)
class Distillation:
    """What is learnt from the dense model, beside the text (Hinton et al. 2015, arXiv:1503.02531).

    loss = (1 - weight) LM + weight temperature^2 KL(dense || model) + hidden E, each a mean over the labelled tokens.

    Attributes:
        weight: of the divergence, in (0, 1]; the rest is that of the loss on the text.
        temperature: logits of both models are divided by it.
        top_k: take so many of the dense model's likeliest tokens, and the others together as one; 0 takes all.
        hidden: weight of the distance of hidden states (`divergence.hidden_error`), whose width must be the same.
        layers: for `hidden` where whole layers went: numbers of the dense model's layers that are left.
        cache: folder for what the dense model says of every training example, so that it need not be in memory while
            the other one trains; None asks it anew at every step.

    Raises:
        RecipeError: a value is out of range, or the cache is asked to hold what it does not.
    """

    weight: float = 0.9
    temperature: float = 1.0
    top_k: int = 0
    hidden: float = 0.0
    layers: Sequence[int] = ()
    cache: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1 or self.temperature <= 0 or self.top_k < 0 or self.hidden < 0:
            raise RecipeError(
                f"distillation: weight {self.weight} must be in (0, 1], temperature {self.temperature} above 0, top_k "
                f"{self.top_k} and hidden {self.hidden} not below 0"
            )
        if self.cache is not None and (wrong := not_cached(self.top_k, self.hidden)):
            raise RecipeError(wrong)


def not_cached(top_k: int, hidden: float) -> str | None:
    """Why a cache cannot hold what distillation needs; None if it can."""
    if hidden:
        return "a teacher cache holds no hidden states: leave out hidden (--distill-hidden) or the cache"
    if not top_k:
        return "a teacher cache of whole distributions would be huge: give top_k, such as 64 (--distill-top-k)"
    return None


@dataclass(frozen=True)
class RecoverySettings:
    """Settings of a recovery run; defaults are LLM-Pruner's published recipe.

    Attributes:
        rank: of the LoRA factors.
        alpha: numerator of the LoRA scale `alpha / rank`.
        dropout: on the adapters' input; none where stacked experts are adapted, for which peft knows no dropout.
        targets: module names, or what they end with; None adapts whatever can be (`all_targets`).
        also_train: what trains whole beside the adapters, at a tenth of their rate: `norms`, `embeddings` (and the
            output head).
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
        full_weights: train all weights instead of adapters, for which `rank` to `also_train` are.
        distill: learn from the dense model, too; None learns from the text alone.
        report_to: any of tensorboard, wandb, trackio, through the Trainer's own reports.
        seed: of initialisation, order and dropout.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: Sequence[str] | None = None
    also_train: Sequence[AlsoTrained] = ()
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
    full_weights: bool = False
    distill: Distillation | None = None
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
