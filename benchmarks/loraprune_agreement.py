"""How well the LoRA-guided importance ranks units as the exact gradient does.

    python benchmarks/loraprune_agreement.py MODEL --data tinystories_train.jsonl.xz --output ...

LoRA adapters are trained on the dense model; at some steps both criteria score every unit from the same batch, weights
and factors: `lora` from the factors' gradients, `grad` from the true gradient of W_0. Both running averages (0.9) are
compared by Spearman's rank correlation over the units of each group, given as the mean over groups of a kind, the
least, and the same for `magnitude`, which knows no gradient.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import TrainerCallback

import secateur as sc
from secateur.importance.lora_guided import LoraGuided, TrueGradients
from secateur.pipeline import PACKAGES, write_json
from secateur.recovery import RecoverySettings, train, with_adapters
from secateur.surgery.live import LiveModel

VARIANTS = ("lora", "grad", "magnitude")
KINDS = ("ffn_channel", "kv_group", "attention_head")
EMA = 0.9


class Compare(TrainerCallback):  # type: ignore[misc]
    """Running averages of all variants, compared at some steps."""

    def __init__(self, at: set[int]) -> None:
        self.at = at
        self.gradients = TrueGradients()
        self.averages: dict[str, dict[str, torch.Tensor]] = {variant: {} for variant in VARIANTS}
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.live = LiveModel(model)
        self.groups = self.live.groups.of_kinds(KINDS)
        self.gradients.begin(self.live.base, self.groups)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        gradients = self.gradients.taken(1.0)
        names = [g.name for g in self.groups]
        for variant, average in self.averages.items():
            given = gradients if variant == "grad" else {}
            now = LoraGuided(variant).scores(self.live.base, self.live.groups, {}, names, given)
            for name, score in now.items():
                average[name] = EMA * average[name] + (1 - EMA) * score if name in average else (1 - EMA) * score
        if state.global_step + 1 in self.at:
            self.rows += [row | {"step": state.global_step + 1} for row in self._rows()]

    def _rows(self) -> list[dict[str, Any]]:
        exact = self.averages["grad"]
        return [
            {"kind": kind, "criterion": variant, "groups": len(found), "mean": round(sum(found) / len(found), 4),
             "least": round(min(found), 4)}
            for kind in dict.fromkeys(g.kind for g in self.groups)
            for variant in ("lora", "magnitude")
            if (found := self._correlations(kind, self.averages[variant], exact))
        ]  # fmt: skip

    def _correlations(
        self, kind: str, found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]
    ) -> list[float]:
        of_kind = [g.name for g in self.groups if g.kind == kind]
        return [float(spearmanr(found[name], exact[name]).statistic) for name in of_kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--at", nargs="*", type=int, default=(10, 50, 200), help="steps to compare at")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    source = sc.load(args.model)
    if source.tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer")
    model, data = source.model.float(), sc.load_corpus(args.data)
    settings = RecoverySettings(
        rank=args.rank, alpha=2 * args.rank, dropout=0.0, learning_rate=args.learning_rate, steps=max(args.at),
        batch_size=args.batch_size, micro_batch_size=args.batch_size, seq_len=args.seq_len, warmup_steps=10,
        save_every=10**9, seed=args.seed,
    )  # fmt: skip
    compare = Compare(set(args.at))
    parameters = model.num_parameters()
    with tempfile.TemporaryDirectory() as folder:
        adapted = with_adapters(model, settings, experts=False)
        train(adapted, source.tokenizer, [data], settings, Path(folder), callbacks=[compare])
    for row in compare.rows:
        print(row)
    chosen = {k: v for k, v in vars(args).items() if k not in ("output", "model", "data")}
    protocol = {
        "data": Path(args.data).name, "data_sha256": data.sha256, **chosen, "alpha": 2 * args.rank, "ema": EMA,
        "normalise": True, "dtype": "float32", "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }  # fmt: skip
    about = {"name": Path(args.model).name, "sha256": source.sha256, "parameters": parameters}
    write_json(args.output, {"schema": 1, "command": "benchmarks/loraprune_agreement.py", "model": about,
                             "rows": compare.rows, "protocol": protocol})  # fmt: skip


if __name__ == "__main__":
    main()
