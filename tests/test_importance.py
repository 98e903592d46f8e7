"""Every formula against brute force with whole gradients; the streaming against what it promises."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from secateur.discovery import discover
from secateur.discovery.trace import plain_forward
from secateur.errors import NonFiniteError
from secateur.groups import Group, Member
from secateur.importance import CRITERIA, REDUCTIONS, Magnitude, Random, Taylor, leave_one_out, score
from secateur.importance.streaming import backward

KINDS = ["ffn_channel", "kv_group", "query_head", "hidden", "layer"]


@pytest.fixture(scope="module")
def batch():
    return torch.randint(2, 300, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(trained):
    return copy.deepcopy(trained).double()


def whole_gradients(model, ids):
    model = copy.deepcopy(model)
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def salience(name, model, ids):
    """Element-wise salience by definition, from gradients held whole."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    mean = whole_gradients(model, ids)
    fisher = {n: torch.zeros_like(w) for n, w in weights.items()}
    for row in ids:
        for n, g in whole_gradients(model, row[None]).items():
            fisher[n] += g.square() / len(ids)
    return {
        "l1": {n: w.abs() for n, w in weights.items()},
        "l2": {n: w.square() for n, w in weights.items()},
        "taylor-vector": {n: w * mean[n] for n, w in weights.items()},
        "taylor-1": {n: (w * mean[n]).abs() for n, w in weights.items()},
        "taylor-2": {n: w.square() * fisher[n] for n, w in weights.items()},
        "taylor-mixed": {n: (w * mean[n] - 0.5 * w.square() * fisher[n]).abs() for n, w in weights.items()},
    }[name]


def by_hand(group, elements, reduction, vector):
    """Scores with loops over units, members and positions."""
    reduce = {"sum": sum, "max": max, "prod": np.prod, "mean": np.mean, "first": lambda v: v[0]}[reduction]
    scores = []
    for u in range(group.units):
        values = []
        for m in group.members:
            positions = [elements[m.parameter].select(m.dim, int(p)) for p in m.index[u]]
            values.append(float(sum(abs(p.sum()) if vector else p.sum() for p in positions)))
        if group.blocks:
            own = [t for n, t in elements.items() if n.startswith(group.blocks[u] + ".")]
            values = [float(abs(t.sum()) if vector else t.sum()) for t in own]
        scores.append(reduce(values))
    return torch.tensor(scores)


@pytest.mark.parametrize("name", [n for n in CRITERIA if n != "random" and not n.startswith("gate")])
def test_every_formula_against_whole_gradients(name, model, batch):
    groups = discover(model).of_kinds(KINDS)
    elements = salience(name, model, batch)
    scores = score(model, groups, [batch], CRITERIA[name])
    for group in groups:
        expected = by_hand(group, elements, "sum", name == "taylor-vector")
        torch.testing.assert_close(scores[group.name], expected.float(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["l2", "taylor-1"])
def test_every_reduction_serves_every_criterion(reduction, name, model, batch):
    groups = discover(model).of_kinds(["ffn_channel", "kv_group"])
    elements = salience(name, model, batch)
    scores = score(model, groups, [batch], CRITERIA[name], reduction)
    for group in groups:
        torch.testing.assert_close(
            scores[group.name], by_hand(group, elements, reduction, False).float(), rtol=2e-4, atol=1e-9
        )


@pytest.mark.parametrize("name", ["taylor-vector", "taylor-1", "taylor-2", "taylor-mixed"])
def test_batches_do_not_change_scores(name, model, batch):
    groups = discover(model).of_kinds(["ffn_channel"])
    one = score(model, groups, [batch], CRITERIA[name])
    several = score(model, groups, [batch[:1], batch[1:3], batch[3:]], CRITERIA[name])
    for group in groups:
        torch.testing.assert_close(one[group.name], several[group.name], rtol=1e-4, atol=1e-9)


def test_second_order_is_per_sequence(model, batch):
    """The squared gradient of a batch is another number; it must not be what we use."""
    groups = discover(model).of_kinds(["ffn_channel"])
    ours = score(model, groups, [batch], Taylor(order=2))
    squared_batch = {
        n: p.detach().square() * whole_gradients(model, batch)[n].square() for n, p in model.named_parameters()
    }
    wrong = by_hand(groups[0], squared_batch, "sum", False).float()
    assert not torch.allclose(ours[groups[0].name], wrong, rtol=0.1)


def test_queries_are_gathered_with_the_kv_head_they_share(model):
    """The reference pairs KV head a with query heads a, a + KV, ...; transformers shares consecutive ones."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[8:16] *= 10  # query head 1 belongs to KV head 0
    group = discover(model).named("model.layers.0.self_attn/kv_group")
    scores = score(model, [group], [], Magnitude(p=2))[group.name]
    q = model.model.layers[0].self_attn.q_proj.weight.detach().square().sum(1)
    reference = q.view(2, 3 * 8).sum(0).view(3, 8).sum(1)
    assert scores.argmax() == 0 and reference.argmax() == 1


def test_at_most_one_gradient_is_alive(model, batch):
    groups = discover(model).of_kinds(KINDS)
    names = {m.parameter for g in groups for m in g.members}
    seen = set()

    def visit(name, weight, grad):
        seen.add(name)
        assert sum(p.grad is not None for p in model.parameters()) == 1

    backward(model, names, [batch], visit)
    assert seen == names


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_left_as_it_was(trained, batch, checkpointing):
    model = copy.deepcopy(trained).train()
    model.lm_head.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    plain = score(model, discover(model).of_kinds(["ffn_channel"]), [batch], Taylor())
    again = score(
        model, discover(model).of_kinds(["ffn_channel"]), [batch], Taylor(gradient_checkpointing=checkpointing)
    )
    assert model.training and flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    for name, values in plain.items():
        torch.testing.assert_close(values, again[name], rtol=1e-4, atol=1e-9)


def test_first_order_is_the_derivative(model, batch):
    """Vector-wise Taylor of a channel of one matrix = |dL| / eps when the channel shrinks by eps."""
    name = "model.layers.1.mlp.down_proj.weight"
    group = Group("g", "ffn_channel", 96, (Member(name, 1, np.arange(96)[:, None], "consumer"),))
    scores = score(model, [group], [batch], Taylor(granularity="vector"))["g"]
    weight = dict(model.named_parameters())[name]
    for unit in (0, 7, 50):
        losses = []
        for factor in (1 - 1e-5, 1 + 1e-5):
            with plain_forward(model):  # norms in float64, too
                saved = weight[:, unit].clone()
                weight[:, unit] *= factor
                logits = model(input_ids=batch).logits[:, :-1]  # the loss itself is float32 in transformers
                losses.append(float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:])))
                weight[:, unit] = saved
        assert abs(losses[1] - losses[0]) / 2e-5 == pytest.approx(float(scores[unit]), rel=1e-3, abs=1e-8)


def test_leave_one_out_is_what_taylor_estimates(trained, tokenizer, batch):
    from conftest import story

    ids = torch.tensor(tokenizer(story(99))["input_ids"])
    ids = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    groups = discover(trained).of_kinds(["ffn_channel"])
    truth = leave_one_out(trained, groups, [ids])
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
    scores = score(trained, groups, [ids], Taylor())
    flat = [torch.cat([s[g.name] for g in groups]) for s in (truth, scores)]
    assert spearmanr(flat[0].abs(), flat[1]).statistic > 0.5


def test_leave_one_out_of_a_layer_bypasses_it(trained, batch):
    from secateur.plan import PruningPlan
    from secateur.surgery import mask

    group = discover(trained).named("model.layers/layer")
    change = leave_one_out(trained, [group], [batch])[group.name][1]
    with torch.no_grad():
        dense = trained(input_ids=batch, labels=batch).loss
        with mask(trained, PruningPlan({group.name: (0, 2)}, {group.name: 3})):
            cut = trained(input_ids=batch, labels=batch).loss
    assert float(cut - dense) == pytest.approx(float(change), abs=1e-5)


def test_random_is_repeatable_and_seeded(model):
    groups = discover(model).of_kinds(["ffn_channel"])
    a, b, c = (score(model, groups, [], Random(seed=s)) for s in (1, 1, 2))
    name = groups[0].name
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


def test_a_function_is_a_criterion(model, batch):
    def gate_only(group, weights, grads):
        m = group.members[0]
        return (weights[m.parameter] * grads[m.parameter]).abs().sum(1)[torch.from_numpy(m.index)].sum(1)

    groups = discover(model).of_kinds(["ffn_channel"])
    own = score(model, groups, [batch], gate_only)
    first = score(model, groups, [batch], Taylor(), "first")
    for group in groups:
        torch.testing.assert_close(own[group.name], first[group.name], rtol=1e-4, atol=1e-9)


def test_broken_weights_are_named(trained, batch):
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    groups = discover(model).of_kinds(["ffn_channel"])
    with pytest.raises(NonFiniteError, match=r"batch 0 is nan: model\.layers\.1\.mlp\.up_proj\.weight"):
        score(model, groups, [batch], Taylor())
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        score(model, groups, [], Magnitude())


def test_bf16_scores_rank_like_float32(trained, batch):
    groups = discover(trained).of_kinds(["ffn_channel"])
    full = score(trained, groups, [batch], Taylor())
    half = score(copy.deepcopy(trained).bfloat16(), groups, [batch], Taylor())
    name = groups[1].name
    assert half[name].dtype == torch.float32
    assert spearmanr(full[name], half[name]).statistic > 0.95


def test_unknown_reduction_and_impossible_taylor():
    with pytest.raises(ValueError, match="known: sum"):
        score(torch.nn.Linear(1, 1), [], [], Magnitude(), "median")
    with pytest.raises(ValueError, match="first order"):
        Taylor(order=2, granularity="vector")
