"""Cutting a model together with the LoRA adapters in its modules (LoRA, rsLoRA, DoRA; a rank of its own per module).

An output unit takes rows of W, bias and B with it, an input unit columns of W and A; a unit of rank is a row of A and a
column of B. The base is cut as any model is (`slicing.py`), so that its class can load it; the cut factors are put into
a new `PeftModel` around it, whose configuration lists the ranks, with alpha set so that the scale of every module stays
(alpha / r would grow as r shrinks). Before it is returned, its logits are compared with those of the model whose
adapters were merged first and whose units were removed afterwards.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from secateur.discovery import discover
from secateur.discovery.reference import Reference
from secateur.discovery.setting import quiet_transformers
from secateur.errors import PlanError
from secateur.groups import Group, Groups, Kept
from secateur.packed import packed_weights
from secateur.plan import PruningPlan
from secateur.surgery.slicing import cut, load_tensors
from secateur.surgery.state import new_name, renumbering, tied_names
from secateur.surgery.trial import LogitCheck

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

PREFIX = "base_model.model."  # what peft puts before the names of the model inside
Tensors = Mapping[str, Tensor]


def is_adapted(model: Any) -> TypeGuard[PeftModel]:
    """Whether the model is a `PeftModel`."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def slice_adapted(model: PeftModel, plan: PruningPlan, groups: Groups | None = None) -> PeftModel:
    """Remove what `plan` removes from the base and its adapters; `model` itself is left as it is.

    For DoRA, the magnitudes absorb what the norms of the rows lose with the removed columns, so that the columns that
    stay keep their effect.

    Raises:
        PlanError: the plan does not fit, no class expresses the cut of the base, or the adapters are of another kind.
    """
    adapted = Adapted(model, groups)
    plan.check(adapted.groups)
    return adapted.cut({n: k for n, k in plan.kept.items() if len(k) < adapted.groups.named(n).units})


class Adapted:
    """A model with adapters in its modules, and its base without them.

    Attributes:
        model: the `PeftModel`.
        groups: its groups.
        layers: path -> module, for every module that holds adapters.
        names: name of every tensor of the base -> its name in `base`.
        base: a copy of the base model, adapters left out and not merged.
        base_groups: the groups of `base`.
    """

    def __init__(self, model: PeftModel, groups: Groups | None = None) -> None:
        if reason := unsupported(model) or packed_base(model):
            raise PlanError(reason)
        self.model = model
        self.groups = groups or discover(model)
        self.layers = adapted_layers(model)
        self.names = base_names(model)
        self.base = base_model(model)
        self.base_groups = discover(self.base)

    @cached_property
    def in_base(self) -> dict[str, str]:
        """Group -> the group of the base it widens; groups of factors alone (ranks) are absent."""
        known = {_key(g, {}): g.name for g in self.base_groups}
        found: dict[str, str] = {}
        for group in self.groups:
            if not self._is_rank(group.name):
                key = _key(group, self.names)
                if key in known:
                    found[group.name] = known[key]
        return found

    def cut(self, kept: Kept) -> PeftModel:
        """The model with the `kept` units alone."""
        rank = {n: k for n, k in kept.items() if self._is_rank(n)}
        base_kept: dict[str, Sequence[int]] = {}
        for name, units in kept.items():
            if name in rank:
                continue
            if name not in self.in_base:
                raise PlanError(f"{name} is no group of the base model, so it cannot be cut with its adapters")
            base_kept[self.in_base[name]] = units
        # `load_tensors` copies; the merged model only serves the comparison
        tied = tied_names(self.base_groups, {})
        copied = load_tensors(self.base, type(self.base), self.base.config, self.base.state_dict(), tied)
        merged = self._attached(copied, rank).merge_and_unload()
        check = _AdaptedCheck(merged, base_kept, lambda small: self._attached(small, kept))
        cut(self.base, self.base_groups, base_kept, check)
        assert check.adapted is not None
        return check.adapted

    def _is_rank(self, name: str) -> bool:
        """Whether a group lies on factors alone."""
        group = self.groups.named(name)
        return bool(group.members) and not any(m.parameter in self.names for m in group.members)

    def _attached(self, base: PreTrainedModel, kept: Kept) -> PeftModel:
        """The adapters, cut to the `kept` units, around a base that was cut likewise."""
        moved = renumbering(self.groups, kept)
        tensors = self._factors(kept)
        configs = {n: self._config(n, tensors, moved, kept) for n in self.model.peft_config}
        (first, config), *others = configs.items()
        with quiet_transformers():
            small = type(self.model)(base, config, first, autocast_adapter_dtype=False)
            for name, more in others:
                small.add_adapter(name, more, autocast_adapter_dtype=False)
            small.base_model.set_adapter(self.model.active_adapters)
        small.load_state_dict({new_name(n, moved): t for n, t in tensors.items()}, strict=False, assign=True)
        flags = {new_name(n, moved): p.requires_grad for n, p in self.model.named_parameters()}
        for name, parameter in small.named_parameters():
            parameter.requires_grad_(flags[name])
        small.train(self.model.training)
        return small

    def _factors(self, kept: Kept) -> dict[str, Tensor]:
        """Every tensor of the adapters that stays, under its old name."""
        positions = self.groups.kept_positions(kept)
        gone = self.groups.removed_prefixes(kept)
        found: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            if name in self.names or name.startswith(gone):
                continue
            cut = self._magnitude(name, tensor, positions) if ".lora_magnitude_vector." in name else tensor.detach()
            for dim, keep in positions.get(name, {}).items():
                cut = cut.index_select(dim, torch.from_numpy(keep).to(cut.device))
            found[name] = cut.clone()
        return found

    def _magnitude(self, name: str, magnitude: Tensor, positions: Mapping[str, Mapping[int, Any]]) -> Tensor:
        """DoRA's magnitudes [out], scaled by the share of each row's norm that lies in the columns that stay."""
        path, _, rest = name.partition(".lora_magnitude_vector.")
        adapter = rest.partition(".")[0]
        layer, factor = self.layers[path], f"{path}.lora_A.{adapter}.weight"
        if 1 not in positions.get(factor, {}):
            return magnitude.detach()
        down, up = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        if (ranks := positions[factor].get(0)) is not None:
            down, up = down[torch.from_numpy(ranks)], up[:, torch.from_numpy(ranks)]
        weight = layer.get_base_layer().weight.detach()
        weight = (weight.T if layer.fan_in_fan_out else weight) + layer.scaling[adapter] * (up @ down)
        columns = torch.from_numpy(positions[factor][1]).to(weight.device)
        scaled: Tensor = magnitude.detach() * weight.index_select(1, columns).norm(dim=1) / weight.norm(dim=1)
        return scaled

    def _config(self, adapter: str, tensors: Tensors, moved: Mapping[str, str], kept: Kept) -> LoraConfig:
        """The adapter's configuration for its new ranks and, where layers went, for the modules that are left."""
        config = copy.deepcopy(self.model.peft_config[adapter])
        config.init_lora_weights = True  # the base is what an initialisation left of it; it must not run again
        config.rank_pattern, config.alpha_pattern = {}, {}
        names: list[str] = []
        for path, layer in self.layers.items():
            stored = (f"{path}.lora_A.{adapter}.weight", f"{path}.lora_embedding_A.{adapter}")
            factor = next((tensors[n] for n in stored if n in tensors), None)
            if factor is None:
                continue
            name = new_name(path + ".", dict(moved)).removesuffix(".").removeprefix(PREFIX)
            names.append(name)
            rank, alpha = factor.shape[0], layer.lora_alpha[adapter]
            if rank != layer.r[adapter]:
                alpha = layer.scaling[adapter] * (math.sqrt(rank) if config.use_rslora else rank)
            if (rank, alpha) != (config.r, config.lora_alpha):
                key = "^" + re.escape(name)
                config.rank_pattern[key], config.alpha_pattern[key] = rank, alpha
        if self.groups.removed_blocks(kept):
            config.target_modules, config.exclude_modules = set(names), None
            config.layers_to_transform = config.layers_pattern = None
        return config


class _AdaptedCheck(LogitCheck):
    """Compares candidates for the base after the adapters were put into them.

    Attributes:
        adapted: the last candidate with its adapters.
    """

    def __init__(self, merged: PreTrainedModel, kept: Kept, attach: Any) -> None:
        super().__init__(merged, kept, Reference(merged))
        self.attach = attach
        self.adapted: PeftModel | None = None

    def same(self, small: PreTrainedModel) -> bool:
        self.adapted = self.attach(small)
        return super().same(self.adapted)


def packed_base(model: PeftModel) -> str | None:
    """Why the base of a model with adapters cannot be cut as it is stored, None if it is plain numbers."""
    for packed in packed_weights(model).values():
        return (
            f"{packed.text}, and adapters are cut together with float weights only: load the base without quantisation "
            "and put the adapter on it (PeftModel.from_pretrained); a plan made here fits that model, since its groups "
            "are the same"
        )
    return None


def unsupported(model: PeftModel) -> str | None:
    """Why the adapters of a model cannot be cut with it, None if they can."""
    from peft import PeftType
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    merge = "merge them first (model.merge_and_unload())"
    for config in model.peft_config.values():
        if config.peft_type != PeftType.LORA:
            return f"only LoRA adapters are cut with their model, and these are {config.peft_type.value}: {merge}"
        if config.target_parameters:
            names = ", ".join(sorted(config.target_parameters)[:3])
            return f"adapters on stacked parameters (target_parameters: {names}) are not cut with their model: {merge}"
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{path} is trained as a whole beside the adapters (modules_to_save), which is not cut: {merge}"
        if isinstance(module, BaseTunerLayer) and module.merged:
            return f"the adapters are merged into {path}: call model.unmerge_adapter(), or unload them for good"
    for path, layer in adapted_layers(model).items():
        if any(layer.lora_bias.values()) and getattr(layer.get_base_layer(), "bias", None) is None:
            return f"the adapter of {path} has a bias (lora_bias) and the module has none, so it can never be merged"
    return None


def adapted_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Path -> module, for every module that holds adapters."""
    from peft.tuners.lora import LoraLayer as AnyLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, AnyLayer)}


def base_names(model: PeftModel) -> dict[str, str]:
    """Name of every tensor of the base in a `PeftModel`'s state dict -> its name in the base alone."""
    layers = adapted_layers(model)
    found: dict[str, str] = {}
    for name in model.state_dict():
        levels = name.split(".")
        owner = next((p for n in range(len(levels)) if (p := ".".join(levels[:n])) in layers), None)
        if owner is None:
            found[name] = name.removeprefix(PREFIX)
        elif name.startswith(f"{owner}.base_layer."):
            found[name] = f"{owner}{name.removeprefix(f'{owner}.base_layer')}".removeprefix(PREFIX)
    return found


def base_model(model: PeftModel) -> PreTrainedModel:
    """A copy of the base of a `PeftModel`, adapters left out and not merged."""
    inside = model.get_base_model()
    state = model.state_dict()
    names = base_names(model)
    tensors = {base: state[name] for name, base in names.items()}
    listed: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names and listed.setdefault(id(parameter), names[name]) != names[name]:
            tied[names[name]] = listed[id(parameter)]
    return load_tensors(inside, type(inside), inside.config, tensors, tied)


def _key(group: Group, names: Mapping[str, str]) -> tuple[Any, ...]:
    """What identifies a group of the base: where its first and last units lie."""
    blocks = tuple(block.removeprefix(PREFIX) for block in group.blocks)
    members = [
        (names.get(m.parameter, m.parameter), m.dim, *m.index[0].tolist(), *m.index[-1].tolist())
        for m in group.members
        if not names or m.parameter in names
    ]
    return group.units, blocks, frozenset(members)
