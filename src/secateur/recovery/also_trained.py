"""What trains whole beside the adapters: norms and embeddings (LongLoRA, Chen et al. 2023, arXiv:2309.12307, 3.3).

peft keeps a copy of each of these modules (`modules_to_save`) and files it with the adapter. Two deviations. LongLoRA
trains the input embeddings; here the output head goes with them, which in many models is the same matrix. It has one
learning rate; here what trains whole takes a tenth of it, as adapters want about ten times the rate that weights do
(Schulman and Thinking Machines Lab 2025, "LoRA Without Regret"; what one rate cost is in `docs/experiments.md`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
LEAVE_OUT = "leave embeddings out of --also-train (recovery.also_train)"


def also_trained(model: PreTrainedModel, parts: Sequence[AlsoTrained]) -> list[str]:
    """Full names of the modules that train whole.

    Raises:
        RecipeError: the embeddings cannot: another module has the same weights, or they are stored packed.
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
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    found = [name for name, m in model.named_modules(remove_duplicate=False) if any(m is end for end in ends)]
    weights = {id(p): p for end in ends for p in end.parameters()}
    if not all(p.is_floating_point() for p in weights.values()):
        raise RecipeError(f"the embeddings are stored packed and cannot train: {LEAVE_OUT}")
    owners = {n.rpartition(".")[0] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in weights}
    if others := sorted(owner for owner in owners if not _within(owner, found)):
        raise RecipeError(f"the embeddings cannot train, as {others[0]} has the same weights: {LEAVE_OUT}")
    return found


def heads_are_tied(model: PreTrainedModel) -> bool:
    """Whether the output head has the embeddings' weight."""
    weights = [getattr(end, "weight", None) for end in (model.get_input_embeddings(), model.get_output_embeddings())]
    return weights[0] is not None and weights[0] is weights[1]


def tie_copies(adapted: nn.Module) -> None:
    """Give the copies that peft keeps of modules one parameter where the modules themselves have one."""
    first: dict[int, nn.Parameter] = {}
    for module, copy in _copies(adapted):
        for name, weight in module.named_parameters(recurse=False):
            copy.register_parameter(name, first.setdefault(id(weight), getattr(copy, name)))


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

    It takes and gives what the rest of the model computes in.
    """
    halves = [(copy, dtype) for _, copy in _copies(adapted) if (dtype := _dtype(copy)) != torch.float32]
    hooks = []
    for copy, dtype in halves:
        hooks.append(copy.register_forward_pre_hook(_widen, with_kwargs=True))
        hooks.append(copy.register_forward_hook(_Narrow(dtype)))
    for copy, _ in halves:
        copy.float()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for copy, dtype in halves:
            copy.to(dtype)


def _copies(adapted: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Each module that trains whole, as it was, and the copy that trains."""
    from peft.utils import ModulesToSaveWrapper

    wrappers = [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [(wrapper.original_module, copy) for wrapper in wrappers for copy in wrapper.modules_to_save.values()]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _in(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_in(dtype, part) for part in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _widen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _in(torch.float32, args), {name: _in(torch.float32, value) for name, value in kwargs.items()}


class _Narrow:
    """A hook that gives what a module puts out in a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _in(self.dtype, output)
