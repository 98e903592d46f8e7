"""Whether to trust a run: what was checked, what was not, and what a reader must know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from secateur.report.facts import COUNTED, NOT_MEASURED, percent, timing_protocol, told_apart
from secateur.report.reading import Run
from secateur.report.schema import Results

ASKED = {"macs": "mac_sparsity", "memory": "memory_sparsity", "latency": "latency_sparsity"}
SHORT = 0.01  # of what is counted: widths may miss a budget by so much, between whose measured widths lines are drawn

Verdict = Literal["yes", "no", "note"]


@dataclass(frozen=True)
class Check:
    """One thing that speaks for (`yes`) or against (`no`) the figures, or that only is to be known (`note`)."""

    verdict: Verdict
    text: str


def checks(run: Run) -> list[Check]:
    """Every check that the results allow, failed ones first."""
    found = [*_baseline(run), *_overlaps(run), *_loaded(run), *_budget(run), *_speed(run), *_seed(run), *_left(run)]
    order = {"no": 0, "yes": 1, "note": 2}
    return sorted(found, key=lambda check: order[check.verdict])


def verdict(run: Run) -> str:
    """How many checks speak for the figures of a run and how many against, in a few words."""
    found = [check.verdict for check in checks(run)]
    against = found.count("no")
    what = "nothing to take care of" if not against else f"{against} to take care of"
    return f"{found.count('yes')} checks passed, {what}"


def _baseline(run: Run) -> Iterator[Check]:
    tasks = run.results.tasks
    if not run.texts and run.results.knowledge is None:
        if not tasks:
            yield Check("no", "Neither perplexity nor tasks were measured, so what the cut cost is not known.")
        elif run.last_stage is not None and any("dense" not in stages for stages in tasks.values()):
            yield Check("no", "The dense model was not measured on the same tasks.")
        elif run.last_stage is not None:
            yield Check("yes", "The dense model was measured on the same tasks, in the same way.")
        return
    if not run.cuts and run.last_stage is None:
        return
    missing = [name for name, text in run.texts.items() if text.dense is None]
    if missing:
        yield Check("no", f"The dense model was not measured on {', '.join(missing)}.")
    else:
        yield Check("yes", "The dense model was measured on the same texts, in the same way, by the same versions.")


def _overlaps(run: Run) -> Iterator[Check]:
    """Texts that were evaluated on, and also trained or scored on."""
    used = {d.sha256: f"trained on {Path(d.source).name}" for t in run.trainings.values() for d in t.data if d.sha256}
    for step in run.steps:
        if (scored := step.protocol.calibration) and scored.sha256:
            used.setdefault(scored.sha256, f"scored on {Path(scored.source).name}")
    if not run.texts or not used:
        return
    overlap = {name: used[text.text_sha256] for name, text in run.texts.items() if text.text_sha256 in used}
    for name, how in overlap.items():
        yield Check("no", f"{name} is not held out: the model was {how}, which is the same file.")
    if not overlap:
        yield Check("yes", "No evaluated text is a file that the model was scored or trained on (by their hashes).")


def _loaded(run: Run) -> Iterator[Check]:
    results = run.results
    if results.parity and "max_logit_difference" in results.parity:
        where = "in a fresh process" if results.parity.get("process") == "fresh" else "in the same process"
        difference = results.parity["max_logit_difference"]
        yield Check("yes", f"What was written was loaded again {where}: logits {_differ(difference)}.")
    elif results.parity_reason:
        yield Check("no", f"What was written was not checked by running it: {results.parity_reason}.")
    for step in run.since_cut:
        if step.masked_minus_cut is not None:
            differ = _differ(step.masked_minus_cut)
            yield Check("yes", f"Cut and merged, compared with the masked model in training: logits {differ}.")


def _differ(difference: float) -> str:
    return f"differ by {difference:.1e} at most" if difference else "are the same"


def _budget(run: Run) -> Iterator[Check]:
    """Whether the share of parameters that was asked for is the one that went."""
    if not run.cuts:
        return
    yield from _cost(run.cuts[-1])
    asked = (run.cuts[-1].recipe or {}).get("prune", {}).get("param_sparsity")
    if asked is None or run.sparsity is None:
        return
    met = f"{asked:.2%} of the parameters were to go, and {run.sparsity:.2%} went"
    unit = max((s.parameters / s.removed for s in run.kinds.values() if s.removed), default=0.0)
    layers = len({w.layer for w in run.widths})
    near = abs(asked - run.sparsity) * run.cuts[-1].params["dense"] <= unit * max(1, layers)
    yield Check("yes" if near else "no", f"{met}{' (whole units)' if near else ', which whole units do not explain'}.")


def _cost(cut: Results) -> Iterator[Check]:
    """Whether as much went as was asked for of what the budget counted, if not parameters."""
    cost, settings = cut.cost, cut.protocol.settings
    if cost is None or settings.get(ASKED[cost.what]) is None:
        return
    asked: float = settings[ASKED[cost.what]]
    went, of = 1 - cost.pruned / cost.dense, f"{COUNTED[cost.what]} over {cost.batch} x {cost.length} tokens"
    told = (
        f"{of}: {asked:.1%} were to go, {cost.sparsity:.1%} do by the table of widths, and the cut model has "
        f"{percent(-went)}"
    )
    if cost.what == "latency":
        yield Check("note", f"{told}. Timings of other moments and machines give other shares.")
    else:
        yield Check("yes" if went >= asked - SHORT else "no", f"{told}.")


def _speed(run: Run) -> Iterator[Check]:
    timed = run.results.benchmark
    if timed is None or timed.against is None:
        yield Check("note", f"Speed: {NOT_MEASURED}. MACs are counted, and do not say how fast a machine is.")
        return
    for phase, name in (("prefill_s", "prefill"), ("decode_s", "decoding")):
        apart = told_apart(timed, phase)
        told = "do not overlap" if apart else "overlap, so the difference may be noise"
        yield Check("yes" if apart else "no", f"Speed of {name}: the quartiles of the two models {told}.")
    yield Check("note", f"{timing_protocol(timed)}. Other machines, lengths and batches give other ratios.")


def _seed(run: Run) -> Iterator[Check]:
    seed = run.results.protocol.seed
    if seed is not None and run.cuts:
        yield Check("note", f"One run with seed {seed}: how much figures vary with the seed, it does not say.")


def _left(run: Run) -> Iterator[Check]:
    for step in run.since_cut:
        for family, reason in step.left_whole.items():
            yield Check("note", f"Left whole: {family}: {reason}.")
        if packed := step.protocol.quantised:
            yield Check("note", f"“dense” is the model as it was trained on, its linear modules packed by {packed}.")
