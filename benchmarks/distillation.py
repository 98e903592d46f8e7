"""Recovery from the text alone beside distillation from the dense model, at equal training tokens.

    python benchmarks/distillation.py demo --text demo-eval --data books.jsonl.xz \
        --output benchmarks/results/distillation_demo.json

The model is cut by LLM-Pruner (first-order Taylor, block-wise, calibration drawn by the seed), and every row trains the
same cut model for the same number of steps on the same examples in the same order:

    lora            adapters, from the text alone
    lora:weight=0.5,temperature=2,top_k=64   the same with distillation; any of its settings turns it on
    full            all weights; learning_rate=... and other settings of the recovery may follow, too

`perplexity` is on a text that is not trained on, `kl` the divergence from the dense model there [nats per token, first
windows], `ms_per_step` the wall time of a step. Rows that the output holds already, from the same protocol, are not
repeated.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import tempfile
from dataclasses import fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from resumed import measured

import secateur as sc
from secateur.data import Corpus
from secateur.importance import Taylor
from secateur.methods.llm_pruner import LLMPruner, run
from secateur.pipeline import PACKAGES
from secateur.recovery import Distillation, RecoverySettings
from secateur.recovery.divergence import divergence, soft_targets
from secateur.recovery.training_data import training_data

METHODS = ("lora", "lora:weight=0.5", "lora:weight=0.9", "lora:weight=0.5,temperature=2", "lora:weight=1",
           "lora:weight=0.5,top_k=64", "lora:weight=0.5,hidden=0.1", "full", "full:weight=0.5")  # fmt: skip
OF_DISTILLATION = {field.name for field in fields(Distillation)}
WINDOWS = 128  # on which the divergence from the dense model is measured


class Case:
    """One model and its texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.source = args, sc.load(args.model)
        self.dense_model, self.tokenizer = self.source.model.float(), self.source.tokenizer
        self.text = sc.load_corpus(args.text)
        whole = sc.load_corpus(args.data)
        piece = "\n\n".join(whole.texts)[: args.characters]
        self.data = Corpus(whole.name, (piece,), hashlib.sha256(piece.encode()).hexdigest(), whole.source)
        self.windows = sc.calibration_tokens(self.text, self.tokenizer, WINDOWS, args.seq_len, 0)
        self.dense = sc.perplexity(self.dense_model, self.tokenizer, self.text, seq_len=args.seq_len, batch_size=16)
        self.examples = training_data([self.data], self.tokenizer, self.settings(1, False, {}))
        self.cut, self.before = cache(self._cut), cache(self._before)

    def settings(self, seed: int, full: bool, given: dict[str, Any]) -> RecoverySettings:
        args = self.args
        common = RecoverySettings(
            rank=args.rank, alpha=2 * args.rank, dropout=0.0, steps=args.steps, batch_size=args.batch_size,
            micro_batch_size=args.batch_size, seq_len=args.seq_len, warmup_steps=10, save_every=10**9, seed=seed,
            learning_rate=args.full_learning_rate if full else args.learning_rate, full_weights=full,
        )  # fmt: skip
        return replace(common, **given)

    def _cut(self, sparsity: float, seed: int) -> Any:
        args = self.args
        tokens = sc.calibration_tokens(self.data, self.tokenizer, args.samples, args.seq_len, seed)
        return run(copy.deepcopy(self.dense_model), [tokens], LLMPruner(sc.Budget(sparsity), Taylor(order=1))).model

    def row(self, method: str, sparsity: float, seed: int) -> dict[str, Any]:
        """One way to recover, from one seed."""
        name, _, rest = method.partition(":")
        given = {k: yaml.safe_load(v) for k, v in (part.split("=", 1) for part in rest.split(",") if part)}
        distill = {key: value for key, value in given.items() if key in OF_DISTILLATION}
        recovery = {key: value for key, value in given.items() if key not in distill}
        settings = self.settings(seed, name == "full", recovery)
        settings = replace(settings, distill=Distillation(**distill) if distill else None)
        small = self.cut(sparsity, seed)
        with tempfile.TemporaryDirectory() as folder:
            done = sc.recover(small, self.tokenizer, self.examples, settings, folder, dense=lambda: self.dense_model)
        return {
            "method": method, "sparsity": sparsity, "seed": seed,
            "reached": round(1 - small.num_parameters() / self.dense_model.num_parameters(), 5),
            "before_training": self.before(sparsity, seed), "perplexity": self.perplexity(done.model),
            "kl": self.kl(done.model), "ms_per_step": round(1000 * done.seconds / self.args.steps, 1),
        }  # fmt: skip

    def _before(self, sparsity: float, seed: int) -> float:
        return self.perplexity(self.cut(sparsity, seed))

    def perplexity(self, model: Any) -> float:
        return sc.perplexity(model, self.tokenizer, self.text, seq_len=self.args.seq_len, batch_size=16).value

    @torch.no_grad()
    def kl(self, model: Any) -> float:
        found = [
            divergence(model(ids).logits[0], soft_targets(self.dense_model(ids).logits[0], 1.0), 1.0)
            for ids in self.windows.split(1)
        ]
        return float(torch.cat(found).mean())

    def report(self) -> dict[str, Any]:
        args = self.args
        names = ("samples", "seq_len", "steps", "batch_size", "rank", "learning_rate", "full_learning_rate")
        return {
            "schema": 1,
            "command": "benchmarks/distillation.py",
            "model": {
                "name": (self.source.folder or Path(args.model)).name,
                "sha256": self.source.sha256,
                "parameters": self.dense_model.num_parameters(),
            },
            "dense": self.dense.to_json(),
            "protocol": {
                "data": {"file": Path(args.data).name, "characters": args.characters, "sha256": self.data.sha256},
                "examples": len(self.examples.examples),
                **{name: getattr(args, name) for name in names},
                "cut": "llm-pruner, taylor-1, block-wise, uniform",
                "kl_windows": WINDOWS,
                "dtype": "float32",
                "threads": torch.get_num_threads(),
                "versions": {name: version(name) for name in PACKAGES},
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to measure on")
    parser.add_argument("--data", required=True, help="to train on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--sparsities", nargs="*", type=float, default=(0.5,))
    parser.add_argument("--seeds", nargs="*", type=int, default=(1, 2, 3))
    parser.add_argument("--characters", type=int, default=10_000_000, help="of the data, from its beginning")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of adapters")
    parser.add_argument("--full-learning-rate", type=float, default=2e-3, help="of all weights")
    args = parser.parse_args()
    case = Case(args)
    measured(args, case.report(), case.row)


if __name__ == "__main__":
    main()
