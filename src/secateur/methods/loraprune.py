"""LoRAPrune: structured pruning meets low-rank parameter-efficient fine-tuning (Zhang et al. 2023, arXiv:2305.18403).

| paper | here |
| --- | --- |
| I, importance from LoRA weights and their gradients (3.2) | `importance.lora_guided.LoraGuided` |
| G, the groups of connected weights | `Group`, from the traced computation; only those inside blocks |
| moving average of the importance, lambda = 0.9 (Eq. 11) | `ema` |
| r_t, cubic schedule over the run (3.3) | `schedules.cubic`: `initial`, `warmup`, `cooldown` |
| mask after every few steps | `frequency` |

1. Before each optimizer step, after accumulation and clipping: score every unit that is left, update the average.
2. Every `frequency` steps: allocate the sparsity of the schedule among the units that are left, mask what goes. What is
   masked never returns. At the end of the ramp the final sparsity is met exactly as `allocate` meets it.
3. Every `compact_every` steps: remove what is masked from weights, factors and the optimizer's moments.
4. In the end: cut, merge, and compare with the masked model.

Deviations: the budget is a share of *parameters* unless `unit_sparsity` asks for the paper's share of units; inputs of
the matrices that read a unit are masked instead of its outputs, which also covers biases; a KV group goes with the
queries it serves; compaction is ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.allocation import Budget, allocate
from secateur.errors import BudgetError, CheckpointError, PlanError
from secateur.importance.lora_guided import LoraGuided, TrueGradients, Variant, check_adapted
from secateur.packed import ready_to_train
from secateur.plan import PruningPlan
from secateur.recovery.mixed_precision import loss_scale, unscaled
from secateur.schedules import cubic
from secateur.surgery import select
from secateur.surgery.compaction import check_unpacked
from secateur.surgery.live import LiveModel

STATE = "loraprune.safetensors"  # beside the Trainer's own files in a checkpoint


@dataclass(frozen=True)
class LoRAPruneSettings:
    """Settings of one run; defaults are the reference's, except that the budget counts parameters.

    Attributes:
        budget: what must be removed in the end.
        kinds: what to prune; FFN channels and heads if empty.
        variant: of the importance: `lora`, `grad` or `magnitude`.
        normalise: see `LoraGuided`.
        ema: weight of the past in the moving average.
        frequency: optimizer steps between two looks at the masks.
        initial: sparsity before the ramp.
        warmup, cooldown: shares of the run before and after the ramp.
        ranking: `local` removes the same share everywhere, `global` the least important per parameter.
        uniform: the same widths in every layer, so that stock classes load the result.
        protect: names of groups to leave whole, such as those a knowledge distribution finds most sensitive.
        compact_every: optimizer steps between two compactions; None masks until the end.
    """

    budget: Budget
    kinds: tuple[str, ...] = ()
    variant: Variant = "lora"
    normalise: bool = True
    ema: float = 0.9
    frequency: int = 10
    initial: float = 0.0
    warmup: float = 0.1
    cooldown: float = 0.1
    ranking: Literal["local", "global"] = "local"
    uniform: bool = True
    round_to: int = 1
    protect_first: int = 0
    protect_last: int = 0
    protect: tuple[str, ...] = ()
    compact_every: int | None = None


@dataclass(frozen=True)
class LoRAPruneResult:
    """What a run leaves.

    Attributes:
        model: cut, with the adapters merged.
        plan: units kept.
        difference: largest difference of its logits from those of the masked model.
        shares: what went of each kind.
        left_whole: family -> why it was not pruned.
    """

    model: PreTrainedModel
    plan: PruningPlan
    difference: float
    shares: Mapping[str, Any]
    left_whole: Mapping[str, str]


class LoRAPrune(TrainerCallback):  # type: ignore[misc]
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

    def __init__(self, sparsity: float | None = None, **settings: Any) -> None:
        if (sparsity is None) == ("budget" not in settings):
            raise BudgetError("say how much to remove, once: LoRAPrune(sparsity=0.5) or LoRAPrune(budget=Budget(...))")
        budget = settings.pop("budget", None) or Budget(sparsity)
        self.settings = LoRAPruneSettings(budget, **settings)
        self._share(0, 1)  # checks the schedule
        self.criterion = LoraGuided(self.settings.variant, self.settings.normalise)
        self.average: dict[str, Tensor] = {}
        self.gradients = TrueGradients()
        self.history: list[dict[str, float]] = []
        self.live: LiveModel | None = None
        self.left_whole: dict[str, str] = {}
        self.shares: dict[str, Any] = {}

    def prepare(self, model: Any, checkpoint: Path | str | None = None) -> None:
        """Find out what can be pruned, and bring a model to where the run was that left `checkpoint`.

        The Trainer's start does this by itself. Call it before the Trainer is made to resume a run with compaction,
        whose checkpoint holds factors of fewer rows and columns than a fresh model.

        Raises:
            PlanError: nothing can be pruned, or nothing of a kind asked for by name; the adapters cannot guide it; or
                packed weights would have to be compacted.
        """
        live = LiveModel(model)
        if self.settings.compact_every:
            check_unpacked(live.base)
        kinds = self.settings.kinds or live.groups.kinds_in_blocks()
        can = live.possible(kinds, uniform=self.settings.uniform)
        named, uniform = self.settings.kinds, self.settings.uniform
        chosen, refused = select(live.blank, live.groups, kinds, can, named=named, uniform=uniform)
        check_adapted(live.base, chosen)
        self.live, self.left_whole, self.can = live, refused, can
        self.average = {g.name: torch.zeros(g.units) for g in chosen}
        if checkpoint is not None:
            self._load(Path(checkpoint) / STATE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if args.world_size > 1 and self.settings.compact_every:
            raise PlanError("compaction changes parameters under distributed training's feet: leave out compact_every")
        if self.live is None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.prepare(model, checkpoint if state.global_step else None)
        elif self.live.model is not model:
            raise PlanError("this LoRAPrune was prepared for another model; make a new one for this training")
        assert self.live is not None
        if self.settings.variant == "grad":
            self.gradients.begin(self.live.base, [self.live.groups.named(name) for name in self.average])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        ready_to_train(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Step 1."""
        assert self.live is not None
        if self._done(state.global_step, state.max_steps) or not unscaled(optimizer):
            self.gradients.found.clear()
            return
        live, past = self.live, self.settings.ema
        gradients = self.gradients.taken(loss_scale(optimizer))
        now = self.criterion.scores(live.base, live.built, live.masked.kept, list(self.average), gradients)
        kept = live.plan.kept
        for name, score in now.items():
            left = list(kept[name]) if name in kept else slice(None)
            self.average[name][left] = past * self.average[name][left] + (1 - past) * score

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Steps 2 and 3."""
        assert self.live is not None
        step, steps, every = state.global_step, state.max_steps, self.settings
        last = self._done(step, steps) and not self._done(step - 1, steps)
        due = step % every.frequency == 0 or (step == 1 and every.initial > 0)
        if last or (due and not self._done(step, steps)):
            self._prune_to(self._share(step, steps), settle=last)
            self.history.append({"step": step, "share": self._share(step, steps), "sparsity": self.sparsity})
        if every.compact_every and (last or step % every.compact_every == 0):
            self.live.compact(optimizer)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            self._save(folder / STATE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.gradients.end()

    def finish(self) -> LoRAPruneResult:
        """Step 4: the cut and merged model.

        Raises:
            PlanError: the run has not reached its sparsity, or the cut model is not the masked one.
        """
        if self.live is None or not self.history:
            raise PlanError("nothing has been pruned yet: train with this callback first")
        if (reached := self.history[-1]["share"]) < (final := self._share(1, 1)):
            raise PlanError(f"training ended at a share of {reached:.4g}, before the {final:g} asked for: let it go on")
        model, difference = self.live.assembled()
        plan = self.live.plan
        facts = asdict(self.settings) | {"budget": self.settings.budget.as_dict(), "sparsity": self.sparsity}
        return LoRAPruneResult(
            model, PruningPlan(plan.kept, plan.units, {"loraprune": facts}), difference, self.shares, self.left_whole
        )

    def save_adapter(self, folder: Path) -> None:
        """Write the cut adapter alone as a PEFT folder; it belongs to the base cut by the same plan, nothing merged."""
        assert self.live is not None
        folder.mkdir(parents=True)
        (name,) = self.live.model.active_adapters
        self.live.model.peft_config[name].save_pretrained(str(folder))
        save_file(self.live.adapter(), folder / "adapter_model.safetensors", {"format": "pt"})

    @property
    def sparsity(self) -> float:
        """Share of the base's parameters that are masked or removed."""
        assert self.live is not None
        groups = self.live.groups
        return 1 - groups.remaining_parameters(self.live.plan.kept) / groups.total_parameters

    def _share(self, step: int, steps: int) -> float:
        """The budget's share after `step` of `steps`."""
        s = self.settings
        final = s.budget.param_sparsity if s.budget.unit_sparsity is None else s.budget.unit_sparsity
        assert final is not None
        return cubic(step, steps, final, s.initial, warmup=s.warmup, cooldown=s.cooldown)

    def _done(self, step: int, steps: int) -> bool:
        """Whether the ramp has ended."""
        return step >= steps * (1 - self.settings.cooldown)

    def _prune_to(self, share: float, *, settle: bool) -> None:
        """Mask more, until this share of the uncut model is gone; `settle` as for `allocate`."""
        assert self.live is not None
        s, before = self.settings, self.live.plan
        budget = Budget(share) if s.budget.unit_sparsity is None else Budget(unit_sparsity=share)
        plan = allocate(
            self.live.groups,
            self.average,
            budget,
            ranking=s.ranking,
            uniform=s.uniform,
            round_to=s.round_to,
            protect_first=s.protect_first,
            protect_last=s.protect_last,
            protect=s.protect,
            feasible=self.can.feasible,
            ties=self.can.ties,
            multiples=self.can.multiples,
            beyond=before,
            settle=settle,
        )
        self.shares = plan.provenance["allocation"]["shares"]
        self.live.mask(PruningPlan(plan.kept, plan.units))

    def _save(self, file: Path) -> None:
        """Averages, and what is removed and masked."""
        assert self.live is not None
        plans = {"removed": self.live.removed.to_json(), "plan": self.live.plan.to_json()}
        save_file(self.average, file, {**plans, "history": json.dumps([self.history, self.shares])})

    def _load(self, file: Path) -> None:
        assert self.live is not None
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, so this run of LoRAPrune cannot go on; if its checkpoint lies elsewhere, call "
                "prepare(model, checkpoint) before the Trainer is made"
            )
        with safe_open(file, "pt") as stored:
            facts = stored.metadata()
            self.average = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        self.history, self.shares = json.loads(facts["history"])
        self.live.restore(PruningPlan.from_json(facts["removed"]), PruningPlan.from_json(facts["plan"]))
