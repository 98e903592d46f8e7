"""What the choices of the knowledge distribution analysis change: windows, ratios and the criterion that chooses units.

    python benchmarks/knowledge_choices.py MODEL --text FILE --calibration FILE \
        --output benchmarks/results/experiments/knowledge_choices_demo.json

The reference is the analysis on the most windows, with ratios 1/8, 2/8 ... 7/8. Each row changes one thing of the
default (64 windows, ratios 0.25, 0.5, 0.75, squared weights) and says how its order of the groups agrees with the
reference's (Spearman), and which groups are the most sensitive tenth.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

import secateur as sc
from secateur.importance import Taylor
from secateur.pipeline import PACKAGES, write_json

EIGHTHS = tuple(i / 8 for i in range(1, 8))
DEFAULT: dict[str, Any] = {"ratios": (0.25, 0.5, 0.75), "samples": 64, "criterion": "l2"}
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "16 windows": {"samples": 16},
    "32 windows": {"samples": 32},
    "128 windows": {"samples": 128},
    "ratio 0.25 alone": {"ratios": (0.25,)},
    "ratio 0.5 alone": {"ratios": (0.5,)},
    "ratio 0.75 alone": {"ratios": (0.75,)},
    "taylor-1 chooses units": {"criterion": "taylor-1"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True, help="for the scores of taylor-1: 32 sequences")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--most", type=int, default=256, help="windows of the reference")
    args = parser.parse_args()
    source = sc.load(args.model)
    model, tokenizer = source.model.float(), source.tokenizer
    text, groups = sc.load_corpus(args.text), sc.discover(model)
    tokens = sc.calibration_tokens(sc.load_corpus(args.calibration), tokenizer, 32, 128, 1)
    taylor = sc.score(model, groups.only(groups.kinds_in_blocks()), [tokens], Taylor(order=1))

    def analysed(given: dict[str, Any]) -> Any:
        given = dict(given)
        scores = taylor if given.pop("criterion") == "taylor-1" else None
        return sc.knowledge_distribution(model, tokenizer, text, groups=groups, scores=scores, **given)

    reference = analysed(DEFAULT | {"samples": args.most, "ratios": EIGHTHS})
    names = list(reference.deviations())
    rows = []
    for name, change in CHANGES.items():
        found = analysed(DEFAULT | change)
        mine = found.deviations()
        agreement = spearmanr([mine[n] for n in names], [reference.deviations()[n] for n in names]).statistic
        rows.append({"name": name, "spearman": float(agreement), "most_sensitive": list(found.most_sensitive(0.1))})
        print(rows[-1], flush=True)
    report = {
        "schema": 1,
        "command": "benchmarks/knowledge_choices.py",
        "model": {"name": Path(args.model).name, "sha256": source.sha256, "parameters": model.num_parameters()},
        "protocol": {
            "text_sha256": text.sha256, "seq_len": 128, "windows": args.most, "ratios": EIGHTHS, "dtype": "float32",
            "threads": torch.get_num_threads(), "versions": {name: version(name) for name in PACKAGES},
        },
        "reference": {
            "deviations": reference.deviations(), "most_sensitive": list(reference.most_sensitive(0.1)),
        },
        "rows": rows,
    }  # fmt: skip
    write_json(args.output, report)


if __name__ == "__main__":
    main()
