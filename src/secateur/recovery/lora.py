"""Recovery through transformers' Trainer: LoRA of peft (LLM-Pruner, section 3.3; Hu et al. 2021, arXiv:2106.09685), or
all weights; from the text alone, or from the dense model, too (`distilling`)."""

from __future__ import annotations

import copy
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.data import Corpus
from secateur.errors import DataError, RecipeError
from secateur.packed import refuse_packed
from secateur.recovery.adapters import with_adapters
from secateur.recovery.also_trained import in_float32, optimizer_with_rates
from secateur.recovery.callbacks import (
    EndAtLastStep,
    HasEndedError,
    MeasureTexts,
    OwnFolder,
    PrintLosses,
    StopOnBrokenLoss,
)
from secateur.recovery.distilling import DistillingTrainer, loaded, teacher_of
from secateur.recovery.examples import IGNORED
from secateur.recovery.gradual import GradualPruning
from secateur.recovery.reporting import PROJECT, ReportFigures, check_reporters, logs_in, own_entries
from secateur.recovery.resuming import check_trains_the_same, last_checkpoint
from secateur.recovery.rounds import Rounds, check_pooled, mix_record
from secateur.recovery.settings import RecoverySettings
from secateur.recovery.training_data import TrainingData, training_data

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

LOGS = "logs"  # beside the checkpoints of a run


@dataclass(frozen=True)
class RecoveryResult:
    """What a recovery run leaves.

    Attributes:
        model: trained; the base with the adapter merged in.
        adapter: PEFT folder of the adapter alone; None where all weights were trained.
        log: the Trainer's log: losses by step, and perplexities where measured.
        seconds: wall time of the training.
        mix: what each round was (`mix_record`); None for a proportional mix.
    """

    model: PreTrainedModel
    adapter: Path | None
    log: list[dict[str, Any]]
    seconds: float
    mix: dict[str, Any] | None = None


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Corpus] | TrainingData,
    settings: RecoverySettings,
    output: Path | str,
    *,
    evaluate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    dense: Callable[[], PreTrainedModel] | None = None,
    resume: bool = False,
    in_place: bool = False,
) -> RecoveryResult:
    """Train LoRA adapters on a copy of `model` and merge them, or all weights of the copy.

    Args:
        data: corpora, or what `training_data` made of them with the same settings.
        output: folder for training checkpoints (`checkpoints/`) and the adapter (`adapter/`).
        evaluate: measures the model every `settings.eval_every` steps; the result goes into the log.
        dense: gives the uncut model, for a dynamic mix and for distillation; called once, before training, and for a
            mix alone not when a run goes on.
        resume: go on from the last checkpoint in `output`, if there is one.
        in_place: train `model` itself, which saves the copy.

    Raises:
        DataError: the corpora give no example, or too few to hold some out.
        RecipeError: the targets asked for are not there or cannot carry adapters, there is nothing to mix, or the dense
            model is no teacher for this one.
        CheckpointError: the run to go on with had another mix or trained something else, or the cache of a teacher is
            another's.
        NonFiniteError: the loss becomes NaN or infinite.
    """
    own: Any = model if in_place else copy.deepcopy(model)
    use_cache = getattr(model.config, "use_cache", True)
    trained = _with_all_weights(own, settings) if settings.full_weights else with_adapters(own, settings)
    with in_float32(trained):
        log, seconds = train(
            trained, tokenizer, data, settings, Path(output), evaluate=evaluate, dense=dense, resume=resume
        )
    adapter = None if settings.full_weights else Path(output) / "adapter"
    if adapter is not None:
        trained.save_pretrained(adapter)
        own = trained.merge_and_unload()
    own.config.use_cache = use_cache  # which training switched off
    rest = [entry for entry in log if "mix" not in entry]
    return RecoveryResult(own.eval(), adapter, rest, seconds, mix_record(log, settings))


def train(
    adapted: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Corpus] | TrainingData,
    settings: RecoverySettings,
    output: Path,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    evaluate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    dense: Callable[[], PreTrainedModel] | None = None,
    resume: bool = False,
) -> tuple[list[dict[str, Any]], float]:
    """Train the adapters in a model, or whatever else of it needs gradients; arguments as for `recover`.

    What an earlier run left in `output` is replaced when training begins; what this one does vanishes with its error.
    What TensorBoard and W&B write lies in `output/logs`.

    Args:
        callbacks: of the Trainer, in addition to our own.

    Returns:
        The Trainer's log, in which the rounds of a mix are entries `mix`, and the wall time [s].

    Raises:
        DataError, RecipeError, CheckpointError: as for `recover`.
        NonFiniteError: the loss becomes NaN or infinite.
    """
    check_reporters(settings.report_to)
    started = last_checkpoint(output) if resume else None
    if started is not None:
        check_trains_the_same(started, adapted)
    folder = OwnFolder(output, resume)
    ours: list[TrainerCallback] = []
    rounds: Rounds | None = None
    ready = data if isinstance(data, TrainingData) else training_data(data, tokenizer, settings)
    arguments = _arguments(settings, ready.steps, output, adapted.dtype)
    if ready.sources:
        per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        pruned_at = max((c.last_cut(ready.steps) for c in callbacks if isinstance(c, GradualPruning)), default=0)
        rounds = Rounds(ready.sources, settings, ready.steps, per_step, pruned_at)
        ours, dataset = [rounds], rounds.data
    else:
        from datasets import Dataset

        if started is not None:
            check_pooled(started)
        dataset = Dataset.from_list(list(ready.examples))
    to_measure = rounds if started is None else None
    kind = _kind_of_trainer(dense, to_measure, adapted, ready, settings, arguments)
    if evaluate is not None and settings.eval_every:
        ours.append(MeasureTexts(evaluate, settings.eval_every))
    begin = time.perf_counter()
    with folder.gone_after_an_error(), logs_in(output / LOGS, settings.report_to):
        trainer = _trainer(adapted, tokenizer, dataset, arguments, kind)
        report = [ReportFigures(trainer, callbacks)] if settings.report_to else []
        for callback in [*ours, *callbacks, *report, folder]:
            trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=started)
        except HasEndedError:
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    return own_entries(trainer.state.log_history), round(time.perf_counter() - begin, 3)


def _kind_of_trainer(
    dense: Callable[[], PreTrainedModel] | None,
    rounds: Rounds | None,
    student: Any,
    data: TrainingData,
    settings: RecoverySettings,
    arguments: TrainingArguments,
) -> Callable[..., Trainer]:
    """The Trainer's class, with the dense model as a teacher if it distils; what else the dense model is for is done.

    Args:
        rounds: for which the dense model is to be measured; None if that is done or there is no mix.
    """
    from transformers import Trainer

    if settings.distill is None:
        if rounds is not None:
            rounds.measure_dense(dense)
        plain: Callable[..., Trainer] = Trainer
        return plain
    model = loaded(dense, arguments.device)
    if rounds is not None:
        rounds.measure_dense(lambda: model)
    teacher = teacher_of(model, student, data, settings.distill, arguments)
    return partial(DistillingTrainer, teacher=teacher, distillation=settings.distill)


def _with_all_weights(model: PreTrainedModel, settings: RecoverySettings) -> PreTrainedModel:
    """The model itself, everything of it to be trained.

    Raises:
        RecipeError: its weights are stored packed.
    """
    from transformers import set_seed

    refuse_packed(model, "trained themselves", RecipeError)
    set_seed(settings.seed)
    model.requires_grad_(True)
    return model


def _arguments(settings: RecoverySettings, steps: int, output: Path, dtype: torch.dtype) -> TrainingArguments:
    """The Trainer's settings; a mix in rounds is read in its own order, and takes as many steps as all examples do."""
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=settings.sequences,
        gradient_accumulation_steps=settings.accumulation,
        train_sampling_strategy="random" if settings.mix == "proportional" else "sequential",
        learning_rate=settings.learning_rate,
        warmup_steps=min(settings.warmup_steps, steps // 10),
        bf16=cuda and torch.cuda.is_bf16_supported() and dtype == torch.float32,
        use_cpu=not cuda,
        gradient_checkpointing=settings.gradient_checkpointing,
        logging_steps=max(1, steps // 20),
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        report_to=list(settings.report_to) or "none",
        run_name=f"{output.absolute().parent.name}/{output.name.removesuffix('.work')}",
        project=PROJECT,
        disable_tqdm=not sys.stderr.isatty(),
    )


def _trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    arguments: TrainingArguments,
    kind: Callable[..., Trainer],
) -> Trainer:
    from transformers import DataCollatorForSeq2Seq, PrinterCallback

    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has neither a padding nor an end token, so examples cannot be batched")
        tokenizer.pad_token = tokenizer.eos_token
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=dataset,
        optimizer_cls_and_kwargs=optimizer_with_rates(model, arguments),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, padding=True),
        callbacks=[EndAtLastStep(), StopOnBrokenLoss(), *([PrintLosses()] if arguments.disable_tqdm else [])],
    )
    trainer.remove_callback(PrinterCallback)  # the Trainer's own stand-in for its bar, on standard output
    return trainer
