"""Every criterion at 20 % and 50 % on a small model: dense, pruned and recovered perplexity in one run.

    python benchmarks/criteria.py MODEL --text tinystories_valid.jsonl.xz --data tinystories_train.jsonl.xz \
        --output benchmarks/results/criteria_stories260K.json

Each cut is also checked: masked against sliced logits, and the saved folder, loaded by transformers alone, must give
the same perplexity. `python benchmarks/results_page.py` renders all result files into docs/results.md.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import secateur as sc
from secateur.discovery.reference import plain_logits
from secateur.discovery.trace import probe_ids
from secateur.importance import CRITERIA
from secateur.methods.llm_pruner import LLMPruner, run
from secateur.pipeline import PACKAGES, write_json
from secateur.plan import PruningPlan

SPARSITIES = (0.2, 0.5)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows for one model."""
    from importlib.metadata import version

    source = sc.load(args.model)
    model, tokenizer = source.model.float(), source.tokenizer
    text, data = sc.load_corpus(args.text), sc.load_corpus(args.data)
    tokens = sc.calibration_tokens(data, tokenizer, args.samples, args.calibration_length, args.seed)

    def ppl(m: Any) -> float:
        return sc.perplexity(m, tokenizer, text, seq_len=args.seq_len).value

    dense = sc.perplexity(model, tokenizer, text, seq_len=args.seq_len)
    rows = []
    for sparsity in SPARSITIES:
        for name in args.criteria or CRITERIA:
            settings = LLMPruner(
                budget=sc.Budget(param_sparsity=sparsity), criterion=CRITERIA[name], ranking=args.ranking
            )
            begin = time.perf_counter()
            result = run(model, [tokens], settings)
            seconds = time.perf_counter() - begin
            row = {
                "criterion": name,
                "sparsity": sparsity,
                "parameters": result.model.num_parameters(),
                "reached": round(1 - result.model.num_parameters() / model.num_parameters(), 5),
                "pruned": ppl(result.model),
                "masked_vs_sliced": masked_against_sliced(model, result.model, result.plan),
                "prune_s": round(seconds, 2),
            }
            with tempfile.TemporaryDirectory() as folder:
                sc.save(result.model, Path(folder) / "m", tokenizer=tokenizer, plan=result.plan)
                row["reloaded"] = ppl(AutoModelForCausalLM.from_pretrained(Path(folder) / "m"))
                recovered = sc.recover(
                    result.model,
                    tokenizer,
                    [data],
                    sc.RecoverySettings(steps=args.steps, batch_size=16, micro_batch_size=16, seq_len=args.seq_len,
                                        learning_rate=args.learning_rate, warmup_steps=10, seed=args.seed),
                    Path(folder) / "recovery",
                )  # fmt: skip
            row["recovered"] = ppl(recovered.model)
            rows.append(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return {
        "schema": 1,
        "command": "benchmarks/criteria.py",
        "model": {"name": Path(args.model).name, "sha256": source.sha256, "parameters": model.num_parameters()},
        "dense": dense.to_json(),
        "rows": rows,
        "protocol": {
            "ranking": args.ranking,
            "calibration": {"file": Path(args.data).name, "sha256": data.sha256, "samples": args.samples,
                            "seq_len": args.calibration_length},
            "recovery": {"file": Path(args.data).name, "steps": args.steps, "batch_size": 16, "seq_len": args.seq_len,
                         "learning_rate": args.learning_rate},
            "seed": args.seed,
            "dtype": "float32",
            "versions": {name: version(name) for name in PACKAGES},
        },
    }  # fmt: skip


def masked_against_sliced(model: Any, small: Any, plan: PruningPlan) -> dict[str, float]:
    """Largest difference of logits on a probe: in float32 relative to the largest logit, in float64 absolute."""
    ids = probe_ids(model)
    found = {}
    for dtype in (torch.float32, torch.float64):
        dense, sliced = copy.deepcopy(model).to(dtype), copy.deepcopy(small).to(dtype)
        with sc.mask(dense, plan):
            masked = plain_logits(dense, ids)
        difference = float((plain_logits(sliced, ids) - masked).abs().max())
        found[str(dtype)] = difference / float(masked.abs().max()) if dtype == torch.float32 else difference
    return {"float32_relative": found["torch.float32"], "float64": found["torch.float64"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", help="evaluation text")
    parser.add_argument("--data", help="calibration and recovery text")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--criteria", nargs="*")
    parser.add_argument("--ranking", default="local")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    write_json(args.output, measure(args))


if __name__ == "__main__":
    main()
