"""Cutting without the weights: the class, the configuration and the scalings of a cut model from shapes alone.

A cut of a loaded model is proven by that model's logits. Here the model is on the meta device, and a *narrow twin* is
used instead: a model of the same class with a fraction of its widths, few layers and random weights, small whatever the
size of the model. Which fields follow a family, and which weights must be scaled, is proven on the twin; so is one cut
of the same families into the same class. What remains to be shown for the model itself are its names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from accelerate import init_empty_weights

from secateur.discovery import discover
from secateur.discovery.reference import Reference
from secateur.discovery.setting import quiet_transformers
from secateur.errors import PlanError
from secateur.groups import Groups, Kept
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.field_rule import FieldRule
from secateur.surgery.folding import Fold, drifted_scalars
from secateur.surgery.per_layer import is_per_layer, layers_differ, skeleton
from secateur.surgery.rule_cache import RuleCache
from secateur.surgery.shapes import build_on_meta
from secateur.surgery.slicing import candidates, checked_solver, fitting, fitting_per_layer, rebuild_per_layer
from secateur.surgery.trial import LogitCheck, trial_run
from secateur.surgery.twin import as_proven, narrow_twin, proven_on

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class UnloadedCut:
    """What a cut leads to.

    Attributes:
        model: the cut model on the meta device.
        scalings: (fold, factor) of weights to scale, in this order.
    """

    model: PreTrainedModel
    scalings: tuple[tuple[Fold, float], ...] = ()


@dataclass(frozen=True)
class Twin:
    """A narrow twin of a model without weights, and what is proven on it.

    Attributes:
        reference: of the twin.
        solver: of the twin, its rules proven by logits.
        of_model: a solver of the model itself, its rules those proven on the twin.
    """

    reference: Reference
    solver: ConfigSolver
    of_model: ConfigSolver

    def unequal(self, families: set[str]) -> PreTrainedModel:
        """The twin with every other layer narrower in these families.

        Raises:
            PlanError: no class expresses that with the right logits.
        """
        kept = sample_cut(self.reference.groups, families, uneven=True)
        check = LogitCheck(self.reference.model, kept, self.reference)
        return rebuild_per_layer(self.reference.model, self.reference.groups, self.solver, kept, check)

    def proves(self, rule: FieldRule) -> bool:
        return _as_proven(rule, self.solver) == rule


def twin_of(uniform: PreTrainedModel, groups: Groups) -> Twin:
    """A twin of a model on the meta device whose layers have the same widths.

    Raises:
        PlanError: none could be made.
    """
    reference = Reference(narrow_twin(uniform, groups))
    solver = checked_solver(reference.model, reference.groups, reference)
    cached = RuleCache(uniform, groups)
    of_model = ConfigSolver(
        uniform,
        groups,
        lambda rule, _: _as_proven(rule, solver),
        cached.load(),
        trial_run(uniform, groups),
        cached.save,
    )
    return Twin(reference, solver, of_model)


def unloaded_cut(model: PreTrainedModel, groups: Groups, kept: Kept, twin: Twin | None = None) -> UnloadedCut:
    """The cut of a model on the meta device, proven on a narrow twin.

    Args:
        twin: what `twin_of` gives for the model (of equal widths), if it is there already.

    Raises:
        PlanError: no class expresses the cut, or no twin could be made or proves it.
    """
    uniform = skeleton(model) if is_per_layer(model) else model
    of_uniform = groups if uniform is model else discover(uniform)
    twin = twin or twin_of(uniform, of_uniform)
    reference, solver = twin.reference, twin.of_model
    families = {groups.named(name).family for name in kept}
    if is_per_layer(model) or layers_differ(groups, kept):
        model_class, config = fitting_per_layer(model, groups, solver, kept)
        twin.unequal(families)
        if all(twin.proves(rule) for f in families if (rule := solver.rule(f))):
            return UnloadedCut(build_on_meta(model_class, config))
    else:
        chosen = sample_cut(reference.groups, families)
        check = LogitCheck(reference.model, chosen, reference)
        right = {type(small) for small in candidates(reference.model, twin.solver, chosen) if check.same(small)}
        for model_class, config, rules in fitting(solver, kept):
            if model_class in right and all(twin.proves(rule) for rule, _ in rules):
                return UnloadedCut(build_on_meta(model_class, config), _scalings(model, model_class, config, rules))
    raise PlanError(f"no class gives the right logits on a small {type(model).__name__} cut in the same kinds")


def _as_proven(rule: FieldRule, twin: ConfigSolver) -> FieldRule | None:
    """A rule as it is proven on a twin, None if it is not."""
    proven = proven_on(twin, rule.families)
    return as_proven(rule, proven, twin) if proven else None


def sample_cut(groups: Groups, families: set[str], *, uneven: bool = False) -> Kept:
    """A cut of the twin in the same families: by one share if all their sizes have a common divisor.

    Args:
        uneven: every other layer stays as wide as it is.
    """
    members = [g for g in groups if g.family in families]
    together = _smallest_divisor(math.gcd(*(g.units for g in members)))
    kept: dict[str, Sequence[int]] = {}
    for group in members:
        divisor = together if together > 1 else _smallest_divisor(group.units)
        whole = divisor == 1 or (uneven and group.layer is not None and group.layer % 2 == 0)
        fewer = 0 if whole else group.units // divisor
        kept[group.name] = range(group.units - fewer) if group.stays else range(fewer, group.units)
    return {name: units for name, units in kept.items() if len(units) < groups.named(name).units}


def _smallest_divisor(number: int) -> int:
    """The smallest prime divisor, 1 if there is none."""
    return next((d for d in range(2, number + 1) if number % d == 0), 1)


def _scalings(
    model: PreTrainedModel,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    rules: Sequence[tuple[FieldRule, Fraction]],
) -> tuple[tuple[Fold, float], ...]:
    """The folds of the rules with their factors; scalars that classes compute are computed by both classes."""
    if not any(rule.folds for rule, _ in rules):
        return ()
    before, after = _with_buffers(type(model), model.config), _with_buffers(model_class, config)
    drift = drifted_scalars(before, after)
    return tuple((fold, fold.factor(share, drift)) for rule, share in rules for fold in rule.folds)


def _with_buffers(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose parameters are on the meta device and whose buffers have their values."""
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        return model_class._from_config(config, dtype=config.dtype)
