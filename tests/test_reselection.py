"""Units chosen again block by block: against a loop by hand, in what order, and what stays as it was."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import zoo
from hand_groups import llama_groups

from secateur.allocation import Budget
from secateur.discovery import discover
from secateur.errors import NonFiniteError
from secateur.importance import Gate, score
from secateur.methods import auto_steps
from secateur.methods.auto import Auto, run
from secateur.methods.reselection import reselected
from secateur.plan import PruningPlan
from secateur.surgery import mask, slice


@pytest.fixture(scope="module")
def tokens(tokenizer, text_file):
    ids = tokenizer(text_file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    return ids[: 24 * 32].view(24, 32)


def test_each_block_is_scored_in_the_model_as_it_is_cut_before_it(trained, tokens):
    before = copy.deepcopy(trained.state_dict())
    settings = Auto(Budget(0.3), {"gate": Gate()}, uniform=True, hidden=False, ranking="local", compensation=None)
    plain = run(trained, [tokens], settings)
    again = run(trained, [tokens], Auto(**{**vars(settings), "reselect": True}))
    assert again.plan.widths(tuple(plain.groups)) == plain.plan.widths(tuple(plain.groups))
    assert again.plan.kept != plain.plan.kept
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())

    groups, found = discover(trained), {}
    for layer in range(3):  # by hand
        chosen = [g for g in plain.groups if g.layer == layer]
        with mask(trained, PruningPlan(found, {n: groups.named(n).units for n in found}), groups):
            scores = score(trained, chosen, [tokens], Gate())
        for g in chosen:
            number = len(plain.plan.kept[g.name])
            found[g.name] = tuple(sorted(scores[g.name].topk(number).indices.tolist()))
    assert again.plan.kept == found
    small = slice(trained, PruningPlan(found, again.plan.units), groups)
    ids = tokens[:2]
    torch.testing.assert_close(again.model(ids).logits, small(ids).logits)


def test_with_compensation_what_was_cut_before_is_solved_again_first(trained, tokens, monkeypatch):
    layers = []

    @contextmanager
    def held(*arguments):
        with whole(*arguments) as done:
            layers.append([int(c.module.split(".")[2]) for c in done])
            yield done

    whole = auto_steps.compensated
    monkeypatch.setattr(auto_steps, "compensated", held)
    run(trained, [tokens], Auto(Budget(0.3), {"gate": Gate()}, uniform=True, hidden=False, reselect=True))
    assert layers[:2] == [[0], [1]] and len(layers) == 2  # the last block is cut with the whole plan


def test_what_must_stay_stays_and_what_spans_layers_is_left_alone():
    groups = llama_groups(layers=2, ffn=8, kv=4, hidden=8)
    first = next(g for g in groups if g.kind == "ffn_channel")
    groups = replace(groups, groups=tuple(replace(g, stays=(0,)) if g is first else g for g in groups))
    named = {g.name: g for g in groups}
    hidden = next(g.name for g in groups if g.kind == "hidden")
    ffn = [g.name for g in groups if g.kind == "ffn_channel"]
    kept = {hidden: (0, 1, 2), ffn[1]: (0, 1), ffn[0]: (0, 1, 2)}
    plan = PruningPlan(kept, {name: named[name].units for name in kept}, {"made": "here"})
    asked, inside = [], []

    @contextmanager
    def held(part):
        inside.append(part.kept)
        yield
        inside.remove(part.kept)

    def scored(some):
        asked.append((*(g.name for g in some), len(inside)))
        return {g.name: torch.arange(float(g.units)) for g in some}

    found = reselected(plan, groups, scored, held)
    assert asked == [(ffn[0], 0), (ffn[1], 1)] and not inside
    assert found.kept == {hidden: (0, 1, 2), ffn[0]: (0, 6, 7), ffn[1]: (6, 7)}
    assert found.provenance == plan.provenance


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_each_group_is_scored_by_its_own_criterion(kind, monkeypatch):
    """Stacked experts, which cannot be compensated, too; and the model is whole again if scoring fails on the way."""
    model = zoo.tiny_model(kind)
    rows = torch.randint(3, 60, (16, 24), generator=torch.Generator().manual_seed(0))
    before, asked, fails = copy.deepcopy(model.state_dict()), [], 0

    def scored(model, groups, batches, criterion, reduction):
        asked.append((type(criterion).__name__, frozenset(g.name for g in groups)))
        if len(asked) == fails:
            raise NonFiniteError("not finite")
        return whole(model, groups, batches, criterion, reduction)

    whole = auto_steps.score
    monkeypatch.setattr(auto_steps, "score", scored)
    settings = Auto(Budget(0.2), uniform=True, hidden=False, reselect=True)
    result = run(model, [rows], settings)
    names = {"taylor-2": "Taylor", "gate": "Gate"}
    again = [(name, group) for name, some in asked[2:] for group in some]
    assert again and all(names[result.criteria[group]] == name for name, group in again)
    assert {group for _, group in again} == set(result.plan.kept)
    fails = len(asked)
    asked.clear()
    with pytest.raises(NonFiniteError):
        run(model, [rows], settings)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_from_the_command_line(secateur, checkpoint_folder, text_file, tmp_path):
    common = ["--sparsity", "0.3", "--calibration", text_file, "--samples", "16", "--seq-len", "32", "--reselect"]
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "a", *common, "--uniform")
    assert code == 0, err
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["protocol"]["settings"]["reselect"] and results["params"]["sparsity"] == pytest.approx(0.3, abs=0.01)
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "b", *common, "--method", "llm-pruner")
    assert code == 2 and "reselect is of the method auto" in err and not (tmp_path / "b").exists()
