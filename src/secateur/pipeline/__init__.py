"""The steps of the whole job, each from one checkpoint folder to the next, and the recipe that joins them."""

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
