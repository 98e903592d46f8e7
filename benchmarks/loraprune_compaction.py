"""How much faster training gets when masked units are removed while it goes on.

    python benchmarks/loraprune_compaction.py --output benchmarks/results/loraprune_compaction.json

The same run of LoRAPrune on a Llama with random weights and on random tokens, in turn with masks alone and with
compaction: training time of the whole run, time of a step at the final sparsity, bytes of the optimizer's moments, and
the largest difference between the losses of the two, step by step. Ratios are within a round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from secateur.methods.loraprune import LoRAPrune
from secateur.pipeline import PACKAGES, write_json

SHAPE = {"vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
         "num_attention_heads": 12, "num_key_value_heads": 4}  # fmt: skip


class StepTimes(TrainerCallback):  # type: ignore[misc]
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begin)


def run(compacts: bool, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), LoraConfig(r=8, target_modules="all-linear"))
    rows = torch.randint(SHAPE["vocab_size"], (args.steps * args.batch_size, args.seq_len)).tolist()
    data = Dataset.from_list([{"input_ids": r, "labels": r} for r in rows])
    pruning = LoRAPrune(
        args.sparsity, frequency=args.frequency, warmup=0.1, cooldown=args.cooldown,
        compact_every=args.frequency if compacts else None,
    )  # fmt: skip
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch_size, use_cpu=True, logging_steps=1,
            report_to="none", disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[pruning, times])
        pruning.prepare(model)  # finding out what can be pruned takes the same for both
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
    state = trainer.optimizer.state.values()
    final = round(args.steps * (1 - args.cooldown)) + 1
    return {
        "compacts": compacts,
        "train_seconds": round(seconds, 2),
        "final_step_seconds": round(statistics.median(times.seconds[final:]), 4),
        "first_step_seconds": round(statistics.median(times.seconds[1 : args.frequency]), 4),
        "moment_bytes": sum(t.numel() * t.element_size() for s in state for t in s.values() if t.dim()),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "difference_of_logits": pruning.finish().difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--frequency", type=int, default=4)
    parser.add_argument("--cooldown", type=float, default=0.4)
    args = parser.parse_args()
    rows = []
    for _ in range(args.rounds):
        masked, compacted = run(False, args), run(True, args)
        away = max(abs(a - b) for a, b in zip(masked.pop("losses"), compacted.pop("losses"), strict=True))
        ratios = {f"{k}_ratio": round(compacted[k] / masked[k], 3)
                  for k in ("train_seconds", "final_step_seconds", "moment_bytes")}  # fmt: skip
        rows.append({"masked": masked, "compacted": compacted, "largest_difference_of_losses": away, **ratios})
        print(rows[-1], flush=True)
    names = ("train_seconds_ratio", "final_step_seconds_ratio", "moment_bytes_ratio")
    parameters = LlamaForCausalLM(LlamaConfig(**SHAPE)).num_parameters()
    settings = {k: v for k, v in vars(args).items() if k != "output"}
    report = {
        "schema": 1,
        "command": "benchmarks/loraprune_compaction.py",
        "median": {name: statistics.median(row[name] for row in rows) for name in names},
        "rows": rows,
        "protocol": {
            "shape": SHAPE, "parameters": parameters, "dtype": "float32", "device": "cpu", **settings,
            "threads": torch.get_num_threads(), "versions": {name: version(name) for name in PACKAGES},
        },
    }  # fmt: skip
    write_json(args.output, report)


if __name__ == "__main__":
    main()
