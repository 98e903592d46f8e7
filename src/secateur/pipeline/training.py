"""From a checkpoint to a smaller one by a method that prunes while it trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.allocation import Budget
from secateur.checkpoint import WIDTHS, check_packable, output_folder, quantised_copy
from secateur.config import Recipe
from secateur.errors import BudgetError
from secateur.pipeline.adapting import measure_dense, prepare_training, train_adapters
from secateur.pipeline.protecting import protection
from secateur.pipeline.pruning import add_pruned, begun
from secateur.pipeline.reporting import check_reporting, keep_logs
from secateur.pipeline.results import (
    Clock,
    Results,
    add_macs,
    add_stage,
    load_model,
    write_checked,
)
from secateur.pipeline.training_settings import training_corpora
from secateur.plan import PruningPlan
from secateur.recovery import save_mix

if TYPE_CHECKING:
    from secateur.recovery.gradual import GradualPruning


def prune_while_training(recipe: Recipe, output: Path, *, resume: bool = False, overwrite: bool = False) -> Results:
    """Prune the recipe's model while it trains: the cut and merged model in the folder `output`, the adapter beside it.

    No adapter is written by a method that merged earlier ones on the way (LoRAShear's `merge`).

    Training checkpoints lie in `<output>.work` until the run ends; `resume` continues from the last one.

    Raises:
        SecateurError: for anything wrong with the input; no output is written then.
    """
    assert recipe.recovery is not None
    check_reporting(recipe)
    work = output.with_name(output.name + ".work")
    protects = protection(recipe.prune)
    pruning = method_of(recipe, protects.groups)
    corpora = training_corpora(recipe)
    with output_folder(output, overwrite=overwrite) as folder:
        clock = Clock()
        clock.begin("load")
        source = load_model(recipe)  # may be quantised: what trains are adapters
        results = begun(source, recipe, protects=protects)
        add_macs(results, "dense", source.model)
        results["protocol"]["settings"] = asdict(pruning.settings)
        if how := recipe.prune.quantize_output:
            pruning.accept = partial(check_packable, name=how, device=source.model.device)
        training = prepare_training(source, recipe, corpora, pruning, work, resume, clock)
        measure_dense(training, recipe, results, clock)
        train_adapters(training, recipe, results, clock)
        clock.begin("cut")
        outcome = pruning.finish()
        results["training"]["sparsity"] = pruning.history
        small = add_pruned(results, outcome.model, source, recipe, clock)
        results["masked_minus_cut"] = outcome.difference
        results["kinds"] = dict(outcome.shares)
        results["left_whole"] = dict(outcome.left_whole)
        results["widths"] = outcome.plan.widths(outcome.groups)
        results["importance"] = list(outcome.importance)
        plan = PruningPlan(outcome.plan.kept, outcome.plan.units, results["protocol"])
        if pruning.adapter_alone:
            pruning.save_adapter(folder / "adapter")
        keep_logs(work, folder)
        if mix := results["training"].get("mix"):
            save_mix(mix, folder / "mix.svg")
        if how:
            small = quantised_copy(small, how)
            add_stage(results, "quantised", source, small, recipe.evaluation)
        write_checked(small, folder, source, results, plan)
    shutil.rmtree(work, ignore_errors=True)
    return results


def method_of(recipe: Recipe, protect: tuple[str, ...] = ()) -> GradualPruning:
    """The callback that a recipe describes.

    Args:
        protect: names of groups to leave whole.

    Raises:
        BudgetError: it does not say how much to remove, or asks for shares of kinds or layers.
    """
    from secateur.methods.loraprune import LoRAPrune
    from secateur.methods.lorashear import LoRAShear

    prune = recipe.prune
    if prune.param_sparsity is None and prune.unit_sparsity is None:
        raise BudgetError("say how much to remove: prune.param_sparsity, or prune.unit_sparsity as the papers count")
    if prune.kind_ratios or prune.layer_ratios:
        raise BudgetError(
            f"{recipe.method.name} takes one budget for all kinds and layers: no shares (kind_ratios, layer_ratios)"
        )
    if prune.compensate != "none":
        raise BudgetError(
            f"{recipe.method.name} trains while it cuts, so there is nothing to compensate (prune.compensate); to "
            "compensate its plan on the dense model instead, replay it: secateur prune MODEL --plan plan.json "
            "--compensate ridge"
        )
    assert prune.ranking != "search"
    methods: dict[str, Callable[..., GradualPruning]] = {"loraprune": LoRAPrune, "lorashear": LoRAShear}
    return methods[recipe.method.name](
        budget=Budget(prune.param_sparsity, prune.unit_sparsity),
        kinds=prune.kinds,
        ranking=prune.ranking,
        uniform=prune.same_widths,
        round_to=prune.round_to,
        width_multiple=WIDTHS.get(prune.quantize_output, 1) if prune.quantize_output else 1,
        protect_first=prune.protect_first,
        protect_last=prune.protect_last,
        protect=protect,
        **recipe.method.given,
    )
