"""Criterion audit: what removing units really costs, beside what each criterion says.

Every criterion promises to rank units by the loss that their removal costs. Here units are removed, alone and in random
sets, the change of the loss on a text is measured, and ranks are compared:

    Spearman's rank correlation of scores and changes (of a set: the sum of its units' scores and its change);
    overlap: of the fifth with the lowest scores, the share that is among the fifth that costs least.

Changes are signed: what lowers the loss is the first to go. Intervals are percentiles of bootstrap resamples over units
or sets (Efron and Tibshirani 1993, section 13.3), which hold the text fixed. They hold the units of the model fixed,
too, and where these are few, a lucky order of them looks good in every resample; `luck` tells how good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.data import Corpus
from secateur.errors import KnowledgeError
from secateur.evaluation.alone import Alone
from secateur.evaluation.knowledge import Losses, dense_of_windows, windows_in_batches
from secateur.evaluation.passes import Passes
from secateur.evaluation.perplexity import Perplexity
from secateur.evaluation.removing import losses_without
from secateur.groups import Group, Groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHEAPEST = 0.2  # the share whose overlap is told
RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 8  # removals that say anything about ranks
Floats = NDArray[np.float64]
How = Literal["alone", "sets"]


@dataclass(frozen=True)
class Removal:
    """Units of one kind that go together.

    Attributes:
        kind: of their groups.
        how: `alone`, a single unit, or `sets`, a random set.
        units: group -> units that go.
    """

    kind: str
    how: How
    units: Mapping[str, tuple[int, ...]]

    def predicted(self, scores: Mapping[str, Tensor]) -> float:
        """The sum of the scores of what goes."""
        return sum(float(scores[name][list(units)].double().sum()) for name, units in self.units.items())


@dataclass(frozen=True)
class Interval:
    """A figure and its interval of confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """How well one criterion ranks the removals of a kind.

    Attributes:
        criterion: its name.
        kind: of the units.
        how: `alone` or `sets`.
        removals: how many there were.
        spearman: rank correlation with the change of the loss.
        overlap: of the cheapest fifth; `chance` is what a random order would have.
        chance: see `overlap`.
    """

    criterion: str
    kind: str
    how: How
    removals: int
    spearman: Interval
    overlap: Interval
    chance: float


def removals(groups: Sequence[Group], *, units: int, sets: int, share: float, seed: int) -> list[Removal]:
    """Draw what is to be removed, of each kind the same numbers.

    Args:
        groups: that may lose units.
        units: of each kind to remove alone, all of them if there are no more.
        sets: random sets of each kind.
        share: of a kind's units in a set, at least two; no group loses more than it may.
        seed: of the draw.

    Raises:
        KnowledgeError: numbers out of range, or a kind with too few units to rank.
    """
    if units < FEWEST or (sets and sets < FEWEST) or not 0 < share < 1:
        raise KnowledgeError(
            f"{units} units, {sets} sets of a share of {share:g}: expected {FEWEST} or more of each (or no sets), and "
            "a share between 0 and 1"
        )
    found: list[Removal] = []
    for kind in dict.fromkeys(g.kind for g in groups):
        mine = [g for g in groups if g.kind == kind]
        free = [(g.name, unit) for g in mine for unit in range(g.units) if unit not in g.stays and g.units > 1]
        if len(free) < FEWEST:
            raise KnowledgeError(
                f"{kind}: the model has {len(free)} units that may go; ranking takes {FEWEST} or more (--kinds)"
            )
        generator = np.random.default_rng([seed, len(found)])
        chosen = generator.choice(len(free), min(units, len(free)), replace=False)
        found += [Removal(kind, "alone", {free[i][0]: (free[i][1],)}) for i in sorted(chosen)]
        room = {g.name: g.units - max(g.at_least, len(g.stays), 1) for g in mine}
        size = max(2, round(share * len(free)))
        found += [Removal(kind, "sets", _drawn(free, size, room, generator)) for _ in range(sets)]
    return found


def _drawn(
    free: Sequence[tuple[str, int]], size: int, room: Mapping[str, int], generator: np.random.Generator
) -> dict[str, tuple[int, ...]]:
    """A random set, in which no group loses more than it has room for."""
    taken: dict[str, list[int]] = {}
    for i in generator.permutation(len(free)):
        name, unit = free[i]
        if sum(map(len, taken.values())) < size and len(taken.get(name, ())) < room[name]:
            taken.setdefault(name, []).append(unit)
    return {name: tuple(sorted(units)) for name, units in sorted(taken.items())}


@torch.no_grad()
def removal_costs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    groups: Groups,
    removed: Sequence[Removal],
    *,
    seq_len: int = 128,
    samples: int | None = 64,
    batch_size: int = 8,
    known: Losses | None = None,
    on_loss: Callable[[str, int, float], None] = lambda what, number, loss: None,
) -> tuple[Perplexity, list[float]]:
    """The dense model's perplexity on a text, and how the loss changes with each removal [nats per token].

    The model is restored bit for bit.

    Args:
        groups: of the model.
        removed: what goes, each alone.
        seq_len, samples, batch_size: windows from the beginning of the text, as for `knowledge_distribution`.
        known: losses that were measured before: (kind, place in `removed`) -> nats per token.
        on_loss: told every loss that is measured.

    Raises:
        KnowledgeError: the model cannot be cut so.
        DataError, NonFiniteError: see `knowledge_distribution`.
    """
    batches = windows_in_batches(model, tokenizer, corpus, seq_len, samples, batch_size)
    training = model.training
    model.eval()
    try:
        kinds = list(dict.fromkeys(r.kind for r in removed))
        alone = Alone(model, groups, kinds)
        passes = Passes(model, groups, groups.of_kinds(kinds), batches)
        losses = dict(known or {})
        wanted = {(r.kind, i): r.units for i, r in enumerate(removed) if (r.kind, i) not in losses}
        for key, found in losses_without(passes, alone, wanted, "removal"):
            if not isinstance(found, float):
                raise KnowledgeError(f"{key[0]} cannot be removed for a measurement ({found}); leave it out (--kinds)")
            losses[key] = found
            on_loss(*key, found)
    finally:
        model.train(training)
    dense = dense_of_windows(passes, model, corpus, seq_len)
    return dense, [losses[r.kind, i] - dense.loss for i, r in enumerate(removed)]


def agreements(
    removed: Sequence[Removal], changes: Sequence[float], scores: Mapping[str, Mapping[str, Tensor]], seed: int
) -> list[Agreement]:
    """Compare every criterion's scores with what was measured.

    Args:
        removed: what went.
        changes: of the loss, one for each [nats per token].
        scores: criterion -> group -> importance of each unit.
        seed: of the resamples, which are the same for every criterion.
    """
    found: list[Agreement] = []
    for kind, how in dict.fromkeys((r.kind, r.how) for r in removed):
        places = [i for i, r in enumerate(removed) if (r.kind, r.how) == (kind, how)]
        truth = np.array([changes[i] for i in places])
        draws = np.random.default_rng(seed).integers(len(places), size=(RESAMPLES, len(places)))
        for criterion, by_group in scores.items():
            said = np.array([removed[i].predicted(by_group) for i in places])
            found.append(
                Agreement(
                    criterion,
                    kind,
                    how,
                    len(places),
                    _interval(spearman(said, truth), [spearman(said[d], truth[d]) for d in draws]),
                    _interval(overlap(said, truth), [overlap(said[d], truth[d]) for d in draws]),
                    _cheapest(len(places)) / len(places),
                )
            )
    return found


def luck(removed: Sequence[Removal], changes: Sequence[float], kind: str, how: How, seed: int) -> float:
    """The rank correlation that a random order of a kind's units exceeds once in twenty times (0.95 quantile).

    The fewer units there are, the higher it is, however many sets of them were removed.
    """
    places = [i for i, r in enumerate(removed) if (r.kind, r.how) == (kind, how)]
    units = list(dict.fromkeys((name, u) for i in places for name, us in removed[i].units.items() for u in us))
    column = {unit: number for number, unit in enumerate(units)}
    member = np.zeros((len(places), len(units)))
    for row, i in enumerate(places):
        member[row, [column[name, u] for name, us in removed[i].units.items() for u in us]] = 1
    truth = np.array([changes[i] for i in places])
    said = member @ np.random.default_rng(seed).normal(size=(len(units), RESAMPLES))
    return float(np.quantile([spearman(order, truth) for order in said.T], CONFIDENCE))


def best(found: Sequence[Agreement], kind: str, how: How) -> tuple[Agreement, list[str]]:
    """The criterion that ranks a kind best, and the others whose interval reaches its value; `random` is no choice."""
    mine = [a for a in found if (a.kind, a.how) == (kind, how)]
    first = max([a for a in mine if a.criterion != "random"] or mine, key=lambda a: a.spearman.value)
    as_good = [a.criterion for a in mine if a is not first and a.spearman.high >= first.spearman.value]
    return first, as_good


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation, ties at their mean rank; 0 where one side has no order at all."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else 0.0


def overlap(said: Floats, truth: Floats) -> float:
    """Of the cheapest by one order, the share that is among the cheapest by the other; of equals the first ones."""
    count = _cheapest(len(said))
    low, cheap = (set(np.argsort(values, kind="stable")[:count].tolist()) for values in (said, truth))
    return len(low & cheap) / count


def _cheapest(removals: int) -> int:
    return max(1, round(CHEAPEST * removals))


def _ranks(values: Floats) -> Floats:
    """Mean rank of each value."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[inverse]
    return ranks


def _interval(value: float, resampled: Sequence[float]) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.array(resampled), [tail, 100 - tail])
    return Interval(value, float(low), float(high))
