"""The sizes of a model as GGUF metadata names them, read from its configuration and its rotary codes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import CheckpointError
from secateur.surgery.per_layer import OWN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ZERO_FFN = 32  # channels of the FFN that stands for one left out: one block of Q8_0
FIXED_ROPE = ("linear", "llama3")  # frequencies that differ from the default and do not change with the text's length


@dataclass(frozen=True)
class Layer:
    """Counts of one decoder layer, as they are written: one head and `ZERO_FFN` channels stand for what is left out.

    Attributes:
        window: tokens that it looks back, its own included; None if that is the whole text.
        skip: the sublayers that it leaves out.
    """

    heads: int
    kv_heads: int
    ffn: int
    window: int | None
    experts: int = 0
    expert_ffn: int = 0
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Counts of a model.

    Attributes:
        rotary: channels of a head that rotate.
        rope_factors: (rotary / 2) by which each frequency is divided, None if by nothing.
        score_scale: what the products of queries and keys are multiplied with.
    """

    layers: tuple[Layer, ...]
    hidden: int
    head_dim: int
    rotary: int
    theta: float
    rope_factors: torch.Tensor | None
    context: int
    tied: bool
    score_scale: float

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths and leave nothing out."""
        return len({replace(layer, window=None) for layer in self.layers}) == 1 and not self.layers[0].skip

    @property
    def padded(self) -> Sizes:
        """With every layer as wide as the widest."""
        counts = ("heads", "kv_heads", "ffn", "experts", "expert_ffn")
        widest: dict[str, Any] = {name: max(getattr(layer, name) for layer in self.layers) for name in counts}
        return replace(self, layers=tuple(replace(layer, skip=(), **widest) for layer in self.layers))


def base_type(config: Any) -> str:
    """Model type of the configuration, or of the one that a per-layer configuration varies."""
    return str(getattr(config, "base_model_type", config.model_type))


def read_sizes(model: PreTrainedModel) -> Sizes:
    """Read the sizes.

    Raises:
        CheckpointError: the rotary frequencies are of a kind that GGUF cannot hold.
    """
    config: Any = model.config
    whole = config.per_layer_config[0]
    rotary = next((m for m in model.modules() if hasattr(m, "inv_freq")), None)
    if rotary is None:
        raise CheckpointError(f"{type(model).__name__} has no rotary position codes, so it has no home in GGUF here")
    return Sizes(
        layers=tuple(_layer(own, i) for i, own in enumerate(config.per_layer_config)),
        hidden=config.hidden_size,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // whole.num_attention_heads,
        rotary=2 * rotary.inv_freq.numel(),
        theta=float(config.rope_parameters["rope_theta"]),
        rope_factors=_rope_factors(config),
        context=config.max_position_embeddings,
        score_scale=next(float(m.scaling) for m in model.modules() if isinstance(getattr(m, "scaling", None), float)),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    )


def with_stand_ins(config: Any, sizes: Sizes) -> Any:
    """The configuration of a per-layer model that has, in place of what layers leave out, what GGUF stores there."""
    values = {name: value for name, value in config.to_dict().items() if name not in OWN}
    overrides = {int(number): dict(fields) for number, fields in config.to_dict()["per_layer_config"].items()}
    for number, layer in enumerate(sizes.layers):
        skip = overrides.get(number, {}).pop("skip", ())
        if "attention" in skip:
            overrides[number] |= {"num_attention_heads": layer.heads, "num_key_value_heads": layer.kv_heads}
        if "mlp" in skip:
            overrides[number] |= {"intermediate_size": layer.ffn}
    return type(config)(**{**values, "head_dim": sizes.head_dim}, per_layer_config=overrides)


def _layer(own: Any, number: int) -> Layer:
    window = getattr(own, "sliding_window", None)
    types = getattr(own, "layer_types", None)
    if types and types[number] != "sliding_attention":
        window = None
    experts = getattr(own, "num_experts", None) or 0
    skip = tuple(getattr(own, "skip", None) or ())
    heads, kv_heads = own.num_attention_heads, getattr(own, "num_key_value_heads", None) or own.num_attention_heads
    return Layer(
        heads=1 if "attention" in skip else heads,
        kv_heads=1 if "attention" in skip else kv_heads,
        ffn=ZERO_FFN if "mlp" in skip else own.intermediate_size,
        window=window,
        experts=experts,
        expert_ffn=(getattr(own, "moe_intermediate_size", None) or own.intermediate_size) if experts else 0,
        skip=skip,
    )


def _rope_factors(config: Any) -> torch.Tensor | None:
    """Default frequency / frequency of every rotary pair, in float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in FIXED_ROPE:
        raise CheckpointError(
            f"rotary codes of type {kind} were not verified in llama.cpp; set rope_type to default in config.json for "
            "contexts that the model can read without them, or run it with transformers"
        )
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    exponents = torch.arange(0, len(frequencies), dtype=torch.float32) / len(frequencies)
    factors: torch.Tensor = (config.rope_parameters["rope_theta"] ** -exponents) / frequencies
    return factors
