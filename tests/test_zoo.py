"""The zoo of tiny models: a sample of its types is small, finite, free of constants, and the same at every build."""

from __future__ import annotations

import pytest
import torch
import zoo

SAMPLE = ("llama", "gpt2", "bert", "gemma3_text", "qwen3_moe", "deepseek_v3", "mamba2", "jamba")
INPUT_IDS = torch.arange(3, 17).view(2, 7)


def logits(model):
    with torch.no_grad():
        return model(INPUT_IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=SAMPLE)
def named_model(request):
    return request.param, zoo.tiny_model(request.param)


def test_models_are_small_and_ready_to_run(named_model):
    model_type, model = named_model
    assert model.config.model_type == model_type
    assert model.num_parameters() < 5_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_logits_are_finite_and_differ_between_tokens(named_model):
    _, model = named_model
    found = logits(model)
    assert found.shape == (2, 7, zoo.VOCAB)
    assert found.isfinite().all()
    assert found.std(dim=1).min() > 0


def test_no_parameter_is_constant(named_model):
    _, model = named_model
    constant = [name for name, p in model.named_parameters() if p.numel() > 1 and p.min() == p.max()]
    assert constant == []


def test_the_seed_decides_every_weight(named_model):
    model_type, model = named_model
    state = torch.random.get_rng_state()
    again, other = zoo.tiny_model(model_type), zoo.tiny_model(model_type, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator moved"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(logits(model), logits(again))


def test_every_kind_of_layer_is_present():
    assert set(zoo.tiny_config("gemma3_text").layer_types) == {"sliding_attention", "full_attention"}
    assert set(zoo.tiny_config("kimi_linear").mlp_layer_types) == {"dense", "sparse"}
    assert len(set(zoo.tiny_config("nemotron_h").layers_block_type)) == 4


def test_configs_share_no_state():
    zoo.tiny_config("ministral").layer_types.clear()
    assert len(zoo.tiny_config("ministral").layer_types) == zoo.MIXED_LAYERS


def test_types_are_sorted_and_include_the_sample():
    types = zoo.model_types()
    assert types == sorted(set(types))
    assert set(SAMPLE) | set(zoo.UNSUPPORTED) <= set(types)


def test_a_type_that_cannot_be_built_says_why():
    with pytest.raises(zoo.ZooError, match=r"gemma3n: .*timm"):
        zoo.tiny_model("gemma3n")
    with pytest.raises(zoo.ZooError, match="no-such-type: not a causal language model type"):
        zoo.tiny_config("no-such-type")
