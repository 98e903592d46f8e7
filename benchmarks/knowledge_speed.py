"""How much faster a knowledge distribution analysis is from cached activations than by whole passes.

    python benchmarks/knowledge_speed.py --output benchmarks/results/knowledge_speed.json

The same analysis of a Llama with random weights, bytes of a bundled text as tokens, in turn with the cache and without:
CPU time of the whole analysis on one thread (passes that verify the cache included; groups and scores are made before)
and the largest difference of the losses. Ratios are within a round. Halving is the most that can be hoped for: a pass
from a layer onward costs half of a whole one on average.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.data import load_corpus
from secateur.discovery import discover
from secateur.evaluation import Knowledge, knowledge_distribution
from secateur.importance import Magnitude, score
from secateur.pipeline import PACKAGES, write_json

TEXT = "demo-eval"
SHAPE = {"vocab_size": 256, "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6,
         "num_key_value_heads": 3}  # fmt: skip


def bytes_of(text: str, **_: Any) -> dict[str, list[int]]:
    """A tokenizer to which every byte is a token, so that the head is small beside the layers as in large models."""
    return {"input_ids": list(text.encode())}


def compared(layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both ways on one model, round after round."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval()
    groups, corpus = discover(model), load_corpus(TEXT)
    chosen = groups.of_kinds(groups.kinds_in_blocks())
    scores = score(model, chosen, [], Magnitude())
    rounds: list[dict[str, Any]] = []
    knowledge_distribution(model, bytes_of, corpus, groups=groups, scores=scores, samples=1)  # warms up
    for _ in range(args.rounds):
        found: dict[bool, Knowledge] = {}
        seconds = {}
        for cached in (True, False):
            begin = time.process_time()
            found[cached] = knowledge_distribution(
                model, bytes_of, corpus, groups=groups, scores=scores, seq_len=args.seq_len, samples=args.samples,
                batch_size=args.batch_size, cached=cached,
            )  # fmt: skip
            seconds[cached] = time.process_time() - begin
        assert found[True].from_cache, found[True].cache_note
        losses = [[trial.loss for trial in found[cached].trials] for cached in (True, False)]
        difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
        row = {"cached_s": seconds[True], "whole_s": seconds[False], "ratio": seconds[False] / seconds[True]}
        rounds.append({k: round(v, 3) for k, v in row.items()} | {"largest_difference": difference})
    return {
        "layers": layers,
        "parameters": model.num_parameters(),
        "groups": len(chosen),
        "trials": len(losses[0]),
        "tokens": found[True].dense.tokens,
        "ratio": statistics.median(r["ratio"] for r in rounds),
        "largest_difference": max(r["largest_difference"] for r in rounds),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for layers in args.layers:
        rows.append(compared(layers, args))
        print(rows[-1], flush=True)
    protocol = {
        "shape": SHAPE,
        "text": TEXT,
        "text_sha256": load_corpus(TEXT).sha256,
        "seq_len": args.seq_len,
        "windows": args.samples,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    results = {"schema": 1, "command": "benchmarks/knowledge_speed.py", "rows": rows, "protocol": protocol}
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
