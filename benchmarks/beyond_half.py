"""From 50 to 90 % of the parameters: cuts and unstructured masks, before and after recovery, and how fast they are.

    python benchmarks/beyond_half.py demo --text demo-eval --data books.jsonl.xz \
        --output benchmarks/results/beyond_half_demo.json

    taylor-1         LLM-Pruner, first-order Taylor, FFN channels and heads, the same widths in every layer
    taylor-1-hidden  the same with the hidden dimension, which loses the same share
    auto             our method as it comes
    auto-hidden      our method with the hidden dimension: equal shares, for which there is no search, and equal widths
    magnitude        the least weights of every linear module of the blocks are zero
    wanda            those of least weight times input, by output

Masks zero as many weights as the sparsity is of all parameters of the model; the linear modules of the blocks take all
of it, and where they have fewer, the row fails, as it does where a cut cannot reach its budget. `perplexity` is as cut,
`recovered` after all weights were trained on the text for the same steps on the same examples in the same order; zeros
are put back after every step. `relative_time` is that of a forward pass over that of the dense model, measured in turn
with it, each the least of several; of a mask that of dense matrices or of compressed sparse rows, whichever is less. It
is processor time on one thread, which is the time by the clock but for what else the machine does.
Seeds draw the calibration text and the order of training. Rows that the output holds already, from the same protocol,
are not repeated; `--steps 0` trains nothing.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from resumed import measured
from transformers import set_seed
from unstructured import KeepZeros, Masks, as_csr, linear_modules, magnitude, wanda, zeros_of

import secateur as sc
from secateur.data import Corpus
from secateur.discovery import discover
from secateur.errors import BudgetError, NonFiniteError, PlanError
from secateur.importance import CRITERIA, Taylor
from secateur.methods import auto
from secateur.methods.llm_pruner import LLMPruner
from secateur.methods.llm_pruner import run as llm_pruner
from secateur.pipeline import PACKAGES
from secateur.recovery import RecoverySettings, train
from secateur.recovery.training_data import training_data

CUTS = ("taylor-1", "taylor-1-hidden", "auto", "auto-hidden")
MASKS = ("magnitude", "wanda")


class Case:
    """One model and its texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.source = args, sc.load(args.model)
        self.model, self.tokenizer = self.source.model.float().eval(), self.source.tokenizer
        self.text, whole = sc.load_corpus(args.text), sc.load_corpus(args.data)
        piece = "\n\n".join(whole.texts)[: args.characters]
        self.data = Corpus(whole.name, (piece,), hashlib.sha256(piece.encode()).hexdigest(), whole.source)
        self.examples = training_data([self.data], self.tokenizer, self.settings(1)) if args.steps else None
        self.kinds = (*discover(self.model).kinds_in_blocks(), "hidden")
        self.tokens = cache(self._tokens)
        self.prompts = self.tokens(0)[: args.batch_size]
        self.dense = sc.perplexity(self.model, self.tokenizer, self.text, seq_len=args.seq_len, batch_size=16)
        self.dense_ms = 1000 * fastest({"dense": self.model}, self.prompts, args.repetitions)["dense"]

    def settings(self, seed: int) -> RecoverySettings:
        args = self.args
        return RecoverySettings(
            steps=args.steps, batch_size=args.batch_size, micro_batch_size=args.batch_size, seq_len=args.seq_len,
            warmup_steps=10, save_every=10**9, seed=seed, learning_rate=args.learning_rate, full_weights=True,
        )  # fmt: skip

    def _tokens(self, seed: int) -> torch.Tensor:
        return sc.calibration_tokens(self.data, self.tokenizer, self.args.samples, self.args.seq_len, seed)

    def row(self, method: str, sparsity: float, seed: int) -> dict[str, Any]:
        """One method at one sparsity from one seed; or why it fails."""
        key = {"method": method, "sparsity": sparsity, "seed": seed}
        self.tokens(seed)  # whose time is no method's
        begin = time.perf_counter()
        try:
            small, masks = self.masked(method, sparsity, seed) if method in MASKS else (self.cut(*key.values()), {})
        except (BudgetError, PlanError) as error:
            return {**key, "failed": str(error)}
        seconds = time.perf_counter() - begin
        found = {**key, "reached": self.reached(small, masks), "perplexity": self.perplexity(small)}
        found |= self.speed(small, masks) | {"seconds": round(seconds, 1)}
        return found | (self.recovered(small, masks, seed) if self.args.steps else {})

    def cut(self, method: str, sparsity: float, seed: int) -> Any:
        """The model cut by a method."""
        budget, batches, hidden = sc.Budget(sparsity), [self.tokens(seed)], method.endswith("-hidden")
        kinds = self.kinds if hidden else ()
        if method.startswith("taylor-1"):
            return llm_pruner(self.model, batches, LLMPruner(budget, Taylor(order=1), kinds=kinds)).model
        ours = auto.Auto(budget)
        if hidden:
            one = {"taylor-2": CRITERIA["taylor-2"]}
            ours = replace(ours, criteria=one, kinds=kinds, ranking="local", uniform=True)
        return auto.run(self.model, batches, ours).model

    def masked(self, method: str, sparsity: float, seed: int) -> tuple[Any, Masks]:
        """A copy of the model with zeros in it, and where."""
        model, zeros = copy.deepcopy(self.model), round(sparsity * self.model.num_parameters())
        return model, magnitude(model, zeros) if method == "magnitude" else wanda(model, zeros, self.tokens(seed))

    def reached(self, model: Any, masks: Masks) -> float:
        """The share of the dense model's parameters that are removed or zero."""
        whole = self.model.num_parameters()
        return round((whole - model.num_parameters() + zeros_of(model, masks)) / whole, 5)

    def perplexity(self, model: Any) -> float:
        return sc.perplexity(model, self.tokenizer, self.text, seq_len=self.args.seq_len, batch_size=16).value

    def speed(self, model: Any, masks: Masks) -> dict[str, Any]:
        """Time of a forward pass relative to the dense model's, of each form and of the fastest."""
        forms = {"matrices": model} | ({"csr": as_csr(model, list(masks))} if masks else {})
        seconds = fastest({"dense": self.model} | forms, self.prompts, self.args.repetitions)
        ratios = {form: round(seconds[form] / seconds["dense"], 4) for form in forms}
        dense_ms = round(1000 * seconds["dense"], 2)
        return {"relative_time": min(ratios.values()), "relative_times": ratios, "dense_ms": dense_ms}

    def recovered(self, model: Any, masks: Masks, seed: int) -> dict[str, Any]:
        """Train all weights of the model itself, whose zeros stay."""
        keep, used_cache = [KeepZeros(linear_modules(model), masks)] if masks else [], model.config.use_cache
        assert self.examples is not None
        set_seed(seed)
        model.requires_grad_(True)
        before = self.reached(model, masks)
        try:
            with tempfile.TemporaryDirectory() as folder:
                _, seconds = train(
                    model, self.tokenizer, self.examples, self.settings(seed), Path(folder), callbacks=keep
                )
        except NonFiniteError as error:
            return {"recovery_failed": str(error)}
        model.config.use_cache = used_cache  # which training switched off
        if self.reached(model, masks) != before:
            raise RuntimeError("the training changed how many weights are zero")
        return {"recovered": self.perplexity(model.eval()), "train_seconds": round(seconds, 1)}

    def report(self) -> dict[str, Any]:
        args = self.args
        names = ("samples", "seq_len", "steps", "batch_size", "learning_rate", "repetitions")
        return {
            "schema": 1,
            "command": "benchmarks/beyond_half.py",
            "model": {
                "name": (self.source.folder or Path(args.model)).name,
                "sha256": self.source.sha256,
                "parameters": self.model.num_parameters(),
                "in_linear_modules": sum(m.weight.numel() for m in linear_modules(self.model).values()),
            },
            "dense": {**self.dense.to_json(), "ms": round(self.dense_ms, 2)},
            "protocol": {
                "data": {"file": Path(args.data).name, "characters": args.characters, "sha256": self.data.sha256},
                "text": {"name": self.text.name, "sha256": self.text.sha256},
                "examples": len(self.examples.examples) if self.examples else 0,
                **{name: getattr(args, name) for name in names},
                "dtype": "float32",
                "threads": torch.get_num_threads(),
                "versions": {name: version(name) for name in PACKAGES},
            },
        }


@torch.no_grad()
def fastest(models: Mapping[str, Any], prompts: torch.Tensor, repetitions: int) -> dict[str, float]:
    """The least processor time of each model's forward pass [s], in turn, after a pass that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repetitions + 1):
        for name, model in models.items():
            begin = time.process_time()
            model(prompts, use_cache=False)
            seconds[name].append(time.process_time() - begin)
    return {name: min(times[1:]) for name, times in seconds.items()}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to measure on")
    parser.add_argument("--data", required=True, help="to calibrate and train on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", choices=(*CUTS, *MASKS), default=(*CUTS, *MASKS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=(0.5, 0.6, 0.7, 0.8, 0.9))
    parser.add_argument("--seeds", nargs="*", type=int, default=(1, 2, 3))
    parser.add_argument("--characters", type=int, default=10_000_000, help="of the data, from its beginning")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of all weights")
    parser.add_argument("--repetitions", type=int, default=15, help="of a timed pass")
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)  # processor time is that of all threads
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    case = Case(args)
    measured(args, case.report(), case.row)


if __name__ == "__main__":
    main()
