"""What LoRA-guided importance saves: peak memory of a scoring step with all gradients, and of a training step without.

    python benchmarks/loraprune_memory.py --output benchmarks/results/loraprune_memory.json
    python benchmarks/loraprune_memory.py --device cuda --shape llama-3-8b --output ...   # see gpu/README.md

On a Llama with random weights, each way runs in a process of its own (peak memory of a process never falls):

    full_gradients  forward, backward, and first-order Taylor scores from the gradients of all weights that are scored
    lora            a training step of LoRA adapters with the LoRA-guided importance of the same units
    lora_8bit       the same on a base packed by bitsandbytes, LLM.int8()
    lora_4bit       the same on NF4

`weights` is the loaded model, `peak` the model and what the step needs beyond it, activations recomputed or not. On the
CPU both are resident memory beyond the imports (Linux; the peak is reset after loading, and weights are copied out of
the mapped file first, which is counted as resident as far as it has been touched), on an accelerator what its allocator
gave out. Embeddings and head are never packed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from own_process import figures_of, passed_on
from peft import LoraConfig, get_peft_model
from scoring_memory import SHAPE, by_definition, resident
from transformers import AutoModelForCausalLM, LlamaConfig

import secateur as sc
from secateur.checkpoint import load
from secateur.importance.lora_guided import LoraGuided
from secateur.packed import ready_to_train
from secateur.pipeline import PACKAGES, write_json
from secateur.recovery.targets import all_targets
from secateur.surgery.live import LiveModel

LARGE = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
SHAPES = {
    "tiny": SHAPE | {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2},
    "150m": SHAPE,
    "llama-3-8b": LARGE,
    "llama-13b": LARGE | {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
                          "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
    "llama-3-70b": LARGE | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                            "num_attention_heads": 64},
}  # fmt: skip
WAYS = {"full_gradients": None, "lora": None, "lora_8bit": "8bit", "lora_4bit": "4bit"}
KINDS = ("ffn_channel", "kv_group")


class Meter:
    """Memory of this process or of the accelerator, beyond what there was at the beginning."""

    def __init__(self, device: str) -> None:
        self.accelerated = device != "cpu"
        self.before = 0 if self.accelerated else resident("VmRSS")

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.accelerated else resident("VmRSS") - self.before

    def restart(self) -> None:
        if self.accelerated:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.accelerated else resident("VmHWM") - self.before


def one_way(way: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Memory and seconds of one way, in this process."""
    meter = Meter(args.device)
    model: Any = load(folder, dtype=args.dtype, device=args.device, quantise=WAYS[way]).model
    if args.device == "cpu":
        out_of_the_file(model)
    if args.recompute:
        model.train().gradient_checkpointing_enable()
    ids = torch.randint(1000, (args.samples, args.seq_len), generator=torch.Generator().manual_seed(0)).to(args.device)
    weights, step = meter.now(), full_gradients(model, ids) if way == "full_gradients" else guided(model, ids, args)
    meter.restart()
    seconds = []
    for _ in range(args.repetitions):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return {
        "way": way, "dtype": args.dtype, "recompute": args.recompute, "weights_bytes": weights,
        "peak_bytes": meter.peak(), "seconds": round(statistics.median(seconds), 3),
    }  # fmt: skip


def out_of_the_file(model: torch.nn.Module) -> None:
    """Give every plain weight memory of its own."""
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()
    gc.collect()


def full_gradients(model: Any, ids: torch.Tensor) -> Any:
    """A step that scores from whole gradients."""
    groups = sc.discover(model).only(KINDS)
    names = {m.parameter for g in groups for m in g.members}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = {name: parameters[name].grad for name in names}
        for group in groups:
            by_definition(group, parameters, gradients)
        model.zero_grad(set_to_none=True)

    return step


def guided(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> Any:
    """A training step of adapters that also scores."""
    adapted = get_peft_model(model, LoraConfig(r=args.rank, target_modules=all_targets(model).modules))
    live, criterion = LiveModel(adapted), LoraGuided()
    names = [g.name for g in live.groups.of_kinds(KINDS)]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        ready_to_train(adapted)
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        criterion.scores(live.base, live.groups, {}, names, {})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def in_own_process(way: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    names = ("dtype", "device", "samples", "seq_len", "repetitions", "rank")
    options = ["--way", way, "--folder", str(folder), *passed_on(args, names), *["--recompute"] * args.recompute]
    return {"way": way, "dtype": args.dtype, "recompute": args.recompute} | figures_of(__file__, options)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways, one after the other, with ratios to the first."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[args.shape]), dtype=getattr(torch, args.dtype))
        model.save_pretrained(scratch)
        parameters = model.num_parameters()
        del model
        for way in WAYS:
            rows.append({"parameters": parameters} | in_own_process(way, Path(scratch), args))
            for size in ("weights_bytes", "peak_bytes"):
                if size in rows[-1] and size in rows[0]:
                    rows[-1][size.replace("bytes", "ratio")] = round(rows[-1][size] / rows[0][size], 3)
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="150m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="of the model; float32 and then bfloat16 if not given")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--scratch", type=Path, help="folder with room for the checkpoint")
    parser.add_argument("--recompute", action="store_true", help="only with gradient checkpointing; both if not given")
    parser.add_argument("--way", help="internal: run one way and print its figures")
    parser.add_argument("--folder", type=Path, help="internal: the checkpoint")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one_way(args.way, args.folder, args)))
        return
    rows = []
    for recompute in [True] if args.recompute else [False, True]:
        for dtype in [args.dtype] if args.dtype else ["float32", "bfloat16"]:
            rows += measure(argparse.Namespace(**{**vars(args), "dtype": dtype, "recompute": recompute}))
    protocol = {
        "shape": SHAPES[args.shape], "samples": args.samples, "seq_len": args.seq_len, "rank": args.rank,
        "repetitions": args.repetitions, "threads": torch.get_num_threads(), "kinds": KINDS,
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "versions": {name: version(name) for name in (*PACKAGES, "bitsandbytes")},
    }  # fmt: skip
    write_json(args.output, {"schema": 1, "command": "benchmarks/loraprune_memory.py", "rows": rows,
                             "protocol": protocol})  # fmt: skip


if __name__ == "__main__":
    main()
