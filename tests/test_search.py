"""The search for widths: against brute force over all choices, its budget, and what it asks to be measured."""

import math
from itertools import product

import numpy as np
import pytest
from hand_groups import llama_groups, random_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation import Budget, allocate
from secateur.allocation.families import select_families
from secateur.allocation.limits import Limits
from secateur.allocation.search import (
    GENERATIONS,
    SHARES,
    Curve,
    candidates,
    cheapest,
    curves,
    together,
    tradeoff,
    within,
)
from secateur.allocation.size import parameters_left
from secateur.errors import BudgetError

KINDS = ["ffn_channel", "kv_group"]


class Measured:
    """Losses that add up over groups: a price for each, times a power of the share that goes."""

    def __init__(self, groups, prices, power=2.0):
        self.groups, self.prices, self.power = groups, prices, power
        self.known, self.asked = set(), 0  # how often something new was wanted

    def __call__(self, cuts):
        self.asked += not self.known.issuperset(map(str, cuts))
        self.known.update(map(str, cuts))
        return [3.0 + sum(self.of(name, len(units)) for name, units in cut.items()) for cut in cuts]

    def of(self, name, gone):
        return self.prices[name] * (gone / self.groups.named(name).units) ** self.power


def prices_of(groups, seed):
    generator = np.random.default_rng(seed)
    return {g.name: float(generator.uniform(0.1, 2.0)) for g in groups.of_kinds(KINDS)}


@st.composite
def some_curves(draw):
    found = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 5))
        rises = draw(st.lists(st.integers(1, 9), min_size=size, max_size=size))
        losses = draw(st.lists(st.floats(-0.1, 3), min_size=size, max_size=size))
        counts = np.arange(size, -1, -1)
        found.append(Curve(counts, np.array([0.0, *losses]), np.cumsum([0, *rises])))
    return found


@settings(max_examples=200, deadline=None)
@given(chosen=some_curves(), share=st.floats(0.01, 1))
def test_no_choice_of_candidates_costs_less(chosen, share):
    wanted = share * sum(int(c.saved[-1]) for c in chosen)
    found = cheapest(chosen, wanted)
    picked = [int(np.flatnonzero(c.counts == k)[0]) for c, k in zip(chosen, found, strict=True)]
    choices = product(*(range(len(c.counts)) for c in chosen))
    # saved is told in whole parts of what is wanted, so that a few choices at the edge are taken to save too little
    part = wanted / max(1, math.ceil(wanted))
    enough = [
        choice for choice in choices
        if sum(math.floor(c.saved[i] / part + 1e-9) for c, i in zip(chosen, choice, strict=True)) >= math.ceil(wanted)
    ]  # fmt: skip
    if not enough:
        assert picked == [len(c.counts) - 1 for c in chosen]
        return
    best = min(sum(c.losses[i] for c, i in zip(chosen, choice, strict=True)) for choice in enough)
    assert sum(c.losses[i] for c, i in zip(chosen, picked, strict=True)) == pytest.approx(best)
    assert sum(int(c.saved[i]) for c, i in zip(chosen, picked, strict=True)) >= wanted - 1e-6


@settings(max_examples=60, deadline=None)
@given(
    ffn=st.integers(20, 60), kv=st.integers(2, 4), sparsity=st.floats(0.05, 0.4), uniform=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_budget_is_met_to_within_one_step(ffn, kv, sparsity, uniform, seed):
    groups = llama_groups(ffn=ffn, kv=kv, hidden=4)
    scores, measure = random_scores(groups, KINDS, seed), Measured(groups, prices_of(groups, seed))
    arguments = {"kinds": KINDS, "ranking": "search", "uniform": uniform, "measure": measure}
    try:
        plan = allocate(groups, scores, Budget(sparsity), **arguments)
    except BudgetError:
        return
    missed = abs(plan.provenance["allocation"]["sparsity"] - sparsity) * groups.total_parameters
    channel = 3 * 4  # gate, up and down
    assert missed <= channel * (3 if uniform else 1) / 2 + 1e-6
    assert measure.asked <= 2 + GENERATIONS  # alone, together, and once in each generation


def test_losses_that_do_not_add_up_are_searched_together():
    """Two layers that are dear only if both lose much: alone they tell nothing of it; against all combinations."""
    groups = llama_groups(layers=4, ffn=32, kv=2, hidden=4)
    families = select_families(groups, random_scores(groups, KINDS, 0), ["ffn_channel"], Limits(uniform=False))
    size = parameters_left(groups, families)
    prices = dict(zip((f.groups[0].name for f in families), (0.1, 0.1, 0.3, 0.3), strict=True))
    alone = Measured(groups, prices)
    first, second = list(prices)[:2]

    def measure(cuts):
        both = [len(cut.get(first, ())) * len(cut.get(second, ())) / 32**2 for cut in cuts]
        return [loss + 4.0 * part for loss, part in zip(alone(cuts), both, strict=True)]

    chosen = curves(families, size, measure)
    wanted = 0.5 * sum(float(c.saved[-1]) for c in chosen)

    def loss(kept):
        cut = {f.groups[0].name: tuple(range(32 - n)) for f, n in zip(families, kept, strict=True) if n < 32}
        return measure([cut])[0]

    every = [
        kept
        for kept in product(*(c.counts.tolist() for c in chosen))
        if sum(float(c.saved[c.counts == n][0]) for c, n in zip(chosen, kept, strict=True)) >= wanted
    ]
    best, added_up = min(map(loss, every)), loss(cheapest(chosen, wanted))
    found = together(families, chosen, wanted, measure)
    assert tuple(found) in every
    assert loss(found) < best + 0.1 * (added_up - best)
    # where they add up, nothing is better than what dynamic programming finds
    assert tuple(together(families, chosen, wanted, alone)) == tuple(cheapest(chosen, wanted))


def test_it_costs_less_than_the_rankings_by_scores():
    """Where groups differ in price and scores do not tell."""
    groups = llama_groups(layers=4, ffn=64, kv=4, hidden=8)
    scores = random_scores(groups, KINDS, 0)
    measure = Measured(groups, prices_of(groups, 1))

    def cost(plan):
        return sum(measure.of(name, len(plan.removed(name))) for name in plan.kept)

    found = allocate(groups, scores, Budget(0.4), kinds=KINDS, ranking="search", uniform=False, measure=measure)
    for ranking in ("local", "global"):
        other = allocate(groups, scores, Budget(0.4), kinds=KINDS, ranking=ranking, uniform=False)
        assert cost(found) < cost(other)
    cheap, dear = (pick(measure.prices, key=lambda n: measure.prices[n] * ("ffn" in n)) for pick in (min, max))
    assert len(found.removed(dear)) < 32
    assert cheap


def test_within_a_group_the_scores_tell_what_goes():
    groups = llama_groups(ffn=16, kv=2)
    scores = random_scores(groups, KINDS, 3)
    measure = Measured(groups, prices_of(groups, 3))
    plan = allocate(groups, scores, Budget(0.3), kinds=KINDS, ranking="search", uniform=False, measure=measure)
    for name in plan.kept:
        gone, left = list(plan.removed(name)), list(plan.kept[name])
        assert scores[name][gone].max() <= scores[name][left].min()


def test_candidates_are_few_and_reach_both_ends():
    groups = llama_groups(ffn=1000, kv=4)
    limits = Limits(uniform=True, round_to=8)
    for family in select_families(groups, None, KINDS, limits):
        found = candidates(family)
        assert found[0] == family.counts[0] and found[-1] == family.counts[-1]
        assert len(found) <= len(SHARES) + 2 and (np.diff(found) < 0).all()
        assert set(found.tolist()) <= set(family.counts.tolist())


def test_between_candidates_the_loss_is_straight():
    groups = llama_groups(ffn=100, kv=4)
    families = select_families(groups, None, ["ffn_channel"], Limits())
    measure = Measured(groups, dict.fromkeys((g.name for g in groups), 1.0), power=1.0)
    (curve,) = curves(families, parameters_left(groups, families), measure)
    steps = curve.each_step(families[0])
    assert steps[:99] == pytest.approx(3 / 100) and steps[99] == 0  # one channel stays


@pytest.mark.parametrize("ranking, measure", [("search", None), ("global", lambda cuts: [0.0] * len(cuts))])
def test_only_a_search_measures(ranking, measure):
    groups = llama_groups()
    with pytest.raises(BudgetError, match="give measure"):
        allocate(groups, random_scores(groups, KINDS, 0), Budget(0.1), ranking=ranking, measure=measure)


def test_kinds_that_share_matrices_are_refused():
    groups = llama_groups(ffn=16, kv=2)
    kinds = ["ffn_channel", "hidden"]
    measure = Measured(groups, dict.fromkeys((g.name for g in groups), 1.0))
    with pytest.raises(BudgetError, match="share matrices"):
        allocate(groups, random_scores(groups, kinds, 0), Budget(0.3), ranking="search", measure=measure)


def test_with_a_share_of_the_hidden_dimension_set_widths_meet_the_rest():
    """What is measured is without it, and so is the curve."""
    groups = llama_groups(layers=2, ffn=64, kv=4, hidden=16)
    kinds = [*KINDS, "hidden"]
    searched, asked = groups.only(KINDS), []

    def measure(cuts):
        asked.extend(cuts)
        return [float(sum(map(len, cut.values()))) for cut in cuts]

    shares = {"hidden": 0.25}
    plan = allocate(
        groups, random_scores(groups, kinds, 0), Budget(0.5), kinds=kinds, ranking="search", kind_ratios=shares,
        measure=within(measure, list(searched)),
    )  # fmt: skip
    assert asked and {name for cut in asked for name in cut} <= {g.name for g in searched}
    (hidden,) = groups.of_kinds(["hidden"])
    made = plan.provenance["allocation"]
    assert len(plan.kept[hidden.name]) == 12 and abs(made["sparsity"] - 0.5) < 0.02
    others = [kind for kind in kinds if kind != "hidden"]
    plain = allocate(
        groups, random_scores(groups, others, 0), Budget(0.2), kinds=others, ranking="search", measure=measure
    )
    assert made["tradeoff"] == plain.provenance["allocation"]["tradeoff"]  # its hidden size as it is
    plan = allocate(
        groups, random_scores(groups, others, 0), Budget(0.2), kinds=others, ranking="search", measure=measure,
        kind_ratios={others[0]: 0.25},
    )  # fmt: skip
    assert "tradeoff" not in plan.provenance["allocation"]


def test_the_tradeoff_comes_from_the_same_measurements():
    groups = llama_groups(layers=4, ffn=64, kv=4, hidden=8)
    scores, measure = random_scores(groups, KINDS, 0), Measured(groups, prices_of(groups, 1))
    plan = allocate(groups, scores, Budget(0.3), kinds=KINDS, ranking="search", uniform=False, measure=measure)
    asked = measure.asked
    assert measure.asked <= 2 + GENERATIONS
    families = select_families(groups, scores, KINDS, Limits(uniform=False))
    assert tradeoff(families, parameters_left(groups, families), measure) and measure.asked == asked
    shares, losses = zip(*plan.provenance["allocation"]["tradeoff"], strict=True)
    assert list(shares) == sorted(shares) and list(losses) == sorted(losses) and len(shares) > 8
    made = sum(measure.of(name, len(plan.removed(name))) for name in plan.kept)
    assert np.interp(0.3, shares, losses) == pytest.approx(made, rel=0.1)


def test_the_tradeoff_is_of_the_whole_model_and_of_finite_losses():
    groups = llama_groups(layers=4, ffn=64, kv=4, hidden=8)
    scores, measure = random_scores(groups, KINDS, 0), Measured(groups, prices_of(groups, 1))
    how = {"kinds": KINDS, "ranking": "search", "uniform": False, "measure": measure}
    half = allocate(groups, scores, Budget(0.2), **how)
    assert "tradeoff" not in allocate(groups, scores, Budget(0.4), beyond=half, **how).provenance["allocation"]

    def impossible(cuts):
        return [math.inf if any(len(u) > 40 for u in cut.values()) else v for cut, v in zip(cuts, measure(cuts))]  # noqa: B905

    families = select_families(groups, scores, KINDS, Limits(uniform=False))
    found = tradeoff(families, parameters_left(groups, families), impossible)
    assert 0 < len(found) < len(half.provenance["allocation"]["tradeoff"]) and all(math.isfinite(v) for _, v in found)
