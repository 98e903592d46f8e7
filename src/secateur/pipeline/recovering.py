"""From a pruned checkpoint to a recovered one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from secateur import checkpoint as checkpoints
from secateur.checkpoint import output_folder
from secateur.config import Recipe
from secateur.data import Corpus
from secateur.pipeline.before_cut import adapted_steps
from secateur.pipeline.dense import Dense, dense_of
from secateur.pipeline.pruning import prune
from secateur.pipeline.reporting import check_reporting, keep_logs
from secateur.pipeline.results import (
    Clock,
    Results,
    add_stage,
    header,
    load_model,
    needs_tokenizer,
    peak_memory,
    values,
    write_checked,
    write_json,
)
from secateur.pipeline.training_settings import recovery_settings, training_corpora
from secateur.recovery import RecoveryResult, RecoverySettings, recover, save_mix
from secateur.recovery.training_data import training_data


def recover_checkpoint(
    recipe: Recipe,
    folder_in: Path | str,
    output: Path,
    *,
    steps_before: int = 0,
    resume: bool = False,
    overwrite: bool = False,
) -> Results:
    """Recover a (pruned) checkpoint into the folder `output`: the trained model, and the adapter beside it, if any.

    Training checkpoints lie in `<output>.work` until the run ends; `resume` continues from the last one.

    Args:
        steps_before: how many of the steps the model was trained for before it was cut.

    Raises:
        SecateurError: for anything wrong with the input.
    """
    assert recipe.recovery is not None
    check_reporting(recipe)
    given = recipe.recovery
    work = output.with_name(output.name + ".work")
    with output_folder(output, overwrite=overwrite) as folder:
        clock = Clock()
        clock.begin("load")
        source = load_model(recipe, folder_in, to_change=True)
        plan = checkpoints.carried_plan(source)
        checkpoints.check_space(folder, checkpoints.weight_bytes(source.model))  # not only after hours of training
        results = header("recover", source, recipe)
        results["perplexity"] = {}
        settings = recovery_settings(given, recipe.seed, source.model)
        if settings.distill is not None and settings.distill.hidden:
            settings = replace(settings, distill=replace(settings.distill, layers=checkpoints.layers_left(source)))
        corpora = training_corpora(recipe)
        data = training_data(corpora, needs_tokenizer(source), settings)
        if steps_before:
            settings = replace(settings, steps=data.steps - steps_before)
            data = replace(data, steps=data.steps - steps_before)
        dense = dense_of(recipe, source)
        clock.begin("evaluate_pruned")
        add_stage(results, "pruned", source, source.model, recipe.evaluation)
        clock.begin("recover")
        outcome = recover(
            source.model,
            needs_tokenizer(source),
            data,
            settings,
            work,
            evaluate=lambda model: values(source, model, recipe.evaluation),
            dense=dense.load if dense else None,
            resume=resume,
        )
        clock.begin("evaluate_recovered")
        add_stage(results, "recovered", source, outcome.model, recipe.evaluation)
        clock.end()
        results["params"] = {"recovered": outcome.model.num_parameters()}
        results["recovery"] = _account(settings, corpora, outcome, dense)
        if outcome.mix:
            save_mix(outcome.mix, folder / "mix.svg")
        results["timing"], results["memory"] = clock.seconds, peak_memory()
        files = [] if outcome.adapter is None else list(outcome.adapter.rglob("*"))
        adapter = sum(file.stat().st_size for file in files)
        checkpoints.check_space(folder, checkpoints.weight_bytes(outcome.model) + adapter)
        if outcome.adapter is not None:
            shutil.copytree(outcome.adapter, folder / "adapter")
        keep_logs(work, folder)
        write_checked(outcome.model, folder, source, results, plan)
    shutil.rmtree(work, ignore_errors=True)
    return results


def _account(
    settings: RecoverySettings, corpora: Sequence[Corpus], outcome: RecoveryResult, dense: Dense | None
) -> Results:
    """What `results.json` tells of the training."""
    return {
        "settings": asdict(settings),
        "data": [{"source": c.source, "sha256": c.sha256} for c in corpora],
        "log": outcome.log,
        **({"mix": outcome.mix} if outcome.mix else {}),
        **({"dense": dense.to_json()} if dense else {}),
    }


def prune_and_recover(recipe: Recipe, output: Path, *, plan: Path | None = None, overwrite: bool = False) -> Results:
    """`prune` and `recover_checkpoint` in one go; only the recovered checkpoint is kept, with the plan beside it."""
    with output_folder(output, overwrite=overwrite) as folder:
        pruned = folder / "pruned"
        results = prune(recipe, pruned, plan=plan)
        after = recover_checkpoint(recipe, pruned, folder / "recovered", steps_before=adapted_steps(results))
        results = joined(results, after)
        for file in (folder / "recovered").iterdir():
            shutil.move(str(file), folder / file.name)
        shutil.rmtree(pruned)
        (folder / "recovered").rmdir()
        write_json(folder / "results.json", results)
    return results


def joined(pruned: Results, recovered: Results) -> Results:
    """The results of pruning with those of recovery filed beside them."""
    perplexity = {name: dict(figures) for name, figures in pruned["perplexity"].items()}
    for name, figures in recovered["perplexity"].items():
        perplexity.setdefault(name, {}).update(recovered=figures["recovered"])
    times = {k: v for k, v in recovered["timing"].items() if k in ("recover_s", "evaluate_recovered_s")}
    samples = {**pruned.get("samples", {}), **recovered.get("samples", {})}
    if samples:
        samples["continuations"] = pruned["samples"]["continuations"] | recovered["samples"]["continuations"]
    return {
        **pruned,
        "perplexity": perplexity,
        **({"samples": samples} if samples else {}),
        "timing": pruned["timing"] | times,
        "recovery": recovered["recovery"],
        "parity": recovered["parity"],
    }
