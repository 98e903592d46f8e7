"""Groups found in traced models, against layouts written down by hand from the modelling code."""

import importlib
import pkgutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import zoo
from families import FAMILIES, make
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from secateur.discovery import discover
from secateur.discovery.trace import run_trace

# family -> kinds that must be prunable, with units per group
EXPECTED = {
    "llama": {"ffn_channel": 44, "kv_group": 3, "query_head": 2, "hidden": 48, "layer": 2},
    "mistral": {"ffn_channel": 44, "kv_group": 3, "query_head": 2, "hidden": 48, "layer": 2},
    "qwen2": {"ffn_channel": 44, "kv_group": 3, "query_head": 2, "hidden": 48, "layer": 2},
    "qwen3": {"ffn_channel": 44, "kv_group": 3, "query_head": 2, "hidden": 48, "layer": 2},
    "gemma2": {"ffn_channel": 44, "kv_group": 3, "query_head": 2, "hidden": 48, "layer": 2},
    "phi3": {"ffn_channel": 44, "kv_group": 3, "query_head": 2, "hidden": 48, "layer": 2},
    "gpt2": {"ffn_channel": 44, "attention_head": 6, "hidden": 48, "layer": 2},
    "gpt_neox": {"ffn_channel": 44, "attention_head": 6, "hidden": 48, "layer": 2},
    "opt": {"ffn_channel": 44, "attention_head": 6, "hidden": 48, "layer": 2},
    "bloom": {"ffn_channel": 192, "hidden": 48, "layer": 2},
    "falcon-mqa": {"ffn_channel": 192, "query_head": 6, "hidden": 48, "layer": 2},
    "falcon-gqa": {"ffn_channel": 192, "kv_group": 3, "query_head": 2, "hidden": 48, "layer": 2},
}
OFFERED = {"ffn_channel", "attention_head", "kv_group", "query_head", "hidden", "layer"}


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_and_units(family):
    model = make(family)
    groups = discover(model)
    assert {g.kind: g.units for g in groups.prunable if g.kind in OFFERED} == EXPECTED[family]
    per_layer = [g for g in groups.prunable if g.kind in OFFERED - {"hidden", "layer"}]
    assert all(g.layer in (0, 1) for g in per_layer)
    assert groups.total_parameters == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_its_hidden_axis(family):
    """Hidden is complete: each parameter with a dimension of 48 that is not heads x width takes part."""
    groups = discover(make(family))
    hidden = groups.named("hidden")
    taking_part = {(m.parameter, m.dim) for m in hidden.members}
    inner = {(m.parameter, m.dim) for g in groups if g.kind not in ("hidden",) for m in g.members}
    for name, shape in groups.shapes.items():
        for dim, size in enumerate(shape):
            if size == 48 and (name, dim) not in inner:
                assert (name, dim) in taking_part, (name, dim)


def members(groups, name):
    return {(m.parameter.rsplit(".", 2)[-2], m.dim): (m.index, m.role) for m in groups.named(name).members}


def test_llama_kv_group_takes_consecutive_query_heads():
    found = members(discover(make("llama")), "model.layers.0.self_attn/kv_group")
    queries = np.arange(48).reshape(3, 16)  # KV head k serves query heads 2k and 2k+1, 8 wide
    np.testing.assert_array_equal(found["q_proj", 0][0], queries)
    np.testing.assert_array_equal(found["o_proj", 1][0], queries)
    np.testing.assert_array_equal(found["k_proj", 0][0], np.arange(24).reshape(3, 8))
    np.testing.assert_array_equal(found["v_proj", 0][0], np.arange(24).reshape(3, 8))
    assert found["o_proj", 1][1] == "consumer" and found["q_proj", 0][1] == "producer"


def test_phi3_fused_projections():
    groups = discover(make("phi3"))
    gate_up = members(groups, "model.layers.0.mlp/ffn_channel")["gate_up_proj", 0][0]
    np.testing.assert_array_equal(gate_up, np.stack([np.arange(44), np.arange(44) + 44], axis=1))
    qkv = members(groups, "model.layers.1.self_attn/kv_group")["qkv_proj", 0][0]
    expected = [
        [*range(16 * k, 16 * k + 16), *range(48 + 8 * k, 56 + 8 * k), *range(72 + 8 * k, 80 + 8 * k)] for k in range(3)
    ]
    np.testing.assert_array_equal(qkv, expected)


def test_gpt2_and_neox_fused_heads():
    gpt2 = members(discover(make("gpt2")), "transformer.h.0.attn/attention_head")["c_attn", 1][0]
    np.testing.assert_array_equal(gpt2[2], [*range(16, 24), *range(64, 72), *range(112, 120)])
    neox = members(discover(make("gpt_neox")), "gpt_neox.layers.0.attention/attention_head")["query_key_value", 0][0]
    np.testing.assert_array_equal(neox, np.arange(144).reshape(6, 24))


def test_falcon_interleaved_kv_groups():
    found = members(discover(make("falcon-gqa")), "transformer.h.0.self_attention/kv_group")
    np.testing.assert_array_equal(found["query_key_value", 0][0], np.arange(96).reshape(3, 32))


def test_biases_take_part():
    names = {m.parameter for m in discover(make("qwen2")).named("model.layers.0.self_attn/kv_group").members}
    assert {f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkv"} <= names


def test_tied_embeddings_are_one_parameter():
    groups = discover(make("llama"))
    assert groups.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in groups.shapes


def test_refusals_say_why():
    groups = discover(make("bloom"))
    heads = [g for g in groups if g.kind == "attention_head"]
    assert heads and all("aten.arange" in g.refusals[0] for g in heads)
    rotary = [g for g in discover(make("llama")) if g.refusals and "rotary_emb.inv_freq" in g.refusals[0]]
    assert rotary and all(g.kind == "head_dim" for g in rotary)
    assert not discover(make("llama")).of_kinds(["vocabulary"])


def test_an_operation_without_a_rule_freezes_what_it_touches(monkeypatch):
    from secateur.discovery import recorder

    without = {op: r for op, r in recorder.RULES.items() if op is not torch.ops.aten._softmax}
    monkeypatch.setattr(recorder, "RULES", without)
    groups = discover(make("llama"))
    refused = [g for g in groups if any("_softmax" in reason for reason in g.refusals)]
    assert refused and not any(g.kind in ("kv_group", "query_head") and g.prunable for g in groups)
    assert groups.named("model.layers.0.mlp/ffn_channel").prunable


def test_an_unread_parameter_blocks_groups_of_its_size():
    model = make("llama")
    model.model.extra = torch.nn.Parameter(torch.zeros(44))
    group = discover(model).named("model.layers.0.mlp/ffn_channel")
    assert "model.extra" in group.refusals[0]


def test_discovery_leaves_the_model_alone():
    model = make("llama").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    attention = model.config._attn_implementation
    discover(model)
    assert model.training and model.config._attn_implementation == attention
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_large_shapes_need_no_weights():
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    groups = discover(model)
    assert len(groups.of_kinds(["ffn_channel"])) == 80
    assert groups.total_parameters == model.num_parameters()


def test_every_operation_of_the_families_has_a_rule():
    for family in FAMILIES:
        trace = run_trace(make(family))
        causes = {h.cause for axes in trace.parameters.values() for axis in axes for h in axis.find().hazards.values()}
        assert not causes & {"unknown", "layout"}, family


def test_the_rules_need_no_model_to_be_imported_first():
    """Operators of other libraries may be defined later, or never."""
    subprocess.run([sys.executable, "-c", "import secateur.discovery"], check=True)


def test_import_is_light():
    code = "import secateur, sys; assert 'transformers' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_does_not_train_imports_nothing_of_training():
    """peft and the Trainer take longer to import than everything else that `groups`, `prune` or `report` need."""
    code = """import sys
from secateur.pipeline import evaluate, prune, run_sweep, write_report
assert not {"peft", "datasets", "transformers.trainer", "transformers.trainer_callback"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["secateur", "secateur.pipeline", "secateur.recovery"])
def test_names_imported_on_first_use_are_what_they_are_called(package):
    """A module of the same name would take the place of the name once anything imports it."""
    module = importlib.import_module(package)
    assert set(module.__all__) == set(module._HOME)
    assert not set(module.__all__) & {found.name for found in pkgutil.iter_modules(module.__path__)}
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


TINY_MOE = {**FAMILIES["llama"][1], "moe_intermediate_size": 20, "head_dim": 8}


def moe(model_type, **sizes):
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**TINY_MOE, **sizes})).eval()


def test_routers_are_tied_to_their_experts():
    groups = discover(moe("mixtral", num_local_experts=5, num_experts_per_tok=2))
    found = members(groups, "model.layers.0.mlp/expert")
    assert set(found) == {("gate", 0), ("experts", 0)}
    for index, _ in found.values():
        np.testing.assert_array_equal(index, np.arange(5)[:, None])
    channels = groups.named("model.layers.1.mlp.experts/expert_channel")
    assert {(m.parameter.rsplit(".")[-1], m.dim, m.index.shape[1]) for m in channels.members} == {
        ("gate_up_proj", 1, 2),
        ("down_proj", 2, 1),
    }


def test_groups_of_experts_and_shared_experts_and_latents():
    sizes = {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    mla = {
        "q_lora_rank": 14,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "head_dim": 4,
    }
    groups = discover(moe("deepseek_v3", **sizes, **mla, num_key_value_heads=6))
    kinds = {g.name.removeprefix("model.layers.1."): g.units for g in groups if g.prunable and g.layer == 1}
    assert kinds["mlp/expert_group"] == 3 and kinds["mlp/expert"] == 2
    assert kinds["mlp.shared_experts/ffn_channel"] == 20 and kinds["mlp.experts/expert_channel"] == 20
    assert kinds["self_attn.q_a_proj/latent"] == 14


def test_interleaved_expert_channels():
    groups = discover(moe("gpt_oss", num_local_experts=5, num_experts_per_tok=2))
    found = members(groups, "model.layers.0.mlp.experts/expert_channel")
    assert {dim for _, dim in found} == {1, 2}
    fused = next(m for m in groups.named("model.layers.0.mlp.experts/expert_channel").members if m.dim == 2)
    np.testing.assert_array_equal(fused.index[1], [2, 3])


def test_state_space_channels():
    config = CONFIG_MAPPING["mamba"](hidden_size=48, state_size=10, num_hidden_layers=2, vocab_size=131)
    groups = discover(AutoModelForCausalLM.from_config(config))
    assert groups.named("backbone.layers.0.mixer/ssm_channel").units == 96
    assert groups.of_kinds(["latent"])


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_part_of_the_groups(use_dora):
    settings = LoraConfig(r=5, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 3}, use_dora=use_dora)
    groups = discover(get_peft_model(make("llama"), settings).get_base_model())
    assert groups.named("model.layers.0.mlp.down_proj/lora_rank").units == 5
    assert groups.named("model.layers.0.self_attn.q_proj/lora_rank").units == 3
    channels = {m.parameter for m in groups.named("model.layers.0.mlp/ffn_channel").members}
    assert "model.layers.0.mlp.down_proj.lora_A.default.weight" in channels and groups.named("hidden").prunable


def test_as_many_experts_stay_as_the_router_picks():
    experts = [g for g in discover(zoo.tiny_model("mixtral")).prunable if g.kind == "expert"]
    assert experts and all(g.units == zoo.EXPERTS and g.at_least == zoo.TOP_K for g in experts)
