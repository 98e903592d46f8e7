"""Gate importance: against finite differences of real gates, weight gradients, leave-one-out; what has no gate."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from scipy.stats import spearmanr

from secateur.discovery import discover
from secateur.errors import PlanError
from secateur.importance import Gate, Taylor, leave_one_out, score
from secateur.importance.gates import Gates
from secateur.importance.streaming import backward
from secateur.surgery.input_masks import InputMasks

STEP = 3e-3  # norms and softmax compute in float32 even here


def ids(rows, length=12, seed=0):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, groups, sequence):
    """dL/dz of every unit for one sequence."""
    gates, found = Gates(model, groups), {}

    def take():
        found.update({g.name: gates.of(g) for g in groups})

    with gates.open():
        backward(model, gates.matrices, [sequence], gates.visit, on_batch=take)
    return found


def loss_with(model, groups, group, unit, gate, sequence):
    """The loss with one unit's activation multiplied wherever a linear module reads it."""
    masks = InputMasks(model, groups)
    masks.set({group.name: [u for u in range(group.units) if u != unit]})
    for handle in masks._handles:  # the hooks multiply by a mask of zeros: give them the gate instead
        hook = handle.hooks_dict_ref()[handle.id]
        held = hook.__closure__[0].cell_contents
        held["mask"] = torch.where(held["mask"].bool(), 1.0, gate).double()
    try:
        with torch.no_grad():
            logits = model(input_ids=sequence, use_cache=False).logits  # its own loss is float32
            return float(torch.nn.functional.cross_entropy(logits[0, :-1], sequence[0, 1:]))
    finally:
        masks.remove()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "phi3", "bloom"])
def test_the_gradient_is_that_of_a_gate(model_type):
    model = zoo.tiny_model(model_type).double()
    groups = discover(model)
    chosen = groups.of_kinds(groups.kinds_in_blocks())
    sequence = ids(1)
    found = gradients(model, chosen, sequence)
    for group in chosen[:4]:
        for unit in (0, group.units - 1):
            up, down = (loss_with(model, groups, group, unit, 1 + s * STEP, sequence) for s in (1, -1))
            assert float(found[group.name][unit]) == pytest.approx((up - down) / (2 * STEP), rel=2e-3, abs=2e-5)


def test_scores_are_made_of_the_gradients_of_single_sequences():
    model = zoo.tiny_model("llama")
    chosen = discover(model).of_kinds(["ffn_channel", "kv_group"])
    batches = [ids(3), ids(2, 7, seed=1)]
    by_sequence = [(row.shape[0] - 1, gradients(model, chosen, row[None])) for batch in batches for row in batch]
    found = {order: score(model, chosen, batches, Gate(order)) for order in ("fisher", 1, "mixed")}
    for group in chosen:
        first = sum(g[group.name] for _, g in by_sequence) / 5
        second = sum(t * g[group.name].square() for t, g in by_sequence) / 5
        expected = {"fisher": second / 2, 1: first.abs(), "mixed": (second / 2 - first).abs()}
        for order, values in expected.items():
            torch.testing.assert_close(found[order][group.name], values.float(), rtol=1e-4, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_modules_and_matrices_give_the_same_gradient(monkeypatch):
    """x dL/dx over tokens is W G over a column: the way of stacked experts, taken by a linear module."""
    model = zoo.tiny_model("llama").double()
    chosen = discover(model).of_kinds(["ffn_channel", "kv_group"])
    sequence = ids(1)
    by_hooks = gradients(model, chosen, sequence)
    monkeypatch.setattr("secateur.importance.gates.input_dim", lambda module: None)
    by_weights = gradients(model, chosen, sequence)
    for name, values in by_hooks.items():
        torch.testing.assert_close(values, by_weights[name], rtol=1e-5, atol=1e-12)  # gates are float32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputed_activations_change_nothing(checkpointing):
    model = zoo.tiny_model("llama")
    chosen = discover(model).of_kinds(["ffn_channel"])
    plain = score(model, chosen, [ids(2)], Gate())
    again = score(model, chosen, [ids(2)], Gate(gradient_checkpointing=checkpointing))
    for name, values in plain.items():
        torch.testing.assert_close(values, again[name], rtol=1e-5, atol=0)


def test_frozen_weights_have_gates_and_stay_as_they_are():
    model = zoo.tiny_model("llama").requires_grad_(False)
    chosen = discover(model).of_kinds(["ffn_channel"])
    before = copy.deepcopy(model.state_dict())
    free = score(zoo.tiny_model("llama"), chosen, [ids(2)], Gate())
    frozen = score(model, chosen, [ids(2)], Gate())
    assert all(torch.equal(free[n], frozen[n]) for n in free)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_channels_of_experts_have_gates(model_type):
    model = zoo.tiny_model(model_type)
    chosen = discover(model).of_kinds(["expert_channel"])
    found = score(model, chosen, [ids(4)], Gate())
    assert chosen and all((found[g.name] >= 0).all() and (found[g.name] > 0).any() for g in chosen)


def test_a_layer_has_no_gate():
    model = zoo.tiny_model("llama")
    with pytest.raises(PlanError, match=r"no matrix reads its units.*taylor-1"):
        score(model, discover(model).of_kinds(["layer"]), [ids(1)], Gate())
    with pytest.raises(ValueError, match="nothing to reduce"):
        score(model, discover(model).of_kinds(["ffn_channel"]), [ids(1)], Gate(), "max")


@pytest.fixture(scope="module")
def removals(trained, tokenizer, text_file):
    """Sequences that the model knows, its groups, and what each of their units costs that is left out alone."""
    text = tokenizer(text_file.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    batch = text[0, : 32 * 32].view(32, 32)
    groups = discover(trained).of_kinds(["ffn_channel", "kv_group"])
    return batch, groups, leave_one_out(trained, groups, [batch])


def agreement(model, removals, kind, criterion):
    """Rank correlation with what removal costs, over all units of a kind."""
    batch, groups, truth = removals
    chosen = [g for g in groups if g.kind == kind]
    found = score(model, chosen, [batch], criterion)
    return spearmanr(*(torch.cat([s[g.name] for g in chosen]) for s in (found, {n: t.abs() for n, t in truth.items()})))


@pytest.mark.parametrize("order, ffn", [("fisher", 0.85), (1, 0.9), ("mixed", 0.95)])
def test_it_agrees_with_what_removal_costs(trained, removals, order, ffn):
    assert agreement(trained, removals, "ffn_channel", Gate(order)).statistic > ffn
    assert agreement(trained, removals, "kv_group", Gate(order)).statistic > 0.75


@pytest.mark.parametrize("gate, taylor", [("fisher", 2), (1, 1), ("mixed", 1)])
def test_it_ranks_channels_better_than_weights_do(trained, removals, gate, taylor):
    better, other = (agreement(trained, removals, "ffn_channel", c) for c in (Gate(gate), Taylor(order=taylor)))
    assert better.statistic > other.statistic
