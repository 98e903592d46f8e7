"""Recipes: whole jobs and sweeps of them, read from YAML, checked before anything runs."""

from secateur.config.files import list_recipes, load_job, load_recipe, recipe_text
from secateur.config.recipe import Recipe, dump_recipe, parse_recipe
from secateur.config.recovery import RecoverSettings
from secateur.config.sections import (
    BUDGET_OF,
    METHOD_OPTIONS,
    CalibrationSettings,
    ComponentSettings,
    EvaluationSettings,
    MethodSettings,
    ModelSettings,
    PruneSettings,
    Section,
    TuneSettings,
)
from secateur.config.sweep import Combination, Sweep, label, parse_sweep

__all__ = [
    "BUDGET_OF",
    "METHOD_OPTIONS",
    "CalibrationSettings",
    "Combination",
    "ComponentSettings",
    "EvaluationSettings",
    "MethodSettings",
    "ModelSettings",
    "PruneSettings",
    "Recipe",
    "RecoverSettings",
    "Section",
    "Sweep",
    "TuneSettings",
    "dump_recipe",
    "label",
    "list_recipes",
    "load_job",
    "load_recipe",
    "parse_recipe",
    "parse_sweep",
    "recipe_text",
]
