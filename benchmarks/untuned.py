"""How good a cut model is without any training: criteria, with and without compensation, over sparsities and seeds.

    python benchmarks/untuned.py MODEL --text tinystories_valid.jsonl.xz --data tinystories_train.jsonl.xz \
        --output benchmarks/results/untuned_stories260K.json

A method is a criterion, alone or with what makes up for the cut: `gate`, `gate+ridge` (what a matrix put out before,
with inputs as they are by then), `gate+ridge-dense` (what the dense model puts out), `gate+ridge-halfway` (their mean),
`gate+bias` (FLAP's biases alone, which the class has fields for; they count as parameters).
Settings of the cut, or shares of kinds, may follow after a colon: `gate+ridge:uniform=false,ranking=global`,
`gate+ridge:kv_group=0.75`, `taylor-1:kinds=[ffn_channel;kv_group;hidden]`. `auto` is our method as it comes, or with
settings: `auto:uniform=true,iterations=3`, `auto:compensation=dense`, `auto:compensation=null`. Seeds draw the
calibration text. Block-wise; uniform widths and local ranking if not said otherwise. Rows that the output holds
already, from the same protocol, are not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from resumed import measured

import secateur as sc
from secateur.compensation import Compensation
from secateur.cutting import cut
from secateur.importance import CRITERIA
from secateur.methods import auto
from secateur.methods.llm_pruner import LLMPruner, run
from secateur.pipeline import PACKAGES
from secateur.plan import PruningPlan
from secateur.surgery.biases import readers_of, share_with_biases, with_biases

FORMS = {
    "": None,
    "ridge": Compensation("ridge"),
    "ridge-halfway": Compensation("ridge", "halfway"),
    "ridge-dense": Compensation("ridge", "dense"),
}
METHODS = tuple(
    criterion + (f"+{form}" if form else "") for criterion in ("taylor-1", "taylor-2", "gate") for form in FORMS
)
BIAS = "bias"
SETTINGS = {field.name for field in fields(LLMPruner)}


class Case:
    """One model and its texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.source = args, sc.load(args.model)
        self.source.model.float()
        self.text, self.data = sc.load_corpus(args.text), sc.load_corpus(args.data)
        self.dense = self.perplexity(self.source.model)
        self.plans: dict[tuple[bool, str, str, float, int], PruningPlan] = {}

    @cached_property
    def biased(self) -> Any:
        """The model with biases of zero."""
        groups = sc.discover(self.source.model)
        return with_biases(self.source.model, readers_of(groups.of_kinds(groups.kinds_in_blocks())))[0]

    def perplexity(self, model: Any) -> Any:
        return sc.perplexity(model, self.source.tokenizer, self.text, seq_len=self.args.seq_len, batch_size=16)

    def tokens(self, seed: int) -> torch.Tensor:
        args = self.args
        return sc.calibration_tokens(self.data, self.source.tokenizer, args.samples, args.calibration_length, seed)

    def plan(self, model: Any, criterion: str, given: str, sparsity: float, seed: int) -> PruningPlan:
        """Made once for all forms of compensation of a model."""
        key = model is self.source.model, criterion, given, sparsity, seed
        if key not in self.plans:
            options = options_of(given)
            shares = {kind: value for kind, value in options.items() if kind not in SETTINGS}
            options = {name: value for name, value in options.items() if name in SETTINGS}
            settings = LLMPruner(sc.Budget(sparsity), CRITERIA[criterion], kind_ratios=shares, **options)
            self.plans[key] = run(model, [self.tokens(seed)], settings).plan
        return self.plans[key]

    def row(self, method: str, sparsity: float, seed: int) -> dict[str, Any]:
        name, _, given = method.partition(":")
        if name == "auto":
            return self.row_of_auto(method, given, sparsity, seed)
        criterion, _, form = name.partition("+")
        model, share = self.source.model, sparsity
        if form == BIAS:
            model, share = self.biased, share_with_biases(sparsity, model, self.biased)
        plan = self.plan(model, criterion, given, share, seed)
        begin = time.perf_counter()
        how = Compensation("bias") if form == BIAS else FORMS[form]
        small, done = cut(model, plan, [self.tokens(seed)], how)
        return {
            "method": method,
            "sparsity": sparsity,
            "seed": seed,
            "reached": round(1 - small.num_parameters() / self.source.model.num_parameters(), 5),
            "perplexity": self.perplexity(small).value,
            **({"off": {k: sum(getattr(c, k) for c in done) / len(done) for k in ("before", "after")}} if done else {}),
            "cut_seconds": round(time.perf_counter() - begin, 2),
        }

    def row_of_auto(self, method: str, given: str, sparsity: float, seed: int) -> dict[str, Any]:
        begin = time.perf_counter()
        found = auto.run(self.source.model, [self.tokens(seed)], settings_of_auto(sparsity, options_of(given)))
        seconds, done = time.perf_counter() - begin, found.compensated
        return {
            "method": method,
            "sparsity": sparsity,
            "seed": seed,
            "reached": round(1 - found.model.num_parameters() / self.source.model.num_parameters(), 5),
            "perplexity": self.perplexity(found.model).value,
            **({"choice": dict(found.choice)} if found.choice else {}),
            **({"off": {k: sum(getattr(c, k) for c in done) / len(done) for k in ("before", "after")}} if done else {}),
            "seconds": round(seconds, 2),
        }

    def report(self) -> dict[str, Any]:
        args, model = self.args, self.source
        return {
            "schema": 1,
            "command": "benchmarks/untuned.py",
            "model": {
                "name": Path(args.model).name,
                "sha256": model.sha256,
                "parameters": model.model.num_parameters(),
            },
            "dense": self.dense.to_json(),
            "protocol": {
                "calibration": {"file": self.data.name, "sha256": self.data.sha256, "samples": args.samples,
                                "seq_len": args.calibration_length},
                "dtype": "float32",
                "threads": torch.get_num_threads(),
                "versions": {name: version(name) for name in PACKAGES},
            },
        }  # fmt: skip


def options_of(given: str) -> dict[str, Any]:
    """Settings that follow a method's name; of a list, `[a;b]`, the items."""
    pairs = (option.split("=") for option in given.split(",") if option)
    made = {name: yaml.safe_load(value.replace(";", ",")) for name, value in pairs}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in made.items()}


def settings_of_auto(sparsity: float, options: Mapping[str, Any]) -> auto.Auto:
    """Settings of our method from those that a row's name has: a criterion is given by name, a compensation by what
    it aims at."""
    made = dict(options)
    if "criterion" in made:
        name = made.pop("criterion")
        made["criteria"] = {one: CRITERIA[one] for one in (auto.TRIED if name == "measured" else (name,))}
    if made.get("compensation"):
        made["compensation"] = Compensation("ridge", made["compensation"])
    return auto.Auto(sc.Budget(sparsity), **made)


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """What a benchmark of cut models that are not trained is told; `defaults` of methods, sparsities and seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--sparsities", nargs="*", type=float)
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--calibration-length", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.set_defaults(**defaults)
    return parser


def main() -> None:
    args = arguments(__doc__, methods=METHODS, sparsities=(0.2, 0.5), seeds=(1, 2, 3)).parse_args()
    case = Case(args)
    measured(args, case.report(), case.row)


if __name__ == "__main__":
    main()
