"""Sweeps: one recipe file that stands for many, all combinations of the values that it lists."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from secateur.config.recipe import Recipe, assign, parse_recipe, wrong_key
from secateur.errors import RecipeError

SWEEP = "sweep"
SHORT = {"sparsity": "prune.param_sparsity"}


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Attributes:
        settings: the keys of the sweep as written there, each with one of its values.
        recipe: the whole recipe with these values.
    """

    settings: Mapping[str, Any]
    recipe: Recipe

    @property
    def label(self) -> str:
        """The settings in one line."""
        return label(self.settings)


@dataclass(frozen=True)
class Sweep:
    """All combinations, the last key varying fastest."""

    combinations: tuple[Combination, ...]


def parse_sweep(data: Mapping[str, Any], origin: str = "recipe") -> Sweep:
    """Check a recipe with a section `sweep`: lists of values by dotted key; `sparsity` is `prune.param_sparsity`.

    Raises:
        RecipeError: one line per problem with its place, and for what is wrong with a combination only, which one.
    """
    axes = _axes(data[SWEEP], origin)
    rest = {key: value for key, value in data.items() if key != SWEEP}
    combinations: list[Combination] = []
    problems: dict[str, list[str]] = {}
    for values in product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        try:
            combinations.append(Combination(settings, _recipe(rest, settings)))
        except RecipeError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(label(settings))
    if problems:
        raise RecipeError("\n".join(f"{origin}: {line} ({_where(at)})" for line, at in problems.items()))
    _check_distinct(combinations, origin)
    return Sweep(tuple(combinations))


def swept(data: Mapping[str, Any]) -> set[str]:
    """The keys that the sweep in a recipe sets, by both names where they have two."""
    section = data.get(SWEEP)
    keys = [str(key) for key in section] if isinstance(section, dict) else []
    return {name for key in keys for name in (key, SHORT.get(key, key))}


def label(settings: Mapping[str, Any]) -> str:
    """Settings in one line: `method=lorashear, sparsity=0.5, seed=1`."""
    return ", ".join(f"{key}={_shown(value)}" for key, value in settings.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(_shown(v) if k == "name" else f"{k}:{_shown(v)}" for k, v in value.items())
    return ",".join(_shown(v) for v in value) if isinstance(value, list) else str(value)


def _axes(section: Any, origin: str) -> dict[str, list[Any]]:
    """The lists of a sweep.

    Raises:
        RecipeError: it is no mapping of lists, or of keys that no recipe has.
    """
    example = "write lists of values by key, for example sweep: {sparsity: [0.2, 0.5], seed: [1, 2, 3]}"
    if not isinstance(section, dict) or not section:
        raise RecipeError(f"{origin}: {SWEEP}: nothing to vary; {example}")
    problems, named = [], set()
    for key, values in section.items():
        full = SHORT.get(key, str(key))
        if reason := wrong_key(full):
            problems.append(f"{origin}: {SWEEP}.{key}: {reason}")
        elif not isinstance(values, list) or not values:
            problems.append(f"{origin}: {SWEEP}.{key}: a list of values was expected (got {values!r}); {example}")
        elif full in named:
            problems.append(f"{origin}: {SWEEP}.{key}: given twice, as sparsity and as {full}")
        named.add(full)
    if problems:
        raise RecipeError("\n".join(problems))
    return section


def _recipe(rest: Mapping[str, Any], settings: Mapping[str, Any]) -> Recipe:
    """The recipe of one combination: whole sections first, then what lies in them."""
    data = copy.deepcopy(dict(rest))
    named = {SHORT.get(key, key): value for key, value in settings.items()}
    for key in sorted(named, key=lambda name: name.count(".")):
        assign(data, key, copy.deepcopy(named[key]))
    return parse_recipe(data, SWEEP)


def _where(labels: list[str]) -> str:
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return f"in {labels[0]}{more}"


def _check_distinct(combinations: list[Combination], origin: str) -> None:
    """Raise RecipeError if two combinations are the same recipe."""
    found: dict[str, Combination] = {}
    for combination in combinations:
        same = found.setdefault(combination.recipe.model_dump_json(), combination)
        if same is not combination:
            raise RecipeError(
                f"{origin}: {SWEEP}: the combinations {same.label} and {combination.label} are one and the same run"
            )
