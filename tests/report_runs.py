"""Run folders to report on: one made by a real run, others with results written after its pattern."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from secateur.config import parse_recipe
from secateur.pipeline import run_recipe

SOURCES = ("wiki", "tales")


def real_run(folder: Path, checkpoint: Path, text: Path) -> Path:
    """A small model pruned, recovered and timed."""
    recipe = {
        "model": {"source": str(checkpoint)},
        "method": "llm-pruner",
        "prune": {"param_sparsity": 0.2, "criterion": "l2", "uniform": False, "ranking": "global",
                  "calibration": {"source": str(text), "samples": 2, "seq_len": 32}},
        "recovery": {"data": [str(text)], "steps": 2, "batch_size": 2, "micro_batch_size": 2, "seq_len": 32},
        "evaluation": {"texts": [str(text)], "seq_len": [32]},
        "benchmark": True,
    }  # fmt: skip
    run_recipe(parse_recipe(recipe), folder)
    return folder


def write(folder: Path, results: dict) -> Path:
    """A run folder with these results."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def changed(results: dict, **how) -> dict:
    """A copy with other top-level entries."""
    return copy.deepcopy(results) | how


def trained(results: dict) -> dict:
    """As if a method had pruned while it trained on a dynamic mix."""

    def row(step: int, share: float) -> dict:
        sources = {name: {"share": s, "loss": 2.0, "degradation": 0.1} for name, s in zip(SOURCES, (share, 1 - share))}  # noqa: B905
        return {"step": step, "steps": 5, "stage": "pruning" if step < 10 else "recovery", "sources": sources}

    training = results["recovery"] | {
        "sparsity": [{"step": 5, "share": 0.1, "sparsity": 0.1}, {"step": 10, "share": 0.2, "sparsity": 0.2}],
        "mix": {"kind": "dynamic", "rounds": [row(0, 0.5), row(5, 0.6), row(10, 0.7)], "end": row(15, 0.7)},
    }
    kept = {k: v for k, v in results.items() if k not in ("recovery", "benchmark")}
    return kept | {"training": training, "masked_minus_cut": 1e-6}


def tuned(results: dict) -> dict:
    """As if an adapter had been pruned while it trained."""
    ranks = [{"step": s, "mean": m, "least": m - 1, "most": m + 1} for s, m in ((0, 8), (4, 6), (8, 4))]
    names = [f"model.layers.{n}.mlp.{part}_proj" for n in range(3) for part in ("up", "down")]
    perplexity = {n: {k: v for k, v in p.items() if k not in ("pruned", "recovered")} | {"tuned": p["dense"] - 0.5}
                  for n, p in results["perplexity"].items()}  # fmt: skip
    return {
        **{name: results[name] for name in ("schema", "model", "protocol", "recipe")},
        "command": "tune", "method": "prunedlora", "params": {"initial": 800, "final": 400}, "perplexity": perplexity,
        "training": results["recovery"] | {"ranks": ranks}, "ranks": {name: 3 + n % 3 for n, name in enumerate(names)},
    }  # fmt: skip


def analysed(results: dict) -> dict:
    """As if every group had been cut alone."""
    facts = next(iter(results["perplexity"].values()))
    known = ("text", "text_sha256", "tokens", "seq_len", "stride", "bos", "dtype")
    dense = {name: facts[name] for name in known} | {"value": facts["dense"], "loss": 2.0}
    trials = [
        {"group": f"model.layers.{n}.mlp/ffn_channel", "kind": "ffn_channel", "layer": n, "ratio": ratio, "units": 96,
         "removed": int(96 * ratio), "loss": 2.0 + ratio * (3 - n) / 10}
        for n in range(3) for ratio in (0.25, 0.5)
    ]  # fmt: skip
    knowledge = {"schema": 1, "dense": dense, "protocol": {}, "from_cache": True, "cache_note": "", "sliced": [],
                 "left_out": {}, "deviations": {}, "trials": trials}  # fmt: skip
    header = {name: results[name] for name in ("schema", "model", "protocol")}
    return {**header, "command": "analyze", "knowledge": knowledge, "most_sensitive": [trials[0]["group"]]}
