"""Items of tasks from local files, and generated programs within limits."""

import gzip
import json

import pytest
import task_files

from secateur.errors import DataError, EvaluationError
from secateur.evaluation import code_execution
from secateur.evaluation.code_execution import pass_at_1, passes
from secateur.evaluation.scores import TaskScore, average
from secateur.evaluation.tasks import SEVEN, TASKS, local_items, task_named


@pytest.mark.parametrize("task", TASKS)
def test_files_are_found_in_their_folders_or_right_in_the_one_named(task, tmp_path):
    rows, _ = task_files.items(task)
    place = tmp_path / f"{TASKS[task].file}.jsonl"
    task_files.write(place, rows)
    below = local_items(TASKS[task], tmp_path, with_training=False)
    right = local_items(TASKS[task], place.parent, with_training=False)
    assert len(below.rows) == len(rows) and below.sha256 == right.sha256 and below.source == right.source == str(place)
    packed = place.with_name(place.name + ".gz")
    packed.write_bytes(gzip.compress(place.read_bytes()))
    place.unlink()
    assert local_items(TASKS[task], tmp_path, with_training=False).rows == below.rows


def test_forms_give_what_the_definitions_expect(tmp_path):
    for task in ("boolq", "hellaswag"):
        local, hub = task_files.items(task)
        task_files.write(tmp_path / f"{task}.jsonl", local)
        rows = local_items(TASKS[task], tmp_path, with_training=False).rows
        assert [{name: row[name] for name in wanted} for row, wanted in zip(rows, hub, strict=True)] == hub
        task_files.write(tmp_path / f"{task}.jsonl", hub)
        assert local_items(TASKS[task], tmp_path, with_training=False).rows == hub


@pytest.mark.parametrize(
    ("context", "second"),
    [
        ("A man sits on a roof. he", "he"),
        ('He says "stop!" the boy', "the boy"),
        ("How to bake. Take flour, e.g. rye. Mix it.", ""),
        ("no sentence at all", ""),
    ],
)
def test_the_second_part_of_a_hellaswag_context_is_what_follows_its_last_sentence(context, second, tmp_path):
    row = {"activity_label": "x", "ctx": context, "endings": ["a"], "label": 0}
    task_files.write(tmp_path / "hellaswag.jsonl", [row])
    (found,) = local_items(TASKS["hellaswag"], tmp_path, with_training=False).rows
    assert found["ctx_b"] == second and f"{found['ctx_a']} {second}".strip() == context


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("layout", ["whole", "part", "flat"])
def test_examples_never_come_from_what_is_evaluated(task, layout, tmp_path):
    rows, _ = task_files.items(task)
    found = TASKS[task]
    begin = {"whole": 0, "part": 1, "flat": -1}[layout]
    evaluated, training = ("/".join(stem.split("/")[begin:]) for stem in (found.file, found.training))
    task_files.write(tmp_path / f"{evaluated}.jsonl", rows)
    with pytest.raises(DataError, match="few-shot examples"):
        local_items(found, tmp_path, with_training=True)
    if training != evaluated:
        task_files.write(tmp_path / f"{training}.jsonl", rows)
        with pytest.raises(DataError, match="holds the items that are evaluated"):
            local_items(found, tmp_path, with_training=True)
        task_files.write(tmp_path / f"{training}.jsonl", [*rows, *rows])
        items = local_items(found, tmp_path, with_training=True)
        assert items.training_sha256 != items.sha256 and len(items.training) == 2 * len(items.rows)


def test_wrong_files_are_told_by_name_and_row(tmp_path):
    with pytest.raises(
        DataError, match=r"piqa: .* has neither zeroshot/piqa.jsonl nor piqa.jsonl .*put the file there"
    ):
        local_items(TASKS["piqa"], tmp_path, with_training=False)
    with pytest.raises(DataError, match="is no folder"):
        local_items(TASKS["piqa"], tmp_path / "nowhere", with_training=False)
    rows, _ = task_files.items("gsm8k")
    task_files.write(tmp_path / "gsm8k" / "test.jsonl", rows)
    with pytest.raises(DataError, match=r"gsm8k/train.jsonl .*few-shot examples"):
        local_items(TASKS["gsm8k"], tmp_path, with_training=True)
    task_files.write(tmp_path / "piqa.jsonl", [{"goal": "g", "sol1": "a", "label": 0}])
    with pytest.raises(DataError, match=r"row 1: no field 'sol2', which piqa needs; it has goal, sol1, label"):
        local_items(TASKS["piqa"], tmp_path, with_training=False)
    task_files.write(tmp_path / "boolq.jsonl", [{"question": "q", "passage": "p", "answer": "yes"}])
    with pytest.raises(DataError, match="row 1 does not have the form of boolq"):
        local_items(TASKS["boolq"], tmp_path, with_training=False)
    with pytest.raises(EvaluationError, match=r"did you mean hellaswag\?"):
        task_named("helaswag")


def test_the_average_takes_the_metrics_of_the_tables():
    assert {task.name: task.metric for task in SEVEN} == {
        "boolq": "acc", "piqa": "acc", "hellaswag": "acc_norm", "winogrande": "acc", "arc_easy": "acc",
        "arc_challenge": "acc_norm", "openbookqa": "acc_norm",
    }  # fmt: skip

    def score(task, acc, norm):
        errors = {"acc": 0.3, "acc_norm": 0.4}
        return TaskScore(task, {"acc": acc, "acc_norm": norm}, errors, 1, 1, 0, 0, "1", "test", {}, 0.0)

    found = average([score("piqa", 0.5, 0.9), score("hellaswag", 0.1, 0.7), score("rte", 1.0, 1.0)])
    assert found["value"] == pytest.approx(0.6) and found["stderr"] == pytest.approx(0.25) and found["tasks"] == 2
    assert found["metrics"] == {"piqa": "acc", "hellaswag": "acc_norm"}
    assert average([score("piqa", 0.5, 0.9)]) is None


@pytest.mark.parametrize("namespace", [True, False], ids=["network namespace", "audit hook alone"])
def test_programs_are_stopped_at_what_they_have_no_need_for(namespace, tmp_path, monkeypatch):
    if not namespace:
        monkeypatch.setattr(code_execution, "without_network", lambda: ())
    victim = tmp_path / "victim"
    victim.write_text("whole")
    assert passes("import math\nassert math.gcd(4, 6) == 2")
    assert passes("with open('own', 'w') as f: f.write('x')\nimport os; os.remove('own')")
    for program in (
        "assert False",
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import socket; socket.socket()",
        "import _socket; _socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://localhost')",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import ctypes; ctypes.CDLL(None)",
        f"open({str(victim)!r}, 'w')",
        f"import os; os.remove({str(victim)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        "x = [0] * 10**9",
    ):
        assert not passes(program), program
    assert not passes("while True: pass", seconds=1) and not passes("import time; time.sleep(9)", seconds=1)
    assert victim.read_text() == "whole"
    told = code_execution.protection()["network"]
    assert ("audit hook" in told) == (not namespace or not code_execution.without_network())


def test_pass_at_1_runs_the_tests_of_an_item():
    (row,), _ = task_files.items("humaneval", 1)
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    right, wrong = (row["prompt"] + body for body in (row["canonical_solution"], "    return None\n"))
    assert pass_at_1([tests], [[right]]) == {"pass@1": 1.0} and pass_at_1([tests], [[wrong]]) == {"pass@1": 0.0}
    assert code_execution.completions([["x"]], [{"prompt": "def f():"}]) == [["def f():x"]]


def test_items_are_json(tmp_path):
    (tmp_path / "piqa.jsonl").write_text(json.dumps([1]) + "\n")
    with pytest.raises(DataError, match="line 1: expected an object"):
        local_items(TASKS["piqa"], tmp_path, with_training=False)
