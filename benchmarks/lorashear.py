"""LoRAShear beside LLM-Pruner and LoRAPrune on sources of different character, at equal training tokens.

    python benchmarks/lorashear.py demo --source fiction=books.jsonl.xz --source c4=c4.jsonl.gz ... \
        --output benchmarks/results/lorashear_demo.json

The commands behind the committed results, with their texts, are in README.md of this folder.

Of every source a part is set aside and never trained on; perplexities are measured on it, for the dense model first.
Every row trains adapters for the same number of steps of the same size:

    llm-pruner  first-order Taylor cut, then recovery on all sources pooled (static)
    auto        our method's cut, then recovery with norms and embeddings trained whole beside the adapters; settings
                of it may follow after a colon, `distill=0.9`, the weight of learning from the dense model, and
                `adapt=0.1`, the share of the steps before the cut
    gate+ridge  and the like: any cut of `untuned.py` in the place of `auto`'s, and all else as for `auto`; into a file
                of their own, `recovered_cuts_MODEL.json`, where `--adapt 0.1` of the steps come before any of the cuts
    loraprune   prunes while it trains, static
    lorashear   half-space steps in periods, static
    lorashear-random  the same with units drawn at random in each period
    lorashear-unfloored  the same without the least lambda that brings a unit to zero in time

A name with `-dynamic` trains on the dynamic mix; one with `+knowledge` leaves the groups whole that an analysis of the
dense model finds most sensitive, on the first 64 windows of the training text, which are of the first source alone, and
layers differ in width then; `:uniform=false` is the same without an analysis. Settings of the method or of the recovery
may follow after a colon: `lorashear-dynamic:push=linear,balance=0.5`; `held_out_most` is how many examples of a
source a mix holds out at most.
`seconds` of a row are without steps before the cut that another row has taken already.
`mean` is the geometric mean over sources, `worst` the source whose perplexity is the largest multiple of the dense one.
Rows that the output holds already, from the same protocol, are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import tempfile
import time
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from resumed import measured
from untuned import FORMS, SETTINGS, settings_of_auto
from untuned import METHODS as CUTS

import secateur as sc
from secateur.cutting import cut
from secateur.data import Corpus
from secateur.importance import CRITERIA, Taylor
from secateur.importance.displacement import Displacement
from secateur.methods import auto
from secateur.methods.llm_pruner import LLMPruner
from secateur.methods.llm_pruner import run as llm_pruner
from secateur.pipeline import PACKAGES
from secateur.pipeline.before_cut import SEED
from secateur.recovery import RecoverySettings, sources, train, with_adapters
from secateur.recovery.also_trained import also_trained
from secateur.recovery.gradual import GradualPruning

METHODS = ("llm-pruner", "llm-pruner-dynamic", "loraprune", "lorashear", "lorashear-dynamic", "lorashear:push=linear")
CALIBRATION_OF_AUTO, ALSO_TRAIN = 128, ("norms", "embeddings")  # defaults of auto
KNOWLEDGE, DYNAMIC = "+knowledge", "-dynamic"
OF_THE_RECOVERY = {field.name for field in fields(RecoverySettings)} | {"held_out_most"}


def split(name: str, file: str, characters: int, held_out: int) -> tuple[Corpus, Corpus]:
    """Training and held-out text of a source: what comes first, as long as asked for, and what comes after."""
    path, _, title = file.partition("#")
    texts = sc.load_corpus(path).texts
    if title:
        titles = sc.load_corpus(path, field="title").texts
        texts = tuple(text for text, of in zip(texts, titles, strict=True) if title in of)
    text = "\n\n".join(texts)[: characters + held_out]
    at = len(text) - held_out

    def part(piece: str) -> Corpus:
        return Corpus(name, (piece,), hashlib.sha256(piece.encode()).hexdigest(), name)

    return part(text[:at]), part(text[at:])


def settings_of(args: argparse.Namespace, seed: int, given: dict[str, Any]) -> RecoverySettings:
    common = RecoverySettings(
        rank=args.rank, alpha=2 * args.rank, dropout=0.0, learning_rate=args.learning_rate, steps=args.steps,
        batch_size=args.batch_size, micro_batch_size=args.batch_size, seq_len=args.seq_len, warmup_steps=10,
        save_every=10**9, patience=0, seed=seed,
    )  # fmt: skip
    return replace(common, **given)


def while_training(
    method: str, sparsity: float, args: argparse.Namespace, protect: tuple[str, ...], given: dict[str, Any]
) -> GradualPruning:
    common: dict[str, Any] = {
        "warmup": args.warmup, "cooldown": args.cooldown, "protect": protect, "uniform": not protect,
    }  # fmt: skip
    if method == "loraprune":
        return sc.LoRAPrune(sparsity, **{"frequency": args.frequency, **common, **given})
    return KINDS[method](sparsity, **{"periods": args.periods, **common, **given})


class RandomUnits(sc.LoRAShear):
    """LoRAShear whose saliency is drawn at random: what is left of the choice of units."""

    def _scores(self) -> dict[str, torch.Tensor]:
        assert self.live is not None
        return {name: torch.rand(self.live.groups.named(name).units) for name in self.candidates}


class Unfloored(sc.LoRAShear):
    """LoRAShear whose lambda is OTOv2's alone: what is left of a unit at the end of its period goes at once."""

    def _half_space(self, found: Displacement, steps_left: int) -> torch.Tensor:
        return super()._half_space(found, 10**9)


KINDS = {"lorashear": sc.LoRAShear, "lorashear-random": RandomUnits, "lorashear-unfloored": Unfloored}


def parsed(method: str) -> tuple[str, bool, bool, dict[str, Any], dict[str, Any]]:
    """A method's name, whether its mix is dynamic, whether it knows, its settings and those of the recovery."""
    name, _, rest = method.partition(":")
    options = dict(option.split("=", 1) for option in rest.split(",") if option)
    given = {key: yaml.safe_load(value.replace(";", ",")) for key, value in options.items()}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    name, knows, _ = name.partition(KNOWLEDGE)
    recovery = {key: value for key, value in given.items() if key in OF_THE_RECOVERY}
    if "distill" in recovery:
        recovery["distill"] = sc.Distillation(weight=recovery["distill"])
    pruning = {key: value for key, value in given.items() if key not in recovery}
    return name.removesuffix(DYNAMIC), name.endswith(DYNAMIC), bool(knows), pruning, recovery


def cut_of(method: str, model: Any, tokens: torch.Tensor, sparsity: float, given: dict[str, Any]) -> Any:
    """The model cut by `auto`, or by a criterion with or without compensation (`gate+ridge`)."""
    if method == "auto":
        return auto.run(model, [tokens], settings_of_auto(sparsity, given)).model
    criterion, _, form = method.partition("+")
    shares = {kind: value for kind, value in given.items() if kind not in SETTINGS}
    options = {name: value for name, value in given.items() if name in SETTINGS}
    settings = LLMPruner(sc.Budget(sparsity), CRITERIA[criterion], kind_ratios=shares, **options)
    plan = llm_pruner(model, [tokens], settings).plan
    return cut(model, plan, [tokens], FORMS[form])[0]


def ours(
    case: Case, method: str, sparsity: float, settings: RecoverySettings, given: dict[str, Any], folder: Path
) -> Any:
    """The model cut and recovered, as `prune --recover-steps` does it by default; adapted before it if asked."""
    options, source = dict(given), case.source
    before = round(options.pop("adapt", case.args.adapt) * settings.steps)
    model = case.adapted(replace(settings, steps=before, mix="proportional", distill=None))
    small = cut_of(method, model, case.calibration(CALIBRATION_OF_AUTO, settings.seed), sparsity, options)
    rest = replace(settings, steps=settings.steps - before)
    return sc.recover(small, source.tokenizer, case.train, rest, folder, dense=lambda: source.model).model


def row(case: Case, method: str, sparsity: float, seed: int) -> dict[str, Any]:
    """One method at one sparsity from one seed."""
    args, begin = case.args, time.perf_counter()
    name, dynamic, knows, pruning_given, recovery_given = parsed(method)
    held_out = recovery_given.pop("held_out_most", sources.HELD_OUT_MOST)
    mix, protect = "dynamic" if dynamic else "proportional", case.protect if knows else ()
    as_ours = name == "auto" or name in CUTS
    if as_ours and knows:
        raise ValueError(f"{method}: what an analysis finds is for the other methods")
    whole = {"also_train": ALSO_TRAIN} if as_ours else {}
    settings = settings_of(args, seed, {"mix": mix, **whole, **recovery_given})
    model = None if as_ours else copy.deepcopy(case.source.model)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sources, "HELD_OUT_MOST", held_out):
        if as_ours:
            small = ours(case, name, sparsity, settings, pruning_given, Path(folder))
        elif name == "llm-pruner":
            tokens = case.calibration(args.samples, seed)
            options = {"uniform": not protect, **pruning_given}
            wanted = LLMPruner(sc.Budget(sparsity), Taylor(order=1), protect=protect, **options)
            less = llm_pruner(model, [tokens], wanted).model
            small = sc.recover(
                less, case.source.tokenizer, case.train, settings, Path(folder), dense=lambda: case.source.model
            ).model
        else:
            parts = also_trained(model, settings.also_train)
            adapted = with_adapters(model, replace(settings, also_train=()), experts=False)
            for part in parts:  # in place: what peft keeps copies of is not cut
                adapted.get_base_model().get_submodule(part).requires_grad_(True)
            pruning = while_training(name, sparsity, args, protect, pruning_given)
            train(
                adapted, case.source.tokenizer, case.train, settings, Path(folder), callbacks=[pruning],
                dense=lambda: case.source.model,
            )  # fmt: skip
            small = pruning.finish().model
    found = case.perplexities(small)
    worse = {source: value / case.dense[source] for source, value in found.items()}
    return {
        "method": method, "sparsity": sparsity, "seed": seed, **({"protected": list(protect)} if knows else {}),
        "reached": round(1 - small.num_parameters() / case.source.model.num_parameters(), 5),
        "perplexity": found, "mean": mean(found), "worst": max(worse, key=lambda source: worse[source]),
        "worst_ratio": max(worse.values()), "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def mean(values: dict[str, float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values.values())) / len(values))


class Case:
    """One model with its sources, and what is measured of the dense model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.source = args, sc.load(args.model)
        self.source.model.float()
        files = dict(given.split("=", 1) for given in args.source)
        parts = {name: split(name, file, args.characters, args.held_out) for name, file in files.items()}
        self.train = [part for part, _ in parts.values()]
        self.held_out = {name: part for name, (_, part) in parts.items()}
        pieces = tuple(text for part in self.train for text in part.texts)
        self.pooled = replace(self.train[0], name="all", rows=pieces)
        self.dense = self.perplexities(self.source.model)
        self._adapted: dict[RecoverySettings, Any] = {}
        self._calibration: dict[tuple[int, int], torch.Tensor] = {}
        self.protect: tuple[str, ...] = ()
        if any(KNOWLEDGE in method for method in args.methods):
            found = sc.knowledge_distribution(
                self.source.model, self.source.tokenizer, self.pooled, seq_len=args.seq_len
            )
            self.protect = tuple(found.most_sensitive(args.protect_share))

    def calibration(self, samples: int, seed: int) -> torch.Tensor:
        """Token ids of all sources pooled, [samples, seq_len], drawn once for all cuts from a seed."""
        if (samples, seed) not in self._calibration:
            self._calibration[samples, seed] = sc.calibration_tokens(
                self.pooled, self.source.tokenizer, samples, self.args.seq_len, seed
            )
        return self._calibration[samples, seed]

    def adapted(self, settings: RecoverySettings) -> Any:
        """A copy of the dense model after the steps before the cut, which are taken once for all cuts from a seed."""
        if settings.steps and settings not in self._adapted:
            first = replace(settings, seed=settings.seed + SEED)
            model = copy.deepcopy(self.source.model)
            with tempfile.TemporaryDirectory() as folder:
                found = sc.recover(model, self.source.tokenizer, self.train, first, Path(folder))
            self._adapted = {settings: found.model}
        return copy.deepcopy(self._adapted[settings] if settings.steps else self.source.model)

    def perplexities(self, model: Any) -> dict[str, float]:
        args = self.args
        return {
            name: sc.perplexity(model, self.source.tokenizer, text, seq_len=args.seq_len, batch_size=16).value
            for name, text in self.held_out.items()
        }

    def report(self) -> dict[str, Any]:
        args, model = self.args, self.source
        texts = {name: {"train_sha256": part.sha256, "held_out_sha256": self.held_out[name].sha256}
                 for name, part in zip(self.held_out, self.train, strict=True)}  # fmt: skip
        names = ("characters", "held_out", "samples", "seq_len", "steps", "batch_size", "rank", "learning_rate",
                 "frequency", "periods", "warmup", "cooldown", "protect_share", "adapt")  # fmt: skip
        return {
            "schema": 1,
            "command": "benchmarks/lorashear.py",
            "model": {
                "name": Path(args.model).name,
                "sha256": model.sha256,
                "parameters": model.model.num_parameters(),
            },
            "dense": {"perplexity": self.dense, "mean": mean(self.dense)},
            "protocol": {
                "sources": texts,
                **{name: getattr(args, name) for name in names},
                "dtype": "float32",
                "threads": torch.get_num_threads(),
                "versions": {name: version(name) for name in PACKAGES},
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        help="NAME=FILE, two or more; FILE#WORD: rows by title",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--sparsities", nargs="*", type=float, default=(0.2, 0.5))
    parser.add_argument("--seeds", nargs="*", type=int, default=(1, 2, 3))
    parser.add_argument("--characters", type=int, default=400_000, help="of each source to train on, at most")
    parser.add_argument("--held-out", type=int, default=40_000, help="characters of each source to measure on")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of LLM-Pruner")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--frequency", type=int, default=10, help="of LoRAPrune's looks")
    parser.add_argument("--periods", type=int, default=10, help="of LoRAShear")
    parser.add_argument("--warmup", type=float, default=0.02)
    parser.add_argument("--cooldown", type=float, default=0.6)
    parser.add_argument("--protect-share", type=float, default=0.1)
    parser.add_argument("--adapt", type=float, default=0.0, help="share of our steps before the cut, if a row has none")
    args = parser.parse_args()
    case = Case(args)
    measured(args, case.report(), lambda method, sparsity, seed: row(case, method, sparsity, seed))


if __name__ == "__main__":
    main()
