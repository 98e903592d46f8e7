"""The command line as a user runs it, wrong input included."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import story
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from secateur import checkpoint, cli
from secateur.config import load_recipe
from secateur.pipeline import recipes


@pytest.fixture(scope="module")
def pruned(checkpoint_folder, text_file, tmp_path_factory):
    """A folder made by `secateur prune`."""
    output = tmp_path_factory.mktemp("cli") / "pruned"
    patch = pytest.MonkeyPatch()
    arguments = ["prune", checkpoint_folder, "-o", output, "--method", "llm-pruner",
                     "--sparsity", 0.3, "--calibration", text_file,
                 "--samples", 4, "--seq-len", 32, "--text", text_file]  # fmt: skip
    patch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    patch.undo()
    assert not stop.value.code
    return output


def test_prune_writes_a_checkpoint_with_its_protocol(pruned):
    results = json.loads((pruned / "results.json").read_text())
    assert results["schema"] == 1 and results["command"] == "prune"
    params = results["params"]
    assert abs(params["sparsity"] - 0.3) * params["dense"] <= 3 * 3 * 48
    figures = results["perplexity"]["stories"]
    assert figures["dense"] > 1 and figures["pruned"] > 1 and figures["dense"] != figures["pruned"]
    assert figures["seq_len"] == 128 and len(figures["text_sha256"]) == 64
    assert {"discover_s", "score_s", "allocate_s", "cut_s"} <= set(results["timing"])
    assert results["protocol"]["calibration"]["samples"] == 4 and results["protocol"]["versions"]["torch"]
    assert results["parity"]["max_logit_difference"] == 0.0 and results["memory"]["peak_rss_bytes"] > 0
    assert AutoModelForCausalLM.from_pretrained(pruned).num_parameters() == params["pruned"]


def test_eval_gives_the_same_perplexity_for_what_was_saved(secateur, pruned, text_file, tmp_path):
    code, out, _ = secateur("eval", pruned, "--text", text_file, "--seq-len", 128, "--json", tmp_path / "e.json")
    value = json.loads((tmp_path / "e.json").read_text())["perplexity"]["stories"]["value"]
    saved = json.loads((pruned / "results.json").read_text())["perplexity"]["stories"]["pruned"]
    assert code == 0 and value == pytest.approx(saved, rel=1e-6) and "stories" in out


def test_recover_keeps_the_adapter_and_eval_takes_it(secateur, pruned, text_file, tmp_path):
    output = tmp_path / "recovered"
    code, out, err = secateur(
        "recover", pruned, "-o", output, "--data", text_file, "--steps", 2, "--batch-size", 2, "--seq-len", 32,
        "--text", text_file,
    )  # fmt: skip
    assert code == 0, err
    assert "recovered" in out and not (tmp_path / "recovered.work").exists()
    assert "- step 1 of 2: loss " in err and "- step 2 of 2: loss " in err and "'loss'" not in out + err
    results = json.loads((output / "results.json").read_text())
    code, *_ = secateur("eval", pruned, "--adapter", output / "adapter", "--text", text_file, "--seq-len", 128,
                        "--json", tmp_path / "e.json")  # fmt: skip
    value = json.loads((tmp_path / "e.json").read_text())["perplexity"]["stories"]["value"]
    assert code == 0 and value == pytest.approx(results["perplexity"]["stories"]["recovered"], rel=1e-4)
    before = json.loads((pruned / "results.json").read_text())
    text, figures = (output / "README.md").read_text(), before["perplexity"]["stories"]
    row = [f"{v:.3f}" for v in (figures["dense"], figures["pruned"], results["perplexity"]["stories"]["recovered"])]
    assert " | ".join(row) in text and "merged into the weights: 2 steps of 2 sequences" in text
    assert f"{before['params']['sparsity']:.2%} of {before['params']['dense']:,} parameters were removed" in text
    assert f"{results['parity']['perplexity_before']:.4f} before" in text and "in a fresh process" in text
    assert (output / "plan.json").read_text() == (pruned / "plan.json").read_text()
    code, _, err = secateur("eval", pruned, "--adapter", tmp_path, "--text", text_file, "--seq-len", 128)
    assert code == 2 and "adapter" in err


def test_prune_and_recover_in_one_command(secateur, checkpoint_folder, text_file, tmp_path):
    code, _, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "o", "--method", "llm-pruner",
        "--sparsity", 0.2, "--criterion", "l2", "--calibration",
        text_file, "--recover-steps", 1, "--data", text_file, "--text", text_file, "--distill",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads((tmp_path / "o" / "results.json").read_text())["recovery"]
    assert told["dense"]["source"] == str(checkpoint_folder) and told["settings"]["distill"]["weight"] > 0
    assert {f.name for f in (tmp_path / "o").iterdir()} >= {"plan.json", "adapter", "config.json", "results.json"}
    assert [f.name for f in tmp_path.iterdir()] == ["o"]
    card = ModelCard.load(tmp_path / "o" / "README.md")
    assert card.data.base_model is None  # the hub takes no folder for one
    assert f"from the checkpoint `{checkpoint_folder.name}`" in card.text and "o.secateur" not in card.content
    assert "| stories | " in card.text and "| dense | pruned | recovered |" in card.text
    assert f"It was distilled from {checkpoint_folder.name}: weight " in card.text


def test_kinds_by_name_with_a_share_of_their_own(secateur, checkpoint_folder, text_file, tmp_path):
    flags = ["--calibration", text_file, "--samples", 4, "--seq-len", 32, "--kinds", "ffn_channel,kv_group=0.34"]
    code, out, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "o", "--method", "llm-pruner", "--sparsity", 0.3, *flags
    )
    assert code == 0, err
    assert "34.00% of kv_group was asked for, and 33.33% is the nearest that can go" in out
    told = json.loads((tmp_path / "o" / "results.json").read_text())["kinds"]
    assert told["kv_group"] == {"asked": 0.34, "units": 9, "removed": 3, "share": 0.333333, "parameters": 3 * 48 * 48}
    assert told["ffn_channel"]["asked"] is None and told["ffn_channel"]["removed"] > 0
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2 and config["intermediate_size"] < 96
    params = json.loads((tmp_path / "o" / "results.json").read_text())["params"]
    assert abs(params["sparsity"] - 0.3) * params["dense"] <= 3 * 3 * 48


@pytest.mark.parametrize(
    ("kinds", "message"),
    [("kv_group=x", "is no number"), ("kv_group=1.5", "kv_group=1.5: the share of units to remove must lie in [0, 1)"),
     ("kv_group=-0.1", "kv_group=-0.1: the share"), ("kv_group,kv_group=0.2", "names a kind again"),
     ("=0.2", "names no kind"), ("kv_group", "say how much to remove")],
)  # fmt: skip
def test_kinds_that_make_no_sense(secateur, checkpoint_folder, tmp_path, kinds, message):
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "p", "--kinds", kinds)
    assert code == 2 and err.startswith("error: ") and message in err


def test_a_plan_is_replayed_exactly(secateur, checkpoint_folder, pruned, tmp_path):
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "again", "--plan", pruned / "plan.json")
    assert code == 0, err
    assert (tmp_path / "again" / "plan.json").read_text() == (pruned / "plan.json").read_text()
    text = (tmp_path / "again" / "README.md").read_text()
    assert "a plan that was given" in text and "`param_sparsity` 0.3" in text and "of stories.txt." in text
    assert {f.name for f in (tmp_path / "again").iterdir()} == {f.name for f in pruned.iterdir()}
    a, b = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (pruned, tmp_path / "again"))
    assert all((a[n] == b[n]).all() for n in a)


def test_groups_lists_and_proves(secateur, checkpoint_folder, tmp_path):
    code, out, _ = secateur("groups", checkpoint_folder)
    assert code == 0 and "kv_group" in out and "looked up by token" in out
    code, out, _ = secateur("groups", checkpoint_folder, "--verify", "--json", tmp_path / "g.json")
    results = json.loads((tmp_path / "g.json").read_text())
    families = results["families"]
    proven = {f["kind"]: f["proof"]["max_difference"] for f in families if f["prunable"]}
    assert code == 0 and set(proven) == {"ffn_channel", "kv_group", "query_head", "hidden", "layer", "sublayer"}
    assert all(difference < 1e-9 for difference in proven.values())
    kinds = {row["kind"]: row for row in results["kinds"]}
    assert {k for k, row in kinds.items() if row["proven"]} == set(proven)
    assert all(0 <= kinds[k]["relative_difference_float32"] <= 1e-5 for k in proven)
    assert kinds["sublayer"]["proven"] == 2 and kinds["value_dim"]["max_difference"] is None
    assert "in float32" in out
    refused = next(f for f in families if f["kind"] == "value_dim")  # Llama has one width for keys and values
    assert "no field" in refused["proof"]["reason"]


def test_bench_against_dense(secateur, pruned, checkpoint_folder, tmp_path):
    code, _, err = secateur(
        "bench", pruned, "--against", checkpoint_folder, "--prompt-length", 16, "--new-tokens", 2, "--repetitions", 1,
        "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "b.json").read_text())["benchmark"]["ratios"]


@pytest.fixture
def small_recipe(tmp_path, checkpoint_folder, text_file):
    file = tmp_path / "r.yaml"
    file.write_text(
        f"model: {{source: '{checkpoint_folder}'}}\n"
        f"prune: {{param_sparsity: 0.2, criterion: l2, calibration: {{source: '{text_file}'}}}}\n"
        f"recovery: {{data: ['{text_file}'], steps: 2, batch_size: 2, micro_batch_size: 2, seq_len: 32}}\n"
        f"evaluation: {{texts: ['{text_file}'], seq_len: [32, 64]}}\n"
    )
    return file


def test_run_and_resume(secateur, small_recipe, tmp_path, monkeypatch):
    output = tmp_path / "run"
    code, _, err = secateur("run", small_recipe, "-o", output)
    assert code == 0, err
    results = json.loads((output / "results.json").read_text())
    assert set(results["perplexity"]) == {"stories@32", "stories@64"}
    assert {"dense", "pruned", "recovered"} <= set(results["perplexity"]["stories@32"])
    code, _, err = secateur("run", small_recipe, "-o", output)
    assert code == 2 and "not empty" in err
    code, _, err = secateur("run", small_recipe, "prune.param_sparsity=0.3", "-o", output, "--resume")
    assert code == 2 and "another recipe" in err
    shutil.rmtree(output / "recovered")
    monkeypatch.setattr(recipes, "prune", None)  # a finished stage must not be run again
    code, _, err = secateur("run", small_recipe, "-o", output, "--resume")
    assert code == 0, err
    assert (output / "recovered" / "results.json").exists()


def test_recipes(secateur, small_recipe):
    code, out, _ = secateur("recipes", "ls")
    assert code == 0 and "llm-pruner/llama-7b" in out
    code, out, _ = secateur("recipes", "show", "demo")
    assert code == 0 and out.startswith("# secateur run demo")
    assert secateur("recipes", "validate", small_recipe)[0] == 0
    code, _, err = secateur("recipes", "validate", small_recipe, "prune.param_sparsity=2")
    assert code == 2 and "prune.param_sparsity" in err


def test_demo(monkeypatch, tmp_path):
    from rich.console import Console

    from secateur import demo

    def quick(name, overrides):
        return load_recipe(name, [*overrides, "recovery.steps=2", "prune.calibration.samples=2"])

    monkeypatch.setattr(demo, "load_recipe", quick)
    monkeypatch.setattr(demo, "SPARSITIES", (0.2,))
    console = Console(record=True, width=140)
    report = demo.run_demo(tmp_path / "d", console)
    dense, cut = report["rows"]
    assert 0.79 < cut["parameters"] / dense["parameters"] < 0.81
    assert dense["dense"] < 60 and cut["pruned"] > dense["dense"]
    run = json.loads((tmp_path / "d" / "sparsity-20" / "results.json").read_text())
    speed = 1 / run["benchmark"]["ratios"]["prefill_s"]
    shown = console.export_text(clear=False)
    assert dense["speed"] == 1 and cut["speed"] == pytest.approx(speed, abs=0.01)  # of one run, as the report has it
    assert f"{cut['speed']:.2f}x" in shown and "The old man opened the door" in shown


def bert(folder):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(folder)


BAD = {
    "not reachable": (["--sparsity", "0.9999"], "largest reachable"),
    "too large": (["--sparsity", "1.0"], "less than 1"),
    "negative": (["--sparsity", "-0.1"], "greater than or equal to 0"),
    "no budget": ([], "--sparsity"),
    "missing text": (["--sparsity", "0.2", "--calibration", "nothing.txt"], "no such file"),
    "empty text": (["--sparsity", "0.2", "--calibration", "{empty}"], "is empty"),
    "binary text": (["--sparsity", "0.2", "--calibration", "{binary}"], "binary"),
    "short text": (["--sparsity", "0.2", "--calibration", "{short}", "--seq-len", "64"], "fewer than one window"),
    "no field": (["--sparsity", "0.2", "--calibration", "{fields}"], "no field 'text'"),
    "unknown criterion": (["--sparsity", "0.2", "--criterion", "l3"], "prune.criterion"),
    "no such kind": (
        ["--sparsity", "0.2", "--kinds", "ffn_channel,bogus"],
        "'bogus' is no kind of unit; there are ffn_",
    ),
    "kind it lacks": (
        ["--sparsity", "0.2", "--calibration", "{good}", "--kinds", "ffn_channel,expert"],
        "this model offers",
    ),
    "no plan": (["--plan", "nothing.json"], "cannot read the plan"),
    "foreign plan": (["--plan", "{plan}"], "another model"),
    "protected uniform": (
        ["--sparsity", "0.2", "--calibration", "{good}", "--uniform", "--protect-first", "1"],
        "per-layer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_writes_nothing(secateur, checkpoint_folder, tmp_path, case):
    flags, message = BAD[case]
    place = tmp_path / "in"
    place.mkdir()
    files = {
        "empty": ("e.txt", b""),
        "binary": ("b.txt", b"a\0b" * 99),
        "short": ("s.txt", b"The old man."),
        "fields": ("f.jsonl", b'{"story": "x"}\n'),
        "good": ("g.txt", story(1).encode()),
        "plan": ("p.json", json.dumps({"schema": 1, "provenance": {"model_sha256": "ab"}, "groups": {}}).encode()),
    }
    for name, content in files.values():
        (place / name).write_bytes(content)
    paths = {key: place / name for key, (name, _) in files.items()}
    if not any("calibration" in f for f in flags):
        flags = [*flags, "--calibration", str(paths["good"])]
    output = tmp_path / "out"
    code, _, err = secateur("prune", checkpoint_folder, "-o", output, *(f.format(**paths) for f in flags))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err and [f.name for f in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("what", ["empty folder", "missing", "truncated", "encoder", "pickle", "quantised"])
def test_bad_models(secateur, checkpoint_folder, tmp_path, what):
    model = tmp_path / "m"
    if what == "encoder":
        bert(model)
    elif what in ("truncated", "pickle"):
        shutil.copytree(checkpoint_folder, model)
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:4000])
        if what == "pickle":
            weights.rename(model / "pytorch_model.bin")
    elif what == "quantised":
        shutil.copytree(checkpoint_folder, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    elif what == "empty folder":
        model.mkdir()
    output = tmp_path / "out"
    code, _, err = secateur("prune", model, "-o", output, "--sparsity", "0.2", "--calibration", "demo-calibration")
    assert code == 2 and err.count("error: ") == 1 and "Traceback" not in err and not output.exists()


def test_a_calibration_text_that_cannot_be_had_is_told_before_anything_is_measured(
    secateur, checkpoint_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("secateur.pipeline.pruning.add_stage", None)
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "o", "--sparsity", "0.2")
    assert code == 2 and "c4" in err and "--calibration FILE" in err and not list(tmp_path.iterdir())


def test_an_output_in_use_is_left_alone(secateur, checkpoint_folder, tmp_path):
    (tmp_path / "keep").write_text("1")
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path, "--sparsity", "0.2")
    assert code == 2 and "not empty" in err and [f.name for f in Path(tmp_path).iterdir()] == ["keep"]


def test_ctrl_c_leaves_nothing(secateur, checkpoint_folder, text_file, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "verify_in_fresh_process", interrupt)  # by then everything has been written
    flags = ["--sparsity", 0.2, "--calibration", text_file, "--seq-len", 32]
    code, _, _ = secateur("prune", checkpoint_folder, "-o", tmp_path / "out", "--method", "llm-pruner", *flags)
    assert code == 130 and not list(tmp_path.iterdir())


def test_nothing_else_is_heard(tmp_path):
    """Libraries of quantised models warn when transformers imports them, whatever the model."""
    command = [sys.executable, "-c", "from secateur.cli import main; main()", "groups", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "parameters" in done.stdout and not done.stderr


def test_where_no_one_watches_no_bars_are_drawn(checkpoint_folder, text_file):
    """In a process of its own: other libraries read their settings when they are imported."""
    command = "import sys; from secateur import cli; cli.main(); assert 'transformers' in sys.modules"
    arguments = ["eval", checkpoint_folder, "--text", text_file, "--seq-len", "128"]
    done = subprocess.run([sys.executable, "-c", command, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr
    assert "it/s" not in done.stderr and "%|" not in done.stderr


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "secateur", "groups", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_examples_run(tmp_path, checkpoint_folder):
    examples = Path(__file__).parents[1] / "examples"
    for script in sorted(set(examples.glob("0*.py")) - {examples / "04_llama_cpp.py"}):  # the README's, run with it
        arguments = [str(checkpoint_folder), *([str(tmp_path / "o")] if "02" in script.name else [])]
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
