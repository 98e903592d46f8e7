"""Tasks measured by Secateur and by lm-eval run directly give the same, item by item; kept answers, adapters, runs."""

import copy
import json
import sys
from pathlib import Path

import pytest
import task_files
import yaml

import secateur as sc
from secateur import pipeline
from secateur.config import parse_recipe
from secateur.errors import CheckpointError, EvaluationError
from secateur.evaluation import prepare, tasks, zero_shot
from secateur.evaluation.tasks import TASKS
from secateur.pipeline.kept import Kept

lm_eval = pytest.importorskip("lm_eval")
SHARED = Path(__file__).parents[2] / "shared" / "data"
GLUE = ("sst2", "cola", "mrpc", "rte")
SEVEN = tuple(task.name for task in tasks.SEVEN)
ALL = (*SEVEN, "gsm8k", *GLUE)


@pytest.fixture(scope="module")
def demo():
    return sc.load("demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files of every task, with a training split where one is needed."""
    place = tmp_path_factory.mktemp("tasks")
    for name in TASKS:
        task_files.write(place / f"{TASKS[name].file}.jsonl", task_files.items(name)[0])
    task_files.write(place / "gsm8k/train.jsonl", task_files.items("gsm8k", 8, seed=1)[0])
    return place


def directly(model, tokenizer, name, place, files, *, limit=None, shots=0):
    """Items as lm-eval itself logs them: its YAML, included by one that names the files as `json` data set."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task, unused = TASKS[name], ("training_split", "validation_split", "test_split")
    definition = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / task.definition), "task": name,
        "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(place / "cache")},
        **{split: None for split in unused if split != f"{task.split}_split" and not (shots and "train" in split)},
    }  # fmt: skip
    (place / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=8)
    found = lm_eval.simple_evaluate(
        lm, tasks=[name], task_manager=TaskManager(include_path=str(place), include_defaults=False),
        limit=limit, bootstrap_iters=0, num_fewshot=shots,
    )  # fmt: skip
    return found["results"][name], found["samples"][name]


def same_items(score, results, samples):
    assert len(score.samples) == len(samples) > 0
    for ours, theirs in zip(score.samples, samples, strict=True):
        assert ours["arguments"][0][0] == theirs["arguments"][0][0] and ours["target"] == theirs["target"]
        assert ours["filtered_resps"] == theirs["filtered_resps"] and ours["metrics"] == theirs["metrics"]
        assert [ours[name] for name in ours["metrics"]] == [theirs[name] for name in theirs["metrics"]]
    for name, value in score.metrics.items():
        key = name if "," in name else f"{name},none"
        assert value == results[key]


@pytest.mark.parametrize("name", ALL)
def test_items_and_figures_are_those_of_lm_eval_run_directly(name, demo, folder, tmp_path):
    shots = 2 if name == "gsm8k" else 0
    (prepared,) = prepare([name], folder, shots=shots)
    (score,) = zero_shot(demo.model, demo.tokenizer, [prepared], limit=4)
    task_files.write(tmp_path / "items.jsonl", task_files.items(name)[1])
    files = {TASKS[name].split: str(tmp_path / "items.jsonl")}
    files |= {"train": str(folder / "gsm8k/train.jsonl")} if shots else {}
    results, samples = directly(demo.model, demo.tokenizer, name, tmp_path, files, limit=4, shots=shots)
    same_items(score, results, samples)
    assert score.items == 4 and score.of == 6 and score.shots == shots and score.metric in score.metrics
    assert all(error is not None for error in score.errors.values()) and set(score.errors) == set(score.metrics)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real items are not there")
@pytest.mark.parametrize("name", SEVEN)
def test_real_items_too(name, demo, tmp_path):
    (prepared,) = prepare([name], SHARED)
    (score,) = zero_shot(demo.model, demo.tokenizer, [prepared], limit=6)
    rows = tasks.local_items(TASKS[name], SHARED, with_training=False).rows
    task_files.write(tmp_path / "items.jsonl", rows)
    files = {TASKS[name].split: str(tmp_path / "items.jsonl")}
    same_items(score, *directly(demo.model, demo.tokenizer, name, tmp_path, files, limit=6))


def test_items_from_the_hub_give_the_same(demo, folder, monkeypatch):
    asked = []

    def load_dataset(repository, name, split):
        asked.append((repository, name, split))
        return task_files.items("boolq")[1]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(tasks, "reach_hub", lambda repository: None)
    local, hub = (
        next(zero_shot(demo.model, demo.tokenizer, prepare(["boolq"], place), limit=4)) for place in (folder, None)
    )
    assert asked == [("aps/super_glue", "boolq", "validation")] and hub.data["source"] == "aps/super_glue"
    assert local.metrics == hub.metrics and len(hub.data["sha256"]) == 64
    assert [s["filtered_resps"] for s in local.samples] == [s["filtered_resps"] for s in hub.samples]


def test_programs_that_a_model_wrote_are_run_when_that_is_allowed(demo, folder):
    with pytest.raises(EvaluationError, match="--allow-code-execution"):
        prepare(["humaneval"], folder)
    prepared = prepare(["humaneval"], folder, allow_code_execution=True)
    keys: list[str] = []
    (score,) = zero_shot(demo.model, demo.tokenizer, prepared, limit=2, on_answer=lambda key, _: keys.append(key))
    assert score.metrics == {"pass@1": 0.0} and score.notes["code_execution"]["network"]
    assert score.notes["new_tokens"].startswith("256 instead of 1024")
    rows = task_files.items("humaneval")[0]
    prompts = [prompt for sample in score.samples for prompt, _ in sample["arguments"]]
    assert prompts == [row["prompt"] for row in rows[:2]]
    answers = dict.fromkeys(keys, rows[0]["canonical_solution"])  # right for the first item only
    (score,) = zero_shot(demo.model, demo.tokenizer, prepared, limit=2, answers=answers)
    assert score.metrics == {"pass@1": 0.5}


def test_what_does_not_fit_the_positions_is_counted(checkpoint_folder, tmp_path):
    row = task_files.items("boolq", 1)[0][0]
    task_files.write(tmp_path / "boolq.jsonl", [row, {**row, "passage": row["passage"] * 20}])
    small = sc.load(checkpoint_folder)
    (score,) = zero_shot(small.model, small.tokenizer, prepare(["boolq"], tmp_path))
    assert score.truncated == 1 and score.items == 2
    row = task_files.items("piqa", 1)[0][0]
    task_files.write(tmp_path / "piqa.jsonl", [{**row, "sol1": "garden " * 300}])
    with pytest.raises(EvaluationError, match="longer than its 256 positions"):
        list(zero_shot(small.model, small.tokenizer, prepare(["piqa"], tmp_path)))


def test_an_answer_that_a_token_of_the_prompt_swallows_is_encoded_by_itself(trained, tokenizer, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "?": 2, "a": 3, "b": 4, " ": 5, "a ": 6, "a b": 7}
    bpe = Tokenizer(models.BPE(vocabulary, [("a", " "), ("a ", "b")], unk_token="?"))
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="?")
    rows = [{"sentence": "_ b", "option1": "a", "option2": "b", "answer": "1"}] * 2
    task_files.write(tmp_path / "winogrande.jsonl", rows)
    (score,) = zero_shot(trained, words, prepare(["winogrande"], tmp_path))
    assert score.notes["answers_encoded_apart"].startswith("of 2 items")
    (sample, _) = score.samples
    assert [len(words(context + answer)["input_ids"]) for context, answer in sample["arguments"]] == [1, 3]
    assert all(value < 0 for value, _ in sample["filtered_resps"])


def test_eval_prints_and_writes_every_figure(secateur, folder, checkpoint_folder, tmp_path):
    arguments = ["eval", checkpoint_folder, "--tasks", ",".join(SEVEN), "--task-data", folder, "--limit", 3]
    code, out, err = secateur(*arguments, "--json", tmp_path / "e.json")
    assert code == 0, err
    assert "average of 7 tasks" in out and "acc_norm of hellaswag, arc_challenge, openbookqa" in out
    found = json.loads((tmp_path / "e.json").read_text())
    piqa = found["tasks"]["piqa"]
    assert {"acc", "acc_norm", "stderr", "n"} <= set(piqa) and piqa["n"] == 3 and piqa["metric"] == "acc"
    assert piqa["version"] == "1.0" and piqa["split"] == "validation" and len(piqa["data"]["sha256"]) == 64
    assert found["protocol"]["versions"]["lm_eval"] and found["protocol"]["tasks"]["limit"] == 3
    values = [found["tasks"][name]["value"] for name in SEVEN]
    assert found["tasks_average"]["value"] == pytest.approx(sum(values) / 7) and found["perplexity"] == {}
    assert not list(tmp_path.glob("*.work"))


def test_a_killed_evaluation_asks_only_what_has_no_answer(folder, checkpoint_folder, tmp_path, monkeypatch):
    recipe = parse_recipe({
        "model": {"source": str(checkpoint_folder)},
        "evaluation": {"tasks": ["piqa", "arc_easy"], "task_data": str(folder), "batch_size": 2},
    })  # fmt: skip
    whole = pipeline.evaluate(recipe, json_file=tmp_path / "whole.json")
    file, add = tmp_path / "e.json", Kept.add
    asked = []

    def killed(self, entry):
        asked.append(entry)
        add(self, entry)
        if len(asked) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.evaluate(recipe, json_file=file)
    work = file.with_name("e.json.work")
    assert work.exists() and not file.exists()
    work.write_text(work.read_text() + '["cut sho')
    monkeypatch.setattr(Kept, "add", lambda self, entry: (asked.append(entry), add(self, entry)))
    found = pipeline.evaluate(recipe, json_file=file, resume=True)
    assert len(asked) == len({key for key, _ in asked}) == 2 * 6 + 4 * 6 and not work.exists()
    timeless = [
        {name: {k: v for k, v in score.items() if k != "seconds"} for name, score in r["tasks"].items()}
        for r in (whole, found)
    ]
    assert timeless[0] == timeless[1]
    assert pipeline.evaluate(recipe, json_file=file, resume=True) == json.loads(file.read_text())
    assert len(asked) == 36


def test_answers_of_another_model_are_refused(secateur, folder, checkpoint_folder, tmp_path):
    file = tmp_path / "e.json"
    (tmp_path / "e.json.work").write_text('"another"\n')
    flags = ["--tasks", "piqa", "--task-data", folder, "--limit", 2]
    code, _, err = secateur("eval", checkpoint_folder, *flags, "--json", file, "--resume")
    assert code == 2 and "answers of another model" in err and not file.exists()
    code, _, err = secateur("eval", checkpoint_folder, *flags, "--resume")
    assert code == 2 and "--json FILE" in err


def test_wrong_input_is_one_line(secateur, folder, checkpoint_folder, tmp_path, monkeypatch):
    def refused(*flags):
        code, out, err = secateur("eval", checkpoint_folder, "--json", tmp_path / "e.json", *flags)
        assert code == 2 and not out and len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
        return err

    assert "did you mean piqa?" in refused("--tasks", "piqb")
    assert "limit is for tasks" in refused("--limit", 3)
    assert "neither zeroshot/boolq.jsonl" in refused("--tasks", "boolq", "--task-data", tmp_path)
    assert "cannot be loaded from the hub" in refused("--tasks", "boolq")
    assert "few-shot examples" in refused("--tasks", "rte", "--task-data", folder, "--shots", 2)
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'secateur[eval]'" in refused("--tasks", "boolq", "--task-data", folder)


def test_models_whose_layers_differ_and_adapters_are_evaluated_like_any_other(
    secateur, folder, checkpoint_folder, tmp_path
):
    base, flags = sc.load(checkpoint_folder), ["--tasks", "piqa,winogrande", "--task-data", folder]
    groups = sc.discover(base.model)
    kept = {f"model.layers.{n}.mlp/ffn_channel": tuple(range(units)) for n, units in enumerate((96, 40, 64))}
    small = sc.slice(base.model, sc.PruningPlan(kept, {name: groups.named(name).units for name in kept}))
    sc.save(small, tmp_path / "o", tokenizer=base.tokenizer)
    code, _, err = secateur("eval", tmp_path / "o", *flags, "--json", tmp_path / "a.json")
    assert code == 0, err
    assert small.config.per_layer_config is not None
    expected = zero_shot(small, base.tokenizer, prepare(["piqa", "winogrande"], folder))
    found = json.loads((tmp_path / "a.json").read_text())
    assert {s.task: s.metrics["acc"] for s in expected} == {n: s["acc"] for n, s in found["tasks"].items()}

    adapter = tmp_path / "adapter"
    make_adapter(checkpoint_folder, adapter)
    code, _, err = secateur("eval", checkpoint_folder, "--adapter", adapter, *flags, "--json", tmp_path / "b.json")
    assert code == 0, err
    found = json.loads((tmp_path / "b.json").read_text())
    assert len(found["adapter_sha256"]) == 64
    merged = pipeline.with_adapter(base, adapter)
    (score,) = zero_shot(merged, base.tokenizer, prepare(["piqa"], folder))
    assert score.metrics["acc_norm"] == found["tasks"]["piqa"]["acc_norm"]
    with pytest.raises(CheckpointError, match="cannot put the adapter"):
        pipeline.with_adapter(base, tmp_path)


def make_adapter(base, place):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(sc.load(base).model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(place)


def test_a_run_measures_every_stage_and_none_twice(
    secateur, folder, checkpoint_folder, text_file, tmp_path, monkeypatch
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({
        "model": {"source": str(checkpoint_folder)},
        "method": "llm-pruner",
        "prune": {"param_sparsity": 0.2, "criterion": "l2", "calibration": {"source": str(text_file)}},
        "recovery": {"data": [str(text_file)], "steps": 1, "batch_size": 2, "seq_len": 32},
        "evaluation": {"tasks": ["piqa", "openbookqa"], "task_data": str(folder), "limit": 3},
    }))  # fmt: skip
    run = tmp_path / "run"
    code, out, err = secateur("run", recipe, "-o", run)
    assert code == 0, err
    assert "recovered, average of 2 tasks" in out
    results = json.loads((run / "results.json").read_text())
    assert set(results["tasks"]["piqa"]) == {"dense", "pruned", "recovered"} == set(results["tasks_average"])
    assert results["tasks"]["piqa"]["dense"]["n"] == 3 and results["protocol"]["versions"]["lm_eval"]
    assert {file.name for file in (run / "tasks").iterdir()} == {"dense.json", "pruned.json", "recovered.json"}
    monkeypatch.setattr(Kept, "add", lambda *_: pytest.fail("a model was asked again"))
    code, *_ = secateur("run", recipe, "-o", run, "--resume")
    assert code == 0 and json.loads((run / "results.json").read_text())["tasks"] == results["tasks"]
    code, _, err = secateur("run", recipe, "evaluation.task_data=nowhere", "-o", tmp_path / "other")
    assert code == 2 and "no folder" in err and not (tmp_path / "other").exists()


def test_a_run_that_tunes_measures_the_model_with_its_adapter(secateur, folder, checkpoint_folder, text_file, tmp_path):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump({
        "model": {"source": str(checkpoint_folder)},
        "recovery": {"data": [str(text_file)], "rank": 4, "steps": 2, "batch_size": 2, "seq_len": 32},
        "tune": {"target_rank": 2, "every": 1},
        "evaluation": {"tasks": ["piqa"], "task_data": str(folder), "limit": 3},
    }))  # fmt: skip
    code, out, err = secateur("run", recipe, "-o", run)
    assert code == 0, err
    found = json.loads((run / "results.json").read_text())["tasks"]["piqa"]
    assert set(found) == {"dense", "tuned"} and found["tuned"]["n"] == 3 and "tuned" in out
    base = sc.load(checkpoint_folder)
    merged = pipeline.with_adapter(base, run / "adapter")
    (score,) = zero_shot(merged, base.tokenizer, prepare(["piqa"], folder), limit=3)
    assert score.metrics["acc"] == found["tuned"]["acc"]
