"""What is loaded is whole, what is written is whole or absent."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from families import make
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config

from secateur import checkpoint
from secateur.checkpoint import folders, load, load_skeleton, output_folder, save, verify_reload
from secateur.errors import CheckpointError
from secateur.plan import PruningPlan

pytestmark = pytest.mark.fresh_process


def test_load_and_skeleton(checkpoint_folder, trained):
    loaded = load(checkpoint_folder)
    assert loaded.architecture == "llama" and len(loaded.sha256) == 64 and not loaded.model.training
    assert loaded.tokenizer.bos_token == "<s>"
    assert all(torch.equal(t, trained.state_dict()[n]) for n, t in loaded.model.state_dict().items())
    assert load(checkpoint_folder, dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    assert all(p.is_meta for p in load_skeleton(checkpoint_folder).parameters())


def damaged(folder, to, change):
    shutil.copytree(folder, to)
    change(to)
    return to


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def scramble(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def widen(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))


def deepen(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))


def break_config(folder):
    (folder / "config.json").write_text("{")


def lose_shard(folder):
    index = {"weight_map": {"x": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "model.safetensors is truncated or corrupted"),
        (scramble, "model.safetensors is truncated or corrupted"),
        (pickle_only, "only pickled weights"),
        (drop_weights, "has no weights"),
        (widen, "lacks weights|cannot load"),
        (deepen, "lacks weights.*layers.3"),
        (break_config, "cannot read the configuration"),
        (lose_shard, "lacks the shard model-00002"),
    ],
)
def test_damaged_folders(checkpoint_folder, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        load(damaged(checkpoint_folder, tmp_path / "m", change))


def test_what_is_no_causal_language_model(tmp_path, checkpoint_folder):
    BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="BertForMaskedLM, not a causal"):
        load(tmp_path / "bert")
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(CheckpointError, match="not a causal"):
        load_skeleton(tmp_path / "t5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a file"):
        load(checkpoint_folder / "config.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot read the configuration"):
        load("some/model")
    with pytest.raises(CheckpointError, match="unknown dtype"):
        load(checkpoint_folder, dtype="float33")


def test_saved_folder_is_complete_and_loads_with_stock_classes(trained, tokenizer, tmp_path):
    plan = PruningPlan({"g": (0, 2)}, {"g": 3}, {"seed": 1})
    results = {
        "params": {"dense": 10, "pruned": 8, "sparsity": 0.2},
        "perplexity": {"t": {"dense": 1.0, "pruned": 2.0, "tokens": 7, "seq_len": 4}},
    }
    folder = save(trained, tmp_path / "out", tokenizer=tokenizer, plan=plan, results=results)
    names = {f.name for f in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "plan.json", "results.json", "README.md"}
    assert PruningPlan.load(folder / "plan.json") == plan
    assert verify_reload(folder, trained) == 0.0
    assert "20.00% of 10 parameters" in (folder / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == trained.num_parameters()
    with pytest.raises(CheckpointError, match="not empty"):
        save(trained, folder)
    save(trained, folder, overwrite=True)
    assert not (folder / "plan.json").exists()
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_the_base_models_licence_is_carried_over(checkpoint_folder, tmp_path):
    base = load(checkpoint_folder)
    checkpoint.write_about(checkpoint.checkpoint_form(base.model), tmp_path, results={}, base=base)
    assert "license: mit" in (tmp_path / "README.md").read_text()


def test_a_model_that_does_not_reload_is_not_left_behind(tmp_path):
    model = make("llama")
    model.model.layers[0].mlp.down_proj.weight.data = model.model.layers[0].mlp.down_proj.weight.data[:, :40].clone()
    with pytest.raises(CheckpointError, match=r"does not load|other logits"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), ValueError("x")])
def test_failures_leave_the_old_folder_or_none(tmp_path, error):
    old = tmp_path / "old"
    old.mkdir()
    (old / "keep").write_text("1")
    for target in (old, tmp_path / "new"):
        with (
            pytest.raises((KeyboardInterrupt, CheckpointError, ValueError)),
            output_folder(target, overwrite=True) as folder,
        ):
            (folder / "half").write_text("x")
            raise error
    assert [f.name for f in tmp_path.iterdir()] == ["old"] and [f.name for f in old.iterdir()] == ["keep"]


def test_kill_in_the_middle_leaves_no_folder_of_that_name(tmp_path):
    code = (
        "import sys, time\nfrom secateur.checkpoint import output_folder\n"
        f"with output_folder({str(tmp_path / 'out')!r}) as f:\n"
        "    (f / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    assert not (tmp_path / "out").exists()


KILLED_AT_ANY_LINE = """
import importlib.util, os, sys
from pathlib import Path

place, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
spec = importlib.util.spec_from_file_location("folders", sys.argv[3])  # without torch, which makes forks slow
spec.loader.exec_module(folders := importlib.util.module_from_spec(spec))
folders.JUST_MADE = -1
if not exchange:
    folders._exchange = lambda *_: False

def overwrite():
    with folders.output_folder(place / "out", overwrite=True) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("new")

def kill_at(line):
    left = line
    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename != folders.__file__ and frame.f_code.co_filename != shutil_file:
            return None
        left -= event == "line"
        if left < 0:
            os._exit(9)
        return trace
    sys.settrace(trace)

shutil_file = folders.shutil.__file__
outcomes, line, code = set(), 0, 9
while code == 9:
    folders._remove(place / "out")
    (place / "out").mkdir()
    for name in ("a", "b"):
        (place / "out" / name).write_text("old")
    if (child := os.fork()) == 0:
        kill_at(line)
        overwrite()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = sorted(f.read_text() for f in place.glob("out/*"))
    if exchange:
        assert found in (["old"] * 2, ["new"] * 2), (line, found)
    try:
        with folders.output_folder(place / "out", overwrite=True):
            raise KeyError
    except KeyError:
        pass
    assert [f.name for f in place.iterdir()] == ["out"], (line, list(place.iterdir()))
    left = sorted(f.read_text() for f in place.glob("out/*"))
    assert left in ([found] if found else [["old"] * 2, ["new"] * 2]), (line, found, left)
    outcomes.add((*found, "then", *left))
    line += 1
assert code == 0 and line > 50, (code, line)
print(sorted(outcomes))
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_kill_at_any_line_of_overwriting_leaves_the_old_folder_or_the_new_one(way, tmp_path):
    command = [sys.executable, "-c", KILLED_AT_ANY_LINE, str(tmp_path), way, folders.__file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("('then', 'old', 'old')" in done.stdout) == (way == "two renames")
    assert "('old', 'old', 'then', 'old', 'old')" in done.stdout
    assert "('new', 'new', 'then', 'new', 'new')" in done.stdout


@pytest.mark.parametrize("exchange", [True, False])
def test_files_and_links_are_replaced_too(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr("secateur.checkpoint.folders._exchange", lambda *_: False)
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "keep").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    for name in ("file", "link"):
        with output_folder(tmp_path / name, overwrite=True) as folder:
            (folder / "new").write_text("x")
        assert (tmp_path / name / "new").exists() and not (tmp_path / name).is_symlink()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "link", "other"]
    assert (tmp_path / "other" / "keep").exists()


def test_a_full_disk_that_only_the_text_of_an_error_tells(tmp_path):
    with pytest.raises(CheckpointError, match="no space left while writing"), output_folder(tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="5"), output_folder(tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_was_written(trained, tmp_path):
    folder = save(trained, tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    assert {oct(f.stat().st_mode & 0o777) for f in folder.iterdir()} == {oct(0o666 & ~mask)}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_room_on_the_disk_is_looked_at_before_writing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"GB are needed.*nothing was written"):
        save(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())
