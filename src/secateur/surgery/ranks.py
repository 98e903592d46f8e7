"""Components of LoRA adapters, removed in place: row j of A with column j of B, and what an optimizer keeps for them.

A module computes W x + s B A x, with s = alpha / r (rsLoRA: alpha / sqrt(r)). When r falls, alpha falls with it so that
s stays, unless `rescale` says otherwise, and removing a component is the same as setting it to zero; for DoRA, too,
whose norms follow W + s B A. PEFT's own bookkeeping is kept right all the time, so that any `save_pretrained` writes a
folder that plain PEFT loads: `r` and `lora_alpha` alone where every module has the same, `rank_pattern` and
`alpha_pattern` for those that differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.groups import IndexArray
from secateur.surgery.adapters import PREFIX, is_adapted
from secateur.surgery.cuts import Cut

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch.optim import Optimizer

# These leave the base as it is; others put a part of it into the adapter, and would do so anew at the smaller rank.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# In the names optimizers give to averages of squares: exp_avg_sq, square_avg, sum; Adam's of bitsandbytes is state2.
SQUARES = ("sq", "sum", "state2")
ONLY_SQUARES = ("rmsprop", "adagrad")  # optimizers of bitsandbytes whose state1 is of squares, too
REMEDY = "take another optimizer, one that keeps numbers of the parameters' shapes (adamw_torch, or one of 32 bits)"


class Components:
    """The components of one adapter of a model, module by module.

    Args:
        model: a `PeftModel`; changed in place.
        adapter: its name; the active one if not given.

    Attributes:
        layers: path in the base -> module with a LoRA pair.

    Raises:
        PlanError: there is no such adapter, or it is of a kind whose components cannot be removed.
    """

    def __init__(self, model: Any, adapter: str | None = None) -> None:
        if not is_adapted(model):
            raise PlanError("there is no adapter to prune: get_peft_model(model, LoraConfig(...)) gives one")
        self.model = model
        self.adapter = adapter or _only_active(model)
        if self.adapter not in model.peft_config:
            raise PlanError(f"no adapter {self.adapter!r}; there are {', '.join(model.peft_config)}")
        self.layers = dict(self._found())
        self._check()

    @property
    def config(self) -> LoraConfig:
        return self.model.peft_config[self.adapter]

    @property
    def ranks(self) -> dict[str, int]:
        """Components of each module."""
        return {name: self.down(name).shape[0] for name in self.layers}

    def down(self, name: str) -> Tensor:
        """A of a module [r, in]."""
        weight: Tensor = self.layers[name].lora_A[self.adapter].weight
        return weight

    def up(self, name: str) -> Tensor:
        """B of a module [out, r]."""
        weight: Tensor = self.layers[name].lora_B[self.adapter].weight
        return weight

    def remove(self, kept: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Leave only these components: of A, of B, of their gradients, and of the optimizer's state.

        Args:
            kept: path of a module -> indices of the components that stay, ascending.

        Raises:
            PlanError: the optimizer keeps state that cannot be cut along; nothing is changed then.
        """
        self.check(kept, optimizer)
        for name, keep in kept.items():
            for cut in self._cuts(name, keep.cpu().numpy().astype(np.int64)):
                cut.apply(optimizer)
            self._tell(self.layers[name], len(keep))
        self._configure()

    def check(self, names: Iterable[str], optimizer: Optimizer | None) -> None:
        """Make sure that components of these modules can leave what the optimizer keeps.

        Raises:
            PlanError: it keeps state of other shapes than its parameters, or in packed form.
        """
        for name in names:
            for cut in self._cuts(name, np.arange(0)):
                cut.check(optimizer, REMEDY)

    def clear(self, gone: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Set components to zero, with their gradients and moments, and leave the shapes.

        Both factors are zero then, and so are their gradients, so that no optimizer brings them back.

        Raises:
            PlanError: as for `remove`; nothing is changed then.
        """
        self.check(gone, optimizer)
        for name, index in gone.items():
            for factor, dim in ((self.down(name), 0), (self.up(name), 1)):
                state: Mapping[str, Any] = optimizer.state.get(factor, {}) if optimizer is not None else {}
                for tensor in (factor.data, factor.grad, *state.values()):
                    if isinstance(tensor, Tensor) and tensor.shape == factor.shape:
                        tensor.index_fill_(dim, index.to(tensor.device), 0)

    @property
    def scales(self) -> dict[str, float]:
        """The factor s of each module."""
        return {name: layer.scaling[self.adapter] for name, layer in self.layers.items()}

    def rescale(self, scales: Mapping[str, float], optimizer: Optimizer | None = None) -> None:
        """Give modules other scales and factors, gradients and moments to match, so that they compute the same.

        With s' = k s both factors are divided by the root of k, and their gradients are multiplied by it. As the step
        of Adam does not depend on the size of gradients, B A moves by the root of k as far as before.
        """
        for name, scale in scales.items():
            root = math.sqrt(scale / self.layers[name].scaling[self.adapter])
            for factor in (self.up(name), self.down(name)):
                factor.data /= root
                if factor.grad is not None:
                    factor.grad *= root
                state: dict[str, Any] = optimizer.state.get(factor, {}) if optimizer is not None else {}
                for key, value in list(state.items()):
                    if isinstance(value, Tensor) and value.shape == factor.shape:
                        state[key] = value * (root**2 if _of_squares(key, optimizer) else root)
        self.set_scales(scales)

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Give modules these scales, and leave the factors, as a checkpoint with such scales needs."""
        ranks = self.ranks
        for name, scale in scales.items():
            self.layers[name].scaling[self.adapter] = scale
            self._tell(self.layers[name], ranks[name])
        self._configure()

    def shrink_to(self, ranks: Mapping[str, int]) -> None:
        """Give the modules these ranks, whatever their values, as a checkpoint with such ranks needs.

        Raises:
            PlanError: the ranks are of other modules, or larger than what is there.
        """
        have = self.ranks
        if ranks.keys() != have.keys() or any(ranks[name] > have[name] for name in have):
            raise PlanError("the checkpoint is of a run with another adapter: other modules, or a larger initial rank")
        self.remove({n: torch.arange(r) for n, r in ranks.items() if r < have[n]})

    def _cuts(self, name: str, keep: IndexArray) -> tuple[Cut, Cut]:
        """Of A and of B of a module."""
        layer = self.layers[name]
        return (
            Cut(layer.lora_A[self.adapter], "weight", {0: keep}),
            Cut(layer.lora_B[self.adapter], "weight", {1: keep}),
        )

    def _found(self) -> Iterator[tuple[str, LoraLayer]]:
        """Modules that hold this adapter."""
        from peft.tuners.lora import LoraLayer as AnyLayer

        for path, module in self.model.named_modules():
            if isinstance(module, AnyLayer) and self.adapter in {*module.lora_A, *module.lora_embedding_A}:
                yield path.removeprefix(PREFIX), module

    def _check(self) -> None:
        from peft import PeftType

        config = self.config
        if config.peft_type != PeftType.LORA:
            raise PlanError(
                f"components are removed from LoRA adapters, and this is {config.peft_type.value}: take LoraConfig"
            )
        if config.target_parameters:
            raise PlanError("adapters on stacked parameters (target_parameters) share their ranks: leave them out")
        if config.init_lora_weights not in HARMLESS_STARTS:
            raise PlanError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base by the rank it starts with, so that "
                f"no smaller adapter fits the base: take one of {', '.join(map(repr, HARMLESS_STARTS))}"
            )
        seen: set[int] = set()
        for name, layer in self.layers.items():
            if reason := self._reason(layer, seen):
                raise PlanError(f"the components of {name} cannot be removed: {reason}")

    def _reason(self, layer: LoraLayer, seen: set[int]) -> str | None:
        """Why the components of one module cannot be removed, None if they can."""
        from peft.tuners.lora.variants import DoraLinearVariant

        if self.adapter in layer.lora_embedding_A:
            return "it is an embedding; leave it out of target_modules"
        variant = layer.lora_variant.get(self.adapter)
        if variant is not None and not isinstance(variant, DoraLinearVariant):
            return f"{type(variant).__name__} computes more than B A; take a plain LoraConfig"
        factors = (layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight)
        if any(f.dim() != 2 for f in factors):
            return "it is a convolution; leave it out of target_modules"
        if any(id(f) in seen for f in factors):
            return "it shares a factor with another module"
        seen.update(map(id, factors))
        if self.adapter in layer.merged_adapters:
            return "the adapter is merged into it; call model.unmerge_adapter()"
        return None

    def _tell(self, layer: LoraLayer, rank: int) -> None:
        """Let a module know its new rank; its scale stays."""
        name = self.adapter
        layer.r[name] = rank
        layer.lora_alpha[name] = _alpha(layer.scaling[name], rank, bool(layer.use_rslora[name]))
        if name in layer.lora_magnitude_vector:  # outside training DoRA remembers B A; entering it forgets
            magnitude = layer.lora_magnitude_vector[name]
            training = magnitude.training
            magnitude.train().train(training)

    def _configure(self) -> None:
        """Write ranks and alphas into the adapter's configuration: the largest rank's as default, others by name."""
        config, name = self.config, self.adapter
        sizes = {path: (layer.r[name], layer.lora_alpha[name]) for path, layer in self.layers.items()}
        config.r, config.lora_alpha = max(sizes.values())
        whole = {"^" + re.escape(path): size for path, size in sizes.items()}
        config.rank_pattern = {path: rank for path, (rank, _) in whole.items() if rank != config.r}
        config.alpha_pattern = {path: alpha for path, (_, alpha) in whole.items() if alpha != config.lora_alpha}


def _only_active(model: Any) -> str:
    """The name of the adapter in use.

    Raises:
        PlanError: several are.
    """
    if len(model.active_adapters) != 1:
        raise PlanError(f"adapters {', '.join(model.active_adapters)} are active: say which one to prune (adapter=...)")
    return str(model.active_adapters[0])


def _of_squares(key: str, optimizer: Any) -> bool:
    """Whether what an optimizer keeps under this name is an average of squares of gradients."""
    name = getattr(getattr(optimizer, "optimizer", optimizer), "optimizer_name", None)  # accelerate wraps it
    return any(word in key for word in SQUARES) or (key == "state1" and name in ONLY_SQUARES)


def _alpha(scale: float, rank: int, root: bool) -> float:
    """The alpha that gives this scale at this rank; a whole number where it is one."""
    alpha = scale * (math.sqrt(rank) if root else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha
