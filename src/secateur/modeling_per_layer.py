# Copyright 2026 The Secateur authors. Licensed under the Apache License, Version 2.0.
"""Causal language models whose layers differ in width: one implementation for every class of transformers.

A checkpoint of such a model holds a copy of this file, which needs only torch and transformers, and loads with

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`config.json` is that of the base class (named by `base_model_type`) with transformers' own `per_layer_config`: layer
number -> fields that differ there. `"skip": ["attention"]` or `"skip": ["mlp"]` leaves out a sublayer.

`PerLayerLlamaConfig` and `PerLayerLlamaForCausalLM` are made when first asked for, from `LlamaConfig` and
`LlamaForCausalLM`, and so for every other class: the base class builds the model, and each of its layers is then built
again from that layer's own configuration.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

MODEL_TYPE = "secateur_per_layer"
PREFIX = "PerLayer"
SUBLAYERS = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward", "moe")}


def _shared(name: str) -> property:
    """A setting that the configurations of layers read from the whole one, so that switching it reaches every layer."""

    def get(self: Any) -> Any:
        return vars(vars(self).get("_whole", self)).get(name)

    def put(self: Any, value: Any) -> None:
        vars(vars(self).get("_whole", self))[name] = value

    return property(get, put)


class PerLayerConfigMixin:
    """What distinguishes `PerLayer*Config` from its base class."""

    model_type = MODEL_TYPE
    _attn_implementation_internal = _shared("_attn_implementation_internal")
    _experts_implementation_internal = _shared("_experts_implementation_internal")

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["base_model_type"] = type(self).base.model_type  # type: ignore[attr-defined]
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def validate_architecture(self) -> None:
        """Replaces the base's rules, which know one width for all layers (heads that divide the hidden size)."""


class PerLayerConfig(PreTrainedConfig):  # type: ignore[misc]
    """What `AutoConfig` finds under the model type: hands over to the class for the base named in config.json."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base = transformers.CONFIG_MAPPING[config_dict["base_model_type"]]
        return config_class(base).from_dict(config_dict, **kwargs)


class PerLayerModelMixin:
    """What distinguishes `PerLayer*ForCausalLM` from its base class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_skips(config)
        with _as_uniform(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        layers = decoder_layers(self, config.num_hidden_layers)
        for number, old in enumerate(layers):
            own = config.per_layer_config[number]
            if own is not config:
                vars(own)["_whole"] = config
            layer = type(old)(own, number)
            for sublayer in getattr(own, "skip", []):
                remove_sublayer(layer, sublayer)
            layers[number] = layer
        self.post_init()  # type: ignore[attr-defined]

    def initialize_weights(self) -> None:
        """Rotary codes are computed again after loading, from the one head width that all layers share."""
        with _as_uniform(self.config):  # type: ignore[attr-defined]
            super().initialize_weights()  # type: ignore[misc]


@contextmanager
def _as_uniform(config: Any) -> Iterator[None]:
    """Hide the differences between layers, which the base class could not read."""
    spec = vars(config).pop("_heterogeneity_spec", None)
    try:
        yield
    finally:
        if spec is not None:
            vars(config)["_heterogeneity_spec"] = spec


def check_skips(config: Any) -> None:
    """Cached decoding reads the length of the cache in layer 0, so a layer without attention must not come first.

    Raises:
        ValueError: it does.
    """
    spec = vars(config).get("_heterogeneity_spec")
    if spec is not None and "attention" in spec.per_layer_overrides.get(0, {}).get("skip", []):
        raise ValueError("layer 0 must keep its attention: cached decoding reads its length there")


def decoder_layers(model: Any, count: int) -> nn.ModuleList:
    """The list of decoder layers: the outermost one of that length.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} layers")


class NoAttention(nn.Module):
    """Adds nothing to the residual stream in place of attention."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Adds nothing to the residual stream in place of an MLP."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def remove_sublayer(layer: nn.Module, sublayer: str) -> None:
    """Leave out the attention or the MLP of a layer; its norm stays, unused.

    Raises:
        ValueError: see `sublayer_name`.
    """
    setattr(layer, sublayer_name(layer, sublayer), NoAttention() if sublayer == "attention" else NoMLP())


def sublayer_name(layer: nn.Module, sublayer: str) -> str:
    """What the attention or the MLP of a layer is called.

    Raises:
        ValueError: the layer has no such submodule, or it does more than add to the residual stream.
    """
    if sublayer not in SUBLAYERS:
        raise ValueError(f"cannot skip {sublayer!r}; a layer can skip {' or '.join(SUBLAYERS)}")
    found = [
        name
        for name, child in layer.named_children()
        if any(part in name for part in SUBLAYERS[sublayer])
        and next(child.children(), None) is not None  # norms and dropouts have none
    ]
    if len(found) != 1:
        raise ValueError(f"{type(layer).__name__} has no submodule that is its {sublayer}, so it cannot be skipped")
    if "residual" in inspect.signature(getattr(layer, found[0]).forward).parameters:
        raise ValueError(f"the {sublayer} of {type(layer).__name__} adds the residual itself, so it cannot be skipped")
    return found[0]


@functools.cache
def config_class(base: Any) -> Any:
    """`PerLayer*Config` for a configuration class of transformers; its model class becomes known to AutoModel."""
    made: Any = strict(_derived(PerLayerConfigMixin, base, {"_auto_class": "AutoConfig"}))
    rules = made.validate

    def validate(config: Any) -> None:
        check_skips(config)
        with _as_uniform(config):
            rules(config)

    made.validate = validate
    model: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[base]
    transformers.AutoModelForCausalLM.register(made, _model_class(model, made), exist_ok=True)
    return made


def model_class(base: Any) -> Any:
    """`PerLayer*ForCausalLM` for a model class of transformers."""
    config: Any = config_class(base.config_class)
    return _model_class(base, config)


@functools.cache
def _model_class(base: Any, config: Any) -> Any:
    members = {
        "_auto_class": "AutoModelForCausalLM",
        "config_class": config,
        # transformers decides these by reading the source file of the class, which would be this file
        "_can_set_attn_implementation_cached_value": base._can_set_attn_implementation(),
        "_can_set_experts_implementation_cached_value": base._can_set_experts_implementation(),
    }
    return _derived(PerLayerModelMixin, base, members)


def _derived(mixin: type, base: Any, members: dict[str, Any]) -> Any:
    name = PREFIX + base.__name__
    return type(name, (mixin, base), {"__module__": __name__, "__qualname__": name, "base": base, **members})


def __getattr__(name: str) -> Any:
    """Make `PerLayerX` from transformers' `X`, so that `auto_map` can name it and pickle can find it."""
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(base) if issubclass(base, PreTrainedConfig) else model_class(base)
