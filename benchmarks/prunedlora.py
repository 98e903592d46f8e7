"""PrunedLoRA beside LoRA, rsLoRA, DoRA, AdaLoRA, and rivals that prune the same adapter, on two tasks.

    python benchmarks/prunedlora.py MODEL --task sst2 --data FOLDER \
        --output benchmarks/results/prunedlora_demo_sst2.json

FOLDER has `alpaca/alpaca_14k.jsonl.gz` and `glue/sst2_{train,dev}.jsonl.gz`. Every row fine-tunes the same model on the
same examples in the same order for the same number of steps, and is measured on examples that are held out. `lora`,
`rslora`, `dora` and `adalora` train at the target rank (AdaLoRA starts at one and a half times of it, as in its paper),
`lora-initial` at the initial rank; `after-*` prunes what `lora-initial` trains, without training again; all others
prune while they train.

The learning rate of each method at each rank is the best of a few, by what is measured (loss or accuracy) on the
validation part with seed 0: three neighbours on a grid, and further ones as long as the best is the last that was
tried; smaller ones as long as every loss broke. Where there is no single minimum the whole grid is tried: of all
methods on SST-2, and of the paper's forms, which have smaller rates of their own, too. With `--refine` the geometric
means of the best rate and its neighbours are tried as well. Rivals that prune while they train have the rate of `ours`,
whose training theirs is but for the criterion. Times are seconds of the processor, so that other work on the machine
counts little; bytes are those of trainable parameters and the optimizer's state. Rows that the output holds already,
from the same protocol and at the rate that is chosen, are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from prunedlora_rows import AFTER, FORMS, GLOBAL, TRAINED, pruned_after, trained
from prunedlora_tasks import TASKS, Task

import secateur as sc
from secateur.errors import NonFiniteError
from secateur.pipeline import PACKAGES, write_json

Data = dict[str, Any]
METHODS = (
    *TRAINED, "paper-form", "paper-form-masks", "magnitude", "taylor", "activation", "ours", "ours-global",
    "after-magnitude", "after-taylor", "after-activation", "after-ours",
)  # fmt: skip
LIKE_OURS = dict.fromkeys(("magnitude", "taylor", "activation"), "ours")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
PAPER_RATES = (1e-5, 1e-4)


class Comparison:
    """The rows of one model on one task, and the file they are in.

    Attributes:
        report: what is written: model, protocol, `tuning` and `rows`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.source = sc.load(args.model)
        self.source.model.float()
        self.task: Task = TASKS[args.task](args.data, self.source.tokenizer, args.seq_len)
        self.report = self._head()
        known = json.loads(args.output.read_text()) if args.output.exists() else {}
        if known.get("protocol") == self.report["protocol"]:
            self.report |= {"tuning": known["tuning"], "rows": known["rows"]}

    def run(self) -> None:
        """Choose learning rates, measure what is missing, and write after each training."""
        trainings = list(self._wanted())
        alike = LIKE_OURS if self.args.seeds else {}
        rates = [self._rate(alike.get(method, method), target) for target, method in trainings]
        self._forget_other_rates(dict(zip(trainings, rates, strict=True)))
        for seed in self.args.seeds:
            for (target, method), rate in zip(trainings, rates, strict=True):
                if all(self._done(m, rank, seed) for rank, m in [(target, method), *self._after(method)]):
                    continue
                made = self._rows(method, target, seed, rate)
                self.report["rows"] += [r for r in made if not self._done(r["method"], r["target_rank"], seed)]
                print(self.report["rows"][-1], flush=True)
                write_json(self.args.output, self.report)

    def _wanted(self) -> Iterator[tuple[int, str]]:
        """Trainings: what prunes afterwards comes with `lora-initial`, which is one for all target ranks."""
        args = self.args
        for target in args.target_ranks:
            for method in args.methods:
                if method == "lora-initial":
                    if target == args.target_ranks[0]:
                        yield args.initial_rank, method
                elif not method.startswith(AFTER):
                    yield target, method

    def _done(self, method: str, target: int, seed: int) -> bool:
        return any((r["method"], r["target_rank"], r["seed"]) == (method, target, seed) for r in self.report["rows"])

    def _forget_other_rates(self, chosen: Mapping[tuple[int, str], float]) -> None:
        """Rows of a rate that was best when fewer had been tried are measured again."""
        rates = dict(chosen)
        for (_, method), rate in chosen.items():
            rates |= dict.fromkeys(self._after(method), rate)
        self.report["rows"] = [
            r for r in self.report["rows"]
            if rates.get((r["target_rank"], r["method"]), r["learning_rate"]) == r["learning_rate"]
        ]  # fmt: skip

    def _rows(self, method: str, target: int, seed: int, rate: float) -> list[Data]:
        model, row = self._trained(method, target, seed, rate)
        row |= {} if model is None else self.task.result(model, "held_out")
        rows = [row]
        for rank, after in self._after(method) if model is not None else []:
            pruned, facts = pruned_after(model, self.source.tokenizer, row, self.task, after, rank, self.args)
            rows.append(facts | self.task.result(pruned, "held_out"))
        return rows

    def _after(self, method: str) -> list[tuple[int, str]]:
        """What is pruned after this training."""
        after = [m for m in self.args.methods if m.startswith(AFTER)] if method == "lora-initial" else []
        return [(rank, m) for m in after for rank in self.args.target_ranks]

    def _trained(self, method: str, target: int, seed: int, rate: float) -> tuple[Any, Data]:
        """A trained model and the start of its row; no model, and the error, where its loss broke."""
        key = {"method": method, "target_rank": target, "seed": seed, "learning_rate": rate}
        try:
            model, facts = trained(self.source.model, self.source.tokenizer, self.task, key, self.args)
        except NonFiniteError as error:
            return None, key | {"error": str(error)}
        return model, key | facts

    def _rate(self, method: str, target: int) -> float:
        """The best learning rate of a method by its error on the validation part."""
        paper = method.startswith("paper")
        rates = sorted({*self.args.learning_rates, *(self.args.paper_rates if paper else ())})
        if len(rates) == 1:
            return float(rates[0])
        whole = paper or self.task.tokens is not None
        found = {r: error for r, error in self._known(method, target).items() if r in rates}
        while missing := (set(rates) if whole else _around(rates, found)) - found.keys():
            found |= self._validated(method, target, missing)
        if self.args.refine:
            at = rates.index(_best(found))
            between = {_between(*rates[i : i + 2]) for i in (at - 1, at) if 0 <= i < len(rates) - 1}
            found |= self._validated(method, target, between)
        return _best(found)

    def _known(self, method: str, target: int) -> dict[float, float]:
        """Rates that were tried, and the error of each."""
        mine = [r for r in self.report["tuning"] if (r["method"], r["target_rank"]) == (method, target)]
        return {r["learning_rate"]: _error(r) for r in mine}

    def _validated(self, method: str, target: int, rates: set[float]) -> dict[float, float]:
        """The error of each rate; those that are not known are tried."""
        for rate in sorted(rates - self._known(method, target).keys()):
            model, row = self._trained(method, target, 0, rate)
            row |= {} if model is None else self.task.result(model, "validation")
            self.report["tuning"].append(row)
            print("validation", row, flush=True)
            write_json(self.args.output, self.report)
        return {rate: error for rate, error in self._known(method, target).items() if rate in rates}

    def _head(self) -> Data:
        args, base = self.args, self.task.model(self.source.model)
        names = (
            "steps", "batch_size", "seq_len", "initial_rank", "every", "events", "calibration",
            "learning_rates",
        )  # fmt: skip
        return {
            "schema": 1,
            "command": "benchmarks/prunedlora.py",
            "model": {
                "name": Path(args.model).name,
                "sha256": self.source.sha256,
                "parameters": self.source.model.num_parameters(),
            },
            "protocol": {
                "task": {"name": self.task.name, **self.task.facts},
                "settings": {name: getattr(args, name) for name in names},
                "dtype": "float32",
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "threads": args.threads,
                "versions": {name: version(name) for name in PACKAGES},
            },
            "base": {part: self.task.result(base, part) for part in ("validation", "held_out")},
            "tuning": [],
            "rows": [],
        }


def _best(found: Mapping[float, float]) -> float:
    """The rate of least error, the smaller one of several."""
    return min(found, key=lambda rate: (found[rate], rate))


def _around(rates: Sequence[float], found: Mapping[float, float]) -> set[float]:
    """The best rate that was found, or the middle of the grid, and its neighbours."""
    middle = rates.index(_best(found)) if found else len(rates) // 2
    return set(rates[max(0, middle - 1) : middle + 2])


def _between(low: float, high: float) -> float:
    """The geometric mean, to two digits."""
    return float(f"{math.sqrt(low * high):.1e}")


def _error(row: Data) -> float:
    """Of a training on the validation part: the share that is told wrongly, or the loss; infinite if it broke."""
    loss: float = row.get("loss", math.inf)
    error: float = 1 - row["accuracy"] if "accuracy" in row else loss
    return error if math.isfinite(loss) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=(*TRAINED, *all_names()), metavar="METHOD")
    parser.add_argument("--target-ranks", nargs="*", type=int, default=(1, 4, 16))
    parser.add_argument("--seeds", nargs="*", type=int, default=(1, 2, 3), help="none: only choose learning rates")
    parser.add_argument(
        "--learning-rates", nargs="*", type=float, default=RATES, help="a grid, its middle tried first; or one"
    )
    parser.add_argument("--paper-rates", nargs="*", type=float, default=PAPER_RATES, help="more, for the paper's forms")
    parser.add_argument("--refine", action="store_true", help="try the means of the best rate and its neighbours, too")
    parser.add_argument("--initial-rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--events", type=int, default=1, help="removals of what prunes after training")
    parser.add_argument("--calibration", type=int, default=8, help="batches for what prunes after training")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.learning_rates = sorted(args.learning_rates)
    Comparison(args).run()


def all_names() -> list[str]:
    """Every pruning method there is: a form, maybe after training, maybe with one budget."""
    return [f"{after}{name}{budget}" for name in FORMS for after in ("", AFTER) for budget in ("", GLOBAL)]


if __name__ == "__main__":
    main()
