"""LoRAPrune: structured pruning meets low-rank parameter-efficient fine-tuning (Zhang et al. 2023, arXiv:2305.18403).

| paper | here |
| --- | --- |
| I, importance from LoRA weights and their gradients (3.2) | `importance.lora_guided.LoraGuided` |
| G, the groups of connected weights | `Group`, from the traced computation; only those inside blocks |
| moving average of the importance, lambda = 0.9 (Eq. 11) | `recovery.guided.GuidedAverage`, `ema` |
| r_t, cubic schedule over the run (3.3) | `schedules.cubic`: `initial`, `warmup`, `cooldown` |
| mask after every few steps | `frequency` |

1. Before each optimizer step, after accumulation and clipping: score every unit that is left, update the average.
2. Every `frequency` steps: allocate the sparsity of the schedule among the units that are left, mask what goes. What is
   masked never returns. At the end of the ramp the final sparsity is met exactly as `allocate` meets it.
3. Every `compact_every` steps: remove what is masked from weights, factors and the optimizer's moments.
4. In the end: cut, merge, and compare with the masked model (`finish`; in `recovery/gradual.py`, like all that is not
   LoRAPrune's own).

Deviations: the budget is a share of *parameters* unless `unit_sparsity` asks for the paper's share of units; inputs of
the matrices that read a unit are masked instead of its outputs, which also covers biases; a KV group goes with the
queries it serves; compaction is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from secateur.errors import BudgetError, PlanError
from secateur.importance.lora_guided import Variant, check_adapted
from secateur.packed import refuse_packed
from secateur.recovery.gradual import GradualPruning, GradualSettings, budget_of
from secateur.recovery.guided import GuidedAverage
from secateur.schedules import cubic
from secateur.surgery.compaction import check_unpacked
from secateur.surgery.live import LiveModel


@dataclass(frozen=True)
class LoRAPruneSettings(GradualSettings):
    """Settings of one run; defaults are the reference's, except that the budget counts parameters.

    Attributes:
        variant: of the importance: `lora`, `grad` or `magnitude`.
        normalise: see `LoraGuided`.
        ema: weight of the past in the moving average.
        frequency: optimizer steps between two looks at the masks.
        initial: sparsity before the ramp.
        warmup, cooldown: shares of the run before and after the ramp.
        compact_every: optimizer steps between two compactions; None masks until the end.
    """

    variant: Variant = "lora"
    normalise: bool = True
    ema: float = 0.9
    frequency: int = 10
    initial: float = 0.0
    warmup: float = 0.1
    cooldown: float = 0.1
    compact_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("variant", get_args(Variant))
        if not 0 <= self.ema < 1 or self.frequency < 1 or (self.compact_every is not None and self.compact_every < 1):
            raise BudgetError(
                f"ema {self.ema}, frequency {self.frequency}, compact_every {self.compact_every}: expected an average "
                "in [0, 1), and steps of at least 1"
            )


class LoRAPrune(GradualPruning):
    """Prunes the base of a `PeftModel` while any transformers or TRL trainer trains its LoRA adapters.

    >>> pruning = LoRAPrune(sparsity=0.5)
    >>> trainer.add_callback(pruning)
    >>> trainer.train()
    >>> small = pruning.finish().model

    Args:
        sparsity: share of all parameters of the base to remove; or give a `budget` in `settings`.
        settings: any of `LoRAPruneSettings`.

    Raises:
        BudgetError: no budget, or two, or a schedule that does not ascend to it.
    """

    name = "loraprune"
    settings: LoRAPruneSettings

    def __init__(self, sparsity: float | None = None, **settings: Any) -> None:
        super().__init__(LoRAPruneSettings(budget_of("LoRAPrune", sparsity, settings), **settings))
        self._share(0, 1)  # checks the schedule
        self.average = GuidedAverage(self.settings.variant, self.settings.normalise, self.settings.ema)
        self._state_checked = False

    def last_cut(self, steps: int) -> int:
        return next(step for step in range(steps + 1) if self._done(step, steps))

    def check(self, live: LiveModel, chosen: Any) -> None:
        """Refuse adapters that cannot guide, weights without gradients, and modules that cannot be compacted."""
        check_adapted(live.base, chosen)
        if self.settings.variant == "grad":
            refuse_packed(live.base, "scored by their gradients", PlanError)
        if self.settings.compact_every:
            check_unpacked(live.base)
            live.check_compaction(chosen)
        self.average.prepare(live, tuple(g.name for g in chosen))

    def tensors(self) -> dict[str, Tensor]:
        return self.average.values

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        self.average.restore(tensors)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if args.world_size > 1 and self.settings.compact_every:
            raise PlanError("compaction changes parameters under distributed training's feet: leave out compact_every")
        if args.world_size > 1 and self.settings.variant == "grad":
            raise PlanError("gradients of frozen weights are not shared among processes: take the variant lora")
        super().on_train_begin(args, state, control, model)
        assert self.live is not None
        self.average.begin(self.live)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Step 1."""
        assert self.live is not None
        if self._done(state.global_step, state.max_steps):
            self.average.skip()
        else:
            self.average.update(self.live, optimizer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Steps 2 and 3."""
        assert self.live is not None
        step, steps, every = state.global_step, state.max_steps, self.settings
        if every.compact_every and optimizer.state and not self._state_checked:  # which is made with the first step
            self.live.check_state(self.candidates, optimizer)
            self._state_checked = True
        last = self._done(step, steps) and not self._done(step - 1, steps)
        due = step % every.frequency == 0 or (step == 1 and every.initial > 0)
        if last or (due and not self._done(step, steps)):
            share = self._share(step, steps)
            self.live.mask(self.planned(share, self.average.values, settle=last))
            self.note(step, share)
        if every.compact_every and (last or step % every.compact_every == 0):
            self.live.compact(optimizer)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.average.end()

    def _share(self, step: int, steps: int) -> float:
        """The budget's share after `step` of `steps`."""
        s = self.settings
        return cubic(step, steps, s.final, s.initial, warmup=s.warmup, cooldown=s.cooldown)

    def _done(self, step: int, steps: int) -> bool:
        """Whether the ramp has ended."""
        return step >= steps * (1 - self.settings.cooldown)
