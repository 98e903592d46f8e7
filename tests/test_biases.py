"""Biases where the class has fields for them: the same logits, the budget met, what has none refused."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from secateur.compensation import Compensation, compensated
from secateur.discovery import discover
from secateur.plan import PruningPlan
from secateur.surgery import slice
from secateur.surgery.biases import readers_of, with_biases


@pytest.mark.parametrize(
    ("model_type", "fields", "have"),
    [
        ("llama", ("attention_bias", "mlp_bias"), 2),
        ("gemma", ("attention_bias",), 1),  # tied embeddings
        ("falcon", ("bias",), 2),
        ("gpt2", (), 0),  # has them already
        ("mistral", (), 0),
    ],
)
def test_they_change_no_logit(model_type, fields, have):
    model = zoo.tiny_model(model_type).double()
    groups = discover(model)
    readers = readers_of(groups.of_kinds(groups.kinds_in_blocks()))
    biased, found = with_biases(model, readers)
    assert found == fields and (biased is model) == (not fields)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(biased(ids).logits, model(ids).logits)
    new = biased.state_dict().keys() - model.state_dict().keys()
    assert all(name.endswith("bias") and not biased.state_dict()[name].any() for name in new)
    assert len({f"{path}.bias" for path in readers} & new) == have * model.config.num_hidden_layers
    assert biased.num_parameters() == model.num_parameters() + sum(biased.state_dict()[name].numel() for name in new)


def test_only_the_fields_that_what_is_cut_needs():
    model = zoo.tiny_model("llama")
    biased, fields = with_biases(model, readers_of(discover(model).of_kinds(["ffn_channel"])))
    assert fields == ("mlp_bias",) and biased.model.layers[0].self_attn.o_proj.bias is None
    assert model.config.mlp_bias is False


def test_heads_and_channels_of_a_llama(secateur, checkpoint_folder, trained, text_file, tmp_path):
    common = ["--sparsity", "0.3", "--calibration", text_file, "--samples", "16", "--seq-len", "32", "--uniform"]
    given = ["--method", "llm-pruner", "--compensate", "bias", "-o", tmp_path / "out"]
    code, _, err = secateur("prune", checkpoint_folder, *common, *given)
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["attention_bias"] and config["mlp_bias"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["params"]["sparsity"] == pytest.approx(0.3, abs=0.02)
    assert results["parity"]["max_logit_difference"] < 1e-4


@pytest.mark.parametrize("method", ["llm-pruner", "auto"])
def test_from_the_command_line(secateur, checkpoint_folder, trained, text_file, tmp_path, method):
    common = ["--calibration", text_file, "--samples", "16", "--seq-len", "32", "--text", text_file, "--uniform"]
    common += ["--method", method, "--criterion", "gate", "--ranking", "local", "--kinds", "ffn_channel"]
    given = ["--sparsity", "0.3", "--compensate", "bias"]
    code, printed, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "bias", *given, *common)
    assert code == 0, err
    results = json.loads((tmp_path / "bias" / "results.json").read_text())
    assert (
        results["biases"]["fields"] == ["mlp_bias"]
        and "parameters, which the configuration has with mlp_bias" in printed
    )
    unit = 3 * (3 * 48 + 2)  # a channel of three layers, with the biases of what writes it
    assert abs(results["params"]["pruned"] - 0.7 * trained.num_parameters()) <= unit
    assert results["params"]["dense"] == trained.num_parameters()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "bias")
    ffn = small.model.layers[0].mlp
    assert ffn.down_proj.bias.any() and not ffn.up_proj.bias.any() and results["parity"]["max_logit_difference"] < 1e-4
    assert all(c["after"] < c["before"] and c["target"] == "current" for c in results["compensation"])
    plan = tmp_path / "bias" / "plan.json"
    code, _, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "again", "--plan", plan, "--compensate", "bias", *common[:6]
    )
    assert code == 0, err
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == small.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in small.state_dict().items())


def test_where_only_some_have_a_field_the_others_are_as_cut():
    """Gemma: attention has a bias, the FFN none; its channels are gone when the means for the other are taken."""
    model = zoo.tiny_model("gemma")
    groups = discover(model)
    biased, _ = with_biases(model, readers_of(groups.of_kinds(groups.kinds_in_blocks())))
    groups = discover(biased)
    half = {g.name: tuple(range(g.units // 2)) for g in groups.of_kinds(groups.kinds_in_blocks())}
    plan = PruningPlan(half, {name: groups.named(name).units for name in half})
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    with compensated(biased, plan, [ids], Compensation("bias", "dense"), groups) as done:
        small = slice(biased, plan, groups)
        torch.testing.assert_close(small(ids).logits, biased(ids).logits, rtol=1e-4, atol=1e-5)
    assert {c.module.rpartition(".")[2]: c.after < c.before for c in done} == {"o_proj": True, "down_proj": False}
    assert {c.target for c in done} == {"current"}


@pytest.mark.parametrize("kind", ["memory", "macs"])
def test_what_a_budget_does_not_count_is_refused(secateur, checkpoint_folder, text_file, tmp_path, kind):
    common = ["--sparsity", "0.2", "--of", kind, "--calibration", text_file, "--samples", "8", "--seq-len", "32"]
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "out", *common, "--compensate", "bias")
    assert code == 2 and f"no part of the {kind}" in " ".join(err.split()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--method", "llm-pruner"], [], ["--iterations", "2"]])
def test_where_there_are_none_and_can_be_none_it_is_refused(secateur, tokenizer, text_file, tmp_path, options):
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    common = ["--sparsity", "0.2", "--calibration", text_file, "--samples", "8", "--seq-len", "32"]
    code, _, err = secateur(
        "prune", tmp_path / "model", "-o", tmp_path / "out", *common, "--compensate", "bias", *options
    )
    assert code == 2 and "MistralForCausalLM has no field that gives it one" in " ".join(err.split())
    assert "perplexity" not in err and not (tmp_path / "out").exists()  # before anything is searched for
