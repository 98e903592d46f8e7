"""`secateur export`: one checkpoint in the forms that other programs want."""

import json

import pytest
import torch
from test_per_layer import with_vocabulary
from transformers import AutoConfig, AutoModelForCausalLM

from secateur import checkpoint
from secateur.export import LlamaCppParity, llama_cpp, plainest, tiers
from secateur.pipeline import shipping
from secateur.surgery import slice


@pytest.fixture(scope="module")
def small(tokenizer):
    return slice(*with_vocabulary(tokenizer))


@pytest.fixture(scope="module")
def folder(small, tokenizer, tmp_path_factory):
    """A checkpoint whose layers differ in width."""
    return checkpoint.save(small, tmp_path_factory.mktemp("export") / "small", tokenizer=tokenizer)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_tiers_and_what_they_cost(small, trained):
    found = {tier.name: tier for tier in tiers(small)}
    assert found["uniform"].parameters is None and "differ in width" in found["uniform"].reason
    assert found["per-layer"].parameters == small.num_parameters() < found["padded"].parameters
    assert found["per-layer"].bytes == 4 * small.num_parameters() and found["per-layer"].macs < found["padded"].macs
    assert plainest(tuple(found.values())).name == "per-layer"
    assert [(tier.name, tier.parameters) for tier in tiers(trained)] == [("uniform", trained.num_parameters())]


def test_padded_loads_without_the_bundled_file(secateur, small, folder, tmp_path):
    code, out, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "padded")
    assert code == 0, err
    results = results_of(tmp_path / "o")
    assert results["parity"]["max_logit_difference"] == 0.0 and results["parity"]["process"] == "fresh"
    assert results["export"]["max_logit_difference_to_source"] < 1e-5 and "fresh process" in out
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert type(again).__name__ == "LlamaForCausalLM"
    assert again.num_parameters() == small.num_parameters() + results["export"]["zeros"]
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(again(ids).logits, small(ids).logits, atol=1e-5)
    code, _, err = secateur("export", tmp_path / "o", "-o", tmp_path / "p", "--to", "padded")
    assert code == 2 and "stock class already" in err


def test_uniform_is_refused_where_it_would_lose_something(secateur, folder, tmp_path):
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "uniform")
    assert code == 2 and "--to padded" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_gguf_runs_in_llama_cpp(secateur, folder, tmp_path, dtype):
    pytest.importorskip("xllamacpp")
    code, out, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "gguf", "--gguf-type", dtype)
    assert code == 0, err
    results = results_of(tmp_path / "o")
    assert results["export"]["arch"] == "deci" and (tmp_path / "o" / "model.gguf").stat().st_size > 10_000
    assert results["parity"]["mean_difference"] <= llama_cpp.TOLERANCE[dtype] and "llama.cpp" in out
    if dtype == "f32":
        assert results["parity"]["same_greedy"]


def test_a_failed_comparison_leaves_nothing_and_exits_with_1(secateur, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shipping, "compare", lambda *_: LlamaCppParity(9.0, 3.0, 4, False, ()))
    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "gguf")
    assert code == 1 and "computes something else" in err and not list(tmp_path.iterdir())


def test_without_llama_cpp_the_file_is_said_to_be_unverified(secateur, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    code, out, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "gguf")
    assert code == 0, err
    assert "not verified" in out and "parity" not in results_of(tmp_path / "o")


def test_vllm_layout(secateur, small, folder, tmp_path):
    code, out, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "vllm")
    assert code == 0, err
    config = AutoConfig.from_pretrained(tmp_path / "o", trust_remote_code=True)
    assert config.model_type == "nemotron-nas" and len(config.block_configs) == small.config.num_hidden_layers
    assert f"vllm serve {tmp_path / 'o'}" in out.replace("\n", "") and "read back" in out


def test_wrong_words(secateur, folder, tmp_path):
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "onnx")
    assert code == 2 and "no such form" in err
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "gguf", "--gguf-type", "q2")
    assert code == 2 and "q8_0" in err and not list(tmp_path.iterdir())
