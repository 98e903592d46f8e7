"""What trains whole beside the adapters: norms and embeddings (LongLoRA, Chen et al. 2023, arXiv:2309.12307, 3.3).

peft keeps a copy of each of these modules (`modules_to_save`) and files it with the adapter. Two deviations. LongLoRA
trains the input embeddings; here the output head goes with them, which in many models is the same matrix. It has one
learning rate; here what trains whole takes a tenth of it, as adapters want about ten times the rate that weights do
(Schulman and Thinking Machines Lab 2025, "LoRA Without Regret"; what one rate cost is in `docs/experiments.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.errors import RecipeError
from secateur.recovery.settings import AlsoTrained
from secateur.recovery.targets import shared

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

RATE = 0.1  # of the adapters' learning rate
ROOT = "base_model.model."  # what peft puts before names
LEAVE_OUT = "leave embeddings out of --also-train (recovery.also_train)"


def also_trained(model: PreTrainedModel, parts: Sequence[AlsoTrained]) -> list[str]:
    """Full names of the modules that train whole.

    Raises:
        RecipeError: the embeddings cannot, as the class does not name them, has them in several places, or packed.
    """
    embeddings = _embeddings(model) if "embeddings" in parts else []
    norms = _norms(model) if "norms" in parts else []
    return [name for name in norms if not _within(name, embeddings)] + embeddings


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _norms(model: PreTrainedModel) -> list[str]:
    """Modules that hold nothing but vectors; none whose weights are another module's, too."""
    out = shared(model)
    return [name for name, module in model.named_modules() if name not in out and _holds_vectors(module)]


def _holds_vectors(module: nn.Module) -> bool:
    own = list(module.parameters())
    return bool(own) and not list(module.children()) and all(p.dim() == 1 and p.is_floating_point() for p in own)


def _embeddings(model: PreTrainedModel) -> list[str]:
    """The input embeddings and the output head."""
    try:
        ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    except NotImplementedError as error:
        raise RecipeError(f"{type(model).__name__} does not tell which its embeddings are: {LEAVE_OUT}") from error
    if not all(p.is_floating_point() for end in ends for p in end.parameters()):
        raise RecipeError(f"the embeddings are stored packed and cannot train: {LEAVE_OUT}")
    places = [(id(m), name) for name, m in model.named_modules(remove_duplicate=False) if any(m is end for end in ends)]
    if len(places) > len(dict(places)):
        raise RecipeError(f"the embeddings cannot train: {places[0][1]} has several places in the model; {LEAVE_OUT}")
    return [name for _, name in places]


def peft_ties(model: PreTrainedModel) -> bool:
    """Whether the head and the embeddings, and no other module, have one weight, and the head nothing else: peft ties
    that and no more."""
    head = model.get_output_embeddings()
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if head is None or weight is None or [id(p) for p in head.parameters()] != [id(weight)]:
        return False
    return sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) == 2


def tie_copies(adapted: nn.Module, names: Sequence[str]) -> None:
    """Give the copies that peft keeps of modules one parameter where the modules themselves have one.

    What modules outside share, such as the bias of a head that the module around it holds, too, trains in place.

    Args:
        names: of the modules asked for.

    Raises:
        RecipeError: peft took others with them, which it finds by the ends of their names.
    """
    copies = _copies(adapted)
    wrapped = [name for name, _, _ in copies]
    if more := [name for name in wrapped if not any(name == f"{ROOT}{asked}" for asked in names)]:
        raise RecipeError(f"peft takes {more[0].removeprefix(ROOT)} for a module of the same name: {LEAVE_OUT}")
    elsewhere = {id(p) for name, p in adapted.named_parameters(remove_duplicate=False) if not _within(name, wrapped)}
    first: dict[int, nn.Parameter] = {}
    for _, module, copy in copies:
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in elsewhere:
                weight.requires_grad_(True)
                first[id(weight)] = weight
            copy.register_parameter(name, first.setdefault(id(weight), copy.get_parameter(name)))


def optimizer_with_rates(adapted: nn.Module, arguments: TrainingArguments) -> tuple[Any, dict[str, Any]] | None:
    """The Trainer's optimizer and its settings, with a learning rate for what trains whole; None if nothing does."""
    from peft import PeftModel
    from transformers import Trainer

    if not isinstance(adapted, PeftModel):
        return None
    trains = [(name, weight) for name, weight in adapted.named_parameters() if weight.requires_grad]
    factors, whole = (
        [w for name, w in trains if (adapted.prefix in name) == of_adapters] for of_adapters in (True, False)
    )
    if not whole:
        return None
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    decay = {"weight_decay": arguments.weight_decay}  # an optimizer's own default is not the Trainer's
    rate = RATE * arguments.learning_rate
    return kind, {**settings, "params": [{"params": factors, **decay}, {"params": whole, **decay, "lr": rate}]}


@contextmanager
def in_float32(adapted: nn.Module) -> Iterator[None]:
    """What trains whole is held in float32 meanwhile, as adapters are: in half precision small steps would be lost.

    It takes and gives what the rest of the model computes in, and multiplies matrices in that.
    """
    halves = [(copy, dtype) for _, _, copy in _copies(adapted) if (dtype := _dtype(copy)) != torch.float32]
    before = [copy.__dict__.get("forward") for copy, _ in halves]  # accelerate's, where it moves tensors
    try:
        for copy, dtype in halves:
            copy.forward = _computing_in(dtype, copy.forward)  # type: ignore[method-assign]
            copy.float()
        yield
    finally:
        for (copy, dtype), forward in zip(halves, before, strict=True):
            copy.__dict__.pop("forward", None)
            if forward is not None:
                copy.forward = forward  # type: ignore[method-assign]
            copy.to(dtype)


def _copies(adapted: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """Each module that trains whole: its name, as it was, and the copy that trains."""
    from peft.utils import ModulesToSaveWrapper

    wrappers = [(name, m) for name, m in adapted.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    return [(name, m.original_module, copy) for name, m in wrappers for copy in m.modules_to_save.values()]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _in(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_in(dtype, part) for part in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _computing_in(dtype: torch.dtype, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a module in float32 within a model in half precision."""

    def computed(*args: Any, **kwargs: Any) -> Any:
        wide = {name: _in(torch.float32, value) for name, value in kwargs.items()}
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        with torch.autocast(device, dtype):
            return _in(dtype, forward(*_in(torch.float32, args), **wide))

    return computed
