"""Training that learns from the dense model beside the text: the Trainer's loop and its loss, with two terms more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from secateur.errors import RecipeError
from secateur.recovery.divergence import divergence, hidden_error
from secateur.recovery.teacher import OnlineTeacher, Teacher, evaluating, labelled
from secateur.recovery.teacher_cache import filled_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from secateur.recovery.settings import Distillation
    from secateur.recovery.training_data import TrainingData


class DistillingTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss is that of `settings.Distillation`.

    The added terms are sums over labelled tokens, divided as the Trainer divides the loss of the text: by all such
    tokens of an optimizer step, however it is split into micro-batches. The log has their means since the last entry:
    `kl` [nats per token, at the temperature] and `hidden`.

    Args:
        teacher: asked of every batch.
        distillation: its settings.
    """

    def __init__(self, *args: Any, teacher: Teacher, distillation: Distillation, **others: Any) -> None:
        super().__init__(*args, **others)
        self.teacher, self.distillation = teacher, distillation
        self._sums: dict[str, Tensor] = {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        settings = self.distillation
        lesson = self.teacher(inputs)
        asked = {**inputs, "output_hidden_states": True} if lesson.states else inputs
        text, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        tokens = labelled(inputs["labels"])
        kl = divergence(outputs.logits[tokens], lesson.targets, settings.temperature).sum()
        added = settings.weight * settings.temperature**2 * kl
        sums = {"kl": kl, "tokens": tokens.sum()}
        if lesson.states:
            sums["hidden"] = hidden_error(outputs.hidden_states[1:], lesson.states, tokens).sum()
            added = added + settings.hidden * sums["hidden"]
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        loss = (1 - settings.weight) * text + added / self._divisor(tokens, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _divisor(self, tokens: Tensor, items: Any) -> Tensor:
        """What turns a sum over the labelled tokens of a micro-batch into its part of the loss.

        Of several processes the Trainer takes the mean, and scales the loss of the text by their number before.
        """
        if items is None:  # the model takes no number of items: the Trainer divides means of micro-batches
            return tokens.sum().clamp(min=1)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return torch.as_tensor(items, device=tokens.device).flatten()[0] / processes

    def log(self, logs: dict[str, float], *args: Any, **others: Any) -> None:
        if "loss" in logs and self._sums:
            count = float(self._sums.pop("tokens").clamp(min=1))
            logs |= {name: float(value) / count for name, value in self._sums.items()}
            self._sums = {}
        super().log(logs, *args, **others)


def teacher_of(
    dense: PreTrainedModel, student: Any, data: TrainingData, settings: Distillation, arguments: TrainingArguments
) -> Teacher:
    """The dense model as the teacher of a run; with a cache, which is filled here, nothing holds on to the model.

    Raises:
        RecipeError: the two models do not compare.
        CheckpointError: the cache holds something else, or there is no room for it.
        NonFiniteError: the dense model's logits are NaN.
    """
    teacher = OnlineTeacher(dense, settings, arguments.bf16, _compared(dense, student, settings))
    if settings.cache is None:
        return teacher
    examples = data.examples or [example for source in data.sources for example in source.train]
    how = f"{dense.dtype} in bfloat16" if arguments.bf16 else str(dense.dtype)
    return filled_cache(teacher, dense, examples, settings, arguments.train_batch_size, how.replace("torch.", ""))


def loaded(load: Callable[[], PreTrainedModel] | None, device: torch.device) -> PreTrainedModel:
    """The teacher on the device that is trained on, unless it is spread over several or packed.

    Raises:
        RecipeError: nothing says which it is.
    """
    if load is None:
        raise RecipeError("distillation learns from the dense model: name it with --distill (recovery.dense)")
    model = load()
    if getattr(model, "hf_device_map", None) is None and getattr(model, "quantization_method", None) is None:
        model.to(device)  # type: ignore[arg-type]
    return model


def _compared(dense: PreTrainedModel, student: Any, settings: Distillation) -> list[int]:
    """Make sure that two models compare, by what they put out for two tokens.

    Returns:
        The numbers of the teacher's hidden states for those of the student after each layer; none if not asked for.

    Raises:
        RecipeError: they do not, and why.
    """
    theirs, ours = (_output(model, bool(settings.hidden)) for model in (dense, student))
    sizes = [out.logits.shape[-1] for out in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"the teacher has another vocabulary ({sizes[0]:,} tokens) than the model ({sizes[1]:,}): distil from the "
            "model that was cut (--distill, recovery.dense)"
        )
    if not settings.hidden:
        return []
    if not theirs.hidden_states or not ours.hidden_states:
        raise RecipeError("this class of model gives no hidden states: leave out --distill-hidden (hidden)")
    widths = [out.hidden_states[-1].shape[-1] for out in (theirs, ours)]
    if widths[0] != widths[1]:
        raise RecipeError(
            f"hidden states have {widths[0]:,} dimensions in the teacher and {widths[1]:,} in the model, so they do "
            "not compare: leave out --distill-hidden (hidden), or cut no units of the kind hidden"
        )
    return matched_layers(len(ours.hidden_states) - 1, len(theirs.hidden_states) - 1, settings.layers)


def matched_layers(ours: int, theirs: int, kept: Sequence[int]) -> list[int]:
    """For the output of each of our layers the number of the teacher's hidden state to compare it with.

    Where layers went, it is what the next layer that is left read in the teacher, and the last is compared with the
    last: so a layer is asked to make up for those behind it that are gone (ours).

    Args:
        ours, theirs: numbers of layers.
        kept: which of the teacher's layers are left, where some went.

    Raises:
        RecipeError: the numbers of layers differ, and nothing says which are left.
    """
    if ours == theirs:
        return list(range(1, theirs + 1))
    if len(kept) != ours or list(kept) != sorted(set(kept)) or kept[-1] >= theirs:
        raise RecipeError(
            f"the model has {ours} layers and the teacher {theirs}, and no plan made on the teacher says which of them "
            "are left, so hidden states do not compare: leave out --distill-hidden (hidden)"
        )
    return [*kept[1:], theirs]


@torch.no_grad()
def _output(model: Any, states: bool) -> Any:
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with evaluating(model):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, output_hidden_states=states)
