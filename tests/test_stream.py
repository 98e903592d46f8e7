"""Cutting a checkpoint tensor by tensor gives the files that loading, cutting and saving it gives, and is as safe."""

import errno
import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import zoo
from families import make
from huggingface_hub.serialization._base import parse_size_to_int
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.checkpoint import (
    SHARD_SIZE,
    cut_streaming,
    memory,
    output_folder,
    reload_process,
    streamed,
    verify_streamed,
)
from secateur.checkpoint import stream as streaming
from secateur.checkpoint.parity import probed
from secateur.checkpoint.shards import INDEX
from secateur.checkpoint.streamed import compare_tensors
from secateur.checkpoint.tensorfiles import Cut, read_header
from secateur.discovery import discover
from secateur.errors import CheckpointError, ParityError, PlanError, StreamingError
from secateur.plan import PruningPlan
from secateur.surgery import slice

THREE = {"num_hidden_layers": 3}
# family -> (sizes, kinds cut to two thirds or a half, dtype)
CASES = {
    "llama": (THREE, ("ffn_channel", "kv_group", "layer"), "bfloat16"),
    "llama-untied": ({"tie_word_embeddings": False}, ("hidden",), "float32"),
    "mistral": ({}, ("ffn_channel", "kv_group", "query_head"), "float16"),
    "qwen2": ({}, ("kv_group", "hidden"), "bfloat16"),
    "qwen3": (THREE, ("ffn_channel", "layer"), "float32"),
    "gemma2": ({}, ("ffn_channel", "hidden"), "bfloat16"),
    "phi3": ({}, ("ffn_channel", "kv_group"), "float32"),
    "gpt_neox": ({}, ("ffn_channel", "layer"), "float16"),
    "opt": ({}, ("ffn_channel", "layer"), "float32"),
    "gpt2": ({}, ("attention_head", "hidden"), "bfloat16"),
}


def saved(model, folder, **options):
    """A model saved and loaded again, as cutting in memory gets it."""
    model.save_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder)


def scattered_plan(groups, kinds, seed=0):
    """Two thirds of the units of a group, or a half, anywhere in it; by one share where hidden dimensions go."""
    chosen = np.random.default_rng(seed)
    kept = {}
    for g in groups.of_kinds(kinds):
        count = g.units * 2 // 3 if g.units % 3 == 0 and "hidden" not in kinds else g.units // 2
        kept[g.name] = tuple(sorted(int(u) for u in chosen.choice(g.units, count, replace=False)))
    return PruningPlan(kept, {name: groups.named(name).units for name in kept})


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stream(source, plan, folder, **options):
    folder.mkdir()
    return cut_streaming(source, plan, folder, progress=False, **options)


@pytest.mark.parametrize("family", CASES)
def test_files_are_those_of_cutting_in_memory(family, tmp_path):
    sizes, kinds, dtype = CASES[family]
    model = saved(make(family.removesuffix("-untied"), **sizes).to(getattr(torch, dtype)), tmp_path / "dense")
    groups = discover(model)
    plan = scattered_plan(groups, kinds)
    report = stream(tmp_path / "dense", plan, tmp_path / "streamed")
    small = slice(model, plan, groups)
    small.save_pretrained(tmp_path / "sliced")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "sliced")
    assert report.pruned == small.num_parameters() == report.model.num_parameters()
    assert report.dense == model.num_parameters()
    compare_tensors(report, tmp_path / "streamed")
    reload_process.main(str(tmp_path / "streamed"), "auto", "meta", "plain")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_that_lie_one_by_one_on_disk(model_type, tmp_path):
    model = saved(zoo.tiny_model(model_type), tmp_path / "dense", max_shard_size=100_000)
    on_disk = json.loads((tmp_path / "dense" / INDEX).read_text())["weight_map"]
    assert any(".experts.3." in name for name in on_disk)
    groups = discover(model)
    plan = scattered_plan(groups, ("expert", "expert_channel"))
    report = stream(tmp_path / "dense", plan, tmp_path / "streamed")
    compare_tensors(report, tmp_path / "streamed")
    reload_process.main(str(tmp_path / "streamed"), "auto", "meta", "plain")
    slice(model, plan, groups).save_pretrained(tmp_path / "sliced")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "sliced")


def uneven_plan(groups, kinds):
    """Fewer units in each later layer."""
    kept = {g.name: tuple(range(g.layer * max(1, g.units // 5), g.units)) for g in groups.of_kinds(kinds)}
    return PruningPlan(kept, {name: groups.named(name).units for name in kept})


def test_widths_that_differ_by_layer_and_cutting_again(tmp_path):
    sizes = {**THREE, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4}
    for name, kinds in (("first", ("ffn_channel", "kv_group")), ("second", ("ffn_channel",))):
        source = tmp_path / ("dense" if name == "first" else "first")
        model = (
            saved(make("llama", **sizes), source) if name == "first" else AutoModelForCausalLM.from_pretrained(source)
        )
        groups = discover(model)
        plan = uneven_plan(groups, kinds)
        compare_tensors(stream(source, plan, tmp_path / name), tmp_path / name)
        reload_process.main(str(tmp_path / name), "auto", "meta", "trust")
        slice(model, plan, groups).save_pretrained(tmp_path / "sliced" / name)
        assert contents(tmp_path / name) == contents(tmp_path / "sliced" / name)
    assert (tmp_path / "second" / "modeling_per_layer.py").exists()


def test_left_out_sublayers(tmp_path):
    model = saved(make("qwen2", **THREE), tmp_path / "dense")
    groups = discover(model)
    kept = {"model.layers/self_attn": (0, 2), "model.layers/mlp": (1, 2)}
    kept |= {g.name: range(20) for g in groups.of_kinds(["ffn_channel"]) if g.layer}
    plan = PruningPlan(kept, {name: groups.named(name).units for name in kept})
    stream(tmp_path / "dense", plan, tmp_path / "streamed")
    slice(model, plan, groups).save_pretrained(tmp_path / "sliced")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "sliced")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A sharded Llama with tied embeddings."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    make("llama", **THREE).save_pretrained(folder, max_shard_size=30_000)
    return folder


@pytest.fixture(scope="module")
def plan(dense):
    return scattered_plan(discover(AutoModelForCausalLM.from_pretrained(dense)), ("ffn_channel",))


@pytest.fixture(scope="module")
def wanted(dense, plan):
    return slice(AutoModelForCausalLM.from_pretrained(dense), plan)


def test_shards_and_index_are_those_of_transformers(dense, plan, wanted, tmp_path):
    assert len(list(dense.glob("*.safetensors"))) > 3
    stream(dense, plan, tmp_path / "streamed", max_shard_size=20_000)
    wanted.save_pretrained(tmp_path / "sliced", max_shard_size=20_000)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "sliced")
    index = json.loads((tmp_path / "streamed" / INDEX).read_text())
    assert index["metadata"]["total_parameters"] == wanted.num_parameters()
    assert "lm_head.weight" not in index["weight_map"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def with_head(dense, to, change):
    """The checkpoint with the tied head stored a second time, as some are."""
    shutil.copytree(dense, to)
    state = {name: t for file in dense.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in [*to.glob("*.safetensors"), to / INDEX]:
        file.unlink()
    head = state["model.embed_tokens.weight"] + change
    save_file(
        state | {"lm_head.weight": head, "model.layers.0.old": head[:1].clone()},
        to / "model.safetensors",
        {"format": "pt"},
    )
    return to


def test_a_second_copy_of_a_tied_tensor_is_compared(dense, plan, wanted, tmp_path):
    stream(with_head(dense, tmp_path / "same", 0), plan, tmp_path / "streamed")
    wanted.save_pretrained(tmp_path / "sliced")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "sliced")
    with pytest.raises(StreamingError, match=r"lm_head\.weight is stored besides the tensor it is tied to"):
        stream(with_head(dense, tmp_path / "other", 1), plan, tmp_path / "out")


def test_each_tensor_keeps_its_dtype(dense, plan, tmp_path):
    shutil.copytree(dense, tmp_path / "mixed")
    for file in (tmp_path / "mixed").glob("*.safetensors"):
        state = {n: t.bfloat16() if "mlp" in n else t for n, t in load_file(file).items()}
        save_file(state, file, {"format": "pt"})
    stream(tmp_path / "mixed", plan, tmp_path / "streamed")
    with safe_open(tmp_path / "streamed" / "model.safetensors", "pt") as opened:
        found = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    assert all(dtype == ("BF16" if "mlp" in name else "F32") for name, dtype in found.items())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_part_of_any_tensor_is_read_in_blocks_of_any_size(data, tmp_path_factory):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=3))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.int64, torch.bool]))
    tensor = torch.arange(np.prod(shape, dtype=int)).reshape(shape).to(dtype)
    file = tmp_path_factory.getbasetemp() / "one.safetensors"
    save_file({"before": torch.zeros(3), "x": tensor}, file)
    kept, expected = {}, tensor
    for dim, size in enumerate(shape):
        if data.draw(st.booleans()):
            kept[dim] = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
            expected = expected.index_select(dim, torch.from_numpy(kept[dim]))
    cut = Cut(read_header(file)["x"], kept)
    patch = pytest.MonkeyPatch()
    patch.setattr("secateur.checkpoint.tensorfiles.BLOCK", data.draw(st.integers(1, 200)))
    with file.open("rb") as opened:
        found = b"".join(np.ascontiguousarray(block).tobytes() for block in cut.blocks(opened))
    patch.undo()
    assert cut.shape == tuple(expected.shape)
    assert found == expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def lose_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def mix_up_index(folder):
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]
    (folder / INDEX).write_text(json.dumps(index))


def forget_tensor(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def reconfigure(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (truncate, CheckpointError, r"model-00002-of-.* is truncated or corrupted"),
        (lose_shard, CheckpointError, "lacks the shard model-00002-of-"),
        (mix_up_index, CheckpointError, r"lacks model\.norm\.weight, which the index says"),
        (forget_tensor, CheckpointError, r"lacks weights its config.json asks for: model\.norm\.weight"),
        (reconfigure(intermediate_size=132), PlanError, "made for another model"),
        (reconfigure(vocab_size=64), CheckpointError, r"has model\.embed_tokens\.weight with shape \[131, 48\]"),
        (reconfigure(quantization_config={"quant_method": "gptq", "bits": 4}), CheckpointError, "is quantised"),
    ],
)
def test_damaged_sources_are_refused(dense, plan, tmp_path, change, error, message):
    shutil.copytree(dense, tmp_path / "damaged")
    change(tmp_path / "damaged")
    with pytest.raises(error, match=message):
        stream(tmp_path / "damaged", plan, tmp_path / "out")


def test_plans_of_other_checkpoints_are_refused(dense, plan, tmp_path):
    foreign = PruningPlan(plan.kept, plan.units, {"model_sha256": "0" * 64})
    with pytest.raises(PlanError, match="made for another model: sha256 000000000000"):
        stream(dense, foreign, tmp_path / "out")
    with pytest.raises(PlanError, match="has no group 'x'"):
        stream(dense, PruningPlan({"x": (0,)}, {"x": 2}), tmp_path / "out2")


def test_a_full_disk_is_told_before_anything_is_written(dense, plan, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with (
        pytest.raises(CheckpointError, match=r"0\.00 GB are free; nothing was written: make room"),
        output_folder(tmp_path / "out") as folder,
    ):
        cut_streaming(dense, plan, folder, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(dense, plan, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("secateur.checkpoint.shards._write", full)
    with pytest.raises(CheckpointError, match="no space left while writing"), output_folder(tmp_path / "out") as folder:
        cut_streaming(dense, plan, folder, progress=False)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from secateur.checkpoint import cut_streaming, output_folder, shards
from secateur.plan import PruningPlan
write = shards._write
def slowly(*arguments):
    write(*arguments)
    print("one", flush=True)
    time.sleep(60)
shards._write = slowly
with output_folder(sys.argv[3]) as folder:
    cut_streaming(Path(sys.argv[1]), PruningPlan.load(sys.argv[2]), folder, progress=False)
"""


def test_killed_while_writing_leaves_nothing_and_the_next_run_cleans_up(dense, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-c", KILLED, str(dense), str(tmp_path / "plan.json"), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "one"
    (left,) = tmp_path.glob(".out.secateur-*")
    long_ago = time.time() - 3600
    os.utime(left, (long_ago, long_ago))
    with output_folder(tmp_path / "out") as folder:  # while it lives, its folder is not touched
        (folder / "x").write_text("x")
    assert left.exists()
    shutil.rmtree(tmp_path / "out")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and list(left.glob("*.safetensors"))
    with output_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "plan.json"]


@pytest.fixture
def never_loaded(monkeypatch):
    monkeypatch.setattr("secateur.checkpoint.load", lambda *_, **__: pytest.fail("the model was loaded"))


def test_prune_with_a_plan_does_not_load_the_model(secateur, checkpoint_folder, tmp_path, never_loaded):
    groups = discover(make("llama", hidden_size=48, intermediate_size=96, num_hidden_layers=3))
    scattered_plan(groups, ("ffn_channel",)).save(tmp_path / "plan.json")
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["surgery"] == "streaming" and results["streaming"]["bytes_written"] > 0
    assert "logits" in results["streaming"]["check"] and results["streaming"]["seconds"] >= 0
    assert results["parity"]["max_logit_difference"] == 0.0 and results["parity"]["text"].startswith("the first tokens")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert results["params"]["pruned"] == model.num_parameters() < results["params"]["dense"]
    assert PruningPlan.load(tmp_path / "out" / "plan.json").provenance["model_sha256"] == results["model"]["sha256"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (checkpoint_folder / "tokenizer.json").read_bytes()
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_each_tensor_is_compared_with_its_part_of_the_input(dense, plan, tmp_path, monkeypatch):
    report = stream(dense, plan, tmp_path / "out")
    monkeypatch.setattr(streamed, "BLOCK", 500)  # so that tensors are compared in several steps
    compare_tensors(report, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    whole = file.read_bytes()
    for name, stored in read_header(file).items():
        last = stored.offset + Cut(stored, {}).nbytes - 1
        file.write_bytes(whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :])
        with pytest.raises(ParityError, match=rf"{re.escape(name)} as just written is not what the input holds"):
            compare_tensors(report, tmp_path / "out")


def changed(folder, to, change):
    """A copy of a checkpoint in one file with other tensors."""
    shutil.copytree(folder, to)
    file = to / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if n != "model.norm.weight"}, r"missing keys: model\.norm\.weight"),
        (lambda s: s | {"one.more": torch.zeros(1)}, r"unexpected keys: one\.more"),
        (lambda s: s | {"model.norm.weight": torch.zeros(3)}, r"mismatched keys: .*model\.norm\.weight"),
        (lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"] + 1}, r"not tied: lm_head\.weight"),
    ],
)
def test_what_does_not_load_as_a_whole_is_told(dense, plan, tmp_path, change, message):
    stream(dense, plan, tmp_path / "out")
    folder = changed(tmp_path / "out", tmp_path / "changed", change)
    with pytest.raises(SystemExit, match=message):
        reload_process.main(str(folder), "auto", "meta", "plain")


def test_logits_are_compared_where_memory_allows(dense, plan, tmp_path, monkeypatch):
    report = stream(dense, plan, tmp_path / "out")
    check = verify_streamed(report, dense, plan, tmp_path / "out")
    assert check.parity.max_logit_difference == 0.0 and check.parity.process == "fresh"
    assert check.parity.perplexity_before == check.parity.perplexity_after and "its logits compared" in check.text
    known = probed(slice(AutoModelForCausalLM.from_pretrained(dense), plan), None)
    monkeypatch.setattr(streamed, "_cut_in_memory", lambda *_: known)
    monkeypatch.setattr(streamed, "compare_tensors", lambda *_: None)
    other = changed(tmp_path / "out", tmp_path / "other", lambda s: {n: t * 1.01 for n, t in s.items()})
    with pytest.raises(ParityError, match="gives other logits"):
        verify_streamed(report, dense, plan, other)


def test_why_logits_were_not_compared(dense, plan, tmp_path, monkeypatch):
    report = stream(dense, plan, tmp_path / "out")
    monkeypatch.setattr(streamed, "load_in_fresh_process", lambda *_: None)
    ended = namedtuple("ended", "returncode stderr")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended(-9, ""))
    check = verify_streamed(report, dense, plan, tmp_path / "out")
    assert check.parity is None and "were not compared" in check.text and "ended early (exit code -9)" in check.text
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended(2, "no class fits"))
    with pytest.raises(ParityError, match=r"cannot be cut so after loading it \(no class fits\)"):
        verify_streamed(report, dense, plan, tmp_path / "out")


def test_without_memory_for_logits_the_reason_is_told(secateur, checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "available_memory", lambda: 10**8)
    groups = discover(make("llama", hidden_size=48, intermediate_size=96, num_hidden_layers=3))
    scattered_plan(groups, ("ffn_channel",)).save(tmp_path / "plan.json")
    code, out, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    reason = "loading the model and cutting it takes 1.6 GB of memory, and 0.1 GB are available"
    assert "parity" not in results and results["timing"]["verify_s"] > 0
    for text in (results["streaming"]["check"], (tmp_path / "out" / "README.md").read_text(), out.replace("\n", " ")):
        assert "every tensor was read again" in text and reason in text


def test_what_fails_its_check_is_removed(secateur, dense, plan, tmp_path, monkeypatch):
    write = streaming.write_shards

    def and_damage(folder, *arguments):
        write(folder, *arguments)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(streaming, "write_shards", and_damage)
    plan.save(tmp_path / "plan.json")
    code, _, err = secateur("prune", dense, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert code == 1 and "is not what the input holds; removed" in err
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]


def test_shards_are_as_large_as_those_of_transformers():
    default = inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default
    assert parse_size_to_int(default) == SHARD_SIZE


def test_memory_left_by_limits_and_control_groups(tmp_path, monkeypatch):
    def group(folder, names, limit, usage, inactive):
        folder.mkdir(parents=True, exist_ok=True)
        stat = f"{names[2]} {inactive}\nanon 3"
        for name, text in zip((*names[:2], "memory.stat"), (limit, usage, stat), strict=True):
            (folder / name).write_text(f"{text}\n")

    for folder in ("unlimited", "v2", "v1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cgroup").write_text("4:memory:/a/b\n3:cpu:/a\n0::/job/step\n")
    group(tmp_path / "v2" / "job", memory.FILES[""], 5000, 3000, 400)
    group(tmp_path / "v2" / "job" / "step", memory.FILES[""], "max", 3000, 0)
    group(tmp_path / "v1" / "memory" / "a" / "b", memory.FILES["memory"], 9000, 3000, 1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    for folder, left in (("unlimited", 8000), ("v2", 2400), ("v1", 7000)):
        monkeypatch.setattr(memory, "CGROUPS", tmp_path / folder)
        monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / folder / "cgroup")
        assert memory.available_memory() == left
    monkeypatch.setattr(resource, "getrlimit", lambda which: (6000 if which == resource.RLIMIT_DATA else -1, -1))
    assert memory.available_memory() == 6000


def test_what_cannot_be_cut_tensor_by_tensor_is_loaded(secateur, tmp_path):
    model = saved(zoo.tiny_model("mixtral"), tmp_path / "dense")
    groups = discover(model)
    first = groups.of_kinds(["expert_channel"])[0]
    PruningPlan({first.name: tuple(range(16))}, {first.name: first.units}).save(tmp_path / "plan.json")
    code, _, err = secateur("prune", tmp_path / "dense", "-o", tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert code == 0 and "the whole model is loaded" in err, err
    assert "would be stored in other pieces" in err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["parity"]["max_logit_difference"] == 0.0 and "surgery" not in results


def test_another_dtype_is_no_matter_of_copying(secateur, dense, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    code, _, err = secateur(
        "prune", dense, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json", "--dtype", "bfloat16"
    )
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_memory_is_bounded_by_a_block(tmp_path, monkeypatch):
    sizes = {"hidden_size": 240, "intermediate_size": 960, "vocab_size": 4000}
    model = make("llama", **sizes)
    model.save_pretrained(tmp_path / "dense")
    plan = scattered_plan(discover(model), ("ffn_channel",))
    monkeypatch.setattr("secateur.checkpoint.tensorfiles.BLOCK", 100_000)
    write, peaks = streaming.write_shards, []

    def traced(*arguments):
        tracemalloc.start()
        write(*arguments)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    monkeypatch.setattr(streaming, "write_shards", traced)
    report = stream(tmp_path / "dense", plan, tmp_path / "out")
    assert report.bytes_written > 8_000_000 and peaks[0] < 1_000_000


def test_a_tier_that_the_plan_does_not_give_is_refused(secateur, checkpoint_folder, tmp_path):
    groups = discover(AutoModelForCausalLM.from_pretrained(checkpoint_folder))
    uneven_plan(groups, ("ffn_channel",)).save(tmp_path / "plan.json")
    flags = ["--plan", tmp_path / "plan.json", "--tier", "uniform"]
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "out", *flags)
    assert code == 2 and "the tier uniform is not possible" in err and not (tmp_path / "out").exists()
