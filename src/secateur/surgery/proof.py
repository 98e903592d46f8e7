"""The proof behind every offered group: the sliced model gives the logits of the model without the units."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator

from secateur.discovery import discover
from secateur.discovery.reference import Reference
from secateur.errors import DiscoveryError, PlanError
from secateur.groups import Group
from secateur.surgery.attributes import cut_modules
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.slicing import cut, layer_solver
from secateur.surgery.trial import LogitCheck, trial_subject, with_noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_OWN_WEIGHTS = 300_000_000  # parameters; larger models are represented by a twin
# What can be pruned where a proof is found. `head_dim` (of queries and keys) sets the scale of attention; `other` is
# what the structure does not tell.
OFFERED_KINDS = (
    "ffn_channel", "attention_head", "kv_group", "query_head", "value_dim", "hidden", "layer", "expert",
    "expert_group", "expert_channel", "latent", "ssm_channel", "ssm_head", "lora_rank",
)  # fmt: skip


@dataclass(frozen=True)
class Proof:
    """Outcome for one family of groups.

    Attributes:
        kind: kind of the groups.
        family: their common name.
        groups: how many groups the family has.
        units: units per group.
        kept: units kept per group in the test.
        max_difference: largest absolute difference of logits in float64, None if no sliced model could be built.
        route: `config` (a stock class loads the result), `modules` (runs in memory only), or `none`.
        fields: configuration fields or module attributes that follow the cut.
        tied: families cut by the same share in the test, because the class knows no other way.
        reason: why the route is not `config`, or empty.
    """

    kind: str
    family: str
    groups: int
    units: int
    kept: int
    max_difference: float | None
    route: str
    fields: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    reason: str = ""

    @property
    def proven(self) -> bool:
        return self.route != "none"


def prove(model: PreTrainedModel, kinds: Sequence[str] = OFFERED_KINDS, seed: int = 0) -> list[Proof]:
    """Slice a quarter of the units of every family, others in each layer, and compare logits with the original.

    Works in float64 on a copy of the model with noise on every weight (so that no bias is zero). Large
    models and those on the meta device are represented by a randomly initialised twin with few layers.
    """
    subject = _subject(model, seed)
    reference = Reference(subject)
    solver = layer_solver(subject, reference.groups, reference)
    generator = np.random.default_rng(seed)
    return [
        _prove_family(subject, reference, solver, members, generator)
        for members in reference.groups.families(kinds).values()
    ]


def _prove_family(
    model: PreTrainedModel, reference: Reference, solver: ConfigSolver, members: list[Group], generator: Generator
) -> Proof:
    group = members[0]
    rule = solver.rule(group.family) or solver.tied_rule(group.family)
    tied = tuple(f for f in rule.families if f != group.family) if rule else ()
    wanted = min(max(1, round(group.units * 0.75)), group.units - 1)
    by_distance = sorted(range(1, group.units), key=lambda c: abs(c - wanted))[:32]
    count = next((c for c in by_distance if rule and solver.feasible(group.family, c)), wanted)
    kept = {
        g.name: tuple(sorted(generator.choice(g.units, max(1, count * g.units // group.units), replace=False).tolist()))
        for g in reference.groups
        if g.family == group.family or g.family in tied
    }
    check = LogitCheck(model, kept, reference)
    facts = (group.kind, group.family, len(members), group.units, count)
    try:
        _ = check.wanted
    except DiscoveryError as error:  # what the model runs depends on values, and so on the units that are there
        return Proof(*facts, None, "none", reason=str(error))
    try:
        cut(model, reference.groups, kept, check, solver)
        return Proof(*facts, check.difference, "config", (*rule.fields, *rule.pins) if rule else (), tied)
    except PlanError as error:
        reason = str(error)
    small = cut_modules(model, reference.groups, kept, check.same)
    if small is None:
        return Proof(*facts, None, "none", reason=reason)
    return Proof(*facts, check.difference, "modules", small[1], tied, reason)


def _subject(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """What the proof runs on: a float64 copy with noise, or a shallow twin where there are no or too many weights."""
    if any(p.is_meta for p in model.parameters()) or model.num_parameters() > MAX_OWN_WEIGHTS:
        return trial_subject(model, discover(model))
    return with_noise(copy.deepcopy(model), seed)
