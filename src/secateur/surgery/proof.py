"""The proof behind every offered group: the sliced model gives the logits of the model without the units."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator

from secateur.discovery import discover
from secateur.discovery.reference import Reference
from secateur.discovery.setting import quiet_transformers
from secateur.errors import DiscoveryError, PlanError
from secateur.groups import OFFERED_KINDS, Group, Groups
from secateur.packed import packed_weights
from secateur.surgery.attributes import cut_modules
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.single import SinglePrecision
from secateur.surgery.slicing import cut, layer_solver
from secateur.surgery.trial import LogitCheck, trial_subject, with_noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_COUNTS = 32  # of units to try
MAX_OWN_WEIGHTS = 300_000_000  # parameters; larger models are represented by a twin


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
        relative_difference_float32: largest difference of logits in float32, as a share of the largest logit.
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
    relative_difference_float32: float | None = None
    fields: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    reason: str = ""

    @property
    def proven(self) -> bool:
        return self.route != "none"


@quiet_transformers()
def prove(model: PreTrainedModel, kinds: Sequence[str] = OFFERED_KINDS, seed: int = 0) -> list[Proof]:
    """Slice a quarter of the units of every family, others in each layer, and compare logits with the original.

    Works in float64 on a copy of the model with noise on every weight (so that no bias is zero), and compares what is
    right there in float32 too. Large models, quantised ones and those on the meta device are represented by a randomly
    initialised twin with few layers.
    """
    subject = _subject(model, seed)
    reference = Reference(subject)
    solver = layer_solver(subject, reference.groups, reference)
    single = SinglePrecision(reference)
    generator = np.random.default_rng(seed)
    return [
        _prove_family(subject, reference, single, solver, members, generator)
        for members in reference.groups.families(kinds).values()
    ]


def _prove_family(
    model: PreTrainedModel,
    reference: Reference,
    single: SinglePrecision,
    solver: ConfigSolver,
    members: list[Group],
    generator: Generator,
) -> Proof:
    group = members[0]
    sublayers = group.kind == "sublayer"  # no field says how many there are; a layer lists those it lacks
    rule = None if sublayers else solver.rule(group.family) or solver.tied_rule(group.family)
    families = rule.families if rule else (group.family,)
    count = _count(reference.groups, families, group, solver if rule else None)
    tied = tuple(f for f in families if f != group.family)
    facts = (group.kind, group.family, len(members), group.units, count)
    fields = (*rule.fields, *rule.pins) if rule else ("skip",) if sublayers else ()
    reason = ""
    for kept in _choices(reference.groups, families, Fraction(count, group.units), generator):
        check = LogitCheck(model, kept, reference)
        try:
            _ = check.probe
            small = cut(model, reference.groups, kept, check, solver)
            off = single.difference(small, kept)
            if not off.failure:
                return Proof(*facts, check.difference, "config", off.largest, fields, tied)
            reason = reason or off.failure
        except DiscoveryError as error:  # what runs depends on values, and so on the units that are there
            return Proof(*facts, None, "none", reason=str(error))
        except PlanError as error:
            reason = reason or str(error)
        if in_place := cut_modules(model, reference.groups, kept, check.same):
            off = single.difference(in_place[0], kept)
            if not off.failure:
                attributes = tuple(sorted({name for _, name in in_place[1]}))
                return Proof(*facts, check.difference, "modules", off.largest, attributes, tied, reason)
            reason = reason or off.failure
    return Proof(*facts, None, "none", reason=reason)


def _count(groups: Groups, families: Sequence[str], group: Group, solver: ConfigSolver | None) -> int:
    """About three quarters of the units, such that all families can keep the same share, and the class allows it."""
    step = group.units // math.gcd(*(g.units for g in groups if g.family in families))
    wanted = round(group.units * 0.75)
    by_distance = sorted(range(step, group.units, step), key=lambda count: abs(count - wanted))[:MAX_COUNTS]
    possible = (c for c in by_distance if solver is None or solver.feasible(group.family, c))
    return next(possible, by_distance[0] if by_distance else max(1, min(wanted, group.units - 1)))


def _choices(
    groups: Groups, families: Sequence[str], share: Fraction, generator: Generator
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Units to keep: chosen at random in every group; of layers then the first ones, as classes may fix a pattern."""
    members = [(g, max(1, int(share * g.units))) for g in groups if g.family in families]
    yield {g.name: _chosen(g, n, generator) for g, n in members}
    if members[0][0].blocks:
        yield {g.name: tuple(range(n)) for g, n in members}


def _chosen(group: Group, count: int, generator: Generator) -> tuple[int, ...]:
    """So many units of a group at random, those that must stay among them."""
    others = [u for u in range(group.units) if u not in group.stays]
    chosen = generator.choice(others, max(count, len(group.stays)) - len(group.stays), replace=False)
    return tuple(sorted([*group.stays, *chosen.tolist()]))


def _subject(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """What the proof runs on: a float64 copy with noise, or a shallow twin where weights are absent, packed or many."""
    if any(p.is_meta for p in model.parameters()) or packed_weights(model) or model.num_parameters() > MAX_OWN_WEIGHTS:
        return trial_subject(model, discover(model))
    return with_noise(copy.deepcopy(model), seed)
