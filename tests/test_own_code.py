"""A checkpoint with code of its own: discovered, proven, cut and saved with its code; nothing runs without consent."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from secateur import checkpoint
from secateur.discovery import discover
from secateur.errors import CheckpointError, PlanError
from secateur.plan import PruningPlan
from secateur.surgery import prove, slice

CODE = Path(__file__).parent / "remote_code"
AUTO_MAP = {
    "AutoConfig": "configuration_tiny.TinyFusedConfig",
    "AutoModelForCausalLM": "modeling_tiny.TinyFusedForCausalLM",
}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A checkpoint as its author would publish it."""
    folder = tmp_path_factory.mktemp("remote") / "tiny-fused"
    shutil.copytree(CODE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    facts = {"model_type": "tiny_fused", "architectures": ["TinyFusedForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps({**facts, "vocab_size": len(tokenizer)}))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_nothing_runs_without_consent(folder, text_file, secateur, tmp_path):
    for command in (["groups", folder], ["eval", folder, "--text", text_file],
                    ["prune", folder, "-o", tmp_path / "out", "--sparsity", 0.2]):  # fmt: skip
        code, _, err = secateur(*command)
        lines = [line for line in err.splitlines() if not line.startswith("- ")]
        assert code == 2 and len(lines) == 1
        assert lines[0].startswith(f"error: {folder} comes with code of its own") and "--trust-remote-code" in lines[0]
    assert not (tmp_path / "out").exists()


def test_every_kind_is_found_and_proven(folder):
    model = checkpoint.load(folder, trust_remote_code=True).model
    groups = discover(model)
    kv = {(m.parameter, m.dim): m.index.tolist() for m in groups.named("blocks.1/kv_group").members}
    assert kv["blocks.1.enter.weight", 0] == [list(range(40 * g, 40 * g + 40)) for g in range(3)]
    assert kv["blocks.1.leave.weight", 1] == [list(range(20 * g, 20 * g + 20)) for g in range(3)]
    channel = {(m.parameter, m.dim): m.index.tolist() for m in groups.named("blocks.1/ffn_channel").members}
    assert channel["blocks.1.enter.weight", 0] == [[120 + 2 * i, 121 + 2 * i] for i in range(44)]
    assert channel["blocks.1.leave.weight", 1] == [[60 + i] for i in range(44)]
    proofs = {p.kind: p for p in prove(model)}
    fields = {kind: p.fields for kind, p in proofs.items() if p.route == "config"}
    assert fields == {
        "kv_group": ("groups",), "query_head": ("queries_per_group",), "ffn_channel": ("channels",),
        "hidden": ("width",), "layer": ("depth",),
    }  # fmt: skip
    assert all(p.max_difference < 1e-9 for p in proofs.values())


def test_shapes_are_enough_to_list_the_groups(folder):
    skeleton = checkpoint.load_skeleton(folder, trust_remote_code=True)
    assert {g.name for g in discover(skeleton)} >= {"blocks.0/ffn_channel", "blocks.0/kv_group", "hidden"}


def test_prune_recover_and_eval_with_the_code_carried_along(folder, text_file, secateur, tmp_path):
    output, trust = tmp_path / "small", "--trust-remote-code"
    code, _, err = secateur(
        "prune", folder, "-o", output, "--method", "llm-pruner",
        "--sparsity", 0.2, "--calibration", text_file, "--samples", 4, "--seq-len", 32,
        "--text", text_file, trust, "--recover-steps", 2, "--data", text_file,
    )  # fmt: skip
    assert code == 0, err
    for file in CODE.glob("*.py"):
        assert (output / file.name).read_text() == file.read_text()
    config = json.loads((output / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["groups"] == 2 and config["channels"] < 44
    assert "comes with the checkpoint (`modeling_tiny.py`)" in (output / "README.md").read_text()
    results = json.loads((output / "results.json").read_text())
    figures = results["perplexity"]["stories"]
    code, _, err = secateur("eval", output, "--text", text_file, trust, "--json", tmp_path / "e.json")
    assert code == 0, err
    value = json.loads((tmp_path / "e.json").read_text())["perplexity"]["stories"]["value"]
    assert value == pytest.approx(figures["recovered"], rel=1e-6)
    code, _, err = secateur("eval", output, "--text", text_file)
    assert code == 2 and "comes with code of its own" in err
    moved = shutil.copytree(output, tmp_path / "elsewhere")
    again = AutoModelForCausalLM.from_pretrained(moved, trust_remote_code=True)
    assert again.num_parameters() == results["params"]["pruned"]


def test_bench_generates_without_a_cache_where_transformers_can_make_none(folder, secateur, tmp_path, monkeypatch):
    """Its configuration has no `num_hidden_layers`."""
    flags = ["--prompt-length", 6, "--new-tokens", 3, "--repetitions", 1, "--trust-remote-code"]
    code, _, err = secateur("bench", folder, "--against", folder, *flags, "--json", tmp_path / "b.json")
    assert code == 0, err
    found = json.loads((tmp_path / "b.json").read_text())["benchmark"]
    assert found["model"]["kv_cache"] is False and found["model"]["decode_s"]["median"] > 0
    assert found["ratios"]["parameters"] == 1 and "kv_cache" not in found["ratios"]
    monkeypatch.setattr("transformers.generation.GenerationMixin.generate", property())
    code, _, err = secateur("bench", folder, *flags)
    assert code == 2 and "TinyFusedForCausalLM cannot generate" in err


def test_widths_that_differ_by_layer_are_refused(folder):
    model = checkpoint.load(folder, trust_remote_code=True).model
    names = {f"blocks.{i}/ffn_channel": 44 for i in range(2)}
    plan = PruningPlan({n: tuple(range(20 + 10 * i)) for i, n in enumerate(names)}, names)
    with pytest.raises(PlanError, match=r"TinyFusedForCausalLM is no class of transformers.*without --per-layer"):
        slice(model, plan)
    in_memory = slice(model, plan, reloadable=False)
    assert [block.leave.in_features for block in in_memory.blocks] == [80, 90]
    assert [block.channels for block in in_memory.blocks] == [20, 30]


def quantised(folder, target):
    """The checkpoint as a quantiser would mark it."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_quantised_checkpoints_are_refused_before_they_are_loaded(checkpoint_folder, text_file, secateur, tmp_path):
    packed = quantised(checkpoint_folder, tmp_path / "packed")
    for command in (["prune", packed, "-o", tmp_path / "out", "--sparsity", 0.2],
                    ["recover", packed, "-o", tmp_path / "out", "--data", text_file]):  # fmt: skip
        code, _, err = secateur(*command)
        assert code == 2 and "is quantised (bitsandbytes)" in err and "prune the float checkpoint" in err
    assert not (tmp_path / "out").exists()
    code, _, err = secateur("groups", packed)
    assert code == 0, err  # shapes are those of the dense form


def test_a_missing_quantiser_is_one_clear_error(checkpoint_folder, tmp_path, monkeypatch, secateur):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_8bit.is_bitsandbytes_available", lambda: False)
    packed = quantised(checkpoint_folder, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"requires bitsandbytes.*pip install"):
        checkpoint.load(packed)
    code, _, err = secateur("groups", packed)
    assert code == 0, err  # shapes alone
