"""Criterion audit: statistics against other implementations and by hand, costs against slicing, the command line."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr
from test_knowledge import state, unchanged

import secateur as sc
from secateur.errors import KnowledgeError
from secateur.evaluation import agreements, best, luck, removal_costs, removals
from secateur.evaluation.audit import Agreement, Interval, Removal, overlap, spearman
from secateur.groups import Group
from secateur.pipeline.auditing import verdicts
from secateur.plan import PruningPlan

values = st.lists(st.integers(-5, 5), min_size=3, max_size=30)


@given(values, st.randoms())
def test_the_rank_correlation_is_scipys(first, random):
    a = np.array(first, dtype=float)
    b = np.array(random.sample(first, len(first)), dtype=float)
    if len(set(first)) > 1:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    else:
        assert spearman(a, b) == 0.0
    assert spearman(a, b) == pytest.approx(spearman(rankdata(a), b), abs=1e-12)


def test_overlap_by_hand():
    truth = np.arange(10.0)
    assert overlap(truth, truth) == 1.0
    assert overlap(-truth, truth) == 0.0
    assert overlap(np.array([1.0, 9, 0, 3, 4, 5, 6, 7, 8, 2]), truth) == 0.5  # 0 and 2 are lowest; 0 and 1 are cheapest


def groups_of(units=20, stays=()):
    return [Group(f"layers.{i}.mlp/ffn_channel", "ffn_channel", units, stays=tuple(stays)) for i in range(2)]


def test_what_is_removed_is_drawn_alike_for_a_seed_and_within_what_groups_may_lose():
    chosen = groups_of(units=10, stays=(0, 1, 2, 3, 4, 5))
    found = removals(chosen, units=8, sets=8, share=0.9, seed=1)
    assert found == removals(chosen, units=8, sets=8, share=0.9, seed=1)
    assert found != removals(chosen, units=8, sets=8, share=0.9, seed=2)
    alone = [r for r in found if r.how == "alone"]
    assert len({(name, units) for r in alone for name, units in r.units.items()}) == len(alone) == 8
    for r in found:
        for units in r.units.values():
            assert not set(units) & set(range(6)) and len(set(units)) == len(units) <= 4


def test_numbers_that_say_nothing_are_refused():
    for arguments in ({"units": 7}, {"sets": 3}, {"share": 0.0}, {"share": 1.0}):
        with pytest.raises(KnowledgeError, match="8 or more"):
            removals(groups_of(), **{"units": 10, "sets": 10, "share": 0.1, "seed": 0} | arguments)
    with pytest.raises(KnowledgeError, match="4 units that may go"):
        removals(groups_of(units=3, stays=(0,)), units=10, sets=0, share=0.1, seed=0)


def test_a_criterion_that_knows_the_truth_is_found_out_among_others():
    truth = torch.rand(20, generator=torch.Generator().manual_seed(0))
    name = "layers.0.mlp/ffn_channel"
    removed = [Removal("ffn_channel", "alone", {name: (u,)}) for u in range(20)]
    scores = {
        "opposite": {name: -truth},
        "noise": {name: torch.rand(20, generator=torch.Generator().manual_seed(1))},
        "right": {name: 3 * truth + 1},
    }
    found = agreements(removed, truth.tolist(), scores, seed=0)
    first, as_good = best(found, "ffn_channel", "alone")
    assert first.criterion == "right" and not as_good
    assert (first.spearman.value, first.overlap.value, first.chance) == (1.0, 1.0, 0.2)
    by_name = {a.criterion: a for a in found}
    assert by_name["opposite"].spearman.value == -1.0 and by_name["opposite"].overlap.value == 0.0
    noise = by_name["noise"].spearman
    assert noise.low < noise.value < noise.high and noise.low < 0 < noise.high


def test_intervals_cover_what_repeated_samples_show():
    """About 19 of 20 intervals hold the correlation of the whole population."""
    generator = np.random.default_rng(0)
    name = "layers.0.mlp/ffn_channel"
    truth = generator.normal(size=2000)
    said = truth + generator.normal(size=2000)
    whole = spearman(said, truth)
    held = 0
    for repeat in range(40):
        chosen = generator.choice(2000, 60, replace=False)
        removed = [Removal("ffn_channel", "alone", {name: (int(u),)}) for u in chosen]
        (a,) = agreements(removed, truth[chosen].tolist(), {"c": {name: torch.from_numpy(said)}}, seed=repeat)
        held += a.spearman.low <= whole <= a.spearman.high
    assert held >= 34


def test_of_equals_those_whose_interval_reaches_the_best_are_named():
    def made(name, value, high):
        return Agreement(name, "k", "sets", 9, Interval(value, -1.0, high), Interval(0, 0, 0), 0.2)

    first, as_good = best([made("a", 0.5, 0.7), made("b", 0.6, 0.9), made("c", 0.1, 0.3)], "k", "sets")
    assert first.criterion == "b" and as_good == ["a"]


def test_few_units_leave_much_to_luck():
    """Random orders of eight and of eighty units, whose sets cost the sum of what their units cost."""
    generator = np.random.default_rng(0)

    def case(units):
        group = Group("g", "k", units)
        removed = [r for r in removals([group], units=8, sets=100, share=0.1, seed=0) if r.how == "sets"]
        cost = {"g": torch.from_numpy(generator.normal(size=units))}
        return removed, [r.predicted(cost) for r in removed]

    few, many = (luck(*case(units), "k", "sets", seed=0) for units in (8, 80))
    assert 0 < many < 0.3 < few < 1
    removed, changes = case(8)
    reached = []
    for _ in range(300):
        order = {"g": torch.from_numpy(generator.normal(size=8))}
        reached.append(spearman(np.array([r.predicted(order) for r in removed]), np.array(changes)))
    beyond = np.mean(np.array(reached) > luck(removed, changes, "k", "sets", seed=1))
    assert 0.01 < beyond < 0.12


def test_random_is_never_taken():
    figures = Interval(0.9, 0.8, 1.0), Interval(0, 0, 0), 0.2
    lower = Agreement("l2", "k", "sets", 9, Interval(0.5, 0.1, 0.7), *figures[1:])
    first, as_good = best([Agreement("random", "k", "sets", 9, *figures), lower], "k", "sets")
    assert first is lower and as_good == ["random"]
    (told,) = verdicts(
        [lower], [Removal("k", "sets", {"g": (u, (u + 1) % 8)}) for u in range(8)], [float(u) for u in range(8)], 0
    )
    assert not told["trusted"] and told["luck"] > 0.5  # although its interval lies above zero


def test_a_criterion_that_random_equals_is_not_trusted():
    """Eight units, all pairs: a lucky order is as good as one that says something."""
    removed = [Removal("k", "sets", {"g": (u, v)}) for u in range(40) for v in range(u)]
    costs = [float(sum(r.units["g"])) for r in removed]
    good = Agreement("l2", "k", "sets", 9, Interval(0.9, 0.8, 1.0), Interval(0, 0, 0), 0.2)
    for value, trusted in ((0.85, False), (0.1, True)):
        other = Agreement("random", "k", "sets", 9, Interval(value, value - 0.1, value + 0.1), Interval(0, 0, 0), 0.2)
        (told,) = verdicts([good, other], removed, costs, 0)
        assert told["trusted"] is trusted


def test_costs_are_those_of_slicing_and_the_model_is_restored(trained, tokenizer, text_file):
    model = copy.deepcopy(trained).double()
    groups, corpus = sc.discover(model), sc.load_corpus(text_file)
    chosen = groups.of_kinds(["ffn_channel", "kv_group"])
    removed = [r for r in removals(chosen, units=8, sets=8, share=0.3, seed=0) if r.kind == "ffn_channel"]
    before = state(model)
    seen = {}
    dense, changes = removal_costs(
        model, tokenizer, corpus, groups, removed, seq_len=32, samples=6,
        on_loss=lambda what, number, loss: seen.__setitem__((what, number), loss),
    )  # fmt: skip
    assert unchanged(model, before)
    assert dense.value == pytest.approx(
        sc.knowledge_distribution(model, tokenizer, corpus, seq_len=32, samples=6, ratios=(0.5,)).dense.value
    )
    for place in (0, len(removed) - 1):
        units = removed[place].units
        kept = {
            name: tuple(u for u in range(groups.named(name).units) if u not in gone) for name, gone in units.items()
        }
        plan = PruningPlan(kept, {name: groups.named(name).units for name in units})
        small = sc.slice(model, plan, groups, reloadable=False)
        none_gone, _ = removal_costs(small, tokenizer, corpus, sc.discover(small), [], seq_len=32, samples=6)
        assert changes[place] == pytest.approx(none_gone.loss - dense.loss, abs=1e-9)
    again = removal_costs(
        model, tokenizer, corpus, groups, removed, seq_len=32, samples=6, known=seen,
        on_loss=lambda *_: pytest.fail("measured again"),
    )  # fmt: skip
    assert again[1] == changes


def test_the_command_tells_which_criterion_to_take(secateur, checkpoint_folder, text_file, tmp_path):
    json_file, picture = tmp_path / "audit.json", tmp_path / "audit.svg"
    common = ["audit", checkpoint_folder, "--text", text_file, "--calibration", text_file, "--units", "8", "--sets",
              "8", "--seq-len", "16", "--samples", "4", "--kinds", "ffn_channel", "--json", json_file]  # fmt: skip
    code, out, err = secateur(*common, "--criteria", "l2,taylor-1", "--picture", picture)
    assert code == 0, err
    assert "ffn_channel: " in out and picture.read_text(encoding="utf-8").startswith("<?xml")
    results = json.loads(json_file.read_text())
    assert {a["criterion"] for a in results["agreements"]} == {"l2", "taylor-1"}
    assert len(results["removals"]) == 16 and all(set(r["scores"]) == {"l2", "taylor-1"} for r in results["removals"])
    assert results["verdicts"][0]["by"] == "sets" and results["protocol"]["text"]["windows"] == 4
    assert not (tmp_path / "audit.json.work").exists()
    code, _, err = secateur(*common, "--resume")  # other criteria, the same removals
    assert code == 0, err
    again = json.loads(json_file.read_text())
    assert [r["change"] for r in again["removals"]] == pytest.approx([r["change"] for r in results["removals"]])
    code, _, err = secateur(*common, "--resume", "--seed", "7")
    assert code == 2 and "leave out --resume" in err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--criteria", "l2,wanda"], "no criterion wanda"),
        (["--units", "3"], "8 or more"),
        (["--kinds", "hidden_layer"], "no kind of unit"),
        (["--picture", "audit.txt"], "names no format of pictures"),
        (["--json", "nowhere/audit.json"], "cannot be written"),
        (["--resume"], "--json FILE"),
    ],
)
def test_wrong_input_is_told_in_one_line(options, words, secateur, checkpoint_folder, text_file, tmp_path):
    code, _, err = secateur("audit", checkpoint_folder, "--text", text_file, "--calibration", text_file, *options)
    assert code == 2 and words in err and "Traceback" not in err
