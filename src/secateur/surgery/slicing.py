"""Final removal: a smaller model that loads again, whose logits are those of the original without the removed units."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import Tensor

from secateur.discovery import discover
from secateur.discovery.reference import Reference
from secateur.discovery.setting import quiet_transformers
from secateur.errors import PlanError, SecateurError, first_line, one_line
from secateur.groups import Groups, Kept
from secateur.packed import refuse_packed
from secateur.plan import PruningPlan
from secateur.surgery.attributes import cut_modules
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.field_rule import FieldRule, Findings
from secateur.surgery.folding import find_folds, fold
from secateur.surgery.per_layer import is_per_layer, layers_differ, per_layer_target, skeleton
from secateur.surgery.rule_cache import RuleCache
from secateur.surgery.shapes import built_shapes, expected_shapes
from secateur.surgery.state import cut_tensors, tied_names
from secateur.surgery.trial import LogitCheck, trial_run, trial_subject
from secateur.surgery.twin import as_proven, narrow_twin, proven_on

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


Fit = tuple["type[PreTrainedModel]", "PreTrainedConfig", list[tuple[FieldRule, Fraction]]]
SMALL = 5_000_000  # parameters of a model that rules are proven on directly


def slice(
    model: PreTrainedModel, plan: PruningPlan, groups: Groups | None = None, *, reloadable: bool = True
) -> PreTrainedModel:
    """Remove what `plan` removes; `model` itself is left as it is.

    If every layer keeps the same widths, the result is built by the model's own class from an edited configuration, or,
    where that class refuses the sizes, by a stock class with the same parameters. If layers differ in width or lack a
    sublayer, it is built by the class of `secateur.modeling_per_layer`, whose file goes into the folder when the model
    is saved. Its logits on a probe are compared with those of the original under restricted reductions before it is
    returned. A model with LoRA adapters in its modules (a `PeftModel`) is cut together with them; see
    `surgery.adapters`.

    Args:
        reloadable: refuse widths that no configuration expresses. If False, such a cut is made in a copy of the
            modules: the result runs, but cannot be saved.

    Raises:
        PlanError: the plan does not fit the model, no class expresses the cut with the same logits, or weights are
            quantised.
    """
    from secateur.surgery.adapters import is_adapted, slice_adapted  # builds on this module

    if is_adapted(model):
        return slice_adapted(model, plan, groups)
    refuse_packed(model, "cut (a plan made here fits the float model, whose groups are the same)", PlanError)
    groups = groups or discover(model)
    plan.check(groups)
    kept = {n: k for n, k in plan.kept.items() if len(k) < groups.named(n).units}
    check = LogitCheck(model, kept)
    try:
        return cut(model, groups, kept, check)
    except PlanError:
        if reloadable:
            raise
    small = cut_modules(model, groups, kept, check.same)
    if small is None:
        raise PlanError("no setting of the modules' sizes gives a model with the right logits for this plan")
    return small[0]


def cut(
    model: PreTrainedModel, groups: Groups, kept: Kept, check: LogitCheck, solver: ConfigSolver | None = None
) -> PreTrainedModel:
    """The cut model, as an instance of a class that can load it.

    Args:
        solver: what `layer_solver` gives for the model, if it is there already.

    Raises:
        PlanError: no class expresses the cut; found before anything is computed with the model's weights, if possible.
    """
    solver = solver or layer_solver(model, groups)
    if is_per_layer(model) or layers_differ(groups, kept):
        return rebuild_per_layer(model, groups, solver, kept, check)
    return rebuild(model, solver, kept, check)


def checked_solver(
    model: PreTrainedModel, groups: Groups, reference: Reference | None = None, hints: Sequence[FieldRule] = ()
) -> ConfigSolver:
    """A solver whose rules are proven by logits.

    Args:
        reference: of a float64 model to prove them on, whatever is known already. By default a wide model's rules are
            proven on a narrow twin, and where that does not tell, on what `trial_subject` makes; what was found out
            before is taken from disk.
        hints: rules to try first, if a reference is given; else those of the class on disk.
    """
    cached = None if reference else RuleCache(model, groups)
    hints = hints if cached is None else cached.of_class()
    failed: list[frozenset[str]] = []  # fields of searches for folds; what can be folded shows in the first edits
    wrong: list[FieldRule] = []  # which ran and computed something else; they do so for any share

    @cache
    def oracle() -> Reference:
        return reference or Reference(trial_subject(model, groups))

    @cache
    def twin() -> ConfigSolver | None:
        return None if cached is None or model.num_parameters() <= SMALL else _solver_of_twin(model, groups, hints)

    def accept(rule: FieldRule, share: Fraction) -> FieldRule | None:
        if rule in wrong:
            return None
        if narrow := twin():
            with suppress(PlanError):
                if not rule.pins and (accepted := narrow.accept(rule, share)):  # values to write would be others there
                    return accepted
            if proven := proven_on(narrow, rule.families):
                return as_proven(rule, proven, narrow)
        members = [g for g in oracle().groups if g.family in rule.families]
        if len({g.family for g in members}) < len(rule.families):  # a twin may be too shallow to have them all
            return None
        if any((share * g.units).denominator != 1 for g in members):  # a shallow twin has fewer layers
            share = Fraction(1, 2)
        subject = oracle().model
        solver = ConfigSolver(subject, oracle().groups, known=Findings.of(rule))
        ran, failure = False, ""
        for kept in solver.kept_at(rule.families, share):
            check = LogitCheck(subject, kept, oracle())
            for small in _tried(subject, solver, kept):
                if check.same(small):
                    return rule
                ran, failure = ran or math.isfinite(check.difference), failure or check.failure
                hopeless = any(fields.issubset(rule.fields) for fields in failed)
                if not math.isfinite(check.difference) or members[0].blocks or hopeless:
                    continue
                if folds := find_folds(subject, small, share, check.same):
                    return replace(rule, folds=folds)
                failed.append(frozenset(rule.fields))
        if failure and not ran:
            raise PlanError(f"it could not be tried: {failure}")
        if ran and not members[0].blocks:
            wrong.append(rule)
        return None

    runs = trial_run(model, groups)
    if cached is None:
        return ConfigSolver(model, groups, accept, failure=runs, hints=hints)
    return ConfigSolver(model, groups, accept, cached.load(), runs, cached.save, hints)


def _solver_of_twin(model: PreTrainedModel, groups: Groups, hints: Sequence[FieldRule]) -> ConfigSolver | None:
    """The solver of a narrow twin, None if there is no twin."""
    try:
        narrow = Reference(narrow_twin(model, groups))
    except SecateurError:
        return None
    return checked_solver(narrow.model, narrow.groups, narrow, hints)


def layer_solver(model: PreTrainedModel, groups: Groups, reference: Reference | None = None) -> ConfigSolver:
    """A solver for a model whose layers may differ: finds the fields on one of the same class where they do not."""
    if not is_per_layer(model):
        return checked_solver(model, groups, reference)
    uniform = skeleton(model)
    return checked_solver(uniform, discover(uniform))


def rebuild(model: PreTrainedModel, solver: ConfigSolver, kept: Kept, check: LogitCheck) -> PreTrainedModel:
    """The cut model, built from an edited configuration by the first class that gives the right logits.

    Raises:
        PlanError: there is none.
    """
    reason = ""
    for small in candidates(model, solver, kept):
        if check.same(small):
            return small
        reason = f"{type(small).__name__} cannot run with these sizes: {check.failure}"
        if math.isfinite(check.difference):
            reason = (
                f"{type(small).__name__} builds the shapes but computes something else (logits differ by "
                f"{check.difference:.2g}): it derives a constant from a size that was cut"
            )
        if solver.groups.removed_blocks(kept):
            reason += "; or it fixes which layers are of which kind: keep the first ones (--layer-choice first)"
    raise PlanError(reason)


def _tried(model: PreTrainedModel, solver: ConfigSolver, kept: Kept) -> Iterator[PreTrainedModel]:
    """`candidates`, or nothing."""
    with suppress(PlanError):
        yield from candidates(model, solver, kept)


def candidates(model: PreTrainedModel, solver: ConfigSolver, kept: Kept) -> Iterator[PreTrainedModel]:
    """The cut model in every class whose configuration has the cut shapes.

    Raises:
        PlanError: there is none; says why the model's own class is not.
    """
    groups = solver.groups
    for model_class, edited, rules in fitting(solver, kept):
        small = load_tensors(
            model, model_class, edited, dict(cut_tensors(model, groups, kept)), tied_names(groups, kept)
        )
        for rule, share in rules:
            fold(model, small, rule.folds, share)
        yield small


def fitting(solver: ConfigSolver, kept: Kept) -> Iterator[Fit]:
    """Every class and configuration with the cut shapes, and the rules that led there.

    Raises:
        PlanError: there is none; says why the model's own class is not.
    """
    solver.check_alignment(kept)
    wanted = expected_shapes(solver.groups, kept)
    reason, found = "", False
    for model_class, config in solver.targets():
        try:
            rules = solver.rules_for(kept)
            edited = solver.edited(config, kept)
            fits = built_shapes(model_class, edited) == wanted
        except PlanError as error:
            reason = reason or str(error)
            continue
        except Exception as error:  # configuration classes raise what they like for sizes they refuse
            reason = reason or f"{type(config).__name__} refuses these sizes: {one_line(error)}"
            continue
        if not fits:
            reason = reason or f"{model_class.__name__} builds other shapes than the cut needs"
            if solver.groups.removed_blocks(kept):
                reason += ", as it fixes which layers are of which kind: keep the first ones (--layer-choice first)"
            continue
        found = True
        yield model_class, edited, rules
    if not found:
        raise PlanError(reason)


def rebuild_per_layer(
    model: PreTrainedModel, groups: Groups, solver: ConfigSolver, kept: Kept, check: LogitCheck
) -> PreTrainedModel:
    """The cut model, every layer built from its own configuration.

    Raises:
        PlanError: a family has no field, or the class computes something else.
    """
    model_class, config = fitting_per_layer(model, groups, solver, kept)
    small = load_tensors(model, model_class, config, dict(cut_tensors(model, groups, kept)), tied_names(groups, kept))
    if not check.same(small):
        what = f"computes something else (logits differ by {check.difference:.2g})"
        if check.failure:
            what = f"does not run: {check.failure}"
        raise PlanError(
            f"{model_class.__name__} builds the shapes but {what}; widths that differ by layer cannot be saved for it"
        )
    return small


def fitting_per_layer(
    model: PreTrainedModel, groups: Groups, solver: ConfigSolver, kept: Kept
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and the configuration of single layers with the cut shapes.

    Raises:
        PlanError: a family has no field, or the class refuses the sizes.
    """
    solver.check_alignment(kept)
    try:
        model_class, config = per_layer_target(model, groups, solver, kept)
        fits = built_shapes(model_class, config) == expected_shapes(groups, kept)
    except PlanError:
        raise
    except Exception as error:  # classes raise what they like for sizes they refuse
        raise PlanError(f"{type(model).__name__} refuses these sizes in single layers: {one_line(error)}") from error
    if not fits:
        raise PlanError(f"{model_class.__name__} builds other shapes than the cut needs")
    return model_class, config


def load_tensors(
    model: PreTrainedModel,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    tied: Mapping[str, str],
) -> PreTrainedModel:
    """A `model_class` with copies of these tensors, on the device, in the dtype and in the mode of `model`.

    Args:
        tied: further names of parameters -> the name they have in `tensors`.

    Raises:
        PlanError: the class cannot be built with this configuration.
    """
    # Buffers that the class computes itself are float32 in a float64 model too, as where the weights were loaded.
    dtype = torch.float32 if model.dtype == torch.float64 else model.dtype
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            small = model_class._from_config(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # classes raise what they like for sizes they cannot start from
        raise PlanError(f"{model_class.__name__} cannot be built with these sizes: {first_line(error)}") from error
    state = {n: t.detach().clone() for n, t in tensors.items()}
    state |= {name: state[of] for name, of in tied.items()}
    small.load_state_dict(state, strict=False, assign=True)
    small.tie_weights()
    for name, other in tied.items():  # what a class ties only where its weights are made
        path, _, attribute = name.rpartition(".")
        setattr(small.get_submodule(path), attribute, small.get_parameter(other))
    small.to(model.device)
    if model.dtype == torch.float64:
        small.double()
    small.generation_config = copy.deepcopy(model.generation_config)
    small.train(model.training)
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    return small
