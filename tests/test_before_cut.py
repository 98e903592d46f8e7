"""A part of the recovery's steps before the cut: how many, what is told of them, and going on after a kill."""

import json

import pytest
import torch
from safetensors.torch import load_file

from secateur.config import parse_recipe
from secateur.errors import RecipeError
from secateur.pipeline import pruning

STEPS, BEFORE = 10, 4


@pytest.fixture
def flags(checkpoint_folder, text_file):
    return ["prune", checkpoint_folder, "--sparsity", 0.3, "--calibration", text_file, "--samples", 8, "--seq-len", 32,
            "--text", text_file, "--recover-steps", STEPS, "--data", text_file, "--uniform"]  # fmt: skip


def test_both_parts_together_are_as_many_steps_as_asked_for(secateur, flags, tmp_path):
    code, printed, err = secateur(*flags, "-o", tmp_path / "a", "--adapt", BEFORE / STEPS)
    assert code == 0, err
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["adapted"]["steps"] == results["adapted"]["settings"]["steps"] == BEFORE
    assert results["recovery"]["settings"]["steps"] == STEPS - BEFORE
    assert results["adapted"]["settings"]["seed"] != results["recovery"]["settings"]["seed"]
    (text,) = results["perplexity"].values()
    assert len({text["dense"], text["adapted"], text["pruned"], text["recovered"]}) == 4
    assert (
        "adapted" in printed
        and "| dense | adapted | pruned | recovered |" in (tmp_path / "a" / "README.md").read_text()
    )
    assert json.loads((tmp_path / "a" / "plan.json").read_text())["provenance"]["adapted_steps"] == BEFORE
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_nothing_is_trained_before_the_cut_unless_it_is_asked_for(secateur, flags, tmp_path):
    code, _, err = secateur(*flags, "-o", tmp_path / "a")
    assert code == 0, err
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert "adapted" not in results and results["recovery"]["settings"]["steps"] == STEPS
    for name in ("auto", "llm-pruner"):
        recipe = {"model": {"source": "demo"}, "method": name, "prune": {"param_sparsity": 0.2}}
        assert parse_recipe(recipe).prune.adapt == 0
    paper = {"model": {"source": "demo"}, "method": "loraprune", "recovery": {"data": ["x"]}}
    with pytest.raises(RecipeError, match="adapt trains before a cut, and loraprune trains all along"):
        parse_recipe(paper | {"prune": {"param_sparsity": 0.2, "adapt": 0.1}})
    code, _, err = secateur(*flags[:4], "-o", tmp_path / "x", "--adapt", 0.2)
    assert code == 2 and "adapt" in err and "--recover-steps" in err


def test_a_cut_that_trains_nothing_leaves_other_runs_checkpoints_alone(secateur, flags, tmp_path):
    """Those of a method that prunes while it trains, interrupted, lie in the same place."""
    left = tmp_path / "a.work" / "checkpoints" / "checkpoint-4" / "whole"
    left.parent.mkdir(parents=True)
    left.touch()
    code, _, err = secateur(*flags[:8], "--criterion", "l2", "--ranking", "local", "-o", tmp_path / "a")
    assert code == 0, err
    assert left.exists()


def test_a_run_killed_after_the_training_goes_on_from_there(
    secateur, checkpoint_folder, text_file, tmp_path, monkeypatch
):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{source: '{checkpoint_folder}'}}\n"
        f"prune: {{param_sparsity: 0.3, adapt: 0.5, uniform: true, calibration: "
        f"{{source: '{text_file}', samples: 8, seq_len: 32}}}}\n"
        f"recovery: {{data: ['{text_file}'], steps: 4, batch_size: 2, micro_batch_size: 2, seq_len: 32, "
        "learning_rate: 0.01, save_every: 1}\n"
    )
    code, _, err = secateur("run", recipe, "-o", tmp_path / "whole")
    assert code == 0, err
    cut = pruning._cut

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "_cut", killed)
    code, _, _ = secateur("run", recipe, "-o", tmp_path / "again")
    assert code != 0 and not (tmp_path / "again" / "pruned").exists()
    assert list((tmp_path / "again" / "pruned.work" / "checkpoints").glob("checkpoint-2"))
    monkeypatch.setattr(pruning, "_cut", cut)
    code, _, err = secateur("run", recipe, "-o", tmp_path / "again", "--resume")
    assert code == 0, err
    assert "step" not in err.partition("- adapt")[2].partition("- evaluate_adapted")[0]
    states = [load_file(tmp_path / name / "recovered" / "model.safetensors") for name in ("whole", "again")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not (tmp_path / "again" / "pruned.work").exists()
