"""Which weights of a model can carry LoRA: linear modules that compute with their own weight, and stacked experts."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.packed import is_bitsandbytes_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# what may be asked of a weight without computing with it
FACTS = frozenset({"dtype", "device", "shape", "size", "ndim", "numel", "is_meta", "requires_grad"})


@dataclass(frozen=True)
class Targets:
    """Where adapters go.

    Attributes:
        modules: full names of linear modules.
        parameters: full names of parameters; peft adapts these without dropout.
    """

    modules: list[str]
    parameters: list[str]


def all_targets(model: PreTrainedModel) -> Targets:
    """Every linear module that can carry an adapter but the output head, and the matrices of stacked experts."""
    out = {*not_linear(model), *read_directly(model), *shared(model)}
    modules = [name for name in _linear(model) if name not in out]
    renamed = _renamed(model, modules)
    parameters = _wrappable(model, stacked_matrices(model)) + [f"{name}.weight" for name in renamed]
    return Targets([name for name in modules if name not in renamed], parameters)


def not_linear(model: PreTrainedModel) -> list[str]:
    """The output head, and modules that derive from a linear one but compute something else, as routers do."""
    head = model.get_output_embeddings()
    return [n for n, m in _linear(model).items() if m is head or not _is_plain(m)]


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear module, its forward pass maybe written anew, computes what its base class does."""
    from transformers.pytorch_utils import Conv1D

    base: Any = nn.Linear if isinstance(module, nn.Linear) else Conv1D
    if type(module).forward is base.forward or is_bitsandbytes_linear(module):
        return True
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    width = weight.shape[1 if base is nn.Linear else 0]
    probe = torch.linspace(-1, 1, 2 * width, dtype=weight.dtype, device=weight.device).view(1, 2, width)
    try:
        with torch.no_grad():
            found, wanted = module(probe), base.forward(module, probe)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # it takes something else
        return False
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= 1e-2 * wanted.abs().max())


def stacked_matrices(model: PreTrainedModel) -> list[str]:
    """The three-dimensional parameters that hold one matrix per expert."""
    kernels = {id(p) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters()}
    return [n for n, p in model.named_parameters() if p.dim() == 3 and min(p.shape) > 1 and id(p) not in kernels]


def read_directly(model: PreTrainedModel) -> list[str]:
    """Linear modules whose weight another module takes for itself, so that an adapter's forward would be passed by.

    State-space blocks do so with the projection of the time step, and where they hand all weights to one fused kernel,
    which may be on accelerators only. So what counts is the source of the forward passes, not what runs here.
    """
    linear = _linear(model)
    paths = {cls: _weights_read(cls) for cls in {type(m) for m in model.modules()}}
    read = (f"{name}.{path}".removeprefix(".") for name, m in model.named_modules() for path in paths[type(m)])
    return sorted(name for name in set(read) if name in linear)


def shared(model: PreTrainedModel) -> set[str]:
    """Modules with a weight that others have too, and which merging one adapter would change for all."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _wrappable(model: PreTrainedModel, parameters: list[str]) -> list[str]:
    """Those of the parameters whose module is called with its input as a positional argument, as peft's wrapper is."""
    if not parameters:
        return []
    holders = {name: model.get_submodule(name.rpartition(".")[0]) for name in parameters}
    called: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[object, ...]) -> None:
        if args:
            called.add(module)

    hooks = [module.register_forward_pre_hook(note) for module in set(holders.values())]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, module in holders.items() if module in called]


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def _renamed(model: PreTrainedModel, modules: list[str]) -> list[str]:
    """Those of the modules that peft would take for experts of an older layout, by the end of their names, and skip."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(modules))
    convert_peft_config_for_transformers(config, model, None)
    return sorted(set(modules).difference(config.target_modules or ()))


def _weights_read(cls: type[nn.Module]) -> set[str]:
    """Paths `x.y` such that a forward pass of this class computes with `self.x.y.weight`."""
    found: set[str] = set()
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop()
        if name in seen or (tree := _source(getattr(cls, name, None))) is None:
            continue
        seen.add(name)
        for path in _paths(tree):
            owner, _, last = path.rpartition(".")
            if owner and last == "weight":
                found.add(owner)
            elif not owner:
                waiting.append(last)
    return found


def _source(method: object) -> ast.AST | None:
    """The syntax tree of a method, None if there is none to be read."""
    if not callable(method):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, TypeError, SyntaxError):
        return None


def _paths(tree: ast.AST) -> Iterator[str]:
    """What is reached from `self`, as dotted paths; what only asks for a fact (`self.x.weight.dtype`) left out."""
    asked = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in FACTS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in asked:
            levels: list[str] = []
            at: ast.expr = node
            while isinstance(at, ast.Attribute):
                levels.append(at.attr)
                at = at.value
            if isinstance(at, ast.Name) and at.id == "self":
                yield ".".join(reversed(levels))
