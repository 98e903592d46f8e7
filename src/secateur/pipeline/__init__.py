"""The steps of the whole job, each from one checkpoint folder to the next, and the recipe that joins them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.first_use import on_first_use

if TYPE_CHECKING:
    from secateur.pipeline.analysing import analyze
    from secateur.pipeline.auditing import audit
    from secateur.pipeline.measuring import benchmark, evaluate, with_adapter
    from secateur.pipeline.pruning import prune
    from secateur.pipeline.recipes import run_recipe, write_report
    from secateur.pipeline.recovering import prune_and_recover, recover_checkpoint
    from secateur.pipeline.results import PACKAGES, load_model, write_json
    from secateur.pipeline.shipping import export
    from secateur.pipeline.sweeping import SweepRun, run_sweep
    from secateur.pipeline.training import prune_while_training
    from secateur.pipeline.tuning import base_of_adapter, prune_trained_adapter, tune

_HOME = {
    "PACKAGES": "results",
    "SweepRun": "sweeping",
    "analyze": "analysing",
    "audit": "auditing",
    "base_of_adapter": "tuning",
    "benchmark": "measuring",
    "evaluate": "measuring",
    "export": "shipping",
    "load_model": "results",
    "prune": "pruning",
    "prune_and_recover": "recovering",
    "prune_trained_adapter": "tuning",
    "prune_while_training": "training",
    "recover_checkpoint": "recovering",
    "run_recipe": "recipes",
    "run_sweep": "sweeping",
    "tune": "tuning",
    "with_adapter": "measuring",
    "write_json": "results",
    "write_report": "recipes",
}

__getattr__ = on_first_use(__name__, _HOME)

__all__ = [
    "PACKAGES",
    "SweepRun",
    "analyze",
    "audit",
    "base_of_adapter",
    "benchmark",
    "evaluate",
    "export",
    "load_model",
    "prune",
    "prune_and_recover",
    "prune_trained_adapter",
    "prune_while_training",
    "recover_checkpoint",
    "run_recipe",
    "run_sweep",
    "tune",
    "with_adapter",
    "write_json",
    "write_report",
]
