"""What commands that train leave beside their output: nothing after a user's error, checkpoints after a kill."""

import pytest

from secateur.checkpoint import put_aside, put_back
from secateur.errors import CheckpointError
from secateur.methods.loraprune import LoRAPrune
from secateur.pipeline import adapting

TRAINING = ["--seq-len", "16", "--batch-size", "2"]


@pytest.fixture
def prune(secateur, checkpoint_folder, text_file, tmp_path):
    """`prune` with a method that trains, into `out`."""

    def run(*options, method="loraprune", steps=3):
        given = ["-o", tmp_path / "out", "--method", method, "--sparsity", "0.3", "--data", text_file, *TRAINING]
        return secateur("prune", checkpoint_folder, *given, "--steps", steps, *options)

    return run


@pytest.fixture
def killed(tmp_path):
    """What a killed run left."""
    file = tmp_path / "out.work" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    return file


WRONG = {  # errors just before the first step, and amid the steps
    "too few steps": ({"method": "lorashear"}, ["--periods", "10"], "do not fit"),
    "diverging": ({"steps": 40}, ["--learning-rate", "1e30"], "lower the learning rate"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_while_training_leaves_nothing(prune, tmp_path, wrong):
    how, options, words = WRONG[wrong]
    code, _, err = prune(*options, **how)
    assert code == 2 and words in " ".join(err.split()), err
    assert not list(tmp_path.iterdir())


TOLD_FIRST = {  # method -> wrong options, and the words that tell
    "too many periods": ("lorashear", ["--periods", "10"], "do not fit"),
    "too short a source": ("lorashear", ["--data", "SHORT", "--mix", "uniform"], "gives no training example"),
    "protected layers and equal widths": ("loraprune", ["--protect-first", "1"], "--per-layer"),
}


@pytest.mark.parametrize("wrong", TOLD_FIRST)
def test_what_is_wrong_with_the_input_is_told_before_anything_is_measured(
    prune, tmp_path, text_file, monkeypatch, wrong
):
    method, options, words = TOLD_FIRST[wrong]
    short = tmp_path / "short.txt"
    short.write_text("short")
    monkeypatch.setattr(adapting, "add_stage", None)  # a call would be an internal error
    code, _, err = prune("--text", text_file, *[short if o == "SHORT" else o for o in options], method=method)
    assert code == 2 and words in " ".join(err.split()), err
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_an_error_before_training_leaves_what_a_killed_run_left(prune, killed, options):
    killed.parent.rename(killed.parent.with_name("checkpoint-none"))  # none to go on from
    kept = killed.parent.with_name("checkpoint-none") / killed.name
    code, _, err = prune("--periods", "10", *options, method="lorashear")
    assert code == 2 and "do not fit" in err and kept.is_file()


def test_a_run_that_trains_takes_the_place_of_a_killed_one(prune, killed, tmp_path):
    code, _, err = prune("--learning-rate", "1e30", steps=40)
    assert code == 2 and "lower the learning rate" in err and not list(tmp_path.iterdir())


def test_checkpoints_outlive_an_error_after_training(prune, tmp_path, monkeypatch):
    """A full disk, say: there is much to lose by then, and nothing was wrong with the input."""

    def full(self):
        raise CheckpointError("no space left")

    monkeypatch.setattr(LoRAPrune, "finish", full)
    code, _, err = prune()
    assert code == 2 and "no space left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    assert (tmp_path / "out.work" / "checkpoints" / "checkpoint-3").is_dir()


def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(prune, tmp_path, monkeypatch):
    monkeypatch.setattr(LoRAPrune, "finish", lambda self: (_ for _ in ()).throw(CheckpointError("no space left")))
    prune(steps=4)
    monkeypatch.undo()
    checkpoints = tmp_path / "out.work" / "checkpoints"
    assert (checkpoints / "checkpoint-4" / "whole").is_file()
    half = checkpoints / "checkpoint-5"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    code, _, err = prune("--resume", steps=4)
    assert code == 0, err
    assert "- step 1 of 4" not in err  # it went on from the last one that is whole


def test_recovery_leaves_nothing_after_an_error(secateur, checkpoint_folder, text_file, tmp_path, killed):
    given = ["-o", tmp_path / "out", "--data", text_file, *TRAINING, "--steps", "40", "--learning-rate", "1e30"]
    code, _, err = secateur("recover", checkpoint_folder, *given, "--mix", "dynamic")
    assert code == 2 and killed.is_file(), err
    code, _, err = secateur("recover", checkpoint_folder, *given)
    assert code == 2 and "lower the learning rate" in err and not list(tmp_path.iterdir())


def test_a_recipe_leaves_what_was_there_after_an_error_in_its_first_stage(
    secateur, checkpoint_folder, text_file, tmp_path, monkeypatch
):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{source: '{checkpoint_folder}'}}\n"
        "method: {name: lorashear, periods: 10}\n"
        "prune: {param_sparsity: 0.3}\n"
        f"recovery: {{data: ['{text_file}'], steps: 3, batch_size: 2, micro_batch_size: 2, seq_len: 16}}\n"
    )
    run = tmp_path / "run"
    code, _, err = secateur("run", recipe, "-o", run)
    assert code == 2 and "do not fit" in err and not run.exists()

    run.mkdir()
    (run / "results.json").write_text("of an earlier run")
    code, _, err = secateur("run", recipe, "-o", run, "--overwrite")
    assert code == 2 and "do not fit" in err
    assert [file.name for file in run.iterdir()] == ["results.json"]
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "run"}

    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    for place in (tmp_path / "link", "."):
        code, _, err = secateur("run", recipe, "-o", place, "--overwrite")
        assert code == 2 and "do not fit" in err
        assert (tmp_path / "link").is_symlink() and (run / "results.json").exists()

    code, _, err = secateur("run", recipe, "-o", recipe, "--overwrite")
    assert code == 2 and "r.yaml is a file" in err


def test_a_folder_put_aside_goes_when_there_is_another_in_its_place(tmp_path):
    run, hidden = tmp_path / "run", tmp_path / ".run.before-overwrite"
    run.mkdir()
    (run / "old").touch()
    with put_aside(run) as begun:
        assert hidden.is_dir() and not run.exists()
        with pytest.raises(CheckpointError, match="another run overwrites"), put_aside(run):
            pass
        run.mkdir()
        put_back(run)  # what another process does first leaves it alone
        assert hidden.is_dir()
        begun()
        assert not hidden.exists()
    assert not list(run.iterdir())
    with pytest.raises(KeyboardInterrupt), put_aside(run):
        raise KeyboardInterrupt
    assert run.is_dir() and not hidden.exists()
    with pytest.raises(CheckpointError, match="cannot overwrite"), put_aside(tmp_path / "none"):
        pass
