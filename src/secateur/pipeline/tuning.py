"""From a checkpoint to an adapter: one that is pruned while it trains, or one that is there already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint import Checkpoint, output_folder, quantisation, write_adapter
from secateur.config import Recipe, TuneSettings
from secateur.data import calibration_tokens, load_corpus
from secateur.errors import CheckpointError, RecipeError, first_line
from secateur.pipeline.adapting import measure_dense, prepare_training, train_adapters
from secateur.pipeline.reporting import check_reporting, keep_logs
from secateur.pipeline.results import (
    Clock,
    Results,
    add_stage,
    header,
    load_model,
    needs_tokenizer,
    peak_memory,
    write_json,
)
from secateur.pipeline.training_settings import training_corpora
from secateur.recovery import save_mix, save_ranks

if TYPE_CHECKING:
    from peft import PeftModel

    from secateur.surgery.rank_schedule import PrunedLoRASettings

ADAPTER_CONFIG = "adapter_config.json"


def tune(recipe: Recipe, output: Path, *, resume: bool = False, overwrite: bool = False) -> Results:
    """Train an adapter for the recipe's model and prune it on the way, into the PEFT folder `output`.

    Training checkpoints lie in `<output>.work` until the run ends; `resume` continues from the last one.

    Raises:
        SecateurError: for anything wrong with the input; no output is written then.
    """
    from secateur.methods.prunedlora import PrunedLoRA

    assert recipe.tune is not None
    if recipe.recovery is None:
        raise RecipeError("tune trains an adapter: give a recovery section (data, rank to start from, steps, ...)")
    check_reporting(recipe)
    work = output.with_name(output.name + ".work")
    settings = _settings(recipe.tune)
    pruning = PrunedLoRA(**{name: getattr(settings, name) for name in settings.__dataclass_fields__})
    with output_folder(output, overwrite=overwrite) as folder:
        clock = Clock()
        clock.begin("load")
        source = load_model(recipe)  # may be quantised: what trains is the adapter
        results = header("tune", source, recipe) | {"method": "prunedlora", "perplexity": {}}
        results["protocol"]["settings"] = asdict(settings)
        training = prepare_training(source, recipe, training_corpora(recipe), pruning, work, resume, clock)
        measure_dense(training, recipe, results, clock)
        adapted = train_adapters(training, recipe, results, clock)
        pruning.finish()
        results["params"] = {"initial": results["training"]["initial_parameters"]}
        results["training"]["ranks"] = pruning.history
        adapted.config.use_cache = True  # which training switched off
        clock.begin("evaluate_tuned")
        add_stage(results, "tuned", source, adapted, recipe.evaluation)  # type: ignore[arg-type]
        if mix := results["training"].get("mix"):
            save_mix(mix, folder / "mix.svg")
        keep_logs(work, folder)
        _write(adapted, folder, source, recipe, results, clock)
    shutil.rmtree(work, ignore_errors=True)
    return results


def prune_trained_adapter(
    recipe: Recipe, adapter: Path, output: Path, *, events: int = 8, overwrite: bool = False
) -> Results:
    """Prune an adapter that was trained already, with the recipe's calibration data, into the PEFT folder `output`.

    Args:
        recipe: its model is the adapter's base.
        events: removals, between which gradients are taken anew.

    Raises:
        SecateurError: for anything wrong with the input; no output is written then.
    """
    from secateur.methods.prunedlora import prune_adapter
    from secateur.surgery.ranks import Components

    assert recipe.tune is not None
    calibration, settings = recipe.prune.calibration, _settings(recipe.tune)
    with output_folder(output, overwrite=overwrite) as folder:
        clock = Clock()
        clock.begin("load")
        source = load_model(recipe)
        results = header("prune", source, recipe) | {"adapter": str(adapter), "perplexity": {}}
        results["protocol"] |= {"method": "prunedlora", "settings": asdict(settings)}
        corpus = load_corpus(calibration.source, field=calibration.field)
        tokens = calibration_tokens(
            corpus, needs_tokenizer(source), calibration.samples, calibration.seq_len, recipe.seed
        )
        results["protocol"]["calibration"] = calibration.model_dump() | {"sha256": corpus.sha256, "events": events}
        clock.begin("evaluate_dense")
        add_stage(results, "dense", source, source.model, recipe.evaluation)
        adapted = _loaded(source, adapter)
        settings.check_larger(Components(adapted).ranks)
        clock.begin("evaluate_adapted")
        add_stage(results, "adapted", source, adapted, recipe.evaluation)  # type: ignore[arg-type]
        results["params"] = {"initial": adapted.num_parameters(only_trainable=True)}
        clock.begin("prune")
        batches = list(tokens.to(source.model.device).split(1))
        results["training"] = {"ranks": prune_adapter(adapted, batches, settings, events)}
        clock.begin("evaluate_pruned")
        add_stage(results, "pruned", source, adapted, recipe.evaluation)  # type: ignore[arg-type]
        _write(adapted, folder, source, recipe, results, clock)
    return results


def base_of_adapter(folder: Path) -> str:
    """The name or folder of the model that an adapter belongs to.

    Raises:
        CheckpointError: its configuration cannot be read or does not say.
    """
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} cannot be read: {first_line(error)}") from error
    if not found:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} names no base model: say which one with --base")
    return str(found)


def _settings(settings: TuneSettings) -> PrunedLoRASettings:
    """What the method needs of a recipe's section."""
    from secateur.importance.components import ComponentCriterion
    from secateur.surgery.rank_schedule import PrunedLoRASettings

    criterion = ComponentCriterion(**settings.criterion.model_dump())
    return PrunedLoRASettings(**settings.model_dump(exclude={"criterion"}), criterion=criterion)


def _loaded(source: Checkpoint, adapter: Path) -> PeftModel:
    """The model with an adapter that can be trained.

    Raises:
        CheckpointError: the adapter does not load on this model.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(source.model, str(adapter), is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"the adapter {adapter} does not fit {source.source}: {first_line(error)}; if that is not its base, say "
            "which one is (--base)"
        ) from error


def _write(
    adapted: PeftModel, folder: Path, source: Checkpoint, recipe: Recipe, results: Results, clock: Clock
) -> None:
    """The adapter, a picture of its ranks, and the results; the adapter is loaded again and compared."""
    from secateur.surgery.ranks import Components

    parts = Components(adapted)
    results["params"]["final"] = sum(parts.up(name).numel() + parts.down(name).numel() for name in parts.layers)
    results["ranks"] = parts.ranks
    clock.begin("write")
    packed = quantisation(source.model.config) is not None
    difference = write_adapter(
        adapted, folder, source.tokenizer, (lambda: load_model(recipe).model) if packed else None
    )
    clock.end()
    results["parity"] = {"max_logit_difference": difference, "process": "same"}
    results["timing"], results["memory"] = clock.seconds, peak_memory()
    save_ranks(record_of_ranks(results), folder / "ranks.svg")
    write_json(folder / "results.json", results)


def record_of_ranks(results: Mapping[str, Any]) -> dict[str, Any]:
    """What `draw_ranks` needs of `results.json`."""
    log = results["training"].get("log", [])
    losses = [{"step": row["step"], "loss": float(row["loss"])} for row in log if "loss" in row]
    return {"history": results["training"]["ranks"], "final": results["ranks"], "losses": losses}
