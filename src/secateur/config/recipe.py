"""The schema of a whole job, checked before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from secateur.config.recovery import RecoverSettings
from secateur.config.sections import (
    AUTO,
    EvaluationSettings,
    MethodSettings,
    ModelSettings,
    PruneSettings,
    Section,
    TuneSettings,
    recovery_of_auto,
    with_defaults_of_auto,
)
from secateur.errors import RecipeError


class Recipe(Section):
    """A whole job: model, method, budget, recovery, evaluation; or model, adapter and data, where `tune` is given."""

    model: ModelSettings
    method: MethodSettings = MethodSettings()
    prune: PruneSettings = PruneSettings()
    recovery: RecoverSettings | None = None
    tune: TuneSettings | None = None
    evaluation: EvaluationSettings = EvaluationSettings()
    benchmark: bool = False
    seed: int = 42

    @property
    def searches(self) -> bool:
        """Whether the method is ours; modes other than block-wise are LLM-Pruner's in any case."""
        return self.method.name == AUTO and self.prune.mode == "block-wise"

    @property
    def recovers(self) -> bool:
        """Whether recovery is a stage of its own, after the cut."""
        return self.recovery is not None and not self.method.trains and self.tune is None

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_auto(cls, data: Any) -> Any:
        """What `auto` takes where nothing else is said, so that a recipe holds all that a run depends on."""
        if not isinstance(data, Mapping) or data.get("tune") is not None:
            return data
        method, prune = data.get("method") or {}, data.get("prune") or {}
        name = method.get("name", AUTO) if isinstance(method, Mapping) else method
        if name != AUTO or not isinstance(prune, Mapping):
            return data
        found = {**data, "prune": with_defaults_of_auto(prune)}
        recovery = data.get("recovery")
        if isinstance(recovery, Mapping) and prune.get("mode", "block-wise") == "block-wise":
            found["recovery"] = recovery_of_auto(recovery)
        return found

    @model_validator(mode="after")
    def _search_of_auto(self) -> Recipe:
        if self.prune.counted and not self.searches:
            (name,) = self.prune.budgets
            raise ValueError(
                f"{name} is a budget of the method auto in block-wise mode: {self.method.name} takes param_sparsity"
            )
        if self.prune.reselect and not self.searches:
            raise ValueError(
                f"reselect is of the method auto in block-wise mode: leave it out, or take these ({self.method.name} "
                f"in {self.prune.mode} mode has no widths found first)"
            )
        if self.prune.ranking == "search" and not self.searches:
            raise ValueError(
                f"the ranking search is of the method auto in block-wise mode: {self.method.name} takes local or global"
            )
        if self.prune.criterion == "measured" and not (self.searches and self.prune.ranking == "search"):
            raise ValueError(
                "the criterion measured is of the method auto with the ranking search, which measures: name another one"
            )
        return self

    @model_validator(mode="after")
    def _data_to_train_on(self) -> Recipe:
        if self.method.trains and self.recovery is None:
            raise ValueError(f"{self.method.name} prunes while it trains: give a recovery section (data, steps, ...)")
        return self

    @model_validator(mode="after")
    def _after_the_cut(self) -> Recipe:
        if self.recovery is not None and not self.recovers:
            for name in ("distill", "full_weights", "also_train"):
                if getattr(self.recovery, name):
                    what = "tune" if self.tune is not None else self.method.name
                    raise ValueError(
                        f"{name} is for recovery after the cut, and {what} trains adapters from the text while it "
                        "prunes: leave it out of recovery, or run `secateur recover` on the result"
                    )
            if self.prune.adapt:
                raise ValueError(f"adapt trains before a cut, and {self.method.name} trains all along: leave it out")
        return self

    @model_validator(mode="after")
    def _adapter_to_tune(self) -> Recipe:
        if self.tune is None:
            return self
        if self.recovery is not None and self.recovery.rank <= self.tune.target_rank:
            raise ValueError(
                f"tune prunes an adapter of rank {self.recovery.rank} to rank {self.tune.target_rank}: start from a "
                "larger one (--init-rank, recovery.rank)"
            )
        if self.prune != PruneSettings(calibration=self.prune.calibration) or self.method != MethodSettings():
            raise ValueError("tune prunes an adapter and leaves the model whole: leave out method and prune")
        return self

    @model_validator(mode="after")
    def _packed_base(self) -> Recipe:
        floats = self.tune is None and self.method.name != "loraprune"
        if floats and (self.model.quantize or self.prune.quantize_output):
            raise ValueError(
                f"{self.method.name} cuts float weights: quantize and quantize_output are for methods that prune while "
                "they train (loraprune); what was cut can be quantised as it is loaded (from_pretrained)"
            )
        return self


def parse_recipe(data: Any, origin: str = "recipe") -> Recipe:
    """Check a recipe.

    Raises:
        RecipeError: one line per problem, each with its place; unknown keys come with the nearest known one.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{origin}: a recipe is a mapping of sections, this is {type(data).__name__}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"{origin}: {_place(e['loc'])}{_message(e)}" for e in error.errors()]
        raise RecipeError("\n".join(lines)) from error


def _place(location: Sequence[Any]) -> str:
    return ".".join(str(part) for part in location) + ": " if location else ""


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] != "extra_forbidden":
        got = "" if isinstance(error["input"], Mapping) else f" (got {error['input']!r})"
        return str(error["msg"]).removeprefix("Value error, ") + got
    return _unknown(str(error["loc"][-1]), _fields(error["loc"][:-1]))


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return "unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


def _fields(path: Sequence[Any]) -> list[str]:
    """Names a section knows; none where the path leads to no section."""
    section: Any = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)


def wrong_key(key: str) -> str | None:
    """What is wrong with a dotted key, such as `prune.param_sparsity`; None if a recipe can have it."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        known = _fields(parts[:depth])
        if not known:
            return None
        if part not in known:
            return _unknown(part, known)
    return None


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in the data of a recipe; sections that are missing are made.

    Raises:
        RecipeError: something on the way is no section.
    """
    *path, last = key.split(".")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise RecipeError(f"{part} is no section, so {key} cannot be set")
    data[last] = value


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every setting, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
