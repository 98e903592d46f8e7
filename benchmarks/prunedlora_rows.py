"""One row of `benchmarks/prunedlora.py`: the adapter a method starts from, its training, and what is measured.

The paper's form has the published criterion, alpha = r at every rank, and the paper's pace. Its runs of 5,000 steps
remove K2 = 2 components every K1 = 10 steps, from the first on, and reach rank 64 from 128, 256 and 512 after 6, 19 and
45 % of the run. A K1 of the same share would be a fifth of a step in a run of 100, so K1 is 1 here and K2 stays 2:
ranks 16, 4 and 1 are reached from 64 after 24, 30 and 32 % of the run. The code's first removal comes at its first
step, when B = 0, and so does this one. The optimizer is that of all rows.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from prunedlora_tasks import Task
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from secateur.importance.components import ComponentCriterion
from secateur.methods.prunedlora import PAPER, PrunedLoRA, prune_adapter
from secateur.recovery.callbacks import StopOnBrokenLoss
from secateur.recovery.examples import IGNORED
from secateur.recovery.targets import all_targets
from secateur.surgery.rank_schedule import PrunedLoRASettings

OURS = ComponentCriterion()
PACE = {"every": 1, "components": 2}  # K1 and K2 of the paper, see above
TRAINED = ("lora", "rslora", "dora", "adalora", "lora-initial")
FORMS: Mapping[str, Mapping[str, Any]] = {  # settings that differ from ours
    "ours": {},
    "paper-form": {"criterion": PAPER, "keep": "scale", **PACE},
    "paper-form-masks": {"criterion": replace(PAPER, recover=False), "keep": "scale", **PACE},  # its first revision
    "paper-form-no-newton": {"criterion": replace(PAPER, newton=0.0), "keep": "scale", **PACE},
    "magnitude": {"criterion": ComponentCriterion("magnitude")},
    "taylor": {"criterion": ComponentCriterion("taylor")},  # LLM-Pruner's, component by component
    "activation": {"criterion": ComponentCriterion("activation")},  # SparseGPT's problem
    "sensitivity": {"criterion": ComponentCriterion("sensitivity")},
    "activation-masks": {"criterion": ComponentCriterion("activation", recover=False)},
    "gradient": {"criterion": replace(OURS, ema=0.0)},
    "slow": {"criterion": replace(OURS, ema=0.98)},
    "both": {"criterion": replace(OURS, factors="both")},
    "b": {"criterion": replace(OURS, factors="b")},
    "a": {"criterion": replace(OURS, factors="a")},
    "newton": {"criterion": replace(OURS, newton=0.1)},
    "newton-whole": {"criterion": replace(OURS, newton=1.0)},
    "single": {"criterion": replace(OURS, joint=False)},
    "unbalanced": {"criterion": replace(OURS, balance=False)},
    "masks": {"criterion": replace(OURS, recover=False)},
    "scale-pace-masks": {"criterion": replace(OURS, recover=False), "keep": "scale", **PACE},
    "undamped": {"criterion": replace(OURS, damping=1e-4)},
    "damped": {"criterion": replace(OURS, damping=0.1)},
    "damped-whole": {"criterion": replace(OURS, damping=1.0)},
    "absolute": {"criterion": replace(OURS, damping=PAPER.damping, relative=False)},
    "pace": PACE,
    "scale": {"keep": "scale"},
    "scale-pace": {"keep": "scale", **PACE},
    "middle": {"cooldown": 0.5},
    "late": {"cooldown": 0.3},
    "scale-late": {"keep": "scale", "cooldown": 0.3},
    "often": {"every": 2},
    "seldom": {"every": 10},
    "once": {"every": 25, "warmup": 0.0, "cooldown": 0.75},
}
AFTER, GLOBAL = "after-", "-global"  # prunes what `lora-initial` trains; with one budget for all modules
EDGE = 20  # steps at the start and at the end whose time is told


class Size(TrainerCallback):  # type: ignore[misc]
    """Bytes of trainable parameters and of the optimizer's state, and seconds, of each step; AdaLoRA's own update."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.process_time()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(state.global_step)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        self.seconds.append(time.process_time() - self.begin)
        trained = [p for p in model.parameters() if p.requires_grad]
        kept = [t for p in trained for t in optimizer.state.get(p, {}).values() if isinstance(t, torch.Tensor)]
        self.bytes.append(sum(t.numel() * t.element_size() for t in [*trained, *kept]))


def adapted(base: Any, task: Task, method: str, target: int, seed: int, args: Namespace) -> Any:
    """A copy of the model with the adapter that a method starts from; alpha is the rank."""
    set_seed(seed)
    common = {"target_modules": all_targets(base).modules, "lora_dropout": 0.0}
    model = task.model(copy.deepcopy(base))
    if method == "adalora":
        schedule = {"tinit": args.steps // 10, "tfinal": 3 * args.steps // 10, "deltaT": max(1, args.every // 2)}
        rank = max(target + 1, math.ceil(1.5 * target))
        return get_peft_model(
            model,
            AdaLoraConfig(
                init_r=rank, target_r=target, lora_alpha=rank, total_step=args.steps, beta1=0.85, beta2=0.85,
                **schedule, **common,
            ),
        )  # fmt: skip
    rank = target if method in TRAINED[:3] else args.initial_rank
    extra = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(method, {})
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, **extra, **common))


def settings_of(method: str, target: int, args: Namespace) -> PrunedLoRASettings:
    """What prunes in a row."""
    form = FORMS[method.removeprefix(AFTER).removesuffix(GLOBAL)]
    scope = "global" if method.endswith(GLOBAL) else "adapter"
    return PrunedLoRASettings(target, **{"every": args.every, "scope": scope, **form})


def trained(
    base: Any, tokenizer: Any, task: Task, key: Mapping[str, Any], args: Namespace
) -> tuple[Any, dict[str, Any]]:
    """The model that a method trains, and what was recorded on the way.

    Args:
        key: has `method`, `target_rank`, `seed` and `learning_rate`.

    Raises:
        NonFiniteError: the loss breaks.
    """
    method, target, seed = key["method"], key["target_rank"], key["seed"]
    model, size = adapted(base, task, method, target, seed, args), Size()
    pruning = None if method in TRAINED else PrunedLoRA(target)
    if pruning is not None:
        pruning.settings = settings_of(method, target, args)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch_size,
            learning_rate=key["learning_rate"], warmup_steps=args.steps // 20, logging_steps=10, save_strategy="no",
            seed=seed, report_to="none",
            use_cpu=not torch.cuda.is_available(), disable_tqdm=True, train_sampling_strategy="group_by_length",
        )  # fmt: skip
        logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
        trainer = Trainer(
            model, arguments, train_dataset=list(task.learn), callbacks=[StopOnBrokenLoss(), size],
            data_collator=_collator(tokenizer),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if pruning is not None:
            trainer.add_callback(pruning)
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
    facts: dict[str, Any] = {"seconds": round(seconds, 2)}
    facts["adapter_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts["state_bytes"] = {"first": size.bytes[0], "most": max(size.bytes), "last": size.bytes[-1]}
    facts["step_seconds"] = {"first": mean(size.seconds[:EDGE]), "last": mean(size.seconds[-EDGE:])}
    return model, facts


def pruned_after(
    model: Any, tokenizer: Any, facts: Mapping[str, Any], task: Task, method: str, target: int, args: Namespace
) -> tuple[Any, dict[str, Any]]:
    """A copy of a trained model with its adapter pruned at once, without training again."""
    model = copy.deepcopy(model).train()
    size, collate = args.batch_size, _collator(tokenizer)
    batches = [dict(collate(task.learn[i * size : (i + 1) * size])) for i in range(args.calibration)]
    begin = time.process_time()
    prune_adapter(model, batches, settings_of(method, target, args), events=args.events)
    mine = {"method": method, "target_rank": target, "prune_seconds": round(time.process_time() - begin, 2)}
    mine["adapter_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, dict(facts) | mine


def _collator(tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, padding=True)
