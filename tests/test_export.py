"""`secateur export`: one checkpoint in the forms that other programs want."""

import copy
import json
import math
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import gguf
import pytest
import torch
from families import make
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_per_layer import GROUPED, built, cut, uneven_plan, with_vocabulary
from transformers import AutoConfig, AutoModelForCausalLM

from secateur import checkpoint
from secateur.checkpoint import account
from secateur.discovery import discover
from secateur.errors import CheckpointError
from secateur.export import NOT_NEEDED, LlamaCppParity, compare, export_gguf, export_vllm, llama_cpp, plainest, tiers
from secateur.export.vllm import READ_BACK
from secateur.pipeline import shipping
from secateur.plan import PruningPlan
from secateur.recovery import RecoverySettings
from secateur.surgery import pad, padding, slice
from secateur.surgery.shapes import build_on_meta
from secateur.surgery.trial import with_noise


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
    equal = {tier.name: tier for tier in tiers(trained)}
    assert list(equal) == ["uniform", "per-layer", "padded", "gguf", "vllm"]
    assert {n: tier.parameters for n, tier in equal.items() if not tier.reason} == dict.fromkeys(
        ("uniform", "gguf", "vllm"), trained.num_parameters()
    )
    assert equal["per-layer"].reason == equal["padded"].reason == NOT_NEEDED
    assert equal["vllm"].loads_with == "vLLM; the same checkpoint" and equal["uniform"].macs == equal["vllm"].macs


SKIPPING = {1: {"skip": ["attention"], "intermediate_size": 24}, 2: {"skip": ["mlp"]}}


@pytest.mark.parametrize("made", [lambda: cut("llama"), lambda: cut("qwen2"), lambda: built("llama", SKIPPING)])
def test_costs_are_those_of_what_is_written(made, tokenizer, tmp_path):
    """Parameters and bytes of every form as exported; multiply-accumulates with stand-ins and padding."""
    model = resized(made(), tokenizer)
    found = {tier.name: tier for tier in tiers(model, tokenizer)}
    assert found["padded"].parameters == pad(model).num_parameters()
    for dtype in ("f32", "q8_0"):
        done = export_gguf(model, tokenizer, tmp_path / f"{dtype}.gguf", dtype)
        stored = sum(tensor.n_bytes for tensor in gguf.GGUFReader(done.path).tensors)
        assert found["gguf"].parameters == done.parameters and found["gguf"].bytes_by_type[dtype] == stored
    vllm = export_vllm(model, tmp_path / "vllm")
    stored = sum(t.numel() for t in load_file(tmp_path / "vllm" / "model.safetensors").values())
    assert found["vllm"].parameters == vllm.parameters == stored and found["vllm"].bytes == 4 * stored
    assert found["per-layer"].macs <= found["gguf"].macs <= found["padded"].macs
    assert (found["vllm"].macs > found["per-layer"].macs) == (vllm.padded_parameters > 0)
    skips = model.config.per_layer_config[1].skip if hasattr(model.config.per_layer_config[1], "skip") else []
    assert (found["gguf"].macs > found["per-layer"].macs) == bool(skips)


@pytest.mark.parametrize("cut_to", ["uniform", "per-layer", "skipping"])
def test_biases_of_projections_stay_in_every_form(cut_to, tokenizer, tmp_path):
    """What FLAP adds to a Llama: a bias in every projection, which config.json says."""
    sizes = {**GROUPED, "attention_bias": True, "mlp_bias": True, "vocab_size": len(tokenizer)}
    if cut_to == "skipping":
        model = with_noise(built("llama", SKIPPING, **sizes)).float()
    else:
        model = make("llama", **sizes)
        groups = discover(model)
        uniform = {g.name: range(g.units // 2) for g in groups.of_kinds(("ffn_channel", "kv_group"))}
        even = PruningPlan(uniform, {name: groups.named(name).units for name in uniform})
        model = slice(model, even if cut_to == "uniform" else uneven_plan(groups, ("ffn_channel", "kv_group")), groups)
    names = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert len(names) == 3 * 7 - (0 if cut_to != "skipping" else 4 + 3)
    assert all(bool(model.get_parameter(name).abs().min() > 0) for name in names)
    for number, form in enumerate([model] if cut_to == "uniform" else [model, pad(model)]):
        folder = checkpoint.save(form, tmp_path / str(number))
        config = json.loads((folder / "config.json").read_text())
        assert config["attention_bias"] and config["mlp_bias"]
        assert names <= load_file(folder / "model.safetensors").keys()
        assert checkpoint.logit_difference(model, form) < 1e-4
    export_vllm(model, tmp_path / "vllm")
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert config["attention_bias"] and config["mlp_bias"] and config.get("qkv_bias", True)
    assert names <= load_file(tmp_path / "vllm" / "model.safetensors").keys()
    if llama_cpp.available():
        done = export_gguf(model, tokenizer, tmp_path / "model.gguf", "f32")
        stored = {tensor.name for tensor in gguf.GGUFReader(done.path).tensors}
        assert len([name for name in stored if name.endswith(".bias")]) == len(names)
        assert compare(done.path, model, list(range(3, 20))).agrees("f32")


def test_biases_that_vllm_would_drop_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Qwen3ForCausalLM has no bias in the output projection"):
        export_vllm(make("qwen3", attention_bias=True), tmp_path / "out")


def test_a_llama_with_heads_that_its_class_refuses(secateur, text_file, tokenizer, tmp_path):
    """Three of four heads: saved as Mistral, which llama.cpp and vLLM take, and said so."""
    dense = make("llama", vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    checkpoint.save(dense, tmp_path / "dense", tokenizer=tokenizer)
    flags = ["--kinds", "attention_head=0.25", "--criterion", "l2", "--calibration", text_file]
    code, out, err = secateur("prune", tmp_path / "dense", "-o", tmp_path / "o", "--method", "llm-pruner", *flags)
    assert code == 0, err
    assert "saved as MistralForCausalLM: LlamaForCausalLM refuses these sizes" in out
    assert results_of(tmp_path / "o")["class"]["name"] == "MistralForCausalLM"
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 64}
    assert heads.items() <= config.items() and config["sliding_window"] is None
    small = checkpoint.load(tmp_path / "o").model
    assert export_vllm(small, tmp_path / "vllm").layout == "transformers"
    assert json.loads((tmp_path / "vllm" / "config.json").read_text())["head_dim"] == 16
    if llama_cpp.available():
        done = export_gguf(small, tokenizer, tmp_path / "model.gguf", "f32")
        assert done.arch == "llama" and done.context == dense.config.max_position_embeddings
        assert compare(done.path, small, list(range(3, 20))).agrees("f32")


def resized(model, tokenizer):
    model.resize_token_embeddings(len(tokenizer))
    return model


def test_costs_need_no_weights():
    for model in (cut("llama"), make("qwen3"), built("llama", SKIPPING)):
        assert tiers(build_on_meta(type(model), model.config)) == tiers(model)


def test_without_weights_padding_is_proven_on_a_small_twin(small, monkeypatch):
    monkeypatch.setattr(padding, "same_logits", lambda model, padded: False)
    reason = {tier.name: tier.reason for tier in tiers(build_on_meta(type(small), small.config))}["padded"]
    assert reason == "PerLayerLlamaForCausalLM cannot be padded: zeros in place of missing units would change what " \
                     "it computes"  # fmt: skip


def test_a_plan_replayed_without_loading_prints_the_costs(secateur, checkpoint_folder, tmp_path):
    groups = discover(checkpoint.load(checkpoint_folder).model)
    uneven_plan(groups, ("ffn_channel",)).save(tmp_path / "plan.json")
    code, out, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "o", "--plan", tmp_path / "plan.json")
    results = results_of(tmp_path / "o")
    assert code == 0 and results["surgery"] == "streaming", err
    assert results["tier"]["chosen"] == "per-layer" and "per-layer (written)" in out and "llama.cpp (deci)" in out
    found = [tier.to_json() for tier in tiers(checkpoint.load(tmp_path / "o").model)]
    assert results["tier"]["tiers"] == found and len(found) == 5


def test_a_depth_that_the_plan_does_not_give_is_refused(secateur, checkpoint_folder, tmp_path):
    flags = ["-o", tmp_path / "o", "--tier", "depth"]
    code, _, err = secateur("prune", checkpoint_folder, *flags, "--sparsity", 0.2)
    assert code == 2 and "add --mode layer-wise" in err
    groups = discover(checkpoint.load(checkpoint_folder).model)
    kept = {g.name: range(40) for g in groups.of_kinds(("ffn_channel",))}
    PruningPlan(kept, {name: groups.named(name).units for name in kept}).save(tmp_path / "plan.json")
    code, _, err = secateur("prune", checkpoint_folder, *flags, "--plan", tmp_path / "plan.json")
    assert code == 2 and "the tier depth is not possible: no whole layer went" in err and not (tmp_path / "o").exists()


def test_fewer_layers_are_a_tier_of_their_own(trained):
    assert tiers(trained, dense_layers=4)[0].name == "depth" and tiers(trained, dense_layers=3)[0].name == "uniform"
    assert plainest(tiers(trained, dense_layers=4)).name == "depth"


def test_a_per_layer_model_whose_layers_are_equal_is_uniform():
    model = built("llama", {})
    found = {tier.name: tier for tier in tiers(model)}
    assert found["uniform"].parameters == model.num_parameters() and plainest(tuple(found.values())).name == "uniform"


def test_a_tokenizer_without_a_home_has_no_gguf(small, tokenizer):
    words = copy.deepcopy(tokenizer)
    words.add_tokens(["beyond the embedding"])
    reasons = {tier.name: tier.reason for tier in tiers(small, words)}
    assert "the tokenizer has tokens up to number 320" in reasons["gguf"] and not reasons["vllm"]


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
    code, out, err = secateur("export", tmp_path / "o", "-o", tmp_path / "back", "--to", "per-layer")
    assert code == 0 and f"{results['export']['zeros']:,} parameters of zeros left out" in out, err
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(small) and back.num_parameters() == small.num_parameters()
    assert all(torch.equal(t, small.state_dict()[name]) for name, t in back.state_dict().items())


def test_uniform_is_refused_where_it_would_lose_something(secateur, folder, tmp_path):
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "uniform")
    assert code == 2 and "--to padded" in err and not list(tmp_path.iterdir())


def test_per_layer_is_refused_where_it_gains_nothing(secateur, folder, checkpoint_folder, tmp_path):
    code, _, err = secateur("export", checkpoint_folder, "-o", tmp_path / "o", "--to", "per-layer")
    assert code == 2 and "would gain nothing" in err and "no unit of any layer is all zeros" in err
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "per-layer")
    assert code == 2 and "is PerLayerLlamaForCausalLM already" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("to, layout", [("vllm", "nemotron-nas"), ("gguf", "GGUF")])
def test_there_is_no_way_back_from_what_other_programs_read(secateur, small, tokenizer, tmp_path, to, layout):
    if to == "vllm":
        export_vllm(small, tmp_path / "o")
    else:
        export_gguf(small, tokenizer, tmp_path / "o" / "model.gguf")
    code, _, err = secateur("export", tmp_path / "o", "-o", tmp_path / "p", "--to", "padded", "--trust-remote-code")
    assert code == 2 and layout in err and "exported from" in err and not (tmp_path / "p").exists()


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_gguf_runs_in_llama_cpp(secateur, folder, tmp_path, dtype):
    pytest.importorskip("xllamacpp")
    code, out, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "gguf", "--gguf-type", dtype)
    assert code == 0, err
    results = results_of(tmp_path / "o")
    assert results["export"]["arch"] == "deci" and (tmp_path / "o" / "model.gguf").stat().st_size > 10_000
    assert results["parity"]["mean_difference"] <= llama_cpp.TOLERANCE[dtype] and "llama.cpp" in out
    before, after = (results["parity"][f"perplexity_{when}"] for when in ("before", "after"))
    assert abs(math.log(after / before)) <= llama_cpp.TOLERANCE[dtype] and f"{after:.4f} after" in out
    assert results["parity"]["tokens"] == 128 and results["parity"]["text"] == "the first tokens of demo-eval"
    if dtype == "f32":
        assert results["parity"]["same_greedy"] and "the same greedy tokens" in out


def test_a_failed_comparison_leaves_nothing_and_exits_with_1(secateur, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shipping, "compare", lambda *_: parity(mean_difference=3.0))
    monkeypatch.setattr(llama_cpp, "available", lambda: True)
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "gguf")
    assert code == 1 and "computes something else" in err and not list(tmp_path.iterdir())


def parity(**changes):
    """Of a perfect file, with changes."""
    perfect = {"max_difference": 0.0, "mean_difference": 0.0, "positions": 4, "perplexity_before": 50.0,
               "perplexity_after": 50.0, "tokens": 3, "same_greedy": True, "greedy_gap": 0.0, "rounding": 0.0,
               "continuation": ()}  # fmt: skip
    return LlamaCppParity(**{**perfect, **changes})


@pytest.mark.parametrize("dtype", llama_cpp.TOLERANCE)
def test_what_counts_as_another_result(dtype):
    allowed = llama_cpp.TOLERANCE[dtype]
    assert parity().agrees(dtype) and parity(mean_difference=allowed).agrees(dtype)
    assert "on average" in parity(mean_difference=1.1 * allowed).disagreement(dtype)
    assert "on average" in parity(mean_difference=float("nan")).disagreement(dtype)
    assert parity(perplexity_after=50 * math.exp(-0.9 * allowed)).agrees(dtype)
    assert "perplexity is" in parity(perplexity_after=50 * math.exp(1.1 * allowed)).disagreement(dtype)
    other = {"same_greedy": False, "greedy_gap": 11 * allowed}
    assert "another token than the most likely one" in parity(**other).disagreement(dtype)
    assert parity(**other, rounding=6 * allowed).agrees(dtype)
    assert parity(same_greedy=False, greedy_gap=9 * allowed).agrees(dtype)


def test_without_llama_cpp_the_file_is_said_to_be_unverified(secateur, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    code, out, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "gguf")
    assert code == 0, err
    results = results_of(tmp_path / "o")
    assert "not checked by running it: the file was not verified" in out
    assert results["parity"] is None and results["parity_reason"] == llama_cpp.NOT_VERIFIED
    assert f"Not checked by running it: {llama_cpp.NOT_VERIFIED}." in (tmp_path / "o" / "README.md").read_text()


def test_vllm_layout(secateur, small, folder, tmp_path):
    code, out, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "vllm")
    assert code == 0, err
    config = AutoConfig.from_pretrained(tmp_path / "o", trust_remote_code=True)
    assert config.model_type == "nemotron-nas" and len(config.block_configs) == small.config.num_hidden_layers
    assert f"vllm serve {tmp_path / 'o'}" in out.replace("\n", "") and "read back" in out


@pytest.fixture(scope="module")
def with_a_past(folder, tmp_path_factory):
    """The same checkpoint, made by pruning a model of the hub and recovering it."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("past") / "small")
    figures = {"tokens": 50, "seq_len": 8, "stride": None, "bos": False}
    pruned = {
        "command": "prune",
        "model": {"source": "org/dense", "sha256": None},
        "protocol": {"method": "llm-pruner", "settings": {"criterion": "taylor-1"}, "seed": 5},
        "params": {"dense": 1000, "pruned": 750, "sparsity": 0.25},
        "perplexity": {"stories": figures | {"dense": 10.5, "pruned": 31.25}},
    }
    settings = RecoverySettings(steps=7, batch_size=4, seq_len=16)
    recovered = {
        "command": "recover",
        "model": {"source": "in/between", "sha256": "ab"},
        "perplexity": {"stories": figures | {"pruned": 31.25, "recovered": 12.75}},
        "recovery": {"settings": asdict(settings), "data": [{"source": "alpaca"}], "log": [1, 2]},
        "before": pruned,
    }
    (copy / "results.json").write_text(json.dumps(recovered))
    (copy / "README.md").write_text("---\nlicense: llama2\nbase_model: org/dense\n---\n")
    PruningPlan({"layers.1.mlp/ffn_channel": (0, 2)}, {"layers.1.mlp/ffn_channel": 3}).save(copy / "plan.json")
    return copy


@pytest.mark.parametrize("form", ["gguf", "vllm"])
def test_the_card_says_what_was_done_before(secateur, with_a_past, tmp_path, form):
    if form == "gguf":
        pytest.importorskip("xllamacpp")
    code, _, err = secateur("export", with_a_past, "-o", tmp_path / "o", "--to", form)
    assert code == 0, err
    card = ModelCard.load(tmp_path / "o" / "README.md")
    assert card.data.to_dict() == {
        "library_name": {"gguf": "llama.cpp", "vllm": "vllm"}[form],
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "secateur", form],
        "base_model": "org/dense",
        "base_model_relation": "finetune",
        "license": "llama2",
    }
    assert "from [org/dense](https://huggingface.co/org/dense)" in card.text and "in/between" not in card.text
    assert "25.00% of 1,000 parameters were removed; 750 are left." in card.text
    assert "| `layers.*.mlp/ffn_channel` | 1 | 3 | 2 |" in card.text
    assert "chosen by llm-pruner with `criterion` taylor-1 (seed 5)." in card.text
    assert "7 steps of 4 sequences of up to 16 tokens of alpaca" in card.text and "`adapter/`" not in card.text
    assert "| stories | 50 | 8 | 10.500 | 31.250 | 12.750 |" in card.text and account.NOT_AGAIN in card.text
    results = results_of(tmp_path / "o")
    checked = {"gguf": lambda: f"{results['parity']['mean_difference']:.1e} on average", "vllm": lambda: READ_BACK}
    assert checked[form]() in card.text and "Not checked.\n" not in card.text
    assert results["before"]["before"]["model"]["source"] == "org/dense"
    assert "log" not in results["before"]["recovery"]
    assert (tmp_path / "o" / "plan.json").read_bytes() == (with_a_past / "plan.json").read_bytes()


@pytest.mark.parametrize("to", ["padded", "gguf", "vllm"])
def test_room_on_the_disk_is_looked_at_before_writing(secateur, folder, tmp_path, monkeypatch, to):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", to)
    assert code == 2 and "GB are needed" in err and "nothing was written: make room" in err
    assert not list(tmp_path.iterdir())


FULL = {
    "padded": ("transformers.modeling_utils.safe_save_file", SafetensorError("I/O error: full (os error 28)")),
    "gguf": ("gguf.GGUFWriter.write_tensor_data", OSError("4096 requested and 17 written")),
    "vllm": ("huggingface_hub.save_torch_state_dict", SafetensorError("I/O error: full (os error 28)")),
}


@pytest.mark.parametrize("to", FULL)
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(secateur, folder, tmp_path, monkeypatch, to):
    place, error = FULL[to]

    def full(*_, **__):
        raise error

    monkeypatch.setattr(place, full)
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", to)
    assert code == 2 and ("no space left while writing" in err or "is the disk full?" in err), err
    assert "nothing was written" in err and not list(tmp_path.iterdir())


def test_forms_that_are_exported_are_no_tiers_to_prune_to(secateur, folder, tmp_path):
    code, _, err = secateur("prune", folder, "-o", tmp_path / "o", "--sparsity", "0.2", "--tier", "gguf")
    assert code == 2 and "-o OUT --to gguf" in err and not list(tmp_path.iterdir())


def test_wrong_words(secateur, folder, tmp_path):
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "onnx")
    assert code == 2 and "no such form" in err
    code, _, err = secateur("export", folder, "-o", tmp_path / "o", "--to", "gguf", "--gguf-type", "q2")
    assert code == 2 and "q8_0" in err and not list(tmp_path.iterdir())
