"""Recipe files, and those that ship with Secateur."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from secateur.config.recipe import Recipe, assign, parse_recipe
from secateur.config.sweep import SWEEP, Sweep, parse_sweep, swept
from secateur.errors import RecipeError


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one that ships with Secateur by name, with `key=value` overrides.

    Raises:
        RecipeError: the file cannot be read, an override is malformed, or the recipe does not follow the schema, or
            is a sweep.
    """
    loaded = load_job(source, overrides)
    if isinstance(loaded, Sweep):
        raise RecipeError(
            f"{source}: a sweep of {len(loaded.combinations)} recipes, and one is needed: leave out sweep"
        )
    return loaded


def load_job(source: str | Path, overrides: Sequence[str] = ()) -> Recipe | Sweep:
    """Read what `load_recipe` reads, or the sweep that the file describes; `sweep.seed=[1, 2]` overrides a list of it.

    Raises:
        RecipeError: as for `load_recipe`, and for every combination of a sweep.
    """
    try:
        data = yaml.safe_load(recipe_text(source))
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from error
    if overrides and not isinstance(data, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of sections")
    for override in overrides:
        _override(data, override)
    if isinstance(data, dict) and SWEEP in data:
        return parse_sweep(data, str(source))
    return parse_recipe(data, str(source))


def _override(data: dict[str, Any], override: str) -> None:
    """Set one key by `key=value`.

    Raises:
        RecipeError: it is malformed, or the sweep sets that key.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: write key=value, for example prune.param_sparsity=0.3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: {text!r} is not a YAML value") from error
    if key in swept(data):
        raise RecipeError(f"override {override!r}: the sweep sets {key}; write {SWEEP}.{key}=[{text}]")
    if key.startswith(f"{SWEEP}."):
        if not isinstance(data.setdefault(SWEEP, {}), dict):
            raise RecipeError(f"override {override!r}: {SWEEP} is no section")
        data[SWEEP][key.removeprefix(f"{SWEEP}.")] = value
        return
    try:
        assign(data, key, value)
    except RecipeError as error:
        raise RecipeError(f"override {override!r}: {error}") from error


def _recipes_folder() -> Path:
    """The recipes inside the installed package, or at the repository's root in an editable install."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "recipes"


def list_recipes() -> list[str]:
    """Names of the recipes that ship with Secateur, such as `llm-pruner/llama-7b`."""
    folder = _recipes_folder()
    return sorted(str(f.relative_to(folder).with_suffix("")) for f in folder.rglob("*.yaml"))


def recipe_text(source: str | Path) -> str:
    """The text of a recipe file, or of a shipped recipe by name.

    Raises:
        RecipeError: there is neither.
    """
    shipped = _recipes_folder() / f"{source}.yaml"
    file = Path(source) if Path(source).is_file() else shipped
    if not file.is_file():
        near = difflib.get_close_matches(str(source), list_recipes(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; `secateur recipes ls` lists those that ship"
        raise RecipeError(f"{source}: no such recipe{hint}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source}: cannot be read: {error}") from error
