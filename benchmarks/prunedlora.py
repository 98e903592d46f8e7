"""PrunedLoRA beside LoRA, rsLoRA, DoRA, AdaLoRA, and rivals that prune the same adapter: held-out loss, memory, time.

    python benchmarks/prunedlora.py MODEL --data alpaca_14k.jsonl.gz --held-out 400 \
        --output benchmarks/results/prunedlora_demo_alpaca.json

Every row fine-tunes the same model on the same examples in the same order for the same number of steps, and measures
the loss on examples that were held out (the last ones of the file). `lora`, `rslora`, `dora` and `adalora` train at the
target rank (AdaLoRA starts at one and a half times of it, as in its paper), `lora-initial` at the initial rank;
`after-*` prunes what `lora-initial` trains, without training again; all others prune while they train. Every row runs
in a process of its own, so that its peak memory is its own; `state_bytes` is what the factors, their gradients and
moments take, `step_seconds` the median of the first and of the last tenth of the steps. Rows that the output holds
already, from the same protocol, are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import TrainerCallback, set_seed

import secateur as sc
from secateur.importance.components import ComponentCriterion
from secateur.methods.prunedlora import PAPER, PrunedLoRA, prune_adapter
from secateur.pipeline import PACKAGES, write_json
from secateur.pipeline.results import peak_memory
from secateur.recovery import RecoverySettings, train
from secateur.recovery.examples import training_examples
from secateur.recovery.targets import all_targets
from secateur.surgery.rank_schedule import PrunedLoRASettings

OURS = ComponentCriterion()
TRAINED = ("lora", "rslora", "dora", "adalora", "lora-initial")
CRITERIA = {
    "paper": PAPER,
    "paper-masks": replace(PAPER, recover=False),  # the first revision of its code
    "ours": OURS,
    "gradient": replace(OURS, ema=0.0),
    "both": replace(OURS, factors="both"),
    "b": replace(OURS, factors="b"),
    "a": replace(OURS, factors="a"),
    "newton": replace(OURS, newton=0.1),
    "single": replace(OURS, joint=False),
    "unbalanced": replace(OURS, balance=False),
    "masks": replace(OURS, recover=False),
    "damped": replace(OURS, damping=0.1),
    "activation": ComponentCriterion("activation"),
    "activation-masks": ComponentCriterion("activation", recover=False),
    "magnitude": ComponentCriterion("magnitude"),
    "taylor": ComponentCriterion("taylor"),
    "sensitivity": ComponentCriterion("sensitivity"),
}
AFTER, GLOBAL = "after-", "-global"  # prunes after training; with one budget for all modules
METHODS = (
    *TRAINED, "paper", "paper-masks", "magnitude", "taylor", "activation", "ours", "ours-global", "after-magnitude",
    "after-taylor", "after-activation", "after-ours",
)  # fmt: skip


class Size(TrainerCallback):  # type: ignore[misc]
    """Bytes of trainable parameters, gradients and moments, and seconds, of each step; and AdaLoRA's own update."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begin)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.bytes.append(sum(4 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(state.global_step)


def adapted(model: Any, method: str, target: int, args: argparse.Namespace, seed: int) -> Any:
    """The model with the adapter that a method starts from; the scale is 1 (rsLoRA: the root of the rank)."""
    set_seed(seed)
    common = {"target_modules": all_targets(model).modules, "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    if method == "adalora":
        schedule = {"tinit": args.steps // 10, "tfinal": 3 * args.steps // 10, "deltaT": max(1, args.every // 2)}
        rank = max(target + 1, math.ceil(1.5 * target))
        return get_peft_model(
            model,
            AdaLoraConfig(
                init_r=rank, target_r=target, lora_alpha=rank, total_step=args.steps, beta1=0.85, beta2=0.85,
                **schedule, **common,
            ),
        )  # fmt: skip
    rank = target if method in TRAINED[:3] else args.initial_rank
    extra = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(method, {})
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, **extra, **common))


def settings_of(method: str, target: int, args: argparse.Namespace) -> PrunedLoRASettings | None:
    """What prunes in a row, None if nothing does."""
    if method in TRAINED:
        return None
    name = method.removeprefix(AFTER).removesuffix(GLOBAL)
    scope: Any = "global" if method.endswith(GLOBAL) else "adapter"
    return PrunedLoRASettings(
        target, every=args.every, scope=scope, warmup=args.warmup, cooldown=args.cooldown, criterion=CRITERIA[name]
    )


def row(method: str, target: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One method at one target rank from one seed, in a process of its own."""
    torch.set_num_threads(args.threads)
    source = sc.load(args.model)
    source.model.float()
    corpus = sc.load_corpus(args.data)
    learn = replace(corpus, rows=corpus.rows[: len(corpus.rows) - args.held_out])
    held = replace(corpus, rows=corpus.rows[len(corpus.rows) - args.held_out :])
    pruning = settings_of(method, target, args)
    model = adapted(source.model, method, target, args, seed)
    size = Size()
    callbacks: list[Any] = [size]
    if pruning is not None and not method.startswith(AFTER):
        callbacks.append(PrunedLoRA(target))
        callbacks[-1].settings = pruning
    recipe = RecoverySettings(
        learning_rate=args.learning_rate, steps=args.steps, batch_size=args.batch_size, seq_len=args.seq_len,
        micro_batch_size=args.batch_size, warmup_steps=args.steps // 20, save_every=10**9, seed=seed,
    )  # fmt: skip
    facts: dict[str, Any] = {"method": method, "target_rank": target, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        _, facts["seconds"] = train(model, source.tokenizer, [learn], recipe, Path(folder), callbacks=callbacks)
    if pruning is not None and method.startswith(AFTER):
        facts["before"] = held_out_loss(model, source.tokenizer, held, args)
        tokens = sc.calibration_tokens(learn, source.tokenizer, 8 * args.batch_size, args.seq_len, seed)
        prune_adapter(model, list(tokens.split(args.batch_size)), pruning, events=args.events)
    facts["loss"] = held_out_loss(model, source.tokenizer, held, args)
    facts["adapter_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tenth = max(1, args.steps // 10)
    facts["state_bytes"] = {"first": size.bytes[0], "mean": sum(size.bytes) // len(size.bytes), "last": size.bytes[-1]}
    facts["step_seconds"] = {"first": median(size.seconds[:tenth]), "last": median(size.seconds[-tenth:])}
    return facts | peak_memory()


def held_out_loss(model: Any, tokenizer: Any, corpus: Any, args: argparse.Namespace) -> float:
    """Mean negative log-likelihood of the labels [nats per token]."""
    total, count = 0.0, 0
    with torch.no_grad():
        for example in training_examples([corpus], tokenizer, args.seq_len, False):
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
            tokens = int((labels[:, 1:] >= 0).sum())
            if tokens:
                logits = model.eval()(input_ids=ids.to(model.device)).logits[0, :-1].float().cpu()
                total += float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
                count += tokens
    return total / count


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows for one model, those in the output file taken from there."""
    source, data = sc.load(args.model), sc.load_corpus(args.data)
    training = ("steps", "batch_size", "seq_len", "learning_rate", "initial_rank", "held_out")
    schedule = ("every", "warmup", "cooldown", "events")
    report: dict[str, Any] = {
        "schema": 1,
        "command": "benchmarks/prunedlora.py",
        "model": {"name": Path(args.model).name, "sha256": source.sha256, "parameters": source.model.num_parameters()},
        "protocol": {
            "data": {"file": Path(args.data).name, "sha256": data.sha256},
            "training": {name: getattr(args, name) for name in training},
            "schedule": {name: getattr(args, name) for name in schedule},
            "dtype": "float32",
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": args.threads,
            "versions": {name: version(name) for name in PACKAGES},
        },
    }
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    rows = known.get("rows", []) if known.get("protocol") == report["protocol"] else []
    done = {(r["method"], r["target_rank"], r["seed"]) for r in rows}
    for seed in args.seeds:
        for target in args.target_ranks:
            for method in args.methods:
                if (method, target, seed) in done or (method == "lora-initial" and target != args.target_ranks[0]):
                    continue
                rows.append(alone(method, target, seed, args))
                print(rows[-1], flush=True)
                write_json(args.output, report | {"rows": rows})
    return report | {"rows": rows}


def alone(method: str, target: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row in a fresh process; one that ends in an error of ours tells it instead of a loss."""
    begin = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(row, method, target, seed, args).result()
        except sc.SecateurError as error:
            seconds = round(time.perf_counter() - begin, 1)
            return {"method": method, "target_rank": target, "seed": seed, "error": str(error), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="training examples, the last ones held out")
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=(*TRAINED, *all_names()), metavar="METHOD")
    parser.add_argument("--target-ranks", nargs="*", type=int, default=(1, 4, 16))
    parser.add_argument("--seeds", nargs="*", type=int, default=(1, 2, 3))
    parser.add_argument("--initial-rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--cooldown", type=float, default=0.3)
    parser.add_argument("--events", type=int, default=8, help="removals of what prunes after training")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    write_json(args.output, measure(args))


def all_names() -> list[str]:
    """Every pruning method there is: a criterion, maybe after training, maybe with one budget."""
    return [f"{after}{name}{budget}" for name in CRITERIA for after in ("", AFTER) for budget in ("", GLOBAL)]


if __name__ == "__main__":
    main()
