import json

import numpy as np
import pytest
from hand_groups import alive_elements, count_alive, llama_groups
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import PlanError
from secateur.groups import Group
from secateur.plan import PruningPlan, format_ranges, parse_ranges

FFN, KV, QUERY = (
    "model.layers.1.mlp/ffn_channel",
    "model.layers.0.self_attn/kv_group",
    "model.layers.2.self_attn/query_head",
)
LAYERS = "model.layers/layer"
UNITS = st.sets(st.integers(0, 60)).map(lambda s: tuple(sorted(s)))


@st.composite
def kept_units(draw, groups):
    """For some prunable groups, a choice of units that leaves at least one."""
    kept = {}
    for group in groups.prunable:
        if draw(st.booleans()):
            units = draw(st.sets(st.integers(0, group.units - 1), min_size=1))
            kept[group.name] = tuple(sorted(units))
    return kept


def plan_of(groups, kept, **provenance):
    return PruningPlan(kept, {name: groups.named(name).units for name in kept}, provenance)


@given(UNITS)
def test_ranges_round_trip(units):
    assert parse_ranges(format_ranges(units)) == units


def test_ranges_by_hand():
    assert format_ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert format_ranges(()) == ""
    assert parse_ranges("") == ()


@pytest.mark.parametrize("text", ["3,2", "1-3,3", "5-3", "1,1", "-3", "a", "0-2,1-4", "1.5"])
def test_ranges_that_do_not_ascend_are_refused(text):
    with pytest.raises(ValueError, match=r"ascend|invalid literal"):
        parse_ranges(text)


@given(st.dictionaries(st.text(min_size=1), UNITS), st.dictionaries(st.text(), st.integers() | st.text()))
def test_json_round_trip(kept, provenance):
    plan = PruningPlan(kept, dict.fromkeys(kept, 61), provenance)
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_save_and_load(tmp_path):
    plan = PruningPlan({"a": (0, 2)}, {"a": 3}, {"seed": 1})
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    with pytest.raises(PlanError, match="cannot read the plan"):
        PruningPlan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 1}', '{"schema": 2, "groups": {}}', '{"schema": 1, "groups": {"a": {"units": 3}}}',
     '{"schema": 1, "groups": {"a": {"units": 3, "kept": "2-0"}}}', '{"schema": 1, "groups": {"a": []}}'],
)  # fmt: skip
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PlanError, match=r"not a pruning plan|schema 2"):
        PruningPlan.from_json(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "it is empty"), ('{"schema": 1,', "cut short .*line 1, column 14"),
     ('{"model_type": "llama"}', "lacks `schema`"),
     ('{"schema": 1, "groups": {"a": []}}', 'group a is \\[\\], where {"units"'),
     ('{"schema": 1, "groups": {}, "provenance": []}', "provenance")],
)  # fmt: skip
def test_a_file_that_is_no_plan_is_named_with_what_was_expected(tmp_path, content, words):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(PlanError, match=f"the plan .*config.json is not a pruning plan: .*{words}"):
        PruningPlan.load(file)
    with pytest.raises(PlanError, match=f"{tmp_path}: it is a folder; give the file"):
        PruningPlan.load(tmp_path)


@given(st.data())
def test_what_is_left_agrees_with_element_masks(data):
    groups = llama_groups(fused=data.draw(st.booleans()))
    kept = data.draw(kept_units(groups))
    alive = alive_elements(groups, kept)
    assert groups.remaining_parameters(kept) == count_alive(groups, kept)
    shapes = groups.remaining_shapes(kept)
    assert sum(int(np.prod(s)) for s in shapes.values()) == sum(int(m.sum()) for m in alive.values())
    for name, dims in groups.kept_positions(kept).items():
        for dim, positions in dims.items():
            rest = tuple(d for d in range(alive[name].ndim) if d != dim)
            np.testing.assert_array_equal(positions, np.flatnonzero(alive[name].any(axis=rest)))
            assert shapes[name][dim] == len(positions)


def test_total_parameters_count_tied_weights_once_and_no_buffers():
    groups = llama_groups(layers=1, hidden=6, ffn=5, kv=2, rep=2, head_dim=2, vocab=7)
    assert groups.total_parameters == 7 * 6 + 6 + (8 + 4 + 4 + 8) * 6 + 3 * 5 * 6 + 6


def test_removed_layers_take_their_parameters_along():
    groups = llama_groups(layers=3)
    kept = {LAYERS: (0, 2), FFN: (1,)}
    assert groups.removed_blocks(kept) == ("model.layers.1",)
    assert groups.kept_positions(kept) == {}
    assert not any(name.startswith("model.layers.1.") for name in groups.remaining_shapes(kept))


@pytest.mark.parametrize(
    ("name", "family", "layer"),
    [
        ("model.layers.12.mlp/ffn_channel", "model.layers.*.mlp/ffn_channel", 12),
        ("transformer.h.3/ffn_channel", "transformer.h.*/ffn_channel", 3),
        ("model.layers.1.experts.7.w1/other.2", "model.layers.*.experts.*.w1/other.*", 1),
        ("hidden", "hidden", None),
        ("model.layers/layer", "model.layers/layer", None),
    ],
)
def test_families_and_layers(name, family, layer):
    group = Group(name, "other", 1)
    assert (group.family, group.layer) == (family, layer)


@given(st.data())
def test_composing_equals_cutting_twice(data):
    groups = llama_groups(kv=3, rep=3)
    first = plan_of(groups, data.draw(kept_units(groups)), step=1, seed=0)
    removed = groups.removed_blocks(first.kept)
    survivors = [g for g in groups.prunable if not any(f"{b}." in g.name for b in removed)]
    layer_number = {old: new for new, old in enumerate(first.kept.get(LAYERS, range(3)))}
    second, expected = {}, {n: set(k) for n, k in first.kept.items()}
    for group in survivors:
        before = first.kept.get(group.name, tuple(range(group.units)))
        places = sorted(data.draw(st.sets(st.integers(0, len(before) - 1), min_size=1)))
        name = group.name
        if group.layer is not None:
            name = name.replace(f"layers.{group.layer}.", f"layers.{layer_number[group.layer]}.")
        second[name] = (tuple(places), len(before))
        expected[group.name] = {before[p] for p in places}
    later = PruningPlan({n: k for n, (k, _) in second.items()}, {n: u for n, (_, u) in second.items()}, {"step": 2})
    whole = first.compose(later)
    assert {n: set(k) for n, k in whole.kept.items()} == expected
    assert whole.provenance == {"step": 2, "seed": 0}
    whole.check(groups)


def test_plans_that_do_not_follow_each_other_are_refused():
    with pytest.raises(PlanError, match="the first leaves 2 units of a, the second starts from 3"):
        PruningPlan({"a": (0, 2)}, {"a": 3}).compose(PruningPlan({"a": (0, 1)}, {"a": 3}))


@given(st.data())
def test_diff_is_empty_only_for_equal_cuts(data):
    groups = llama_groups()
    one, other = (plan_of(groups, data.draw(kept_units(groups))) for _ in range(2))
    difference = one.diff(other)
    assert one.diff(one) == {}
    assert {n: (b, a) for n, (a, b) in difference.items()} == other.diff(one)
    for group in groups.prunable:
        mine, theirs = (set(p.kept.get(group.name, range(group.units))) for p in (one, other))
        assert difference.get(group.name, ((), ())) == (tuple(sorted(mine - theirs)), tuple(sorted(theirs - mine)))


def test_removed_units():
    assert PruningPlan({"a": (0, 2, 3)}, {"a": 6}).removed("a") == (1, 4, 5)


@pytest.mark.parametrize(
    ("kept", "units", "words"),
    [
        ({FFN: (0,)}, {FFN: 6}, "made for another model.*5 units here, 6 in the plan"),
        ({FFN: (0, 5)}, {FFN: 5}, "keeps unit 5"),
        ({FFN: ()}, {FFN: 5}, "removes every unit"),
        ({FFN: (1, 0)}, {FFN: 5}, "do not ascend"),
        ({FFN: (-1, 0)}, {FFN: 5}, "do not ascend"),
        ({"model.embed_tokens/table": (0,)}, {"model.embed_tokens/table": 7}, "cannot be pruned: looked up by token"),
        ({"nowhere": (0,)}, {"nowhere": 2}, "no group 'nowhere'"),
    ],
)
def test_a_plan_for_another_model_is_refused(kept, units, words):
    with pytest.raises(PlanError, match=words):
        PruningPlan(kept, units).check(llama_groups())


def test_a_plan_that_keeps_everything_of_a_refused_group_is_fine():
    PruningPlan({"model.embed_tokens/table": tuple(range(7))}, {"model.embed_tokens/table": 7}).check(llama_groups())


def test_the_file_is_readable():
    text = PruningPlan({KV: (0, 2, 3), QUERY: (1,)}, {KV: 4, QUERY: 2}, {"seed": 7}).to_json()
    assert json.loads(text) == {
        "schema": 1,
        "provenance": {"seed": 7},
        "groups": {KV: {"units": 4, "kept": "0,2-3"}, QUERY: {"units": 2, "kept": "1"}},
    }
