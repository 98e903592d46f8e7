"""What scoring costs: peak memory and time of streamed scoring against holding every gradient, and against training.

    python benchmarks/scoring_memory.py --output benchmarks/results/scoring_memory.json
    python benchmarks/scoring_memory.py --output benchmarks/results/scoring_memory_gates.json \
        --ways forward_backward lora_backward gate --dtypes float32

On a random Llama of 162 M parameters, each way runs in a process of its own (peak memory of a process never falls):

    forward_backward    one forward and backward pass that keeps all gradients: what any training step needs
    full_gradients      the same, then first-order Taylor scores of FFN channels and KV groups from the gradients held
    streamed            the same scores from `secateur.score`: each gradient is reduced and freed as it arises
    streamed_recompute  with gradient checkpointing on top
    lora_backward       forward and backward passes of single sequences that train adapters of rank 16 alone
    gate                gate scores of the same groups, which need no weight's gradient; of single sequences, too

Memory is what the process needs beyond the loaded model: peak resident size, reset after loading (Linux). Ratios are to
`full_gradients` and to `forward_backward` of the same dtype, where these were measured. The allocator returns freed
blocks to the system (MALLOC_MMAP_THRESHOLD_), since glibc otherwise keeps fragments that no longer hold anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import secateur as sc
from secateur.pipeline import PACKAGES, write_json
from secateur.recovery import RecoverySettings, with_adapters

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
WAYS = ("forward_backward", "full_gradients", "streamed", "streamed_recompute", "lora_backward", "gate")
BASES = ("full_gradients", "forward_backward")
KINDS = ["ffn_channel", "kv_group"]


def resident(key: str) -> int:
    """A size of this process in bytes: VmRSS (now) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def one_way(way: str, dtype: str, samples: int, seq_len: int, repetitions: int) -> dict[str, Any]:
    """Peak memory beyond the loaded model, seconds, and a checksum of the scores."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype)).eval()
    ids = torch.randint(SHAPE["vocab_size"], (samples, seq_len), generator=torch.Generator().manual_seed(0))
    groups = sc.discover(model).only(KINDS)
    names = sorted({m.parameter for g in groups for m in g.members})
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names and way != "gate")
    if way == "lora_backward":
        with_adapters(model, RecoverySettings(rank=16), experts=False)  # in place
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    seconds, scores = [], {}
    for _ in range(repetitions):
        begin = time.perf_counter()
        if way.startswith("streamed"):
            criterion = sc.Taylor(order=1, gradient_checkpointing=way == "streamed_recompute")
            scores = sc.score(model, groups, [ids], criterion)
        elif way == "gate":
            scores = sc.score(model, groups, [ids], sc.Gate())
        elif way == "lora_backward":
            for row in ids:
                model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)
        else:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            if way == "full_gradients":
                grads = {n: parameters[n].grad for n in names}
                scores = {g.name: by_definition(g, parameters, grads) for g in groups}
                del grads  # or they would be alive beside those of the next repetition
            model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
    return {
        "way": way,
        "dtype": dtype,
        "parameters": model.num_parameters(),
        "loaded_bytes": loaded,
        "peak_bytes": resident("VmHWM") - loaded,
        "seconds": statistics.median(seconds),
        "scores_sum": float(sum(s.double().sum() for s in scores.values())) if scores else None,
    }


@torch.no_grad()
def by_definition(group: Any, weights: Any, grads: Any) -> torch.Tensor:
    """First-order Taylor scores of one group from whole gradients."""
    total = torch.zeros(group.units)
    for m in group.members:
        salience = (weights[m.parameter].float() * grads[m.parameter].float()).abs()
        others = [d for d in range(salience.dim()) if d != m.dim]
        line = salience.sum(others) if others else salience
        total += line[torch.from_numpy(m.index)].sum(1)
    return total


def in_own_process(way: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """`one_way` in a fresh process."""
    command = [sys.executable, __file__, "--way", way, "--dtype", dtype, "--samples", str(args.samples)]
    command += ["--seq-len", str(args.seq_len), "--repetitions", str(args.repetitions)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--dtypes", nargs="*", default=("float32", "bfloat16"))
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="processes per way, in turn; the fastest counts")
    parser.add_argument("--way", help="internal: run one way and print its figures")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one_way(args.way, args.dtype, args.samples, args.seq_len, args.repetitions)))
        return
    rows = []
    for dtype in args.dtypes:
        done: dict[str, dict[str, Any]] = {}
        for _ in range(args.rounds):
            for way in args.ways:
                row = in_own_process(way, dtype, args)
                if way not in done or row["seconds"] < done[way]["seconds"]:
                    done[way] = row
        for row in done.values():
            for base in (base for base in BASES if base in done):
                row[f"memory_to_{base}"] = round(row["peak_bytes"] / done[base]["peak_bytes"], 3)
                row[f"time_to_{base}"] = round(row["seconds"] / done[base]["seconds"], 3)
            rows.append(row)
            print(row, flush=True)
    protocol = {
        "shape": SHAPE,
        "samples": args.samples,
        "seq_len": args.seq_len,
        "repetitions": args.repetitions,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "criteria": ["taylor-1", "gate"],
        "kinds": KINDS,
        "versions": {name: version(name) for name in PACKAGES},
    }
    results = {"schema": 1, "command": "benchmarks/scoring_memory.py", "rows": rows, "protocol": protocol}
    write_json(args.output, results)


if __name__ == "__main__":
    main()
