"""Every causal language model of transformers: what is discovered, what is proven, what reloads.

    python benchmarks/architectures.py [--only llama,gpt2] [--part 1/4] [--again] [--jobs 2]

examines a tiny model of each type (see `zoo`) and writes one file per type into benchmarks/results/architectures. Types
that have a file are skipped, so a run that was stopped goes on. `python benchmarks/architectures_page.py` turns the
files into docs/architectures.md.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from rich.progress import track
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from secateur.allocation import Budget, allocate
from secateur.discovery import discover
from secateur.discovery.grouping import build_groups
from secateur.discovery.reference import Reference, plain_logits, probe_ids
from secateur.discovery.trace import run_trace
from secateur.errors import SecateurError
from secateur.groups import Groups
from secateur.importance import Random, score
from secateur.pipeline import PACKAGES, write_json
from secateur.surgery import Proof, expressible, prove, slice
from secateur.surgery.attributes import cut_modules
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.field_rule import Findings
from secateur.surgery.slicing import candidates, checked_solver
from secateur.surgery.trial import LogitCheck, with_noise

FOLDER = Path(__file__).parent / "results" / "architectures"
TIME_LIMIT = 100  # seconds per model
HEAD_KINDS = ("kv_group", "attention_head", "query_head")
CONTROLS = 6  # negative controls per model
ROUND_TRIP = 1e-5  # largest difference of logits, relative to the largest logit


class TimeLimitError(BaseException):
    """A model took too long; no `except Exception` on the way stops it."""


def examine(model_type: str) -> dict[str, Any]:
    """Everything about one type."""
    began = time.perf_counter()
    found: dict[str, Any] = {"model_type": model_type, "versions": {name: version(name) for name in PACKAGES}}
    try:
        model = zoo.tiny_model(model_type)
    except zoo.ZooError as error:
        return found | {"instantiated": False, "reason": str(error).removeprefix(f"{model_type}: ")}
    found |= {"instantiated": True, "parameters": model.num_parameters()}
    try:
        found |= {"traced": True, **discovery(model)}
        proofs = prove(model)
        found["proofs"] = [vars(p) for p in proofs]
        found["round_trip"] = round_trip(model)
        found["controls"] = dict(zip(("caught", "total"), controls(model, proofs), strict=True))
    except SecateurError as error:
        found |= {"traced": "families" in found, "reason": str(error)}
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def discovery(model: PreTrainedModel) -> dict[str, Any]:
    """The families, and whether tensors without data teach the same as real ones."""
    trace = run_trace(model, fake=False)
    groups, _ = build_groups(model, trace)
    with torch.device("meta"):
        skeleton = type(model)._from_config(copy.deepcopy(model.config))
    try:
        same: bool | str = identical(groups, discover(skeleton))
    except SecateurError as error:
        same = str(error)
    axes = [axis.find() for axes in trace.parameters.values() for axis in axes]
    causes = [cause for axis in axes for cause in axis.hazards]
    families = []
    for members in {g.family: [x for x in groups if x.family == g.family] for g in groups}.values():
        first = members[0]
        families.append(
            {
                "family": first.family,
                "kind": first.kind,
                "groups": len(members),
                "units": first.units,
                "refusals": sorted({r for g in members for r in g.refusals}),
            }
        )
    return {
        "families": families,
        "without_data_the_same": same,
        "unknown_operations": causes.count("unknown"),
        "layout_conflicts": causes.count("layout"),
    }


def identical(one: Groups, other: Groups) -> bool:
    """Whether two discoveries agree on every unit of every prunable group."""

    def facts(groups: Groups) -> dict[str, Any]:
        return {
            g.name: (g.kind, g.units, g.blocks, sorted((m.parameter, m.dim, m.index.tobytes()) for m in g.members))
            for g in groups.prunable
        }

    return facts(one) == facts(other)


def controls(model: PreTrainedModel, proofs: list[Proof], seed: int = 0) -> tuple[int, int]:
    """(caught, tried): members of proven groups whose positions are moved by one unit must change the logits."""
    generator = np.random.default_rng(seed)
    subject = with_noise(copy.deepcopy(model))
    reference = Reference(subject)
    solver = checked_solver(model, discover(model))
    proven = [p for p in proofs if p.proven and p.kind != "layer"]
    caught = tried = 0
    for i in generator.permutation(len(proven))[:CONTROLS]:
        proof = proven[i]
        kept = {
            g.name: tuple(range(proof.kept * g.units // proof.units))
            for g in reference.groups
            if g.family in (proof.family, *proof.tied)
        }
        check = LogitCheck(subject, kept, reference)
        wrong = copy.deepcopy(reference.groups)
        group = next(g for g in wrong if g.family == proof.family)
        member = group.members[int(generator.integers(len(group.members)))]
        member.index[:] = np.roll(member.index, 1, axis=0)
        rule = solver.rule(proof.family) or solver.tied_rule(proof.family)
        if proof.route == "config" and rule is not None:
            tries = candidates(subject, ConfigSolver(subject, wrong, known=Findings.of(rule)), kept)
            same = any(check.same(small) for small in tries)
        else:
            same = cut_modules(subject, wrong, kept, check.same) is not None
        caught, tried = caught + (not same), tried + 1
    return caught, tried


def round_trip(model: PreTrainedModel) -> dict[str, Any]:
    """Cut hidden, heads, FFN and experts together by about 40 % of their units, save, load with stock classes."""
    groups = discover(model)
    present = {g.kind for g in groups.prunable}
    heads = next((kind for kind in HEAD_KINDS if kind in present), None)
    wanted = [k for k in ("hidden", heads, "ffn_channel", "expert", "expert_channel") if k in present]
    can = expressible(model, groups, wanted)
    chosen = [g for g in groups.of_kinds(wanted) if g.family not in can.refused]
    kinds = sorted({g.kind for g in chosen})
    if not kinds:
        return {"kinds": [], "ok": False, "reason": "; ".join(can.refused.values()) or "nothing to cut"}
    try:
        plan = allocate(
            Groups(tuple(chosen), groups.shapes, groups.buffers, groups.tied),
            score(model, chosen, [], Random()),
            Budget(unit_sparsity=0.4),
            feasible=can.feasible,
            ties=can.ties,
        )
        small = slice(model, plan, groups)
        with tempfile.TemporaryDirectory() as folder:
            small.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder).eval()
    except SecateurError as error:
        return {"kinds": kinds, "ok": False, "reason": str(error)}
    ids = probe_ids(model)
    logits = plain_logits(small, ids)
    difference = float((plain_logits(again, ids) - logits).abs().max() / logits.abs().max())
    return {
        "kinds": kinds,
        "ok": difference < ROUND_TRIP,
        "difference": difference,
        "class": type(again).__name__,
        "cached_generation": same_tokens(again, ids[:1]),
    }


def same_tokens(model: PreTrainedModel, ids: torch.Tensor) -> bool | str:
    """Whether generation with and without cache agree; a reason if the class cannot generate."""
    made = []
    for use_cache in (True, False):
        try:
            made.append(
                model.generate(ids, do_sample=False, use_cache=use_cache, min_new_tokens=5, max_new_tokens=5,
                               pad_token_id=0)
            )  # fmt: skip
        except Exception as error:  # classes fail here in their own ways, uncut ones too
            return f"{type(error).__name__}: {error}"[:200]
    return bool(torch.equal(*made))


def _worker(model_type: str, folder: Path) -> str:
    """Examine one type within the time limit and write its file."""
    torch.set_num_threads(1)
    with quiet(), time_limit(TIME_LIMIT):
        try:
            found = examine(model_type)
        except TimeLimitError:
            found = {"model_type": model_type, "instantiated": True, "traced": False, "reason": "took too long"}
        except Exception as error:  # a crash is a finding too
            found = {"model_type": model_type, "instantiated": True, "crash": f"{type(error).__name__}: {error}"}
    write_json(folder / f"{model_type}.json", found)
    return model_type


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no progress bars of libraries."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeLimitError` in this thread after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeLimitError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--part", default="1/1", help="1/4 is the first of every four types")
    parser.add_argument("--again", action="store_true", help="examine types that have a file, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    number, parts = map(int, args.part.split("/"))
    types = args.only.split(",") if args.only else zoo.model_types()[number - 1 :: parts]
    args.folder.mkdir(parents=True, exist_ok=True)
    left = [t for t in types if args.again or not (args.folder / f"{t}.json").exists()]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        jobs = [pool.submit(_worker, t, args.folder) for t in left]
        for job in track(as_completed(jobs), "architectures", total=len(jobs)):
            job.result()


if __name__ == "__main__":
    main()
