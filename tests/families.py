"""Tiny models of the families the main job must handle, with sizes chosen so that no two dimensions coincide."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

LLAMA_LIKE = {
    "hidden_size": 48,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 131,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MHA = {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
FALCON = {k: v for k, v in MHA.items() if k != "intermediate_size"} | {"bias": False, "alibi": False}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**LLAMA_LIKE, "head_dim": 10}),
    "qwen2": ("qwen2", LLAMA_LIKE),
    "qwen3": ("qwen3", {**LLAMA_LIKE, "head_dim": 10}),
    "gemma2": ("gemma2", {**LLAMA_LIKE, "head_dim": 10}),
    "phi3": ("phi3", LLAMA_LIKE),
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 44, "vocab_size": 131, "n_positions": 64,
                      "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("gpt_neox", MHA),
    "opt": ("opt", {**{k: v for k, v in MHA.items() if k != "intermediate_size"}, "ffn_dim": 44,
                    "word_embed_proj_dim": 48, "max_position_embeddings": 64}),
    "bloom": ("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": 131, "bos_token_id": 1,
                        "eos_token_id": 2}),
    "falcon-mqa": ("falcon", {**FALCON, "multi_query": True, "new_decoder_architecture": False}),
    "falcon-gqa": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 3}),
}  # fmt: skip


def make(family: str, **overrides: object) -> PreTrainedModel:
    """A randomly initialised model in which no parameter is constant."""
    model_type, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**sizes, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
