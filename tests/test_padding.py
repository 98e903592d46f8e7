"""Models whose layers differ in width, padded with zeros to stock models."""

import json

import pytest
import torch
from families import make
from test_per_layer import CASES, GROUPED, built, cut, uneven_plan
from transformers import AutoModelForCausalLM

from secateur.discovery import discover
from secateur.discovery.reference import plain_logits
from secateur.discovery.trace import probe_ids
from secateur.errors import PlanError
from secateur.plan import PruningPlan
from secateur.surgery import pad, slice


def difference(model, padded):
    ids = probe_ids(model)
    wanted = plain_logits(model, ids)
    return float((plain_logits(padded, ids) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", CASES)
def test_a_stock_model_with_the_same_logits(family, tmp_path):
    small = cut(family).double()
    padded = pad(small)
    assert type(padded).__module__.startswith("transformers.models.")
    assert difference(small, padded) < 1e-12
    assert padded.num_parameters() > small.num_parameters()
    padded.float().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain_logits(again, probe_ids(again)), plain_logits(padded, probe_ids(again)))


def test_no_wider_than_the_widest_layer():
    small = cut("qwen2")
    padded = pad(small)
    layers = small.config.per_layer_config
    assert padded.config.intermediate_size == max(layer.intermediate_size for layer in layers)
    assert padded.config.num_key_value_heads == max(layer.num_key_value_heads for layer in layers)


@pytest.mark.parametrize("family, model_type, heads", [("llama", "mistral", 10), ("gemma2", "gemma2", 12)])
def test_head_counts_that_the_class_refuses(family, model_type, heads):
    model = make(family, **GROUPED)  # 48 dimensions: 10 heads do not divide them
    groups = discover(model)
    kept = {g.name: range(5 if g.layer != 1 else 4) for g in groups.of_kinds(["kv_group"])}
    small = slice(model, PruningPlan(kept, {g.name: g.units for g in groups.of_kinds(["kv_group"])}), groups)
    padded = pad(small)
    assert (padded.config.model_type, padded.config.num_attention_heads) == (model_type, heads)
    assert difference(small, padded) < 1e-5


def test_layers_with_other_numbers_of_queries_per_key():
    model = make("mistral", **{**GROUPED, "num_attention_heads": 12, "num_key_value_heads": 3})
    groups = discover(model)
    kept = {g.name: range(4 - g.layer) for g in groups.of_kinds(["query_head"])}
    kept |= {g.name: range(1 + g.layer) for g in groups.of_kinds(["kv_group"])}
    small = slice(model, PruningPlan(kept, {n: groups.named(n).units for n in kept}), groups)
    padded = pad(small)
    assert padded.config.num_attention_heads == 12 and padded.config.num_key_value_heads == 3
    assert difference(small, padded) < 1e-5


def test_skipped_sublayers_are_zero():
    model = built("llama", {1: {"skip": ["attention"]}, 2: {"skip": ["mlp"], "num_attention_heads": 3,
                                                            "num_key_value_heads": 1}})  # fmt: skip
    padded = pad(model)
    assert difference(model, padded) < 1e-5
    assert not padded.model.layers[1].self_attn.o_proj.weight.any()


def test_together_with_removed_layers_and_a_narrower_residual_stream():
    model = make("mistral", num_hidden_layers=4)
    groups = discover(model)
    plan = uneven_plan(groups, ("ffn_channel",))
    kept = {**plan.kept, "hidden": tuple(range(0, 48, 2)), "model.layers/layer": (0, 2, 3)}
    small = slice(model, PruningPlan(kept, {**plan.units, "hidden": 48, "model.layers/layer": 4}), groups)
    padded = pad(small)
    assert difference(small, padded) < 1e-5 and padded.config.num_hidden_layers == 3


def test_a_stock_model_has_nothing_to_pad():
    with pytest.raises(PlanError, match="nothing to pad"):
        pad(make("llama"))


def test_experts_that_a_router_would_still_choose_are_refused():
    model = built("mixtral", {1: {"num_local_experts": 3}}, num_local_experts=4)
    with pytest.raises(PlanError, match="cannot be padded"):
        pad(model)


def test_prune_writes_the_tier_that_is_asked_for(checkpoint_folder, text_file, tmp_path, secateur):
    flags = ["--sparsity", 0.2, "--criterion", "l2", "--protect-first", 1, "--calibration", text_file,
             "--samples", 2, "--seq-len", 16]  # fmt: skip
    found = {}
    for tier in ("per-layer", "padded"):
        code, _, err = secateur(
            "prune", checkpoint_folder, "-o", tmp_path / tier, "--method", "llm-pruner", "--tier", tier, *flags
        )
        assert code == 0, err
        found[tier] = json.loads((tmp_path / tier / "results.json").read_text())
        assert found[tier]["tier"]["chosen"] == tier
        costs = {t["name"]: t["parameters"] for t in found[tier]["tier"]["tiers"]}
        assert found[tier]["params"]["pruned"] == costs[tier]
        assert costs["uniform"] is None and costs["per-layer"] < costs["padded"] <= found[tier]["params"]["dense"]
    assert "auto_map" not in json.loads((tmp_path / "padded" / "config.json").read_text())
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / tier) for tier in found)
    assert difference(a, b) < 1e-5
