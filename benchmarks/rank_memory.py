"""What a large initial rank costs: memory and seconds of a step at rank 512, at rank 64, and from the one to the other.

    python benchmarks/rank_memory.py --output benchmarks/results/rank_memory.json
    python benchmarks/rank_memory.py --device cuda --shape llama-3-8b --dtype bfloat16 --output ...

On a Llama with random weights, each way trains adapters on random tokens in a process of its own:

    large   LoRA of the initial rank
    pruned  PrunedLoRA from the initial rank to the target rank, all at once after `--before` steps
    small   LoRA of the target rank
    dora    DoRA of the target rank
    adalora AdaLoRA from one and a half times the target rank, as in its paper

`before` and `after` are the steps up to the removal and those after the one that follows it, in all three ways; `peak`
is the model, adapter, optimizer's state and activations (see `loraprune_memory.py` for how it is taken), `state` the
exact bytes of trainable parameters and of what the optimizer keeps of them, seconds the median of a step; `between` is
the one step in which components leave, whose peak and seconds are told alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from loraprune_memory import SHAPES, Meter, out_of_the_file
from own_process import figures_of, passed_on
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

import secateur as sc
from secateur.checkpoint import load
from secateur.pipeline import PACKAGES, write_json

WAYS = ("large", "pruned", "small", "dora", "adalora")
PASSED_ON = ("dtype", "device", "samples", "seq_len", "initial_rank", "target_rank", "before", "after")


class Watch(TrainerCallback):
    """Peak memory, seconds and state of the steps before and after a removal."""

    def __init__(self, meter: Meter, before: int) -> None:
        self.meter, self.before = meter, before
        self.seconds: list[float] = []
        self.found: dict[str, dict[str, Any]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.before + 1:  # the step of the removal is of neither part
            self.found["between"] = {"peak_bytes": self.meter.peak(), "seconds": round(self.seconds[-1], 4)}
            self.seconds = []
        if state.global_step in (self.before, self.before + 1):
            self.meter.restart()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begin)
        if state.global_step in (self.before, state.max_steps):
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            kept = [v for p in trained for v in optimizer.state.get(p, {}).values() if torch.is_tensor(v)]
            self.found["before" if state.global_step == self.before else "after"] = {
                "peak_bytes": self.meter.peak(),
                "state_bytes": sum(t.numel() * t.element_size() for t in (*trained, *kept)),
                "seconds": round(statistics.median(self.seconds), 4),
            }


def one_way(way: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one way, in this process."""
    meter = Meter(args.device)
    model: Any = load(folder, dtype=args.dtype, device=args.device).model
    if args.device == "cpu":
        out_of_the_file(model)
    rank = args.initial_rank if way in ("large", "pruned") else args.target_rank
    adapted: Any = get_peft_model(model, adapter_of(way, rank, args.before + 1 + args.after))
    steps = args.before + 1 + args.after
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (steps * args.samples, args.seq_len), generator=generator).tolist()
    watch = Watch(meter, args.before)
    gone = args.initial_rank - args.target_rank
    schedule = {"every": args.before + 1, "components": gone, "warmup": 0.0}
    pruning = [sc.PrunedLoRA(target_rank=args.target_rank, **schedule)] if way == "pruned" else []
    with tempfile.TemporaryDirectory(dir=args.scratch) as output:
        arguments = TrainingArguments(
            output, max_steps=steps, per_device_train_batch_size=args.samples, report_to="none", save_strategy="no",
            use_cpu=args.device == "cpu", disable_tqdm=True, logging_strategy="no", optim="adamw_torch",
        )  # fmt: skip
        data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
        Trainer(adapted, arguments, train_dataset=data, callbacks=[*pruning, watch]).train()
    return {"way": way, "initial_rank": rank, **watch.found}


def adapter_of(way: str, rank: int, steps: int) -> LoraConfig:
    """The configuration of the adapter that a way starts from; AdaLoRA keeps its initial rank for all steps."""
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if way == "adalora":
        first = 3 * rank // 2
        return AdaLoraConfig(init_r=first, target_r=rank, lora_alpha=first, total_step=steps + 1, tinit=steps, **common)
    return LoraConfig(r=rank, lora_alpha=rank, use_dora=way == "dora", **common)


def in_own_process(way: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    options = ["--way", way, "--folder", str(folder), *passed_on(args, PASSED_ON)]
    return {"way": way} | figures_of(__file__, options)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways, one after the other."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[args.shape]), dtype=getattr(torch, args.dtype))
        model.save_pretrained(scratch)
        parameters = model.num_parameters()
        del model
        for way in WAYS:
            rows.append({"parameters": parameters} | in_own_process(way, Path(scratch), args))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="150m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--initial-rank", type=int, default=512)
    parser.add_argument("--target-rank", type=int, default=64)
    parser.add_argument("--before", type=int, default=5, help="steps before the removal")
    parser.add_argument("--after", type=int, default=5, help="steps after the one that follows it")
    parser.add_argument("--scratch", type=Path, help="folder with room for the checkpoint")
    parser.add_argument("--way", help="internal: run one way and print its figures")
    parser.add_argument("--folder", type=Path, help="internal: the checkpoint")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one_way(args.way, args.folder, args)))
        return
    rows = measure(args)
    protocol = {
        **{name: getattr(args, name) for name in PASSED_ON if name != "device"}, "shape": SHAPES[args.shape],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "versions": {name: version(name) for name in PACKAGES},
    }  # fmt: skip
    write_json(args.output, {"schema": 1, "command": "benchmarks/rank_memory.py", "rows": rows,
                             "protocol": protocol})  # fmt: skip


if __name__ == "__main__":
    main()
