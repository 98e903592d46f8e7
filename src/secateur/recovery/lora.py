"""LoRA recovery through peft and transformers' Trainer (LLM-Pruner, section 3.3; Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.data import Corpus
from secateur.errors import DataError
from secateur.recovery.callbacks import MeasureTexts, StopOnBrokenLoss
from secateur.recovery.examples import IGNORED, training_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True)
class RecoverySettings:
    """Settings of a recovery run; defaults are LLM-Pruner's published recipe.

    Attributes:
        rank: of the LoRA factors.
        alpha: numerator of the LoRA scale `alpha / rank`.
        dropout: on the adapters' input; none where stacked experts are adapted, for which peft knows no dropout.
        targets: module names; None adapts every linear module but the output head, and the matrices of stacked experts.
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
    seed: int = 42


@dataclass(frozen=True)
class RecoveryResult:
    """What a recovery run leaves.

    Attributes:
        model: the base with the adapter merged in.
        adapter: PEFT folder of the adapter alone.
        log: the Trainer's log: losses by step, and perplexities where measured.
        seconds: wall time of the training.
    """

    model: PreTrainedModel
    adapter: Path
    log: list[dict[str, Any]]
    seconds: float


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpora: Sequence[Corpus],
    settings: RecoverySettings,
    output: Path | str,
    *,
    evaluate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    resume: bool = False,
) -> RecoveryResult:
    """Train LoRA adapters on a copy of `model` and merge them.

    Args:
        output: folder for training checkpoints (`checkpoints/`) and the adapter (`adapter/`).
        evaluate: measures the model every `settings.eval_every` steps; the result goes into the log.
        resume: go on from the last checkpoint in `output`, if there is one.

    Raises:
        DataError: the corpora give no example.
        NonFiniteError: the loss becomes NaN or infinite.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(settings.seed)
    output = Path(output)
    examples = training_examples(corpora, tokenizer, settings.seq_len, settings.train_on_inputs)
    stacked = [] if settings.targets else stacked_matrices(model)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0 if stacked else settings.dropout,
        target_parameters=stacked or None,
        target_modules=list(settings.targets) if settings.targets else "all-linear",
        exclude_modules=None if settings.targets else not_linear(model),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells what fan_in_fan_out it sets for Conv1D
        adapted = get_peft_model(copy.deepcopy(model), lora)
    trainer = _trainer(adapted, tokenizer, examples, settings, output, evaluate)
    begin = time.perf_counter()
    started = resume and any((output / "checkpoints").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=started or None)
    seconds = time.perf_counter() - begin
    adapter = output / "adapter"
    adapted.save_pretrained(adapter)
    merged = adapted.merge_and_unload()
    merged.config.use_cache = getattr(model.config, "use_cache", True)  # which training switched off
    return RecoveryResult(merged.eval(), adapter, list(trainer.state.log_history), round(seconds, 3))


def not_linear(model: PreTrainedModel) -> list[str]:
    """The output head, and modules that derive from a linear one but compute something else, as routers do."""
    from transformers.pytorch_utils import Conv1D

    head, plain = model.get_output_embeddings(), (torch.nn.Linear.forward, Conv1D.forward)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    return [n for n, m in linear.items() if m is head or type(m).forward not in plain]


def stacked_matrices(model: PreTrainedModel) -> list[str]:
    """The three-dimensional parameters that hold one matrix per expert."""
    kernels = {id(p) for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd) for p in m.parameters()}
    return [n for n, p in model.named_parameters() if p.dim() == 3 and min(p.shape) > 1 and id(p) not in kernels]


def _trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, list[int]]],
    settings: RecoverySettings,
    output: Path,
    evaluate: Callable[[PreTrainedModel], dict[str, float]] | None,
) -> Trainer:
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has neither a padding nor an end token, so examples cannot be batched")
        tokenizer.pad_token = tokenizer.eos_token
    micro = min(settings.micro_batch_size, settings.batch_size)
    accumulation = max(1, settings.batch_size // micro)
    steps = settings.steps or max(1, int(settings.epochs * len(examples) / (micro * accumulation)))
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=min(settings.warmup_steps, steps // 10),
        bf16=cuda and torch.cuda.is_bf16_supported() and model.dtype == torch.float32,
        use_cpu=not cuda,
        gradient_checkpointing=settings.gradient_checkpointing,
        logging_steps=max(1, steps // 20),
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        report_to="none",
        disable_tqdm=False,
    )
    callbacks: list[Any] = [StopOnBrokenLoss()]
    if evaluate is not None and settings.eval_every:
        callbacks.append(MeasureTexts(evaluate, settings.eval_every))
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(list(examples)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, padding=True),
        callbacks=callbacks,
    )
