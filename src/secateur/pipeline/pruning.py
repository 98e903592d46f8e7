"""From a checkpoint to a smaller one."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur import checkpoint as checkpoints
from secateur.allocation import Budget
from secateur.benchmark.costs import Workload
from secateur.checkpoint import BUNDLED, Checkpoint, output_folder
from secateur.compensation import Compensated, Compensation
from secateur.config import PruneSettings, Recipe
from secateur.cutting import cut
from secateur.data import Corpus, calibration_tokens, load_corpus
from secateur.errors import BudgetError, DataError, PlanError, StreamingError
from secateur.export import NOT_NEEDED, layers_of, plainest, tiers
from secateur.importance import CRITERIA, Criterion, Gate, Random, Taylor
from secateur.importance.summary import summary
from secateur.methods import auto, llm_pruner
from secateur.pipeline.before_cut import adapt, adapted_steps
from secateur.pipeline.biases import add_biases
from secateur.pipeline.protecting import Protection, protection
from secateur.pipeline.reporting import check_reporting
from secateur.pipeline.results import (
    Clock,
    Results,
    add_macs,
    add_stage,
    class_note,
    header,
    load_model,
    needs_tokenizer,
    peak_memory,
    write_checked,
)
from secateur.plan import PruningPlan
from secateur.surgery import pad
from secateur.surgery.per_layer import is_per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.methods.forms import Form, Trial


def prune(
    recipe: Recipe, output: Path, *, plan: Path | None = None, resume: bool = False, overwrite: bool = False
) -> Results:
    """Prune the recipe's model into the folder `output`, evaluated before and after on the recipe's texts.

    Where a plan is replayed on a local folder and nothing needs the model as such, it is cut without being loaded.
    A model that is adapted first leaves training checkpoints in `<output>.work` until the cut ends.

    Args:
        plan: replay this plan instead of scoring.
        resume: go on from the last of these checkpoints.

    Raises:
        SecateurError: for anything wrong with the input; nothing is written then.
    """
    check_reporting(recipe)
    wanted = recipe.prune
    if plan is None and not wanted.budgets and not wanted.kind_ratios:
        raise BudgetError("say how much to remove: prune.param_sparsity, or prune.unit_sparsity as the papers count")
    if wanted.tier == "depth" and plan is None and wanted.mode != "layer-wise" and "layer" not in (wanted.kinds or ()):
        raise PlanError("the tier depth drops whole layers, and these settings none: add --mode layer-wise")
    if plan is not None and wanted.knowledge is not None:
        raise PlanError("a plan says already what goes, so a knowledge file has no use: give --plan or --knowledge")
    protects, compensates = protection(wanted), wanted.compensate != "none"
    if plan is not None and (place := _to_stream(recipe)):
        try:
            return _stream(recipe, place, output, plan, overwrite)
        except StreamingError as error:
            print(f"- the whole model is loaded, since it cannot be cut tensor by tensor: {error}", file=sys.stderr)
    work = output.with_name(output.name + ".work")
    with output_folder(output, overwrite=overwrite) as folder:
        clock = Clock()
        clock.begin("load")
        source = load_model(recipe, to_change=True)
        corpus = calibration_corpus(recipe) if plan is None or compensates else None
        replayed = None if plan is None else PruningPlan.load(plan)
        results = dense_results(source, recipe, clock, replayed, protects)
        source = adapt(source, recipe, results, work, resume, clock)
        small, used = _cut(source, recipe, replayed, corpus, protects.groups, clock, results)
        small = add_pruned(results, small, source, recipe, clock)
        if plan is None:
            used = PruningPlan(used.kept, used.units, {**used.provenance, **results["protocol"]})
        write_checked(small, folder, source, results, used)
    if adapted_steps(results):  # else what lies there is of another run
        shutil.rmtree(work, ignore_errors=True)
    return results


def dense_results(
    source: Checkpoint,
    recipe: Recipe,
    clock: Clock,
    plan: PruningPlan | None = None,
    protects: Protection | None = None,
) -> Results:
    """The results of a cut before it: what is cut, how large it is, and its perplexities.

    Args:
        plan: that is replayed.
        protects: what is left whole by a knowledge distribution.

    Raises:
        KnowledgeError: that was made of another checkpoint.
    """
    results = begun(source, recipe, plan, protects)
    clock.begin("evaluate_dense")
    add_stage(results, "dense", source, source.model, recipe.evaluation)
    add_macs(results, "dense", source.model)
    return results


def begun(
    source: Checkpoint, recipe: Recipe, plan: PruningPlan | None = None, protects: Protection | None = None
) -> Results:
    """`dense_results` before anything is measured."""
    results = header("prune", source, recipe, plan)
    if protects is not None:
        protects.record(source, results)
    return results | {"params": {"dense": source.model.num_parameters()}, "perplexity": {}}


def add_pruned(
    results: Results, small: PreTrainedModel, source: Checkpoint, recipe: Recipe, clock: Clock
) -> PreTrainedModel:
    """The cut model in the form asked for; its size, perplexities, and what the cut took are added to the results.

    Raises:
        PlanError: it cannot take that form.
    """
    small = in_tier(small, recipe.prune.tier, source, results)
    results["class"] = {"name": type(small).__name__, "note": class_note(source.model, small)}
    if workload := workload_of(recipe.prune):
        clock.begin("measure_cost")
        results["cost"] |= dict(zip(("dense", "pruned"), workload.of(source.model, small), strict=True))
    clock.begin("evaluate_pruned")
    add_stage(results, "pruned", source, small, recipe.evaluation)
    add_macs(results, "pruned", small)
    clock.end()
    dense, pruned = results["params"]["dense"], small.num_parameters()
    results["params"] |= {"pruned": pruned, "sparsity": round(1 - pruned / dense, 6)}
    results["timing"], results["memory"] = clock.seconds, peak_memory()
    return small


def _to_stream(recipe: Recipe) -> Path | None:
    """The folder to cut without loading the model; None if it is none, or the weights are needed for more than that."""
    place = BUNDLED.get(recipe.model.source, Path(recipe.model.source))
    more = recipe.evaluation.texts or recipe.recovery is not None or recipe.model.dtype is not None
    more = more or recipe.prune.compensate != "none"
    return place if place.is_dir() and not more and recipe.prune.tier == "auto" else None


def _stream(recipe: Recipe, place: Path, output: Path, plan: Path, overwrite: bool) -> Results:
    """Replay a plan on a checkpoint folder tensor by tensor."""
    replayed, trust = PruningPlan.load(plan), recipe.model.trust_remote_code
    with output_folder(output, overwrite=overwrite) as folder:
        clock = Clock()
        clock.begin("cut")
        report = checkpoints.cut_streaming(
            place, replayed, folder, trust_remote_code=trust, progress=sys.stderr.isatty()
        )
        memory = peak_memory()  # the check maps the files, which counts as resident
        clock.begin("verify")
        check = checkpoints.verify_streamed(report, place, replayed, folder, trust_remote_code=trust)
        clock.end()
        name, kind = str(recipe.model.source), report.source.config.model_type
        source = Checkpoint(report.source, None, name, report.sha256, kind)
        results = header("prune", source, recipe, replayed)
        results["protocol"]["device"] = "cpu"
        results["perplexity"] = {}
        sparsity = round(1 - report.pruned / report.dense, 6)
        results["params"] = {"dense": report.dense, "pruned": report.pruned, "sparsity": sparsity}
        results["widths"] = replayed.widths()
        add_macs(results, "dense", report.source)
        add_macs(results, "pruned", report.model)
        found = tiers(report.model, dense_layers=layers_of(report.source))
        written = "per-layer" if is_per_layer(report.model) else found[0].name
        results["tier"] = {"chosen": written, "tiers": [t.to_json() for t in found]}
        results["class"] = {"name": type(report.model).__name__, "note": class_note(report.source, report.model)}
        results |= {"surgery": "streaming", "streaming": report.to_json() | {"check": check.text}}
        if check.parity is not None:
            results["parity"] = check.parity.to_json()
        results["timing"], results["memory"] = clock.seconds, memory
        form = checkpoints.checkpoint_form(report.model)
        checkpoints.write_about(form, folder, plan=_for(source, replayed), results=results, base=source)
    return results


def _for(source: Checkpoint, plan: PruningPlan) -> PruningPlan:
    """A plan that was replayed, with its provenance as it was, and the checkpoint that it now surely belongs to."""
    return PruningPlan(plan.kept, plan.units, {**plan.provenance, "model_sha256": source.sha256})


def _cut(
    source: Checkpoint,
    recipe: Recipe,
    replayed: PruningPlan | None,
    corpus: Corpus | None,
    protect: tuple[str, ...],
    clock: Clock,
    results: Results,
) -> tuple[PreTrainedModel, PruningPlan]:
    """The smaller model and the plan behind it: one to replay, or one made now by scores on a text."""
    batches = [] if corpus is None else [calibration_batch(source, corpus, recipe, results)]
    prune = recipe.prune
    if prune.compensate == "bias":
        clock.begin("discover")
        source, prune = add_biases(source, prune, replayed, results)
    if replayed is not None:
        replayed.check_checkpoint(source.sha256)
        small, done = cut(source.model, replayed, batches, compensation_of(prune), on_step=clock.begin)
        results |= _compensation(done) | {"widths": replayed.widths()}
        return small, _for(source, replayed)
    if recipe.searches:
        learns_hidden = (
            recipe.recovery is not None and recipe.recovery.distill is not None and recipe.recovery.distill.hidden
        )
        ours = replace(settings_of_auto(prune, recipe.seed), protect=protect, hidden=not learns_hidden)
        result = auto.run(source.model, batches, ours, clock.begin, _tell)
        results |= {"choice": dict(result.choice)} if result.choice else {}
        results |= {"criteria": dict(result.criteria)} if len(ours.criteria) > 1 else {}
        allocated = result.plan.provenance["allocation"]
        if ours.workload:
            results["cost"] = asdict(ours.workload) | dict(allocated["cost"])
        results |= {"tradeoff": allocated["tradeoff"]} if "tradeoff" in allocated else {}
        results |= {"compensation_fallback": result.fallback} if result.fallback else {}
    else:
        settings = replace(method_settings(prune, recipe.seed), protect=protect)
        result = llm_pruner.run(source.model, batches, settings, clock.begin)
    results |= _compensation(result.compensated)
    results["kinds"] = result.plan.provenance["allocation"]["shares"]
    results["left_whole"] = dict(result.left_whole)
    results["widths"] = result.plan.widths(tuple(result.groups))
    results["importance"] = summary(tuple(result.groups), result.scores)
    return result.model, result.plan


def _tell(form: Form, trial: Trial) -> None:
    """Say how good a model is that was made to be compared with others."""
    less = f", {trial.share:.1%} of it gone" if form.hidden else ""
    found = math.exp(float(trial.losses.mean()))
    print(f"- {form.words}{less}: perplexity {found:.2f} on the sequences set aside", file=sys.stderr, flush=True)


def _compensation(done: Sequence[Compensated]) -> Results:
    """What each matrix gained, for the results."""
    finite = [asdict(c) | {"strength": c.strength if c.strength != math.inf else None} for c in done]
    return {"compensation": finite} if done else {}


def in_tier(small: PreTrainedModel, wanted: str, source: Checkpoint, results: Results) -> PreTrainedModel:
    """The model in the form asked for, `auto` being the plainest that loses nothing; what each would cost is noted.

    Raises:
        PlanError: it cannot take that form.
    """
    found = tiers(small, source.tokenizer, dense_layers=layers_of(source.model))
    named = {tier.name: tier for tier in found} | {"auto": plainest(found), "uniform": found[0]}
    if wanted not in named:
        raise PlanError(f"the tier {wanted} is not possible: no whole layer went; remove some with --mode layer-wise")
    chosen = named["auto"] if named[wanted].reason == NOT_NEEDED else named[wanted]
    if chosen.parameters is None:
        raise PlanError(f"the tier {wanted} is not possible: {chosen.reason}")
    results["tier"] = {"chosen": chosen.name, "tiers": [t.to_json() for t in found]}
    return pad(small) if is_per_layer(small) and chosen.name != "per-layer" else small


def method_settings(prune: PruneSettings, seed: int) -> llm_pruner.LLMPruner:
    """The method's settings that a recipe describes."""
    assert prune.ranking != "search"
    return llm_pruner.LLMPruner(
        **_settings(prune),
        criterion=criterion_of(prune, seed),
        ranking=prune.ranking,
        mode=prune.mode,
        uniform=prune.same_widths,
        layer_choice=prune.layer_choice,
    )


def settings_of_auto(prune: PruneSettings, seed: int) -> auto.Auto:
    """The settings of our own method that a recipe describes."""
    names = auto.TRIED if prune.criterion == "measured" else (prune.criterion,)
    return auto.Auto(
        **_settings(prune),
        criteria={name: criterion_of(prune.model_copy(update={"criterion": name}), seed) for name in names},
        ranking=prune.ranking,
        reselect=prune.reselect,
        uniform=prune.form,
        workload=workload_of(prune),
    )


def _settings(prune: PruneSettings) -> dict[str, Any]:
    """What both methods know."""
    given = prune.budgets
    share = next(iter(given.values()), 0.0)
    return {
        "budget": Budget(cost_sparsity=share) if prune.counted else Budget(**given) if given else None,
        "kinds": prune.kinds or (() if given else tuple(prune.kind_ratios)),
        "reduction": prune.reduction,
        "iterations": prune.iterations,
        "round_to": prune.round_to,
        "protect_first": prune.protect_first,
        "protect_last": prune.protect_last,
        "layer_ratios": prune.layer_ratios,
        "kind_ratios": prune.kind_ratios,
        "compensation": compensation_of(prune),
    }


def compensation_of(prune: PruneSettings) -> Compensation | None:
    """How a recipe compensates."""
    return None if prune.compensate == "none" else Compensation(prune.compensate, prune.compensate_target)


def workload_of(prune: PruneSettings) -> Workload | None:
    """What a recipe's budget counts, if it is neither parameters nor units."""
    return Workload(prune.counted, prune.workload.batch, prune.workload.length) if prune.counted else None


def criterion_of(prune: PruneSettings, seed: int) -> Criterion | Gate:
    """The criterion that a recipe names."""
    criterion: Criterion | Gate = CRITERIA[prune.criterion]
    if isinstance(criterion, Random):
        return replace(criterion, seed=seed)
    if isinstance(criterion, Taylor | Gate):
        return replace(criterion, gradient_checkpointing=prune.gradient_checkpointing)
    return criterion


def calibration_corpus(recipe: Recipe) -> Corpus:
    """The text to score on, read before anything is measured.

    Raises:
        DataError: it cannot be read; the message names the setting.
    """
    wanted = recipe.prune.calibration
    try:
        return load_corpus(wanted.source, field=wanted.field)
    except DataError as error:
        raise DataError(f"{error} (calibration text: --calibration FILE, prune.calibration.source)") from error


def calibration_batch(source: Checkpoint, corpus: Corpus, recipe: Recipe, results: Results) -> torch.Tensor:
    """Calibration tokens [samples, seq_len]; where they come from goes into the protocol."""
    wanted = recipe.prune.calibration
    tokens = calibration_tokens(corpus, needs_tokenizer(source), wanted.samples, wanted.seq_len, recipe.seed)
    results["protocol"]["calibration"] = {
        "source": wanted.source,
        "sha256": corpus.sha256,
        "samples": wanted.samples,
        "seq_len": wanted.seq_len,
    }
    return tokens
