"""Training that is watched: what shows in TensorBoard, where its files lie, and what is refused."""

import copy
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from secateur.data import load_corpus
from secateur.methods.loraprune import LoRAPrune
from secateur.methods.prunedlora import PrunedLoRA
from secateur.recovery import RecoverySettings, recover, reporting, train, with_adapters

WATCHED = RecoverySettings(
    rank=4, steps=4, batch_size=2, micro_batch_size=2, seq_len=32, save_every=50, report_to=("tensorboard",)
)


def shown(folder):
    """Name of a curve -> its steps and values."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def corpora(text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n".join(text_file.read_text().splitlines()[::-1]) + "\n")
    return [load_corpus(text_file), load_corpus(other)]


def test_the_method_shows_beside_the_loss_and_changes_nothing(trained, tokenizer, corpora, tmp_path):
    curves = {}
    for callback in (LoRAPrune(0.2, frequency=1, warmup=0.0, cooldown=0.25), PrunedLoRA(2, every=1, cooldown=0.0)):
        for report_to in ((), ("tensorboard",)):
            settings = RecoverySettings(**{**vars(WATCHED), "report_to": report_to})
            adapted, fresh = with_adapters(copy.deepcopy(trained), settings, experts=False), copy.deepcopy(callback)
            log, _ = train(adapted, tokenizer, corpora[:1], settings, tmp_path / "w", callbacks=[fresh])
            curves[report_to] = [entry["loss"] for entry in log if "loss" in entry], fresh.history, log[-1].keys()
        assert curves[()] == curves["tensorboard",]
        found, history = shown(tmp_path / "w" / "logs"), curves["tensorboard",][1]
        assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]
        name = "sparsity" if isinstance(callback, LoRAPrune) else "mean"
        tag = f"train/{fresh.history_of}/{name}"
        assert found[tag] == [(row["step"], pytest.approx(row[name])) for row in history]
        assert len(list((tmp_path / "w" / "logs").iterdir())) == 1  # what the run before left is gone
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_mixes_and_texts_show_too(trained, tokenizer, corpora, tmp_path):
    settings = RecoverySettings(**{**vars(WATCHED), "mix": "uniform", "round_steps": 2, "eval_every": 2})
    result = recover(trained, tokenizer, corpora, settings, tmp_path / "w", evaluate=lambda model: {"stories": 3.0})
    found = shown(tmp_path / "w" / "logs")
    assert found["train/perplexity/stories"] == [(2, 3.0), (4, 3.0)]
    rounds = [(row["step"], row["sources"]["other"]["loss"]) for row in result.mix["rounds"]]
    assert found["train/mix/other/loss"][:2] == [(step, pytest.approx(loss)) for step, loss in rounds]
    assert "train/mix/stories/share" in found and not any("/" in key for entry in result.log for key in entry)


def test_the_files_lie_in_the_output_folder(secateur, checkpoint_folder, text_file, tmp_path, monkeypatch):
    flags = ["--data", text_file, "--steps", 2, "--batch-size", 2, "--seq-len", 32, "--report-to", "tensorboard"]
    code, _, err = secateur("recover", checkpoint_folder, "-o", tmp_path / "o", *flags)
    assert code == 0, err
    assert len(shown(tmp_path / "o" / "logs")["train/loss"]) == 2
    assert not (tmp_path / "o.work").exists()
    monkeypatch.setitem(reporting.INSTALLED, "tensorboard", lambda: False)
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # nothing may be loaded
    for verb in (["recover", *flags], ["tune", *flags, "--target-rank", 2],
                 ["prune", *flags[:4], *flags[-2:], "--sparsity", 0.2, "--method", "loraprune"],
                 ["prune", *flags[:2], *flags[-2:], "--sparsity", 0.2, "--recover-steps", 2]):  # fmt: skip
        code, _, err = secateur(verb[0], checkpoint_folder, "-o", tmp_path / "p", *verb[1:])
        assert code == 2 and err == (
            "error: tensorboard is not installed: pip install tensorboard, or leave out --report-to tensorboard "
            "(recovery.report_to)\n"
        )
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "p", "--sparsity", 0.2, *flags[-2:])
    assert code == 2 and "no use for --report-to" in err
    code, _, err = secateur("recover", checkpoint_folder, "-o", tmp_path / "p", *flags[:-1], "tensorbord")
    assert code == 2 and "recovery.report_to.0: Input should be 'tensorboard', 'wandb' or 'trackio'" in err
