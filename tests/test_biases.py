"""Biases where the class has fields for them: the same logits, the budget met, what has none refused."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

import secateur as sc
from secateur.discovery import discover
from secateur.surgery.biases import readers_of, with_biases


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", ("attention_bias", "mlp_bias")),
        ("gemma", ("attention_bias",)),  # tied embeddings
        ("falcon", ("bias",)),
        ("gpt2", ()),  # has them already
        ("mistral", ()),
    ],
)
def test_they_change_no_logit(model_type, fields):
    model = zoo.tiny_model(model_type).double()
    groups = discover(model)
    readers = readers_of(groups, groups.kinds_in_blocks())
    biased, found = with_biases(model, readers)
    assert found == fields and (biased is model) == (not fields)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(biased(ids).logits, model(ids).logits)
    new = biased.state_dict().keys() - model.state_dict().keys()
    assert all(name.endswith("bias") and not biased.state_dict()[name].any() for name in new)
    assert not fields or {f"{path}.bias" for path in readers} & new
    assert groups.remaining_parameters({}) == discover(model).remaining_parameters({})


def test_only_the_fields_that_what_is_cut_needs():
    model = zoo.tiny_model("llama")
    biased, fields = with_biases(model, readers_of(discover(model), ["ffn_channel"]))
    assert fields == ("mlp_bias",) and biased.model.layers[0].self_attn.o_proj.bias is None
    assert model.config.mlp_bias is False


@pytest.mark.parametrize("method", ["llm-pruner", "auto"])
def test_from_the_command_line(secateur, checkpoint_folder, trained, text_file, tmp_path, method):
    common = ["--calibration", text_file, "--samples", "16", "--seq-len", "32", "--text", text_file, "--uniform"]
    common += ["--method", method, "--criterion", "gate", "--ranking", "local", "--kinds", "ffn_channel"]
    given = ["--sparsity", "0.3", "--compensate", "bias"]
    code, printed, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "bias", *given, *common)
    assert code == 0, err
    results = json.loads((tmp_path / "bias" / "results.json").read_text())
    assert results["biases"]["fields"] == ["mlp_bias"] and "mlp_bias of the configuration gives" in printed
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
    assert all(torch.equal(again[name], value) for name, value in small.state_dict().items())


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
    assert code == 2 and "no linear module has a bias" in err and not (tmp_path / "out").exists()
    with pytest.raises(sc.SecateurError):
        sc.load(tmp_path / "out")
