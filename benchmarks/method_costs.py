"""What each method costs: time and peak memory of the cut, and of the cut with training at equal tokens.

    python benchmarks/method_costs.py demo --data ../shared/data/corpus/books/train-01-of-06.jsonl.xz \
        --output benchmarks/results/method_costs_demo.json

    llm-pruner      first-order Taylor cut on `--samples` sequences, then recovery
    auto            our method's cut on its 128 sequences, then recovery, norms and embeddings trained whole beside the
                    adapters; settings may follow after a colon
    auto+distill    the same, recovery from the dense model, too
    loraprune       prunes while it trains, for as many steps
    lorashear       half-space steps while it trains, for as many steps

Each runs in a process of its own, on one thread, so that its peak is its own. `peak` is resident memory beyond what
there was with the model loaded. `seconds` are those of the processor, so that other work on the machine counts little,
`wall_seconds` those of the clock, which it slows down.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from loraprune_memory import Meter
from lorashear import ALSO_TRAIN
from own_process import figures_of, passed_on
from untuned import options_of, settings_of_auto

import secateur as sc
from secateur.data import Corpus
from secateur.importance import Taylor
from secateur.methods import auto
from secateur.methods.llm_pruner import LLMPruner, run
from secateur.pipeline import PACKAGES, write_json
from secateur.recovery import Distillation, RecoverySettings, train, with_adapters

METHODS = ("llm-pruner", "auto", "auto:uniform=true", "auto+distill", "loraprune", "lorashear")
WHILE_TRAINING = {"loraprune": sc.LoRAPrune, "lorashear": sc.LoRAShear}
OF_AUTO = 128  # calibration sequences, its default
PASSED_ON = ("data", "characters", "sparsity", "samples", "seq_len", "steps", "batch_size", "rank")


def settings_of(args: argparse.Namespace, method: str) -> RecoverySettings:
    return RecoverySettings(
        rank=args.rank, alpha=2 * args.rank, dropout=0.0, learning_rate=1e-2, steps=args.steps, seq_len=args.seq_len,
        batch_size=args.batch_size, micro_batch_size=args.batch_size, warmup_steps=10, save_every=10**9, seed=0,
        distill=Distillation() if method.endswith("+distill") else None,
        also_train=ALSO_TRAIN if method.startswith("auto") else (),
    )  # fmt: skip


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one method, in this process."""
    torch.set_num_threads(1)
    source = sc.load(args.model)
    model, data = source.model.float(), corpus_of(args)
    dense = model.num_parameters()  # before adapters are in it
    name, _, given = args.method.partition(":")
    settings = settings_of(args, name)
    meter = Meter("cpu")

    def part(work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        meter.restart()
        begin, wall = time.process_time(), time.perf_counter()
        done = work()
        seconds = {"seconds": time.process_time() - begin, "wall_seconds": time.perf_counter() - wall}
        return done, {name: round(value, 2) for name, value in seconds.items()} | {"peak_bytes": meter.peak()}

    with tempfile.TemporaryDirectory() as folder:
        if name in WHILE_TRAINING:
            pruning = WHILE_TRAINING[name](args.sparsity)

            def pruned() -> Any:
                adapted = with_adapters(model, settings, experts=False)
                train(adapted, source.tokenizer, [data], settings, Path(folder), callbacks=[pruning])
                return pruning.finish().model

            small, trained = part(pruned)
            found = {"cut": None, "trained": trained}
        else:
            cut, of_cut = part(lambda: made(name, options_of(given), model, source, data, args))

            def recovered() -> Any:
                return sc.recover(cut, source.tokenizer, [data], settings, Path(folder), dense=lambda: model).model

            small, trained = part(recovered)
            found = {"cut": of_cut, "trained": trained}
    return found | {"reached": round(1 - small.num_parameters() / dense, 5)}


def made(name: str, options: dict[str, Any], model: Any, source: Any, data: Corpus, args: argparse.Namespace) -> Any:
    """What is left of a model that a method cuts at once."""
    samples = args.samples if name == "llm-pruner" else OF_AUTO
    tokens = [sc.calibration_tokens(data, source.tokenizer, samples, args.seq_len, 0)]
    if name == "llm-pruner":
        return run(model, tokens, LLMPruner(sc.Budget(args.sparsity), Taylor(order=1))).model
    return auto.run(model, tokens, settings_of_auto(args.sparsity, options)).model


def corpus_of(args: argparse.Namespace) -> Corpus:
    whole = sc.load_corpus(args.data)
    piece = "\n\n".join(whole.texts)[: args.characters]
    return Corpus(whole.name, (piece,), hashlib.sha256(piece.encode()).hexdigest(), whole.source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="text to calibrate and to train on")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--characters", type=int, default=2_000_000, help="of the data, from its beginning")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of LLM-Pruner")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--method", help="internal: run one method and print its figures")
    args = parser.parse_args()
    if args.method:
        print(json.dumps(measured(args)))
        return
    source, data = sc.load(args.model), corpus_of(args)
    rows = []
    for method in args.methods:
        options = [args.model, "--method", method, *passed_on(args, PASSED_ON)]
        rows.append({"method": method} | figures_of(__file__, options))
        print(rows[-1], flush=True)
    report = {
        "schema": 1,
        "command": "benchmarks/method_costs.py",
        "model": {"name": Path(args.model).name, "sha256": source.sha256, "parameters": source.model.num_parameters()},
        "protocol": {
            **{key: getattr(args, key) for key in PASSED_ON},
            "data": {"file": Path(args.data).name, "sha256": data.sha256},
            "dtype": "float32", "device": "cpu", "threads": 1,
            "versions": {name: version(name) for name in PACKAGES},
        },
        "rows": rows,
    }  # fmt: skip
    write_json(args.output, report)


if __name__ == "__main__":
    main()
