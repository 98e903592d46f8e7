"""Compensation where the hidden dimension is cut: equations on what the cut model sees, exact cases, what is left."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import zoo
from test_compensation import ids, inputs_of

import secateur as sc
from secateur.compensation import Compensation, compensate_sliced, compensated
from secateur.cutting import cut
from secateur.discovery import discover
from secateur.errors import PlanError
from secateur.methods.llm_pruner import LLMPruner, run
from secateur.plan import PruningPlan
from secateur.readers import input_dim

DENSE, HALFWAY = Compensation("ridge", "dense"), Compensation("ridge", "halfway")


def plan_of(groups, shares):
    """The last units go of every group of these kinds: kind -> share that stays; of layers the first ones go."""
    kept = {}
    for group in groups.of_kinds(tuple(shares)):
        number = round(group.units * shares[group.kind])
        first = group.units - number if group.kind == "layer" else 0
        kept[group.name] = tuple(range(first, first + number))
    return PruningPlan(kept, {name: groups.named(name).units for name in kept})


def matrix(model, path):
    module = model.get_submodule(path)
    return module.weight.detach().T if input_dim(module) == 0 else module.weight.detach()


def away(model, dense):
    """How far logits on other text are from the dense model's, as a share of them."""
    batch = ids(8, seed=9)
    with torch.no_grad():
        wanted = dense(input_ids=batch).logits
        return float((model(input_ids=batch).logits - wanted).norm() / wanted.norm())


CASES = {
    "hidden alone": ("llama", {"hidden": 2 / 3}, 11),
    "rows go, too": ("llama", {"hidden": 2 / 3, "ffn_channel": 0.5, "kv_group": 2 / 3}, 15),
    "layers move up": ("llama", {"hidden": 2 / 3, "ffn_channel": 0.5, "layer": 0.5}, 7),
    "transposed, fused, with biases": ("gpt2", {"hidden": 2 / 3, "attention_head": 2 / 3, "ffn_channel": 0.5}, 8),
    "embeddings are scaled by the width": ("gemma", {"hidden": 2 / 3}, 10),
}


@pytest.mark.parametrize("how", [DENSE, HALFWAY], ids=["dense", "halfway"])
@pytest.mark.parametrize("case", CASES)
def test_each_matrix_is_damped_least_squares_on_what_the_cut_model_sees(case, how):
    """min |W_S z - V x|^2 + lambda d |V - W_SK|^2, x after all matrices before are solved, S the rows that stay.

    z is y, or halfway between x and y in the columns K that stay.
    """
    model_type, shares, number = CASES[case]
    model = zoo.tiny_model(model_type).double().train()
    before, dense = copy.deepcopy(model.state_dict()), copy.deepcopy(model).eval()
    groups, batches = discover(model), [ids(30), ids(12, seed=1)]
    plan = plan_of(groups, shares)
    plain = sc.slice(model, plan).eval()
    small, done = cut(model, plan, batches, how, groups)
    assert model.training and small.training and len(done) == number
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    small.eval()
    batch, positions = torch.cat(batches), groups.kept_positions(plan.kept)
    for made in done:
        path = made.module.replace("layers.1.", "layers.0.") if "layer" in shares else made.module
        name, columns = f"{made.module}.weight", input_dim(dense.get_submodule(made.module))
        rows = torch.from_numpy(positions[name].get(1 - columns, torch.arange(before[name].shape[1 - columns]).numpy()))
        x, z = inputs_of(small, path, batch), inputs_of(dense, made.module, batch)
        if how == HALFWAY:
            stay = torch.from_numpy(positions[name][columns])
            z[:, stay] = (x + z[:, stay]) / 2
        start, found = matrix(plain, path), matrix(small, path)
        damping = (made.strength * float(x.square().sum(0).mean())) ** 0.5 if made.strength < torch.inf else 1e9
        tokens = torch.cat([x, damping * torch.eye(x.shape[1])])
        results = torch.cat([z @ matrix(dense, made.module)[rows].T, damping * start.T])
        torch.testing.assert_close(found, torch.linalg.lstsq(tokens, results).solution.T, rtol=1e-5, atol=1e-8)
        assert made.after <= made.before
    solved = {f"{made.module}.weight" for made in done}
    if "layer" in shares:
        solved = {name.replace("layers.1.", "layers.0.") for name in solved}
    changed = {n for n, t in small.state_dict().items() if not torch.equal(t, plain.state_dict()[n])}
    assert changed <= solved  # biases, gains, embeddings, and an output layer tied to them are as they were cut
    assert away(small, dense) < away(plain, dense)


def test_dimensions_that_others_repeat_are_made_up_for_entirely():
    """Where the half that goes is a copy of the half that stays, norms are the same, and so are the logits."""
    model = zoo.tiny_model("llama").double()
    groups, state = discover(model), dict(model.named_parameters())
    hidden = groups.named("hidden")
    for m in hidden.members:
        if m.role == "producer":
            first, second = torch.from_numpy(m.index[:, 0]).chunk(2)
            tensor = state[m.parameter].data
            tensor.index_copy_(m.dim, second, tensor.index_select(m.dim, first))
    plan = plan_of(groups, {"hidden": 0.5})
    small, done = cut(model, plan, [ids(40)], DENSE, groups)
    assert all(made.before > 0.1 > 1e-5 > made.after for made in done)
    assert away(small, model) < 0.02 < 0.3 < away(sc.slice(model, plan), model)


def test_a_matrix_that_slicing_scaled_stays_scaled():
    """As where a class derives a scalar from a size: results are wanted as often over as the matrix is."""
    model = zoo.tiny_model("llama").double()
    groups, batches = discover(model), [ids(20)]
    plan = plan_of(groups, {"hidden": 2 / 3})
    plain, scaled = sc.slice(model, plan), sc.slice(model, plan)
    for layer in scaled.model.layers:
        layer.self_attn.v_proj.weight.data *= 4
        layer.self_attn.o_proj.weight.data /= 4
    for small in (plain, scaled):
        compensate_sliced(small, model, plan, batches, groups, DENSE)
    for a, b in zip(plain.model.layers, scaled.model.layers, strict=True):
        torch.testing.assert_close(4 * a.self_attn.v_proj.weight, b.self_attn.v_proj.weight)
    assert away(scaled, plain) < 1e-9


@pytest.mark.parametrize("how", [Compensation(), DENSE])
def test_what_does_not_touch_the_hidden_dimension_is_solved_as_ever(how):
    """In the model itself: plans that leave it whole, and of others the target `current`."""
    model = zoo.tiny_model("llama")
    groups, batches = discover(model), [ids(8)]
    shares = {"ffn_channel": 0.5, "kv_group": 2 / 3} | ({} if how == DENSE else {"hidden": 2 / 3})
    plan = plan_of(groups, shares)
    small, done = cut(model, plan, batches, how, groups)
    with compensated(model, plan, batches, how) as ever:
        wanted = sc.slice(model, plan)
    assert done == ever and {made.module.rpartition(".")[2] for made in done} == {"o_proj", "down_proj"}
    assert all(torch.equal(t, small.state_dict()[name]) for name, t in wanted.state_dict().items())


def test_what_cannot_be_compensated_is_refused():
    model = zoo.tiny_model("llama")
    groups = discover(model)
    plan = plan_of(groups, {"hidden": 2 / 3})
    with pytest.raises(PlanError, match="no linear module reads what goes"):
        cut(model, plan, [ids(4)], Compensation(), groups)
    small = sc.slice(model, plan)
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn\.q_proj sees other tokens in the dense model"):
        handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, a: (a[0][:, 1:],))
        try:
            compensate_sliced(small, model, plan, [ids(4)], groups, DENSE)
        finally:
            handle.remove()


def test_it_brings_back_much_of_what_the_cut_costs(trained, tokenizer, text_file):
    """Of a model that knows the text, whose output layer is tied to its embedding."""
    text = sc.load_corpus(str(text_file))
    tokens = sc.calibration_tokens(text, tokenizer, 64, 32, 0)
    plain = LLMPruner(sc.Budget(0.3), sc.Gate(), kinds=("hidden", "ffn_channel"))
    settings = [replace(plain, compensation=c) for c in (None, Compensation(), DENSE, HALFWAY)]
    found = [run(trained, [tokens], s) for s in settings]
    assert found[0].plan.kept == found[2].plan.kept and [len(f.compensated) for f in found] == [0, 3, 18, 18]
    dense, *cuts = (sc.perplexity(m, tokenizer, text, seq_len=32).value for m in (trained, *(f.model for f in found)))
    assert max(cuts[2:]) - dense < 0.7 * (min(cuts[:2]) - dense), (dense, cuts)
