"""Sweeps: every combination in a folder of its own, kept when finished, gone on with after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import task_files
import torch

from secateur.config import load_job
from secateur.errors import CheckpointError, DataError, ProcessError, RecipeError
from secateur.pipeline import run_recipe, run_sweep, sweep_keys, sweep_processes, sweeping
from secateur.pipeline.sweep_processes import Outcome
from secateur.processes import OwnProcess

SWEEP = "import sys; sys.argv = ['secateur', *sys.argv[1:]]; from secateur.cli import main; main()"


@pytest.fixture
def recipe(tmp_path, checkpoint_folder, text_file):
    """A recipe of a few seconds with two seeds."""
    file = tmp_path / "s.yaml"
    file.write_text(
        f"model: {{source: '{checkpoint_folder}'}}\n"
        f"prune: {{param_sparsity: 0.2, calibration: {{source: '{text_file}', samples: 2, seq_len: 32}}}}\n"
        f"recovery: {{data: ['{text_file}'], steps: 6, save_every: 1, batch_size: 2, micro_batch_size: 2,"
        " seq_len: 32}\n"
        f"evaluation: {{texts: ['{text_file}'], seq_len: [32]}}\n"
        "sweep: {seed: [1, 2]}\n"
    )
    return file


class Instant:
    """Stands for a process: a run that is over at once; of some sparsities a failure or a kill."""

    started: ClassVar[list] = []

    def __init__(self, function, arguments, log, threads):
        recipe, folder = arguments
        self.sparsity = recipe.prune.param_sparsity
        self.started.append(self.sparsity)
        read, write = os.pipe()
        os.close(write)
        self.sentinel = read
        if self.sparsity < 0.9:
            folder.mkdir()
            perplexity = {"stories": {"seq_len": 32, "dense": 2.0, "pruned": 3.0}}
            params = {"dense": 100, "pruned": 80, "sparsity": 0.2}
            (folder / "results.json").write_text(json.dumps({"params": params, "perplexity": perplexity}))

    def result(self):
        if self.sparsity == 0.99:
            raise ProcessError("its process was killed")
        return Outcome("the largest reachable sparsity is 0.9", 2) if self.sparsity == 0.95 else Outcome()


@pytest.fixture
def instant(monkeypatch):
    monkeypatch.setattr(sweeping, "OwnProcess", Instant)
    monkeypatch.setattr(Instant, "started", [])
    return Instant


def test_a_run_that_fails_does_not_stop_the_others(secateur, recipe, instant, tmp_path):
    output = tmp_path / "out"
    lists = ["sweep.sparsity=[0.95, 0.1, 0.2]", "sweep.seed=[1]"]
    code, out, err = secateur("run", recipe, *lists, "-o", output, "--workers", 1)
    assert code == 2 and "1 of 3 runs failed" in err and "largest reachable" in err and "3 of 3: seed=1, spars" in err
    assert "3.000" in out and "failed" in out and "80" in out
    record = json.loads((output / "sweep.json").read_text())
    assert [run["state"] for run in record["runs"]] == ["failed", "finished", "finished"]
    assert record["runs"][1]["settings"] == {"seed": 1, "sparsity": 0.1} and record["runs"][0]["exit_code"] == 2
    assert record["runs"][1]["perplexity"] == {"stories": {"dense": 2.0, "pruned": 3.0}}
    assert (output / record["runs"][1]["name"] / "results.json").exists()
    code, _, err = secateur("run", recipe, "sweep.sparsity=[0.1, 0.99, 0.3]", "sweep.seed=[1]", "-o", output)
    assert code == 1 and instant.started == [0.95, 0.1, 0.2, 0.99, 0.3] and "sparsity=0.1: finished before" in err


def test_what_decides_the_results_decides_the_name(recipe, tmp_path, monkeypatch):
    combination, other = load_job(recipe).combinations
    (key, second) = sweep_keys.keys_of([combination, other])
    assert key != second and sweep_keys.name_of(combination, key) == f"seed-1-{key[:10]}"
    assert sweep_keys.keys_of([combination]) == [key]
    monkeypatch.setattr(sweep_keys, "version", lambda name: "0.0.0")
    assert sweep_keys.keys_of([combination]) != [key]
    monkeypatch.undo()
    monkeypatch.setattr(sweep_keys, "checkpoint_sha256", lambda folder: "0" * 64)
    assert sweep_keys.keys_of([combination]) != [key]
    with pytest.raises(DataError, match=r"nothing\.txt: no such file"):
        run_sweep(load_job(recipe, ["evaluation.texts=[nothing.txt]"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    long = SimpleNamespace(settings={"method": {"name": "lorashear"}, "evaluation.texts": ["a b/" * 30]})
    assert (
        sweep_keys.name_of(long, "k" * 64)
        == ("method-lorashear_texts-" + "a-b-" * 30)[:60].rstrip("-") + "-" + "k" * 10
    )


def test_items_of_tasks_decide_it_too(recipe, tmp_path):
    rows, _ = task_files.items("piqa")
    task_files.write(tmp_path / "data" / "piqa.jsonl", rows)
    overrides = ["evaluation.tasks=[piqa]", f"evaluation.task_data={tmp_path / 'data'}"]
    combinations = load_job(recipe, overrides).combinations[:1]
    keys = [sweep_keys.keys_of(combinations) for _ in range(2)]
    task_files.write(tmp_path / "data" / "train" / "piqa.jsonl", rows[:2])
    keys.append(sweep_keys.keys_of(combinations))
    task_files.write(tmp_path / "data" / "piqa.jsonl", rows[:3])
    keys.append(sweep_keys.keys_of(combinations))
    assert keys[0] == keys[1] and len({key for (key,) in keys}) == 3


def test_folders_that_are_no_sweeps_or_in_use_are_left_alone(recipe, instant, tmp_path):
    sweep, output = load_job(recipe), tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not empty and holds no sweep"):
        run_sweep(sweep, output)
    with pytest.raises(CheckpointError, match="is a file"):
        run_sweep(sweep, output / "mine.txt")
    with sweeping._alone(output), pytest.raises(CheckpointError, match="a sweep is running in"):
        run_sweep(sweep, output, overwrite=True)
    assert (output / "mine.txt").exists()
    run_sweep(sweep, output, overwrite=True)
    assert not (output / "mine.txt").exists() and len(list(output.glob("seed-*"))) == 2


def test_workers_share_memory_and_cores(recipe, monkeypatch, secateur):
    recipes = [c.recipe for c in load_job(recipe, ["sweep.seed=[1,2,3,4,5,6,7,8]"]).combinations]
    monkeypatch.setattr(sweep_processes.os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    one = sweep_processes._largest(recipes)
    assert one > sweep_processes.PROGRAM
    for free, workers, threads in ((100 * one, 6, 1), (6 * one, 3, 2), (one, 1, 6)):
        monkeypatch.setattr(sweep_processes, "available_memory", lambda free=free: free)
        assert sweep_processes.share_of(recipes) == sweep_processes.Share(workers, threads)
    assert sweep_processes.share_of(recipes, 20) == sweep_processes.Share(8, 1)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(sweep_processes, "available_memory", lambda: 100 * one)
    assert sweep_processes.share_of(recipes).workers == 1
    timed = [load_job(recipe, ["benchmark=true"]).combinations[0].recipe] * 2
    assert sweep_processes.share_of(timed).workers == 1
    with pytest.raises(RecipeError, match="--workers 1"):
        sweep_processes.share_of(timed, 2)
    code, _, err = secateur("run", "demo", "--workers", 2)
    assert code == 2 and "--workers is for sweeps" in err


def test_a_process_that_is_killed_fails_alone_and_prints_to_its_log(tmp_path, capfd):
    calls = {
        "live": (print, ("hello",)),
        "count": (os.getenv, ("OMP_NUM_THREADS",)),
        "die": (signal.raise_signal, (9,)),
    }
    processes = {name: OwnProcess(*call, tmp_path / name, 3) for name, call in calls.items()}
    assert processes["live"].result() is None and (tmp_path / "live").read_text() == "hello\n"
    assert processes["count"].result() == "3"
    with pytest.raises(ProcessError, match=r"was killed by signal 9 .*; see .*die"):
        processes["die"].result()
    assert capfd.readouterr() == ("", "")
    endless = OwnProcess(time.sleep, (1000,), tmp_path / "endless", 1)
    endless.stop()
    with pytest.raises(ProcessError, match="signal 15"):
        endless.result()


def test_a_sweep_killed_and_called_again_gives_what_it_would_have(recipe, tmp_path, monkeypatch):
    output, method = tmp_path / "out", ["method=loraprune", "recovery.steps=8"]
    flags = ["run", recipe, *method, "-o", output, "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEP, *map(str, flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(output.glob("*/pruned.work/checkpoints/checkpoint-[34567]")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    record = json.loads((output / "sweep.json").read_text())
    started = next(run for run in record["runs"] if list((output / run["name"]).glob("pruned.work/checkpoints/*")))
    assert started["state"] == "running" and (record["workers"], record["threads"]) == (2, 1)

    seed = f"sweep.seed=[{started['settings']['seed']}]"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (again,) = run_sweep(sweep := load_job(recipe, [*method, seed]), output)["runs"]
    assert (again["state"], again["name"]) == ("finished", started["name"]), again
    monkeypatch.undo()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = run_recipe(sweep.combinations[0].recipe, tmp_path / "whole")
    torch.set_num_threads(threads)
    folder = output / again["name"]
    found = json.loads((folder / "results.json").read_text())
    assert found["perplexity"] == whole["perplexity"] and found["params"] == whole["params"]
    weights = [place / "pruned" / "model.safetensors" for place in (folder, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    steps = [line for line in (output / again["log"]).read_text().splitlines() if line.startswith("- step ")]
    assert len(steps) <= 10 and steps[-1].startswith("- step 8 of 8")  # it did not begin anew
