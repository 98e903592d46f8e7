"""LLM-Pruner's seven tasks on a model, from local files, as `secateur eval --tasks` measures them.

    python benchmarks/zero_shot.py demo --task-data FOLDER --output benchmarks/results/zero_shot_demo.json

Every item's answers are also compared with those of lm-eval run directly, on its own definitions and another copy of
the model, with the files in the place of its data sets: `agreement` holds how many items have the same prompts and
figures, and the largest difference of log-likelihoods. Items that lm-eval gives up on are left out of that.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import secateur as sc
from secateur.config import parse_recipe
from secateur.evaluation import TaskScore, average, prepare, setting, zero_shot
from secateur.evaluation.tasks import SEVEN, Task, local_items
from secateur.pipeline import PACKAGES, load_model, write_json

Data = dict[str, Any]


def direct(task: Task, args: argparse.Namespace, ours: Sequence[Data], folder: Path) -> list[Data]:
    """Items as lm-eval logs them, from its own definition with only the data set replaced.

    Args:
        ours: all that are asked for; those are left out that lm-eval gives up on.
    """
    items = folder / f"{task.name}.jsonl"
    rows = local_items(task, args.task_data, with_training=False).rows
    items.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    definition = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / task.definition),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {task.split: str(items)}, "cache_dir": str(folder / "cache")},
        **{f"{kind}_split": None for kind in ("training", "validation", "test") if kind != task.split},
    }
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump({**definition, "task": task.name}))
    loaded = sc.load(args.model)
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=args.batch_size)
    possible = [s["doc_id"] for s in ours if all(lm._encode_pair(*request)[1] for request in s["arguments"])]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        lm, tasks=[task.name], task_manager=manager, samples={task.name: possible}, bootstrap_iters=0, num_fewshot=0
    )
    return found["samples"][task.name]


def compared(score: TaskScore, samples: list[Data]) -> Data:
    """Our items beside lm-eval's."""
    same, difference = 0, 0.0
    of_item = {sample["doc_id"]: sample for sample in score.samples}
    for theirs in samples:
        ours = of_item[theirs["doc_id"]]
        same += ours["arguments"] == theirs["arguments"] and all(ours[n] == theirs[n] for n in ours["metrics"])
        pairs = zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True)
        difference = max(difference, *(abs(a[0] - b[0]) for a, b in pairs))
    left_out = len(of_item) - len(samples)
    return {"items": len(samples), "same": same, "largest_difference": difference, "left_out": left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    source = load_model(parse_recipe({"model": {"source": args.model}}))
    assert source.tokenizer is not None
    prepared = prepare([task.name for task in SEVEN], args.task_data)
    scores: list[TaskScore] = []
    agreement: Data = {}
    began = time.perf_counter()
    for score in zero_shot(source.model, source.tokenizer, prepared, limit=args.limit, batch_size=args.batch_size):
        scores.append(score)
        print(score.task, score.value, score.seconds, flush=True)
    whole = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        for task, score in zip(SEVEN, scores, strict=True):
            samples = direct(task, args, score.samples, Path(folder))
            agreement[task.name] = compared(score, samples)
            print(task.name, agreement[task.name], flush=True)
    tasks = {score.task: score.to_json() for score in scores}
    for score in tasks.values():
        score["data"]["source"] = Path(score["data"]["source"]).name
    report = {
        "schema": 1,
        "model": {
            "name": Path(args.model).name, "parameters": source.model.num_parameters(), "sha256": source.sha256
        },
        "tasks": tasks,
        "average": average(scores),
        "agreement": agreement,
        "seconds": round(whole, 1),
        "protocol": {
            **setting(source.tokenizer, args.limit, args.batch_size),
            "dtype": str(source.model.dtype).removeprefix("torch."),
            "device": str(source.model.device),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in (*PACKAGES, "lm_eval")},
        },
    }  # fmt: skip
    write_json(args.output, report)


if __name__ == "__main__":
    main()
