"""PrunedLoRA: gradient-based structured pruning for low-rank adaptation in fine-tuning (arXiv:2510.00192).

| paper | here |
| --- | --- |
| r_init, r_target | the rank of the `LoraConfig`; `target_rank` |
| K1, steps between two removals; K2, components removed each time | `every`, `components` of `PrunedLoRASettings` |
| the criterion and the update of what stays | `importance.components.ComponentCriterion`, `PAPER` for the paper's |
| alpha = r, so that the scale is 1 at any rank | `keep="scale"`: each module keeps its scale, whatever it is |

1. Before each optimizer step, after accumulation and clipping: take the gradients of A and B into the averages.
2. Every `every` steps: remove as many components as the schedule wants, chosen by the criterion, and change the others.
   Without `components` the rank falls on a cubic curve and reaches the target before the run ends, whatever its length.
3. What is removed leaves A, B, gradients and the optimizer's moments at once, so that it cannot come back.

Deviations: the first removal comes after `every` steps or the warm-up (the code's comes at step 0, when B = 0 and A has
no gradient); alpha stays as ranks fall, so that the scale grows and small ranks take larger steps, unless
`keep="scale"`; with `scope="global"` the modules share one budget; the published code never slices. Under distributed
training components are set to zero with their moments, and leave when training ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import CheckpointError, NonFiniteError, PlanError
from secateur.importance.components import ComponentCriterion
from secateur.recovery.mixed_precision import unscaled
from secateur.surgery.component_pruning import Pruner
from secateur.surgery.rank_schedule import PrunedLoRASettings, part, record

STATE = "prunedlora.safetensors"  # beside the Trainer's own files in a checkpoint
PAPER = ComponentCriterion(
    ema=0.0, damping=1e-6, relative=False, newton=1.0, factors="both", joint=False, balance=False
)
PRESENT = "present"


class PrunedLoRA(TrainerCallback):  # type: ignore[misc]
    """Prunes the LoRA adapter of a `PeftModel` while any transformers or TRL trainer trains it.

    >>> trainer.add_callback(PrunedLoRA(target_rank=16))
    >>> trainer.train()
    >>> trainer.save_model("adapter")  # an ordinary PEFT folder of rank 16

    Args:
        target_rank: of every module in the end.
        settings: any of `PrunedLoRASettings`.

    Raises:
        BudgetError: a rank, interval or share is out of range.
    """

    history_of: ClassVar[str] = "rank"

    def __init__(self, target_rank: int, **settings: Any) -> None:
        self.settings = PrunedLoRASettings(target_rank, **settings)
        self.history: list[dict[str, Any]] = []
        self.pruner: Pruner | None = None

    def prepare(self, model: Any, checkpoint: Path | str | None = None) -> None:
        """Look at the adapter, and bring a model to the ranks of the run that left `checkpoint`.

        The Trainer's start does this by itself, but for a run to resume: call it before `trainer.train(...)` then.

        Raises:
            PlanError: there is no adapter, or its components cannot be removed.
            CheckpointError: the checkpoint is not of such a run.
        """
        self.pruner = Pruner(model, self.settings.criterion, self.settings.adapter, self.settings.keep)
        self.history = [record(0, self.pruner.ranks)]
        if checkpoint is not None:
            self._load(Path(checkpoint) / STATE)

    def check_steps(self, steps: int) -> None:
        """Make sure that the target is reached in a run of so many steps; after `prepare`.

        Raises:
            BudgetError: it is not, or was from the start, so that there is nothing to remove.
        """
        assert self.pruner is not None
        self.settings.check_larger(self.pruner.initial)
        self.settings.check_reach(self.pruner.initial, steps)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        for what in ("fsdp", "deepspeed", "load_best_model_at_end"):
            if getattr(args, what, None):
                raise PlanError(f"{what} does not go with components that leave the adapter in training: switch it off")
        if self.pruner is None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.prepare(model, checkpoint if state.global_step else None)
        assert self.pruner is not None
        if self.pruner.parts.model is not model:
            raise PlanError("this PrunedLoRA was prepared for another model; make a new one for this training")
        self.check_steps(state.max_steps)
        self.pruner.compact = args.world_size == 1
        self.pruner.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Steps 1 to 3."""
        pruner = self.pruner
        assert pruner is not None
        if self.reached or not unscaled(optimizer):
            return
        step = state.global_step + 1
        due = self.settings.due(step, state.max_steps)
        if due or self.settings.criterion.ema > 0:
            pruner.observe()
        if due and (counts := self.settings.wanted(pruner, step, state.max_steps)):
            self.history.append(record(step, cost=pruner.remove(counts, optimizer), ranks=pruner.ranks))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and args.should_save:
            self._save(folder / STATE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        assert self.pruner is not None
        self.pruner.settle(optimizer)
        self.pruner.end()

    @property
    def reached(self) -> bool:
        """Whether the target rank is."""
        assert self.pruner is not None
        return self.settings.reached(self.pruner.ranks)

    def finish(self) -> dict[str, int]:
        """The rank of every module.

        Raises:
            PlanError: training ended before the target rank was reached.
        """
        if self.pruner is None:
            raise PlanError("nothing has been pruned yet: train with this callback first")
        if not self.reached:
            mean = self.history[-1]["mean"]
            raise PlanError(
                f"training ended at an average rank of {mean:.4g}, before the target of {self.settings.target_rank}: "
                "let it go on, or prune the adapter as it is (prune_adapter)"
            )
        return self.pruner.ranks

    def _save(self, file: Path) -> None:
        """Averages, and which components are left of those that the checkpoint's adapter stores."""
        assert self.pruner is not None
        tensors = {f"{name}|{PRESENT}": index for name, index in self.pruner.present.items()}
        for name, state in self.pruner.averages.items():
            tensors |= {f"{name}|{key}": tensor.contiguous() for key, tensor in state.items()}
        parts = self.pruner.parts
        facts = {"initial": self.pruner.initial, "stored": parts.ranks, "scales": parts.scales, "history": self.history}
        save_file(tensors, file, {key: json.dumps(value) for key, value in facts.items()})

    def _load(self, file: Path) -> None:
        assert self.pruner is not None
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, so this run of PrunedLoRA cannot go on; if its checkpoint lies elsewhere, call "
                "prepare(model, checkpoint) before training goes on"
            )
        with safe_open(file, "pt") as stored:
            facts = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        pruner = self.pruner
        if json.loads(facts["initial"]) != pruner.initial:
            raise CheckpointError(f"{file} is of a run with another adapter: other modules, or another initial rank")
        pruner.parts.shrink_to(json.loads(facts["stored"]))
        pruner.parts.set_scales(json.loads(facts["scales"]))
        for key, tensor in tensors.items():
            name, _, what = key.rpartition("|")
            if what == PRESENT:
                pruner.present[name] = tensor
            else:
                pruner.averages[name][what] = tensor.to(pruner.parts.up(name).device)
        self.history = json.loads(facts["history"])


def prune_adapter(
    model: Any, batches: Sequence[Tensor | Mapping[str, Tensor]], settings: PrunedLoRASettings, events: int = 8
) -> list[dict[str, Any]]:
    """Prune a trained adapter to the target rank in place, with gradients on calibration data, and without training.

    Before each of several removals, the gradients of all batches are taken anew, with the model in evaluation mode: no
    dropout, and no recomputed activations.

    Args:
        model: a `PeftModel` whose adapter can be trained (`is_trainable=True`).
        batches: token ids, each [sequences, length], where every token but the first of a sequence is a label; or what
            the model is called with to give a loss (`input_ids`, `attention_mask`, `labels`).
        settings: the schedule has no part: equal numbers go each time.
        events: removals.

    Returns:
        Ranks after each removal, as in `PrunedLoRA.history`.

    Raises:
        PlanError: the components cannot be removed, or the adapter is frozen.
        BudgetError: the adapter has the target rank already.
        NonFiniteError: a loss or score is NaN or infinite.
    """
    pruner = Pruner(model, settings.criterion, settings.adapter, settings.keep)
    settings.check_larger(pruner.initial)
    factors = [f for n in pruner.initial for f in (pruner.parts.up(n), pruner.parts.down(n))]
    if not all(f.requires_grad for f in factors):
        raise PlanError("the adapter is frozen, so it has no gradients: load it with is_trainable=True")
    history = [record(0, pruner.ranks)]
    with _scoring(model, pruner):
        for event in range(1, events + 1):
            _measure(model, batches, pruner, factors)
            if counts := settings.excess(pruner, part(event / events)):
                cost = pruner.remove(counts)
                history.append(record(event, pruner.ranks, cost))
    for factor in factors:
        factor.grad = None
    return history


@contextmanager
def _scoring(model: Any, pruner: Pruner) -> Iterator[None]:
    """Evaluation mode for all modules, and each its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    pruner.begin()  # later than eval(), after which DoRA would remember B A
    try:
        yield
    finally:
        pruner.end()
        for module, mode in modes.items():
            module.training = mode  # train(mode) would set all modules below, too


def _measure(
    model: Any, batches: Sequence[Tensor | Mapping[str, Tensor]], pruner: Pruner, factors: Sequence[Tensor]
) -> None:
    """The averages over all batches, each of the same weight, and the mean gradients."""
    means = [torch.zeros_like(factor) for factor in factors]
    for average in pruner.averages.values():
        average.clear()
    for number, batch in enumerate(batches):
        for factor in factors:
            factor.grad = None
        _backward(model, batch)
        pruner.observe(number / (number + 1))
        for mean, factor in zip(means, factors, strict=True):
            if factor.grad is not None:
                mean += factor.grad / len(batches)
    for mean, factor in zip(means, factors, strict=True):
        factor.grad = mean


def _backward(model: Any, batch: Tensor | Mapping[str, Tensor]) -> None:
    """Gradients of the mean loss of one batch; its graph is gone then, for it knows the shapes of the factors."""
    loss = model(**({"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch)).loss
    if not torch.isfinite(loss):
        raise NonFiniteError(f"the loss on the calibration data is {float(loss)}: check the adapter and its base")
    loss.backward()
