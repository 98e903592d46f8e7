"""The criterion audit of a model, as `secateur audit` makes it, without the single removals.

    python benchmarks/audit.py MODEL --text tinystories_valid.jsonl.xz --calibration tinystories_train.jsonl.xz \
        --output benchmarks/results/audit_stories260K.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from secateur import pipeline
from secateur.config import parse_recipe
from secateur.pipeline import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="text that the loss is measured on")
    parser.add_argument("--calibration", required=True, help="text that criteria read")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--sets", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    calibration = {"source": args.calibration, "samples": args.samples, "seq_len": args.seq_len}
    recipe = parse_recipe(
        {
            "model": {"source": args.model, "dtype": "float32"},
            "prune": {"calibration": calibration},
            "evaluation": {"texts": [args.text], "seq_len": [args.seq_len]},
            "seed": args.seed,
        }
    )
    found = pipeline.audit(recipe, units=args.units, sets=args.sets, samples=64)
    kept = ("schema", "model", "dense", "agreements", "verdicts", "timing", "protocol")
    report = {name: found[name] for name in kept} | {"command": "benchmarks/audit.py"}
    report["model"]["name"] = Path(args.model).name
    report["model"]["source"] = Path(args.model).name
    for part, name in ((report["protocol"]["text"], args.text), (report["protocol"]["calibration"], args.calibration)):
        part["source"] = Path(name).name
    report["protocol"]["threads"] = torch.get_num_threads()
    write_json(args.output, report)


if __name__ == "__main__":
    main()
