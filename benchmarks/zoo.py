"""A tiny model of every causal language model type that transformers knows.

    python benchmarks/zoo.py

prints one row per type: whether the model can be built and run, its parameters, and the seconds it took.

The configs come from one recipe. It reads which fields a config class has and gives each a small size, so a type that
a new transformers release adds usually needs nothing here. `OVERRIDES` holds what the recipe cannot know. The sizes
are chosen so that few of one model's dimensions coincide: a group found along the wrong dimension then has the wrong
length, and shows.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, FFN, VOCAB, POSITIONS = 144, 6, 3, 8, 2, 44, 131, 64
EXPERTS, TOP_K, EXPERT_FFN, SHARED_FFN = 10, 2, 40, 64
MIXED_LAYERS = 4  # of models whose layers differ in kind

# The size of each field, by the names the config classes use for the same thing.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "emb_dim"], HIDDEN),
    **dict.fromkeys(["embedding_size", "embedding_dim", "word_embed_proj_dim", "hidden_size_global"], HIDDEN),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], HEADS),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"], HEADS),
    **dict.fromkeys(["num_decoder_attention_heads", "num_encoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"], KV_HEADS),
    **dict.fromkeys(["head_dim", "swa_head_dim", "kv_channels", "d_kv", "dim_head", "d_head"], HEAD_DIM),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"], LAYERS),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"], LAYERS),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff", "dff", "d_ff"], FFN),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "feed_forward_size"], FFN),
    **dict.fromkeys(["dense_intermediate_size", "intermediate_size_mlp"], FFN),
    **dict.fromkeys(["vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"], VOCAB),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"], POSITIONS),
    **dict.fromkeys(["max_target_positions", "max_source_positions"], POSITIONS),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size", "local_attention"], 4),
    **dict.fromkeys(["window_size", "attention_chunk_size", "local_attn_chunk_length", "lsh_attn_chunk_length"], 4),
    **dict.fromkeys(["shape_vocab_size", "pronunciation_vocab_size", "encoder_hash_byte_group_vocab"], VOCAB),
    "shape_embed_dim": 14,
    "pronunciation_embed_dim": 12,
    "rotary_dim": 4,
    "d_rel": 10,
    "hidden_size_per_layer_input": 18,
    "laurel_rank": 11,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Mixture of experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "top_k_experts"], TOP_K),
    **dict.fromkeys(["moe_topk", "moe_top_k", "moe_k"], TOP_K),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size"], EXPERT_FFN),
    **dict.fromkeys(["shared_expert_intermediate_size", "shared_experts_intermediate_size"], SHARED_FFN),
    **dict.fromkeys(["shared_intermediate_size", "moe_shared_expert_intermediate_size"], SHARED_FFN),
    **dict.fromkeys(["n_group", "num_expert_group"], 2),
    **dict.fromkeys(["zero_expert_num", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["topk_group", "first_k_dense_replace", "num_dense_layers"], 1),
    # Latent and sparse attention
    "q_lora_rank": 36,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "index_head_dim": 14,
    "index_n_heads": 5,
    "index_topk": 4,
    "o_groups": 2,
    "o_lora_rank": 30,
    # State spaces, linear attention, convolutions
    **dict.fromkeys(["state_size", "mamba_d_state", "ssm_state_size"], 20),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 7),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 18),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 8),
    **dict.fromkeys(["mamba_n_groups", "mamba_ngroups", "n_groups"], 2),
    "mamba_d_ssm": 2 * HIDDEN,
    "lru_width": 108,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 5,
    **dict.fromkeys(["linear_key_head_dim", "linear_head_dim"], 10),
    "linear_value_head_dim": 13,
    # Encoders of images and sound, which text never reaches
    **dict.fromkeys(["adapter_input_size", "adapter_in_dim", "adapter_out_dim", "out_hidden_size"], HIDDEN),
    **dict.fromkeys(["ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"], HIDDEN),
    **dict.fromkeys(["image_size", "crop_size"], 56),
    "num_blocks": LAYERS,
    "mlp_dim": FFN,
    "output_channels": 16,
}
# Encoders of images and sound have other widths than the language model, as in real models: what text never reaches
# blocks every width that it may share.
TOWERS = ("vision_config", "audio_config")
TOWER_SIZES: dict[int, int] = {HIDDEN: 96, HEADS: 4, FFN: 52}
# Sized even where the class leaves them None, to be derived from other sizes.
DERIVED = ("num_key_value_heads", "head_dim", "n_inner", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
# Names under which classes keep the number of layers, and lists in which kinds of layers take turns.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
ALTERNATING = ("layer_types", "layers_block_type")
# With latent attention every head has its own keys, and `head_dim` is the part of it that rotates.
LATENT_ATTENTION = {"num_key_value_heads": HEADS, "head_dim": SIZES["qk_rope_head_dim"]}
# Fields that bring out a kind of layer, or of mask, which the class offers but does not use by default.
SWITCHES: dict[str, Any] = {
    "use_sliding_window": True,
    "max_window_layers": 1,
    "mlp_only_layers": [0],
    "is_decoder": True,
}
# Layers of every kind, for classes whose default config has only one.
SLIDING_AND_FULL = {"num_hidden_layers": MIXED_LAYERS, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR_AND_FULL = {"num_hidden_layers": MIXED_LAYERS, "layer_types": ["linear_attention", "full_attention"] * 2}
CONV_AND_FULL = {"num_hidden_layers": MIXED_LAYERS, "layer_types": ["conv", "full_attention"] * 2}
DENSE_FIRST = {"num_hidden_layers": MIXED_LAYERS, "mlp_layer_types": ["dense"] + ["sparse"] * 3}
# What the recipe cannot know, by model type of the config or of the config inside it.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": MIXED_LAYERS, "attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "codegen": {"n_head": 8},
    "cohere2_moe": DENSE_FIRST,
    "cohere_compass_text": {
        **SLIDING_AND_FULL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v4": {"num_key_value_heads": 1, "partial_rotary_factor": 0.5},
    "diffllama": {"num_key_value_heads": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 34,
        "swa_kv_lora_rank": 26,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 10,
    },
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 12},
    "gemma4_unified_text": {"global_head_dim": 12},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": LINEAR_AND_FULL,
    "helium": {"head_dim": HIDDEN // HEADS},
    "inkling_text": DENSE_FIRST,
    "jamba": {"num_hidden_layers": MIXED_LAYERS, "attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": {**SLIDING_AND_FULL, "num_attention_heads_per_layer": [6, 9, 6, 9]},
    "lfm2": CONV_AND_FULL,
    "lfm2_moe": CONV_AND_FULL,
    "llama4_text": {"moe_layers": [2, 3]},
    "mamba2": {"num_heads": 18, "head_dim": 16},
    "mellum": SLIDING_AND_FULL | DENSE_FIRST,
    "minimax_m3_vl_text": DENSE_FIRST
    | {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_n_heads": KV_HEADS},
    "ministral": SLIDING_AND_FULL,
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mpt": {"expansion_ratio": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 5,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 14,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 22,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "eos_token_id": 2,
        "ngram_vocab_size_base": 200,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (48, 96),
        "attention_head_size": HEAD_DIM,
        "hash_seed": 0,
    },
    "xlm": {"causal": True},
    "xlnet": {"d_head": HIDDEN // HEADS},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "sliding_window": 4, "layer_types": ["hybrid", "hybrid_sliding"]},
}
UNSUPPORTED: dict[str, str] = {
    "gemma3n": "its vision tower needs timm and pillow; gemma3n_text is its language model",
    "gemma4_assistant": "a draft model, which reads the embeddings and keys of another model, not tokens",
    "gemma4_unified_assistant": "a draft model, which reads the embeddings and keys of another model, not tokens",
    "musicgen": "the class behind it takes the config of the decoder inside, not this composite",
    "musicgen_melody": "the class behind it takes the config of the decoder inside, not this composite",
}


class ZooError(RuntimeError):
    """A model type of which no tiny model can be built; says which and why."""


def model_types() -> list[str]:
    """Every type that `AutoModelForCausalLM` accepts, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of this type with small sizes and, where its layers differ, at least one layer of every kind."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ZooError(f"{model_type}: not a causal language model type of this transformers release")
    if model_type in UNSUPPORTED:
        raise ZooError(f"{model_type}: {UNSUPPORTED[model_type]}")
    try:
        return _shrink(CONFIG_MAPPING[model_type])
    except Exception as error:
        raise ZooError(f"{model_type}: no config: {_reason(error)}") from error


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model of this type in eval mode, in which no parameter is constant; the seed decides every weight."""
    config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except Exception as error:
            raise ZooError(f"{model_type}: no model: {_reason(error)}") from error
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def _shrink(config_class: type[PreTrainedConfig], *, tower: bool = False) -> PreTrainedConfig:
    """A small config of a class, whose default config tells which fields are in use and what kinds of layers exist."""
    names = {field.name for field in dataclasses.fields(config_class)}
    aliases = config_class.attribute_map
    switches = {name: value for name, value in SWITCHES.items() if name in names}
    default = config_class(**switches)
    values = {
        name: value
        for name in names
        if (value := vars(default).get(aliases.get(name, name))) is not None or name in DERIVED
    }
    sizes = SIZES | (LATENT_ATTENTION if "kv_lora_rank" in names else {})
    if tower:
        inner = (name for name, size in sizes.items() if type(size) is int and "out" not in name)
        sizes = sizes | {name: TOWER_SIZES.get(sizes[name], sizes[name]) for name in inner}
    small = {name: sizes[name] for name in values if name in sizes}
    per_layer = {name: value for name, value in values.items() if name not in small and _is_per_layer(value, default)}
    depth = MIXED_LAYERS if any(len(set(value)) > 1 for value in per_layer.values()) else LAYERS
    small |= dict.fromkeys(small.keys() & DEPTHS, depth)
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _shrink(type(value), tower=name in TOWERS)
        elif name in per_layer:
            small[name] = _every_kind(value, depth, cycle=name in ALTERNATING)
        elif name.endswith("_token_id") and isinstance(value, int):
            small.setdefault(name, min(value, VOCAB - 1))
    overrides = copy.deepcopy(OVERRIDES.get(config_class.model_type, {}))  # classes edit the lists they are given
    return config_class(**(switches | small | overrides))


def _is_per_layer(value: object, config: PreTrainedConfig) -> bool:
    return isinstance(value, list | tuple) and len(value) == getattr(config, "num_hidden_layers", 0)


def _every_kind(values: Sequence[Any], depth: int, cycle: bool) -> list[Any]:
    """One entry per tiny layer in which each distinct value occurs: in turns, or once each and then the last."""
    kinds = list(dict.fromkeys(values))
    return [kinds[i % len(kinds) if cycle else min(i, len(kinds) - 1)] for i in range(depth)]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> None:
    """Build and run every type, print what came of each, and count."""
    logging.set_verbosity_error()
    input_ids = torch.arange(3, 17).view(2, 7)
    works = 0
    for model_type in model_types():
        start, parameters, outcome = time.perf_counter(), 0, "ok"
        try:
            model = tiny_model(model_type)
            parameters = model.num_parameters()
            with torch.no_grad():
                logits = model(input_ids, use_cache=False).logits
            if not logits.isfinite().all():
                outcome = "logits are not finite"
        except ZooError as error:
            outcome = str(error)
        except Exception as error:
            outcome = f"no forward pass: {_reason(error)}"
        works += outcome == "ok"
        print(f"{model_type:24} {parameters:>9} {time.perf_counter() - start:6.2f} s  {outcome}", flush=True)
    print(f"{works} of {len(model_types())} work")


if __name__ == "__main__":
    main()
