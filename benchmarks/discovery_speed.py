"""How long discovery takes on shapes of real models, and how it grows with the number of layers; no weights exist.

    python benchmarks/discovery_speed.py --output benchmarks/results/discovery_speed.json

Each model is built on the meta device and discovered in a process of its own, the fastest of three runs counts. Memory
is the peak resident size beyond what the imports took.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scoring_memory import resident
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from secateur.discovery import discover
from secateur.pipeline import PACKAGES, write_json

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
QWEN3_235B = {
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
}
MODELS = {
    **{f"Llama 7B width, {n} layers": (LlamaConfig, LLAMA_7B | {"num_hidden_layers": n}) for n in (8, 16, 32, 64)},
    "Llama 70B, 80 layers": (LlamaConfig, LLAMA_70B | {"num_hidden_layers": 80}),
    "Qwen3-MoE 235B, 94 layers": (Qwen3MoeConfig, QWEN3_235B | {"num_hidden_layers": 94}),
}


def one(name: str) -> dict[str, Any]:
    """Seconds and memory of one discovery."""
    config_class, sizes = MODELS[name]
    imported = resident("VmRSS")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_class(vocab_size=32000, **sizes))
    begin = time.perf_counter()
    groups = discover(model)
    seconds = time.perf_counter() - begin
    return {
        "model": name,
        "parameters": model.num_parameters(),
        "layers": sizes["num_hidden_layers"],
        "groups": len(groups.prunable),
        "seconds": round(seconds, 3),
        "memory_bytes": resident("VmHWM") - imported,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--one", help="internal: discover one model and print its figures")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return
    rows = []
    for name in MODELS:
        runs = []
        for _ in range(args.repetitions):
            command = [sys.executable, __file__, "--one", name]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(out.splitlines()[-1]))
        rows.append(min(runs, key=lambda run: run["seconds"]))
        print(rows[-1], flush=True)
    protocol = {
        "repetitions": args.repetitions,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    results = {"schema": 1, "command": "benchmarks/discovery_speed.py", "rows": rows, "protocol": protocol}
    write_json(args.output, results)


if __name__ == "__main__":
    main()
