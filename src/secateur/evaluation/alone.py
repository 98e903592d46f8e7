"""Some units of a model cut, and nothing else, for as long as it takes to measure what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from secateur.discovery.reference import Reference, plain_logits
from secateur.errors import DiscoveryError, PlanError
from secateur.groups import Group, Groups
from secateur.packed import packed_weights
from secateur.plan import PruningPlan
from secateur.surgery import mask, slice
from secateur.surgery.live import LiveModel
from secateur.surgery.rule_cache import RuleCache
from secateur.surgery.trial import TOLERANCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Alone:
    """Cuts units of a model; the model itself is restored bit for bit.

    Where zeroed weights amount to removal, they are masked in place. Where they do not (a norm still averages over
    what is zero, a softmax still gives experts their share), a copy of the model is sliced. Which is which is tried for
    each family on a narrow twin of the model in float64; where no twin can be made, everything is sliced.

    Attributes:
        masked: families that are masked; the others are sliced.
    """

    def __init__(self, model: PreTrainedModel, groups: Groups, kinds: Sequence[str]) -> None:
        self.model = model
        self.groups = groups
        self.masked = _zeroed_is_removed(model, groups, kinds)

    def possible(self, group: Group) -> bool:
        """Whether the group can be cut: packed weights are masked or not at all."""
        return group.family in self.masked or not packed_weights(self.model)

    @contextmanager
    def without(self, removed: Mapping[str, Sequence[int]]) -> Iterator[PreTrainedModel | None]:
        """The model without these units: None for the model itself, changed in place, else a smaller one.

        Args:
            removed: group -> units that go.

        Raises:
            PlanError: it must be sliced, and cannot be.
        """
        chosen = [self.groups.named(name) for name in removed]
        kept = {g.name: tuple(sorted(set(range(g.units)) - set(removed[g.name]))) for g in chosen}
        plan = PruningPlan(kept, {g.name: g.units for g in chosen})
        if all(group.family in self.masked for group in chosen):
            with mask(self.model, plan, self.groups):
                yield None
        else:
            yield slice(self.model, plan, self.groups, reloadable=False)


def _zeroed_is_removed(model: PreTrainedModel, groups: Groups, kinds: Sequence[str]) -> frozenset[str]:
    """The families of these kinds whose masking gives the logits of the model without the units.

    Tried on the least half of the units of each family, on a narrow twin; what was found before is taken from disk.
    """
    cache, wanted = RuleCache(model, groups), groups.families(kinds).keys()
    known = cache.zeroed()
    if new := wanted - known.keys():
        try:
            reference = LiveModel(model).twin.reference
        except (PlanError, DiscoveryError):
            return frozenset()
        tried = reference.groups.families(kinds)
        known |= {family: family in tried and _same_without(reference, tried[family]) for family in new}
        cache.save_zeroed(known)
    return frozenset(family for family in wanted if known[family])


def _same_without(reference: Reference, members: Sequence[Group]) -> bool:
    kept = {g.name: tuple(sorted({*range(max(g.units // 2, g.at_least, 1)), *g.stays})) for g in members}
    try:
        ids, wanted = reference.without(kept)
        with mask(reference.model, PruningPlan(kept, {g.name: g.units for g in members}), reference.groups):
            found = plain_logits(reference.model, ids)
    except (PlanError, DiscoveryError):
        return False
    return float((found - wanted).norm() / wanted.norm()) <= TOLERANCE[torch.float64]
