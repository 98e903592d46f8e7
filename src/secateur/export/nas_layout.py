"""The nemotron-nas layout: Llama layers of unequal width as vLLM's DeciLM takes them.

All layers have the same number of query heads there. `block_configs` says for every layer how many of them share a KV
head (`attention.n_heads_in_group`), how wide its FFN is (`ffn.intermediate_size`), and which of the two it leaves out
(`no_op`). A layer with fewer query heads is therefore stored with zeros in place of the missing ones:

- a query head of zeros adds nothing, because its columns of `o_proj` are zero;
- each KV head keeps its query heads together; if its group is larger than the stored one, the KV head is stored more
  than once; KV heads beyond those are zeros;
- of all numbers of query heads, the one with which the fewest heads are stored is taken.

The norm before a sublayer that is left out is not written: the loader knows no parameter of that name. DeciLM cannot
leave out the attention of layer 0, and no per-layer model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from secateur.export.gguf_sizes import base_type
from secateur.surgery.per_layer import OWN

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BASES = ("llama", "mistral", "qwen2")
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "skip")
SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "max_position_embeddings", "rms_norm_eps",
        "rope_parameters", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
        "use_cache")  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """Where the heads of one layer are stored.

    Attributes:
        queries, keys: how many query and KV heads the layer has.
        stored: query heads as stored, the same in every layer.
        group: query heads that share a KV head as stored.
    """

    queries: int
    keys: int
    stored: int
    group: int

    @property
    def stored_keys(self) -> int:
        return self.stored // self.group

    @property
    def copies(self) -> int:
        """How often each KV head is stored."""
        return -(-(self.queries // self.keys) // self.group)

    def query_places(self) -> list[int]:
        """For each query head, its place among the stored ones."""
        own = self.queries // self.keys
        return [
            (head // own * self.copies + head % own // self.group) * self.group + head % own % self.group
            for head in range(self.queries)
        ]

    def key_sources(self) -> list[int]:
        """For each stored KV head that is not all zeros, the layer's KV head."""
        return [place // self.copies for place in range(self.keys * self.copies)]


def refusal(config: PreTrainedConfig) -> str | None:
    """Why a model has no such layout; None if it has."""
    base = base_type(config)
    if base not in BASES:
        return f"of the models whose layers differ in width, vLLM takes {', '.join(BASES)}, not {base}"
    if window := _window(config):
        return f"attention within a window of {window} tokens is not part of that layout"
    if config.hidden_act != "silu":
        return f"that layout has silu as its activation, not {config.hidden_act}"
    overrides = vars(config)["_heterogeneity_spec"].per_layer_overrides.values() if _differs(config) else ()
    if others := sorted({name for fields in overrides for name in fields} - set(WIDTHS)):
        return f"{', '.join(others)} cannot differ between layers in that layout"
    if len({_head_dim(own) for own in _with_attention(config)}) > 1:
        return "heads of other widths in other layers are not part of that layout"
    return None


def heads_fill_hidden(config: PreTrainedConfig) -> bool:
    """Whether the heads of a model with the same widths in every layer are together as wide as the residual stream."""
    return bool(config.num_attention_heads * _head_dim(config) == config.hidden_size)


def layout_of(config: PreTrainedConfig) -> dict[str, Any]:
    """`config.json` of the layout for a configuration that is not refused."""
    heads = head_layout(config)
    blocks = []
    for number, own in enumerate(config.per_layer_config):
        attention = {"no_op": False, "n_heads_in_group": heads[number].group} if number in heads else {"no_op": True}
        ffn = {"no_op": True} if skips(own, "mlp") else {"no_op": False, "intermediate_size": own.intermediate_size}
        blocks.append({"attention": attention, "ffn": ffn})
    fields = {name: getattr(config, name, None) for name in SAME}
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "model_type": "nemotron-nas",
        **fields,
        "num_attention_heads": heads[0].stored,
        "head_dim": _head_dim(config.per_layer_config[0]),
        "attention_bias": getattr(config, "attention_bias", False),
        "qkv_bias": base_type(config) == "qwen2" or getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "block_configs": blocks,
    }


def tensors_of(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of the layout, by name, and how many of their elements are padding or copies."""
    config = model.config
    heads = head_layout(config)
    absent = tuple(unused_norms(config))
    tensors, padding = {}, 0
    for name, tensor in model.state_dict().items():
        if name.startswith(absent) or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        kept = tensor
        if (place := _place_of(name)) is not None:
            kept = place(heads[int(name.split(".")[2])], tensor)
        tensors[name] = kept.contiguous()
        padding += kept.numel() - tensor.numel()
    return tensors, padding


def differing(model: PreTrainedModel, written: Mapping[str, torch.Tensor]) -> str | None:
    """The first of the tensors in which a query head does not find what is its own, bit by bit; None if all agree."""
    heads = head_layout(model.config)
    own = model.state_dict()
    for name, stored in written.items():
        wanted = own[name].cpu()
        if _place_of(name) is not None:
            stored, wanted = _of_each_query(name, heads[int(name.split(".")[2])], stored, wanted)
        if not torch.equal(stored, wanted):
            return name
    return None


def _of_each_query(
    name: str, heads: Heads, stored: torch.Tensor, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each query head is given by a tensor of the layout, and what it must be given."""
    if ".o_proj." in name:
        return stored, _output(heads, own)
    places, shared = heads.query_places(), heads.queries // heads.keys
    if ".q_proj." in name:
        return stored.unflatten(0, (heads.stored, -1))[places], own.unflatten(0, (heads.queries, -1))
    stored = stored.unflatten(0, (heads.stored_keys, -1))[[place // heads.group for place in places]]
    return stored, own.unflatten(0, (heads.keys, -1))[[head // shared for head in range(heads.queries)]]


def head_layout(config: PreTrainedConfig) -> dict[int, Heads]:
    """Layer that has attention -> how its heads are stored, with the fewest heads stored in all."""
    counts = {
        number: (own.num_attention_heads, own.num_key_value_heads)
        for number, own in enumerate(config.per_layer_config)
        if not skips(own, "attention")
    }
    most = max(queries for queries, _ in counts.values())
    # beyond twice the largest layer, the query heads alone are more than all heads at its own count
    layouts = [_stored_as(stored, list(counts.values())) for stored in range(most, 2 * most + 1)]
    best = min(layouts, key=lambda layout: sum(heads.stored + heads.stored_keys for heads in layout))
    return dict(zip(counts, best, strict=True))


def _stored_as(stored: int, counts: Sequence[tuple[int, int]]) -> list[Heads]:
    """Each layer with as few KV heads as it can have at this number of query heads (one per query head always goes)."""
    divisors = [group for group in range(1, stored + 1) if stored % group == 0]
    layouts = []
    for queries, keys in counts:
        options = [Heads(queries, keys, stored, group) for group in divisors]
        layouts.append([heads for heads in options if keys * heads.copies <= heads.stored_keys][-1])
    return layouts


def as_stored(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a per-layer model that has all the heads which are stored."""
    heads = head_layout(config)
    values = {name: value for name, value in config.to_dict().items() if name not in OWN}
    values |= {"num_attention_heads": heads[0].stored, "head_dim": _head_dim(config.per_layer_config[0])}
    overrides = {int(n): dict(fields) for n, fields in config.to_dict().get("per_layer_config", {}).items()}
    for number, own in heads.items():
        overrides.setdefault(number, {})
        overrides[number] |= {"num_attention_heads": own.stored, "num_key_value_heads": own.stored_keys}
    return type(config)(**values, per_layer_config=overrides)


def skips(own: PreTrainedConfig, sublayer: str) -> bool:
    """Whether the layer with this configuration leaves out `attention` or `mlp`."""
    return sublayer in getattr(own, "skip", [])


def unused_norms(config: PreTrainedConfig) -> Iterator[str]:
    """Prefixes of norms before sublayers that are left out."""
    for number, own in enumerate(config.per_layer_config):
        for sublayer, norm in (("attention", "input_layernorm"), ("mlp", "post_attention_layernorm")):
            if skips(own, sublayer):
                yield f"model.layers.{number}.{norm}."


def _place_of(name: str) -> Callable[[Heads, torch.Tensor], torch.Tensor] | None:
    """What pads the tensor of this name; None if it is stored as it is."""
    for part, place in (("q_proj", _queries), ("k_proj", _keys), ("v_proj", _keys), ("o_proj.weight", _output)):
        if f".self_attn.{part}" in name:
            return place
    return None


def _queries(heads: Heads, tensor: torch.Tensor) -> torch.Tensor:
    """`[queries * head_dim, ...]` -> `[stored * head_dim, ...]`."""
    own: torch.Tensor = tensor.unflatten(0, (heads.queries, -1))
    padded = own.new_zeros(heads.stored, *own.shape[1:])
    padded[heads.query_places()] = own
    return padded.flatten(0, 1)


def _keys(heads: Heads, tensor: torch.Tensor) -> torch.Tensor:
    """`[keys * head_dim, ...]` -> `[stored_keys * head_dim, ...]`."""
    own: torch.Tensor = tensor.unflatten(0, (heads.keys, -1))[heads.key_sources()]
    padded = own.new_zeros(heads.stored_keys, *own.shape[1:])
    padded[: len(own)] = own
    return padded.flatten(0, 1)


def _output(heads: Heads, tensor: torch.Tensor) -> torch.Tensor:
    """`[hidden, queries * head_dim]` -> `[hidden, stored * head_dim]`."""
    return _queries(heads, tensor.T).T


def _with_attention(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [own for own in config.per_layer_config if not skips(own, "attention")]


def _differs(config: PreTrainedConfig) -> bool:
    return vars(config).get("_heterogeneity_spec") is not None


def _head_dim(own: PreTrainedConfig) -> int:
    """Width of a head in the layer with this configuration."""
    return int(getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads)


def _window(config: PreTrainedConfig) -> int | None:
    """Tokens that sliding-window attention sees; None if every layer sees all."""
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return getattr(config, "sliding_window", None) if windowed else None
