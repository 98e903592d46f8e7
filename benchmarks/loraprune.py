"""LoRAPrune beside LLM-Pruner with recovery, on the same training tokens: perplexities over seeds and sparsities.

    python benchmarks/loraprune.py MODEL --text tinystories_valid.jsonl.xz --data tinystories_train.jsonl.xz \
        --output benchmarks/results/loraprune_stories260K.json

Every row trains LoRA adapters for the same number of steps on the same text with the same settings. `llm-pruner` cuts
first (first-order Taylor) and spends all steps on recovery, and so does `random`, which shows what is left of the
choice of units after training; `lora`, `grad` and `magnitude` prune while they train. `lora-replayed` tells the choice
of units from the time they go: the plan that `lora` ends with is cut from the dense model at once, and all steps are
spent on recovery. Rows that the output holds already, from the same protocol, are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from resumed import measured

import secateur as sc
from secateur.importance import Random, Taylor
from secateur.methods.llm_pruner import LLMPruner
from secateur.methods.llm_pruner import run as llm_pruner
from secateur.methods.loraprune import LoRAPrune
from secateur.methods.lorashear import LoRAShear
from secateur.pipeline import PACKAGES
from secateur.recovery import RecoverySettings, train, with_adapters
from secateur.recovery.gradual import GradualPruning

METHODS = (
    "llm-pruner",
    "random",
    "lora",
    "lora-replayed",
    "grad",
    "magnitude",
    "lorashear-half-space",
    "lorashear-linear",
)
ONE_SHOT = ("llm-pruner", "random")
REPLAYED = "-replayed"


def settings_of(args: argparse.Namespace, seed: int) -> RecoverySettings:
    return RecoverySettings(
        rank=args.rank, alpha=2 * args.rank, dropout=0.0, learning_rate=args.learning_rate, steps=args.steps,
        batch_size=args.batch_size, micro_batch_size=args.batch_size, seq_len=args.seq_len, warmup_steps=10,
        save_every=10**9, seed=seed,
    )  # fmt: skip


def row(source: Any, data: Any, method: str, sparsity: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One method at one sparsity from one seed; the model is left as it is."""
    model, tokenizer = copy.deepcopy(source.model), source.tokenizer
    facts: dict[str, Any] = {"method": method, "sparsity": sparsity, "seed": seed}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if method in ONE_SHOT:
            tokens = sc.calibration_tokens(data, tokenizer, args.samples, args.calibration_length, seed)
            criterion = Random(seed=seed) if method == "random" else Taylor(order=1)
            cut = llm_pruner(
                model, [tokens], LLMPruner(sc.Budget(param_sparsity=sparsity), criterion, ranking=args.ranking)
            )
            facts["before_training"] = ppl(cut.model, tokenizer, args)
            small = sc.recover(cut.model, tokenizer, [data], settings_of(args, seed), Path(folder)).model
        else:
            settings = settings_of(args, seed)
            adapted = with_adapters(model, settings, experts=False)
            pruning = while_training(method.removesuffix(REPLAYED), sparsity, args)
            train(adapted, tokenizer, [data], settings, Path(folder), callbacks=[pruning])
            result = pruning.finish()
            small, facts["masked_minus_cut"] = result.model, result.difference
            if method.endswith(REPLAYED):
                cut = sc.slice(source.model, result.plan)
                facts["before_training"] = ppl(cut, tokenizer, args)
                small = sc.recover(cut, tokenizer, [data], settings, Path(folder) / "again").model
    facts |= {
        "parameters": small.num_parameters(),
        "reached": round(1 - small.num_parameters() / source.model.num_parameters(), 5),
        "perplexity": ppl(small, tokenizer, args),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    return facts


def while_training(method: str, sparsity: float, args: argparse.Namespace) -> GradualPruning:
    """The callback of a method that prunes while it trains."""
    if method.startswith("lorashear"):
        return LoRAShear(
            sparsity, push=method.removeprefix("lorashear-"), periods=args.periods, warmup=args.warmup,
            cooldown=args.cooldown, ranking=args.ranking,
        )  # fmt: skip
    return LoRAPrune(
        sparsity, variant=method, frequency=args.frequency, warmup=args.warmup, cooldown=args.cooldown,
        normalise=not args.raw, compact_every=args.frequency, ranking=args.ranking,
    )  # fmt: skip


def ppl(model: Any, tokenizer: Any, args: argparse.Namespace) -> float:
    return sc.perplexity(model, tokenizer, sc.load_corpus(args.text), seq_len=args.seq_len, batch_size=16).value


def measure(args: argparse.Namespace) -> None:
    """All rows for one model, those in the output file taken from there."""
    source = sc.load(args.model)
    source.model.float()
    data, text = sc.load_corpus(args.data), sc.load_corpus(args.text)
    dense = sc.perplexity(source.model, source.tokenizer, text, seq_len=args.seq_len, batch_size=16)
    report: dict[str, Any] = {
        "schema": 1,
        "command": "benchmarks/loraprune.py",
        "model": {
            "name": Path(args.model).name,
            "sha256": source.sha256,
            "parameters": source.model.num_parameters(),
        },
        "dense": dense.to_json(),
        "protocol": {
            "calibration": {"samples": args.samples, "seq_len": args.calibration_length},
            "training": {"file": Path(args.data).name, "sha256": data.sha256, "steps": args.steps,
                         "batch_size": args.batch_size,
                         "seq_len": args.seq_len, "rank": args.rank, "learning_rate": args.learning_rate},
            "schedule": {"frequency": args.frequency, "warmup": args.warmup, "cooldown": args.cooldown},
            "normalise": not args.raw,
            **({} if args.ranking == "local" else {"ranking": args.ranking}),
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in PACKAGES},
        },
    }  # fmt: skip
    measured(args, report, lambda method, sparsity, seed: row(source, data, method, sparsity, seed, args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--data", required=True, help="calibration and training text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--sparsities", nargs="*", type=float, default=(0.2, 0.5))
    parser.add_argument("--seeds", nargs="*", type=int, default=(1, 2, 3))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--frequency", type=int, default=5)
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--cooldown", type=float, default=0.1)
    parser.add_argument("--ranking", choices=("local", "global"), default="local", help="of all but random units")
    parser.add_argument("--periods", type=int, default=10, help="of LoRAShear")
    parser.add_argument("--raw", action="store_true", help="do not normalise the scores of each projection")
    args = parser.parse_args()
    measure(args)


if __name__ == "__main__":
    main()
