"""Our method under budgets of parameters, multiply-accumulates, bytes and seconds: what was asked for, what is there.

    python benchmarks/budgets.py MODEL --text tinystories_valid.jsonl.xz --data tinystories_train.jsonl.xz \
        --output benchmarks/results/budgets_stories260K.json

A method is what the budget counts: `params`, or `macs`, `memory`, `latency` of a forward pass over `--batch` sequences
of `--length` tokens. All of them are measured of every cut, beside the dense model: seconds are the least of seven
passes in turn.
"""

from __future__ import annotations

import time
from typing import Any, get_args

import untuned
from resumed import measured

import secateur as sc
from secateur.benchmark.costs import What, Workload
from secateur.methods.auto import Auto, run

COUNTED = get_args(What)
METHODS = ("params", *COUNTED)


class Case(untuned.Case):
    """One model and its texts, cut to budgets."""

    def workload(self, what: Any) -> Workload:
        return Workload(what, self.args.batch, self.args.length)

    def row(self, method: str, sparsity: float, seed: int) -> dict[str, Any]:
        """One budget: the cut, and the share of everything that it takes away."""
        dense, begin = self.source.model, time.perf_counter()
        if method == "params":
            settings = Auto(sc.Budget(sparsity))
        else:
            settings = Auto(sc.Budget(cost_sparsity=sparsity), workload=self.workload(method))
        found = run(dense, [self.tokens(seed)], settings)
        seconds = time.perf_counter() - begin
        said = found.plan.provenance["allocation"].get("cost")
        return {
            "method": method,
            "sparsity": sparsity,
            "seed": seed,
            **({"expected": round(said["sparsity"], 5)} if said else {}),
            "removed": {"params": round(1 - found.model.num_parameters() / dense.num_parameters(), 5)}
            | {what: self.removed(found.model, what) for what in COUNTED},
            "perplexity": self.perplexity(found.model).value,
            "seconds": round(seconds, 1),
        }

    def removed(self, small: Any, what: str) -> float:
        """The share of the dense model's cost that a smaller one is without."""
        dense, smaller = self.workload(what).of(self.source.model, small)
        return round(1 - smaller / dense, 5)

    def report(self) -> dict[str, Any]:
        made = super().report() | {"command": "benchmarks/budgets.py"}
        made["protocol"] |= {"workload": {"batch": self.args.batch, "length": self.args.length}}
        return made


def main() -> None:
    parser = untuned.arguments(__doc__, methods=METHODS, sparsities=(0.3, 0.5), seeds=(1,))
    parser.add_argument("--batch", type=int, default=8, help="sequences of the pass that is counted")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    args = parser.parse_args()
    case = Case(args)
    case.workload("macs").of(case.source.model)  # a length that the model does not take is refused at once
    measured(args, case.report(), case.row)


if __name__ == "__main__":
    main()
