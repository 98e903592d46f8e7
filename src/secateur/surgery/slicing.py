"""Final removal: a smaller model of a stock class, whose logits are those of the original without the removed units."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import Tensor

from secateur.discovery import discover
from secateur.discovery.reference import Reference, plain_logits, probe_ids
from secateur.discovery.trace import quiet_transformers
from secateur.errors import PlanError
from secateur.groups import Groups, Kept
from secateur.plan import PruningPlan
from secateur.surgery.attributes import cut_modules
from secateur.surgery.config_solver import ConfigSolver, build_on_meta, expected_shapes, shapes_of
from secateur.surgery.field_rule import FieldRule
from secateur.surgery.state import cut_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MAX_OWN_WEIGHTS = 300_000_000  # parameters; trials on larger models run on a shallow twin

# Largest relative difference (Frobenius norm) of logits that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def slice(
    model: PreTrainedModel, plan: PruningPlan, groups: Groups | None = None, *, reloadable: bool = True
) -> PreTrainedModel:
    """Remove what `plan` removes; `model` itself is left as it is.

    The result is built by the model's own class from an edited configuration, or, where that class refuses the sizes,
    by a stock class with the same parameters. Its logits on a probe are compared with those of the original under
    restricted reductions before it is returned.

    Args:
        reloadable: refuse widths that no stock class can load. If False, such a cut is made in a copy of the modules:
            the result runs, but cannot be saved as a plain checkpoint.

    Raises:
        PlanError: the plan does not fit the model, or no stock class expresses the cut with the same logits.
    """
    groups = groups or discover(model)
    plan.check(groups)
    kept = {n: k for n, k in plan.kept.items() if len(k) < groups.named(n).units}
    check = LogitCheck(model, kept)
    try:
        return rebuild(model, checked_solver(model, groups, check.reference), kept, check)
    except PlanError:
        if reloadable:
            raise
    cut = cut_modules(model, groups, kept, check.same)
    if cut is None:
        raise PlanError("no setting of the modules' sizes gives a model with the right logits for this plan")
    return cut[0]


class LogitCheck:
    """Compares candidates with the original model restricted to the units that stay."""

    def __init__(self, model: PreTrainedModel, kept: Kept, reference: Reference | None = None) -> None:
        self.ids = probe_ids(model)
        self.reference = reference or Reference(model)
        self.wanted = self.reference.logits(self.ids, kept)
        self.tolerance = TOLERANCE[model.dtype]
        self.difference = float("inf")

    def same(self, small: PreTrainedModel) -> bool:
        """Whether the logits agree to rounding; `difference` is the largest absolute one."""
        logits = plain_logits(small, self.ids)
        self.difference = float((logits - self.wanted).abs().max())
        relative = float((logits - self.wanted).norm() / self.wanted.norm())
        return relative <= self.tolerance


def checked_solver(model: PreTrainedModel, groups: Groups, reference: Reference | None = None) -> ConfigSolver:
    """A solver whose rules are proven by logits: on the model itself, or on a shallow twin if it is large."""
    subject = model
    if is_large(model):
        subject, reference = twin(model, groups), None
    oracle = reference or Reference(subject)

    def accept(rule: FieldRule, share: Fraction) -> bool:
        members = [g for g in oracle.groups if g.family in rule.families]
        if any((share * g.units).denominator != 1 for g in members):  # a twin has fewer layers
            share = Fraction(1, 2)
        kept = {g.name: range(g.units - int(share * g.units), g.units) for g in members}
        try:
            rebuild(
                subject, ConfigSolver(subject, oracle.groups, rules=[rule]), kept, LogitCheck(subject, kept, oracle)
            )
        except PlanError:
            return False
        return True

    return ConfigSolver(model, groups, accept)


def is_large(model: PreTrainedModel) -> bool:
    """Whether trials run on a twin: there are no weights, or too many to copy for every trial."""
    return any(p.is_meta for p in model.parameters()) or model.num_parameters() > MAX_OWN_WEIGHTS


def twin(model: PreTrainedModel, groups: Groups) -> PreTrainedModel:
    """A model of the same class and widths with random float32 weights and few layers: at least two, and as many of the
    first ones as it takes to have every family.

    Raises:
        PlanError: the class has no field for the number of layers.
    """
    solver = ConfigSolver(model, groups)
    first = {g.family: g.layer for g in reversed(groups.groups) if g.layer is not None}
    for group in groups:
        if group.kind == "layer" and solver.rule(group.family) is not None:
            depth = min(max(2, *(layer + 1 for layer in first.values())), group.units)
            config = solver.edited(model.config, {group.name: range(depth)})
            with quiet_transformers():
                return type(model)._from_config(config, dtype=torch.float32).eval()
    raise PlanError(f"{type(model).__name__} has no field for its number of layers, so no small twin can be tried")


def rebuild(model: PreTrainedModel, solver: ConfigSolver, kept: Kept, check: LogitCheck) -> PreTrainedModel:
    """The cut model, built from an edited configuration by the first class that gives the right logits.

    Raises:
        PlanError: there is none.
    """
    groups = solver.groups
    wanted = expected_shapes(groups, kept)
    reason = ""
    for model_class, config in solver.targets():
        try:
            edited = solver.edited(config, kept)
            if shapes_of(build_on_meta(model_class, edited)) != wanted:
                reason = f"{model_class.__name__} builds other shapes than the cut needs"
                continue
        except PlanError as error:
            reason = str(error)
            continue
        except Exception as error:  # configuration classes raise what they like for sizes they refuse
            reason = reason or f"{type(config).__name__} refuses these sizes: {error}"
            continue
        small = load_tensors(model, model_class, edited, dict(cut_tensors(model, groups, kept)))
        try:
            if check.same(small):
                return small
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # sizes that only the forward pass refuses
            reason = f"{model_class.__name__} cannot run with these sizes: {error}"
            continue
        reason = (
            f"{model_class.__name__} builds the shapes but computes something else (logits differ by "
            f"{check.difference:.2g}): it derives a constant from a size that was cut"
        )
    raise PlanError(reason)


def load_tensors(
    model: PreTrainedModel,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
) -> PreTrainedModel:
    """A `model_class` with copies of these tensors, on the device, in the dtype and in the mode of `model`."""
    # Buffers that the class computes itself are float32 in a float64 model too, as where the weights were loaded.
    dtype = torch.float32 if model.dtype == torch.float64 else model.dtype
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        small = model_class._from_config(copy.deepcopy(config), dtype=dtype)
    small.load_state_dict({n: t.detach().clone() for n, t in tensors.items()}, strict=False, assign=True)
    small.tie_weights()
    small.to(model.device)
    if model.dtype == torch.float64:
        small.double()
    small.generation_config = copy.deepcopy(model.generation_config)
    small.train(model.training)
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    return small
