"""How well each criterion predicts what removal really costs: rank correlation with leave-one-out on a small model.

    python benchmarks/leave_one_out.py MODEL --data tinystories_train.jsonl.xz \
        --output benchmarks/results/leave_one_out_stories260K.json

Every FFN channel and every KV group is removed alone and the change of the loss measured on the very tokens the
criteria see. Spearman's rank correlation is between scores and the absolute change, which is what a first-order score
estimates, and beside it with the signed change, which is what pruning is after.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

import secateur as sc
from secateur.importance import CRITERIA
from secateur.pipeline import PACKAGES, write_json

KINDS = ("ffn_channel", "kv_group")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Correlations of every criterion, by kind."""
    source = sc.load(args.model)
    model, data = source.model.float(), sc.load_corpus(args.data)
    tokens = sc.calibration_tokens(data, source.tokenizer, args.samples, args.seq_len, args.seed)
    groups = sc.discover(model)
    rows = []
    for kind in KINDS:
        chosen = groups.of_kinds([kind])
        changes = sc.leave_one_out(model, chosen, [tokens])
        truth = torch.cat([changes[g.name] for g in chosen])
        for name, criterion in CRITERIA.items():
            scores = sc.score(model, chosen, [tokens], criterion)
            flat = torch.cat([scores[g.name] for g in chosen])
            row = {
                "kind": kind,
                "units": len(truth),
                "criterion": name,
                "spearman_absolute": round(float(spearmanr(flat, truth.abs()).statistic), 4),
                "spearman_signed": round(float(spearmanr(flat, truth).statistic), 4),
            }
            rows.append(row)
            print(row, flush=True)
    return {
        "schema": 1,
        "command": "benchmarks/leave_one_out.py",
        "model": {"name": Path(args.model).name, "sha256": source.sha256, "parameters": model.num_parameters()},
        "rows": rows,
        "protocol": {
            "calibration": {
                "file": Path(args.data).name,
                "sha256": data.sha256,
                "samples": args.samples,
                "seq_len": args.seq_len,
            },
            "seed": args.seed,
            "dtype": "float32",
            "versions": {name: version(name) for name in PACKAGES},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="text the loss and the scores are computed on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    write_json(args.output, measure(args))


if __name__ == "__main__":
    main()
