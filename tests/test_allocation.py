from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hand_groups import count_alive, llama_groups, random_scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.allocation import Budget, allocate, max_sparsity
from secateur.allocation.families import select_families
from secateur.allocation.limits import Limits
from secateur.allocation.ranking import rank
from secateur.allocation.size import parameters_left
from secateur.errors import BudgetError, NonFiniteError, PlanError, SecateurError
from secateur.groups import Group, Groups, Member

KINDS = ["ffn_channel", "kv_group", "query_head", "hidden", "layer"]
BLOCK_KINDS = ["ffn_channel", "kv_group"]


def kept_of(plan, group):
    return plan.kept.get(group.name, tuple(range(group.units)))


def removed_count(plan, group):
    return group.units - len(kept_of(plan, group))


def with_group(groups, name, **changes):
    return replace(groups, groups=tuple(replace(g, **changes) if g.name == name else g for g in groups))


def families_of(groups, kinds, uniform):
    families = list(groups.families(kinds).values())
    return families if uniform else [[g] for family in families for g in family]


def allowed_counts(group, round_to, feasible, multiples):
    steps = [round_to if group.kind in ("ffn_channel", "hidden") else 1, multiples.get(group.family, 1)]
    whole = [c for c in range(1, group.units) if all(c % step == 0 for step in steps)]
    fewer = [c for c in whole if feasible is None or feasible(group.family, c)]
    return [*fewer, group.units]


def removal_order(scores, group):
    """What must go first, written out: ascending score, then number."""
    return sorted(range(group.units), key=lambda u: (scores[group.name][u].item(), u))


def left_with(groups, scores, families, counts):
    kept = {
        g.name: sorted(removal_order(scores, g)[g.units - c :])
        for f, c in zip(families, counts, strict=True)
        for g in f
    }
    return groups.remaining_parameters(kept)


@st.composite
def cases(draw):
    """A small model, what to cut of it, and how."""
    groups = llama_groups(
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.integers(2, 6)),
        ffn=draw(st.integers(2, 12)),
        kv=draw(st.integers(2, 4)),
        rep=draw(st.integers(1, 3)),
        fused=draw(st.booleans()),
    )
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True))
    scores = random_scores(groups, kinds, draw(st.integers(0, 99)))
    modulus = draw(st.sampled_from([None, 2, 3]))
    options = {
        "kinds": kinds,
        "ranking": draw(st.sampled_from(["local", "global"])),
        "uniform": draw(st.booleans()),
        "round_to": draw(st.sampled_from([1, 1, 2, 4])),
        "multiples": {g.family: draw(st.sampled_from([1, 1, 2, 3])) for g in groups.of_kinds(kinds)},
        "feasible": None if modulus is None else lambda name, count: count % modulus == 0 or name == "hidden",
    }
    return groups, scores, draw(st.floats(0, 0.95)), options


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(cases())
def test_the_parameter_budget_is_met_or_refused(case):
    groups, scores, sparsity, options = case
    families = families_of(groups, options["kinds"], options["uniform"])
    feasible = options["feasible"] if options["uniform"] else None
    allowed = [allowed_counts(f[0], options["round_to"], feasible, options["multiples"]) for f in families]
    target = groups.total_parameters * (1 - sparsity)
    smallest = left_with(groups, scores, families, [a[0] for a in allowed])
    if smallest > target + 0.5:
        with pytest.raises(BudgetError, match="cannot be reached") as error:
            allocate(groups, scores, Budget(sparsity), **options)
        said = float(str(error.value).split("largest reachable sparsity is ")[1].split(";")[0])
        assert -1e-12 <= 1 - smallest / groups.total_parameters - said <= 1.0001e-4
        allocate(groups, scores, Budget(said), **options)
        return
    plan = allocate(groups, scores, Budget(sparsity), **options)
    plan.check(groups)
    counts = [len(kept_of(plan, f[0])) for f in families]
    for family, choices, count in zip(families, allowed, counts, strict=True):
        assert count in choices
        for group in family:
            gone = group.units - count  # the same in every layer of a family
            assert plan.removed(group.name) if group.name in plan.kept else gone == 0
            assert kept_of(plan, group) == tuple(sorted(removal_order(scores, group)[gone:]))
    left = count_alive(groups, plan.kept)
    report = plan.provenance["allocation"]
    assert report["parameters_left"] == left == left_with(groups, scores, families, counts)
    assert report["sparsity"] == 1 - left / groups.total_parameters
    for f, choices in enumerate(allowed):
        if families[f][0].kind == "layer" and not options["uniform"]:
            continue  # a block given back would come with the cuts inside it, which the plan no longer shows
        at = choices.index(counts[f])
        for neighbour in choices[max(at - 1, 0) : at + 2]:
            trial = left_with(groups, scores, families, [*counts[:f], neighbour, *counts[f + 1 :]])
            assert abs(left - target) <= abs(trial - target) + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(20, 60), st.floats(0, 0.6), st.booleans(), st.sampled_from(["local", "global"]))
def test_the_finest_units_settle_the_remainder(kv, ffn, sparsity, uniform, ranking):
    """With channels to spare, the error is at most half a channel (of every layer, for uniform output)."""
    groups = llama_groups(kv=kv, ffn=ffn)
    plan = allocate(groups, random_scores(groups, BLOCK_KINDS), Budget(sparsity), ranking=ranking, uniform=uniform)
    counts = {len(kept_of(plan, g)) for g in groups.of_kinds(["ffn_channel"])}
    if 1 in counts or (not uniform and ffn in counts):
        return
    channel = 3 * 6 * (3 if uniform else 1)
    report = plan.provenance["allocation"]
    assert abs(report["parameters_left"] - report["parameters"] * (1 - sparsity)) <= channel / 2


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_polynomial_counts_what_element_masks_count(data):
    ffn = data.draw(st.lists(st.integers(1, 6), min_size=3, max_size=3))
    groups = llama_groups(ffn=ffn, fused=data.draw(st.booleans()))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, unique=True))
    families = select_families(groups, random_scores(groups, kinds), kinds, Limits(uniform=False))
    size = parameters_left(groups, families)
    counts = np.array([data.draw(st.integers(1, f.units)) for f in families])
    kept = {f.groups[0].name: f.orders[0][f.units - c :].tolist() for f, c in zip(families, counts, strict=True)}
    assert size.at(counts) == count_alive(groups, kept)
    f = data.draw(st.integers(0, len(families) - 1))
    choices = families[f].counts
    values = [size.at(np.where(np.arange(len(counts)) == f, c, counts)) for c in choices]
    assert size.drops(counts, f, choices).tolist() == (-np.diff(values)).tolist()


def test_a_parameter_that_carries_a_group_twice_is_counted_as_a_square():
    index = np.arange(4)[:, None]
    group = Group("hidden", "hidden", 4, (Member("w", 0, index), Member("w", 1, index)))
    groups = Groups((group,), {"w": (4, 4)})
    plan = allocate(groups, {"hidden": torch.arange(4.0)}, Budget(0.4))
    assert plan.kept["hidden"] == (1, 2, 3)
    assert plan.provenance["allocation"]["parameters_left"] == 9


def test_irregular_overlap_is_refused():
    a = Group("a", "other", 2, (Member("w", 0, np.array([[0, 1], [2, 3]])),))
    b = Group("b", "ffn_channel", 2, (Member("w", 0, np.array([[0], [1]])),))
    groups = Groups((a, b), {"w": (4,)})
    with pytest.raises(PlanError, match="a and b overlap irregularly on w dimension 0"):
        allocate(groups, {"a": torch.ones(2), "b": torch.ones(2)}, Budget(0.2))


def test_local_ranking_removes_the_same_share_of_every_family():
    groups = llama_groups(kv=10, ffn=100, rep=1)
    for sparsity in (0.1, 0.25, 0.4):
        plan = allocate(groups, random_scores(groups, BLOCK_KINDS), Budget(sparsity))
        shares = [removed_count(plan, g) / g.units for g in groups.of_kinds(BLOCK_KINDS)]
        assert max(shares) - min(shares) <= 0.05 + 0.01 + 10 * 0.01  # half a KV group, and what settles the other half
        channels = {removed_count(plan, g) for g in groups.of_kinds(["ffn_channel"])}
        assert len(channels) == 1


def test_local_ranking_per_layer_settles_the_remainder_on_the_least_important_units():
    groups = llama_groups(layers=4, hidden=10, ffn=10, kv=2)
    scores = {g.name: torch.arange(1, 11.0) * (5 - g.layer) for g in groups.of_kinds(["ffn_channel"])}
    removed = 3 * 10 * (4 * 3 + 2)  # three channels of each layer and two more
    plan = allocate(groups, scores, Budget(removed / groups.total_parameters), uniform=False)
    assert [removed_count(plan, g) for g in groups.of_kinds(["ffn_channel"])] == [3, 3, 4, 4]


def test_global_ranking_compares_importance_per_parameter():
    """A KV group scores more than any channel only because it is larger; raw scores would spare it."""
    groups = llama_groups(layers=1, hidden=8, ffn=40, kv=6, rep=1, head_dim=4)
    kv, ffn = groups.of_kinds(["kv_group"])[0], groups.of_kinds(["ffn_channel"])[0]
    size_kv, size_channel = 4 * 4 * 8, 3 * 8
    scores = {
        kv.name: torch.tensor([1.0, 9.0, 1.1, 9.0, 9.0, 1.2]) * size_kv,
        ffn.name: torch.linspace(1.5, 3.0, 40) * size_channel,
    }
    assert scores[kv.name].min() > scores[ffn.name].max()
    budget = Budget(3 * size_kv / groups.total_parameters)  # as much as 16 channels hold
    for uniform in (True, False):
        plan = allocate(groups, scores, budget, ranking="global", uniform=uniform)
        assert plan.removed(kv.name) == (0, 2, 5)
        assert ffn.name not in plan.kept


def test_global_uniform_bundles_the_least_important_units_of_all_layers():
    groups = llama_groups(layers=2, ffn=4, kv=2)
    first, second = groups.of_kinds(["ffn_channel"])
    scores = {first.name: torch.tensor([9.0, 1, 2, 3]), second.name: torch.tensor([70.0, 80, 10, 20])}
    plan = allocate(groups, scores, Budget(2 * 3 * 6 / groups.total_parameters), ranking="global")
    assert (plan.removed(first.name), plan.removed(second.name)) == ((1,), (2,))
    plan = allocate(groups, scores, Budget(2 * 3 * 6 / groups.total_parameters), ranking="global", uniform=False)
    assert plan.removed(first.name) == (1, 2)
    assert second.name not in plan.kept


def test_a_coarse_step_is_taken_and_fine_ones_given_back_when_they_alone_cannot_reach_the_budget():
    groups = llama_groups(layers=1, hidden=8, ffn=12, kv=3, rep=1, head_dim=4)
    kv, ffn = groups.of_kinds(["kv_group"])[0], groups.of_kinds(["ffn_channel"])[0]
    scores = {kv.name: torch.full((3,), 1e6), ffn.name: torch.arange(12.0)}
    plan = allocate(groups, scores, Budget((11 * 24 + 50) / groups.total_parameters), ranking="global")
    assert (removed_count(plan, kv), removed_count(plan, ffn)) == (1, 8)  # 128 + 8 * 24 = 320, closest to 314


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("final", [0.2, 0.3, 0.45])
def test_a_run_of_looks_ends_where_a_single_cut_does(final, ranking, uniform):
    """Finer units that went in place of a coarse one early on could never come back, until none of them is left."""
    groups = llama_groups(layers=2, hidden=128, ffn=384, kv=4, rep=2, head_dim=16, vocab=2048)
    scores = random_scores(groups, BLOCK_KINDS, 3)
    plan = None
    for share in np.linspace(0, final, 30)[1:-1]:
        before = -1.0 if plan is None else plan.provenance["allocation"]["sparsity"]
        plan = allocate(
            groups, scores, Budget(share), ranking=ranking, uniform=uniform, beyond=plan, settle=False
        )  # fmt: skip
        assert before <= plan.provenance["allocation"]["sparsity"] <= share + 1e-9
    at_the_end = allocate(groups, scores, Budget(final), ranking=ranking, uniform=uniform, beyond=plan)
    at_once = allocate(groups, scores, Budget(final), ranking=ranking, uniform=uniform)
    assert at_the_end.kept == at_once.kept


def test_the_steps_of_a_family_keep_their_order():
    """Also where a more important block is so large that it is the cheaper one per parameter."""
    groups = llama_groups(layers=3, ffn=[2, 40, 10])
    scores = {"model.layers/layer": torch.tensor([10.0, 11.0, 900.0])}
    scores |= {g.name: torch.linspace(0, 3, g.units) for g in groups.of_kinds(["ffn_channel"])}
    families = select_families(groups, scores, ["layer", "ffn_channel"], Limits(uniform=False))
    size = parameters_left(groups, families)
    for ranking in ("local", "global"):
        found = rank(families, size, size, ranking)
        assert sorted(np.concatenate(found.places)) == list(range(2 + 1 + 39 + 9))
        for f, places in enumerate(found.places):
            assert (np.diff(places) > 0).all()
            assert (found.order[places] == f).all()


def test_nothing_is_cut_inside_a_block_that_goes():
    groups = llama_groups(layers=2, ffn=8)
    scores = random_scores(groups, ["ffn_channel"]) | {"model.layers/layer": torch.tensor([1e-9, 1.0])}
    block = 24 * 6 + 8 * 18 + 6
    plan = allocate(groups, scores, Budget((block + 5) / groups.total_parameters), ranking="global", uniform=False)
    assert plan.kept == {"model.layers/layer": (1,)}


def test_equal_scores_go_by_number():
    groups = llama_groups(layers=1, ffn=6)
    name = groups.of_kinds(["ffn_channel"])[0].name
    plan = allocate(groups, {name: torch.tensor([1.0, 0, 1, 0, 1, 0])}, Budget(unit_sparsity=4 / 6))
    assert plan.removed(name) == (0, 1, 3, 5)


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_protected_layers_are_untouched_and_the_budget_is_still_met(ranking):
    groups = llama_groups(layers=6, ffn=30)
    scores = random_scores(groups, BLOCK_KINDS)
    plan = allocate(groups, scores, Budget(0.2), ranking=ranking, uniform=False, protect_first=2, protect_last=1)
    assert {groups.named(n).layer for n in plan.kept} == {2, 3, 4}
    report = plan.provenance["allocation"]
    assert abs(report["parameters_left"] - 0.8 * report["parameters"]) <= 3 * 6 / 2
    assert (report["protect_first"], report["protect_last"]) == (2, 1)


def test_layer_ratios_override_the_share_and_the_protection():
    groups = llama_groups(layers=4, ffn=20)
    scores = random_scores(groups, ["ffn_channel"])
    plan = allocate(groups, scores, Budget(0.15), uniform=False, protect_first=1, layer_ratios={0: 0.1, 2: 0.5})
    removed = [removed_count(plan, g) for g in groups.of_kinds(["ffn_channel"])]
    assert (removed[0], removed[2]) == (2, 10)
    assert abs(removed[1] - removed[3]) <= 1
    report = plan.provenance["allocation"]
    assert abs(report["parameters_left"] - 0.85 * report["parameters"]) <= 3 * 6 / 2
    assert report["layer_ratios"] == {"0": 0.1, "2": 0.5}


def test_layer_ratios_beyond_the_budget_are_refused():
    groups = llama_groups(layers=2, ffn=20)
    scores = random_scores(groups, ["ffn_channel"])
    with pytest.raises(BudgetError, match="of layers or kinds alone remove"):
        allocate(groups, scores, Budget(0.1), uniform=False, layer_ratios={0: 0.5})


def test_uniform_output_cannot_treat_layers_differently():
    groups = llama_groups()
    scores = random_scores(groups, BLOCK_KINDS)
    for options in ({"protect_first": 1}, {"protect_last": 1}, {"layer_ratios": {0: 0.5}}):
        with pytest.raises(BudgetError, match="per-layer output"):
            allocate(groups, scores, Budget(0.1), **options)


@pytest.mark.parametrize("uniform", [True, False])
def test_blocks_go_by_importance_and_protected_ones_stay(uniform):
    groups = llama_groups(layers=6)
    scores = {"model.layers/layer": torch.tensor([0.0, 3, 1, 2, 5, 0.5])}
    free = allocate(groups, scores, Budget(unit_sparsity=0.5), uniform=uniform)
    assert free.kept == {"model.layers/layer": (1, 3, 4)}
    ends = allocate(groups, scores, Budget(unit_sparsity=0.5), uniform=uniform, protect_first=1, protect_last=1)
    assert ends.kept == {"model.layers/layer": (0, 4, 5)}
    with pytest.raises(BudgetError, match=r"largest reachable share is 0\.6667"):
        allocate(groups, scores, Budget(unit_sparsity=0.9), uniform=uniform, protect_first=1, protect_last=1)


def test_blocks_of_unequal_size_are_counted_one_by_one():
    groups = llama_groups(layers=3, ffn=[2, 20, 5])
    scores = {"model.layers/layer": torch.tensor([2.0, 1.0, 3.0])}
    block = 24 * 6 + 20 * 3 * 6 + 6
    plan = allocate(groups, scores, Budget(block / groups.total_parameters), uniform=False)
    assert plan.kept == {"model.layers/layer": (0, 2)}
    assert plan.provenance["allocation"]["parameters_left"] == groups.total_parameters - block


def test_refused_groups_are_never_touched():
    groups = llama_groups(layers=3, ffn=20)
    name = "model.layers.1.mlp/ffn_channel"
    groups = with_group(groups, name, refusals=("an operation without a rule",))
    scores = random_scores(groups, BLOCK_KINDS)
    plan = allocate(groups, scores, Budget(0.2), uniform=False)
    assert {groups.named(n).layer for n in plan.kept if n.endswith("ffn_channel")} == {0, 2}
    # for uniform output the whole family is lost: the refused layer would stay wider than the others
    assert set(allocate(groups, scores, Budget(0.1), kinds=["kv_group"]).kept) == {
        g.name for g in groups.of_kinds(["kv_group"])
    }
    with pytest.raises(BudgetError, match=r"no ffn_channel groups to cut .*an operation without a rule"):
        allocate(groups, scores, Budget(0.2))


def llama_7b():
    return llama_groups(layers=32, hidden=4096, ffn=11008, kv=32, rep=1, head_dim=128, vocab=32000, tied=False)


def test_unit_sparsity_reproduces_the_published_parameter_counts():
    """LLM-Pruner: 25 % of the groups of layers 4-29 leaves 5.42 of LLaMA-7B's 6.74 billion parameters."""
    groups = llama_7b()
    scores = random_scores(groups, BLOCK_KINDS)
    plan = allocate(
        groups, scores, Budget(unit_sparsity=0.25), kinds=BLOCK_KINDS, uniform=False, protect_first=4, protect_last=2
    )
    assert {len(k) for n, k in plan.kept.items() if n.endswith("kv_group")} == {24}
    assert {len(k) for n, k in plan.kept.items() if n.endswith("ffn_channel")} == {8256}
    report = plan.provenance["allocation"]
    assert round(report["parameters"] / 1e9, 2) == 6.74
    assert round(report["parameters_left"] / 1e9, 2) == 5.42
    assert round(100 * (1 - report["sparsity"]), 2) == 80.48
    assert report["budget"] == {"param_sparsity": None, "unit_sparsity": 0.25}


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_7b_shape_is_met_to_half_a_channel(ranking, uniform):
    groups = llama_7b()
    plan = allocate(groups, random_scores(groups, BLOCK_KINDS), Budget(0.2), ranking=ranking, uniform=uniform)
    report = plan.provenance["allocation"]
    channel = 3 * 4096 * (32 if uniform else 1)
    assert abs(report["parameters_left"] - 0.8 * report["parameters"]) <= channel / 2


def test_global_unit_sparsity_removes_that_share_of_all_units():
    groups = llama_groups(layers=3, ffn=17, kv=4)
    plan = allocate(
        groups, random_scores(groups, BLOCK_KINDS), Budget(unit_sparsity=0.3), ranking="global", uniform=False
    )
    removed = sum(removed_count(plan, g) for g in groups.of_kinds(BLOCK_KINDS))
    assert abs(removed - 0.3 * 3 * (17 + 4)) <= 0.5


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(2, 30), st.floats(0, 0.999), st.booleans())
def test_local_unit_sparsity_removes_the_nearest_number_of_units(kv, ffn, share, uniform):
    groups = llama_groups(layers=2, kv=kv, ffn=ffn)
    plan = allocate(groups, random_scores(groups, BLOCK_KINDS), Budget(unit_sparsity=share), uniform=uniform)
    for group in groups.of_kinds(BLOCK_KINDS):
        error = abs(removed_count(plan, group) - share * group.units)
        assert error <= 0.5 + 1e-9 or (error < 1 and len(kept_of(plan, group)) == 1)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("kinds", [["ffn_channel"], ["kv_group", "query_head"], ["hidden", "layer", "ffn_channel"]])
def test_max_sparsity_is_what_brute_force_finds(kinds, uniform):
    groups = llama_groups(layers=2, hidden=3, ffn=4, kv=2, rep=2)
    families = families_of(groups, kinds, uniform)
    scores = random_scores(groups, kinds)
    options = product(*[range(1, f[0].units + 1) for f in families])
    left = min(left_with(groups, scores, families, counts) for counts in options)
    found = max_sparsity(groups, kinds, uniform=uniform)
    assert found == 1 - left / groups.total_parameters
    assert (
        allocate(groups, scores, Budget(found), kinds=kinds, uniform=uniform).provenance["allocation"]["sparsity"]
        == found
    )
    with pytest.raises(BudgetError, match="largest reachable sparsity"):
        allocate(groups, scores, Budget(found + 1 / groups.total_parameters), kinds=kinds, uniform=uniform)


def test_max_sparsity_knows_rounding_protection_and_feasibility():
    groups = llama_groups(layers=2, ffn=12)
    total, channel = groups.total_parameters, 3 * 6
    assert max_sparsity(groups, ["ffn_channel"], round_to=4) == pytest.approx(2 * 8 * channel / total)
    assert max_sparsity(groups, ["ffn_channel"], uniform=False, protect_last=1) == pytest.approx(11 * channel / total)
    largest = max_sparsity(groups, ["ffn_channel"], feasible=lambda name, count: count >= 5)
    assert largest == pytest.approx(2 * 7 * channel / total)


def test_the_class_is_asked_about_few_counts_and_never_overruled():
    groups = llama_groups(layers=3, ffn=1000, kv=6)
    asked = []

    def feasible(name, count):
        asked.append((name, count))
        return count % 50 == 0 or (name.endswith("kv_group") and count in (2, 3))

    for ranking in ("local", "global"):
        plan = allocate(groups, random_scores(groups, BLOCK_KINDS), Budget(0.3), ranking=ranking, feasible=feasible)
        counts = {g.family: len(kept_of(plan, g)) for g in groups.of_kinds(BLOCK_KINDS)}
        assert counts["model.layers.*.mlp/ffn_channel"] % 50 == 0
        assert counts["model.layers.*.self_attn/kv_group"] in (2, 3, 6)
    assert {name for name, _ in asked} == set(counts)
    assert len(set(asked)) < 250
    assert max_sparsity(groups, ["ffn_channel"], feasible=feasible) == pytest.approx(
        3 * 950 * 18 / groups.total_parameters
    )


def test_per_layer_output_does_not_ask_the_class():
    groups = llama_groups(ffn=20)
    scores = random_scores(groups, ["ffn_channel"])
    free = allocate(groups, scores, Budget(0.2), uniform=False)
    assert allocate(groups, scores, Budget(0.2), uniform=False, feasible=lambda name, count: False) == free


def test_a_share_of_units_respects_the_class():
    groups = llama_groups(ffn=20)
    plan = allocate(
        groups, random_scores(groups, ["ffn_channel"]), Budget(unit_sparsity=0.5), feasible=lambda _, c: c in (1, 8, 13)
    )
    assert {len(k) for k in plan.kept.values()} == {8}


def test_nothing_is_removed_at_sparsity_zero():
    groups = llama_groups()
    for budget in (Budget(0.0), Budget(unit_sparsity=0.0)):
        assert allocate(groups, random_scores(groups, KINDS), budget).kept == {}


def test_provenance_records_the_decision():
    groups = llama_groups()
    report = allocate(groups, random_scores(groups, ["ffn_channel"]), Budget(0.1), round_to=2).provenance["allocation"]
    assert report["budget"] == {"param_sparsity": 0.1, "unit_sparsity": None}
    assert (report["ranking"], report["uniform"], report["round_to"]) == ("local", True, 2)
    assert report["kinds"] == ["ffn_channel"]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"param_sparsity": 0.2, "unit_sparsity": 0.2}, {"param_sparsity": 1.0}, {"unit_sparsity": -0.1},
     {"param_sparsity": float("nan")}, {"param_sparsity": 20}],
)  # fmt: skip
def test_budgets_out_of_range_are_refused(arguments):
    with pytest.raises(BudgetError, match=r"exactly one|expected a fraction in \[0, 1\)"):
        Budget(**arguments)


FFN_0 = "model.layers.0.mlp/ffn_channel"


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        ({FFN_0: torch.tensor([1, 2, float("nan"), 4, 5])}, {}, NonFiniteError, f"{FFN_0}: 1 of 5 scores"),
        ({FFN_0: torch.tensor([1, 2, float("inf"), 4, 5])}, {}, NonFiniteError, FFN_0),
        ({FFN_0: torch.ones(4)}, {}, PlanError, f"{FFN_0} have shape"),
        ({FFN_0: None}, {}, PlanError, f"{FFN_0} has no scores"),
        ({"nowhere": torch.ones(2)}, {}, PlanError, "no group 'nowhere'"),
        ({}, {"kinds": ["expert"]}, BudgetError, "no expert groups to cut .it has ffn_channel, hidden"),
        ({}, {"kinds": ["table"]}, BudgetError, "looked up by token number"),
        ({}, {"kinds": []}, BudgetError, "no kinds to cut"),
        ({}, {"uniform": False, "protect_first": 9}, BudgetError, "every layer is protected"),
        ({}, {"uniform": False, "protect_first": -1}, BudgetError, "cannot be negative"),
        ({}, {"uniform": False, "layer_ratios": {7: 0.5}}, BudgetError, "names layer 7"),
        ({}, {"uniform": False, "layer_ratios": {1: 1.0}}, BudgetError, "share of 1.0 in layer 1"),
        ({}, {"kind_ratios": {"kv_group": 0.5}}, BudgetError, "kind kv_group, which is not among those"),
        ({}, {"kind_ratios": {"ffn_channel": 1.0}}, BudgetError, r"ffn_channel=1: the share .* must lie in \[0, 1\)"),
        ({}, {"round_to": 0}, BudgetError, "round_to is 0"),
        ({}, {"ranking": "best"}, BudgetError, "'local', 'global' or 'search'"),
    ],
)
def test_bad_input_is_named(change, options, error, words):
    groups = llama_groups()
    scores = {**random_scores(groups, ["ffn_channel"]), **change}
    with pytest.raises(error, match=words) as raised:
        allocate(groups, {n: s for n, s in scores.items() if s is not None}, Budget(0.1), **options)
    assert isinstance(raised.value, SecateurError)


def test_layers_that_differ_already_need_per_layer_output():
    groups = llama_groups(ffn=[3, 4, 5])
    scores = random_scores(groups, ["ffn_channel"])
    with pytest.raises(BudgetError, match="layers differ already"):
        allocate(groups, scores, Budget(0.1))
    assert allocate(groups, scores, Budget(0.1), uniform=False).kept


def test_a_share_of_a_kind_is_rounded_to_the_nearest_count_that_the_class_can_express():
    groups = llama_groups(ffn=20)
    scores = random_scores(groups, ["ffn_channel"])
    plan = allocate(groups, scores, None, kind_ratios={"ffn_channel": 0.5}, feasible=lambda _, count: count in (4, 13))
    assert {len(k) for k in plan.kept.values()} == {13}


def test_the_share_reached_of_each_kind_is_told():
    groups = llama_groups(layers=4, ffn=20, kv=6, rep=1)
    budget = Budget(0.3)
    plan = allocate(groups, random_scores(groups, BLOCK_KINDS), budget, kind_ratios={"kv_group": 0.25})
    report = plan.provenance["allocation"]
    told = report["shares"]
    assert told["kv_group"] == {"asked": 0.25, "units": 24, "removed": 4, "share": 0.166667, "parameters": 4 * 48}
    gone = sum(removed_count(plan, g) for g in groups.of_kinds(["ffn_channel"]))
    assert told["ffn_channel"]["asked"] is None and told["ffn_channel"]["removed"] == gone > 0
    assert sum(t["parameters"] for t in told.values()) == report["parameters"] - report["parameters_left"]


@pytest.mark.parametrize("uniform", [True, False])
def test_what_lies_in_removed_layers_does_not_count_towards_a_share(uniform):
    groups = llama_groups(layers=4, ffn=10)
    kinds = ["layer", "ffn_channel"]
    ratios = {"layer": 0.5, "ffn_channel": 0.2}
    plan = allocate(groups, random_scores(groups, kinds), None, kind_ratios=ratios, uniform=uniform)
    told = plan.provenance["allocation"]["shares"]
    facts = {kind: (t["units"], t["removed"], t["share"]) for kind, t in told.items()}
    assert facts == {"layer": (4, 2, 0.5), "ffn_channel": (20, 4, 0.2)}
    assert told["ffn_channel"]["parameters"] == 4 * 3 * 6
