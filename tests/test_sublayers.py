"""Attention and MLPs of single layers as units: found, counted, left out, loaded again."""

import json

import pytest
import torch
import zoo
from families import FAMILIES, make
from hand_groups import count_alive, llama_groups, random_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from secateur.allocation import Budget, allocate, max_sparsity
from secateur.discovery import discover
from secateur.discovery.reference import Reference, plain_logits
from secateur.discovery.trace import probe_ids
from secateur.errors import BudgetError, PlanError
from secateur.groups import Group, Groups
from secateur.importance import Magnitude, Taylor, score
from secateur.importance.ablation import leave_one_out
from secateur.methods.llm_pruner import LLMPruner, run
from secateur.plan import PruningPlan
from secateur.surgery import expressible, mask, prove, slice
from secateur.surgery.attributes import cut_modules

# family -> what its sublayers are called
SUBLAYERS = {
    "llama": {"self_attn", "mlp"},
    "gemma2": {"self_attn", "mlp"},
    "gpt_neox": {"attention", "mlp"},
    "phi3": {"self_attn", "mlp"},
    "gpt2": {"attn", "mlp"},
    "falcon-gqa": {"self_attention", "mlp"},
    "opt": {"self_attn"},  # its MLP is no module
    "mixtral": {"self_attn", "mlp"},
    "qwen3_moe": {"self_attn", "mlp"},
    "bloom": set(),  # they add the residual themselves
    "bert": set(),  # a norm acts on the sum
}
DEEP = {"num_hidden_layers": 4}


def tiny(family):
    return make(family) if family in FAMILIES else zoo.tiny_model(family)


def sublayers(groups):
    return {g.name.rpartition("/")[2]: g for g in groups.of_kinds(["sublayer"])}


def plan_of(groups, removed):
    """The plan that removes these units: name of a sublayer -> units."""
    kept = {name: tuple(u for u in range(groups.named(name).units) if u not in gone) for name, gone in removed.items()}
    return PruningPlan(kept, {name: groups.named(name).units for name in kept})


def last_attention_and_first_mlp(groups):
    attention, mlp = (next((g for n, g in sublayers(groups).items() if part in n), None) for part in ("att", "mlp"))
    return plan_of(groups, {attention.name: [1], **({mlp.name: [0]} if mlp else {})})


@pytest.mark.parametrize("family", SUBLAYERS)
def test_what_only_adds_to_the_residual_stream_is_found(family):
    groups = discover(tiny(family))
    found = sublayers(groups)
    assert set(found) == SUBLAYERS[family]
    layers = [g for g in groups if g.kind == "layer"]
    for name, group in found.items():
        assert group.blocks == tuple(f"{layer}.{name}" for layer in layers[0].blocks)
        assert group.stays == ((0,) if "att" in name else ())


def in_place(layer, x, attention, mlp):
    x += attention(x)
    x += mlp(x)
    return x


def through_a_view(layer, x, attention, mlp):
    x = x + attention(x) + mlp(x)
    x[:, :2] += 1
    return x


RESIDUALS = {
    "one after the other": (lambda layer, x, a, m: (h := x + a(x)) + m(h), True),
    "scaled and normalised": (lambda layer, x, a, m: x + 0.5 * layer.input_layernorm(a(x)) + m(x) / 3, True),
    "both at once": (lambda layer, x, a, m: x + (a(x) + m(x)), True),
    "flattened": (lambda layer, x, a, m: (x.view(-1, 48) + a(x).view(-1, 48) + m(x).view(-1, 48)).view(x.shape), True),
    "in place": (in_place, True),
    "norm on the sum": (lambda layer, x, a, m: layer.input_layernorm(x + a(x) + m(x)), False),
    "norm with a bias": (lambda layer, x, a, m: x + nn.functional.layer_norm(a(x) + m(x), (48,), None, x[0, 0]), False),
    "scaled stream": (lambda layer, x, a, m: 0.5 * x + a(x) + m(x), False),
    "twice the stream": (lambda layer, x, a, m: x + x + a(x) + m(x), False),
    "more than they add": (lambda layer, x, a, m: x + a(x) + m(x) + 1, False),
    "subtracted stream": (lambda layer, x, a, m: torch.add(a(x) + m(x), x, alpha=-1), False),
    "one times the other": (lambda layer, x, a, m: x + a(x) * m(x), False),
    "instead of the stream": (lambda layer, x, a, m: torch.where(x > 9, x, a(x) + m(x)), False),
    "through a view": (through_a_view, False),
}


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_trace_decides(residual, monkeypatch):
    compute, additive = RESIDUALS[residual]
    model = make("llama")

    def forward(layer, hidden_states, **options):
        return compute(layer, hidden_states, lambda x: layer.self_attn(x, **options)[0], layer.mlp)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)
    groups = discover(model)
    assert set(sublayers(groups)) == ({"self_attn", "mlp"} if additive else set())
    assert any(g.kind == "layer" for g in groups)


@pytest.mark.parametrize("family", [f for f, names in SUBLAYERS.items() if names])
def test_masked_equals_sliced_and_reloads_exactly(family, tmp_path):
    model = tiny(family).double()
    reference = Reference(model)
    groups = reference.groups
    plan = last_attention_and_first_mlp(groups)
    small = slice(model, plan, groups)
    ids = probe_ids(model)
    logits = plain_logits(small, ids)
    assert (logits - reference.logits(ids, plan.kept)).abs().max() < 1e-9
    with mask(model, plan, groups):
        assert (logits - plain_logits(model, ids)).abs().max() < 1e-9
    assert (logits - plain_logits(model, ids)).abs().max() > 1e-3
    with torch.no_grad():  # a sublayer without weights adds nothing
        for name, parameter in model.named_parameters():
            if name.startswith(groups.removed_prefixes(plan.kept)):
                parameter.zero_()
    assert (logits - plain_logits(model, ids)).abs().max() < 1e-9
    assert small.num_parameters() == groups.remaining_parameters(plan.kept)
    small.float().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain_logits(again, ids), plain_logits(small, ids))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **options), again.generate(ids, use_cache=False, **options))


def test_beside_removed_layers_and_narrower_ones():
    """Layers move up, and with them what they leave out."""
    model = make("llama", **DEEP).double()
    reference = Reference(model)
    removed = {"model.layers/self_attn": [1, 2], "model.layers/mlp": [3], "model.layers/layer": [1]}
    plan = plan_of(reference.groups, removed | {"model.layers.0.mlp/ffn_channel": range(9), "hidden": [1, 5]})
    small = slice(model, plan, reference.groups)
    wanted = reference.logits(probe_ids(model), plan.kept)
    assert (plain_logits(small, probe_ids(model)) - wanted).abs().max() < 1e-9
    own = small.config.to_dict()["per_layer_config"]
    assert own["1"]["skip"] == ["attention"] and own["2"]["skip"] == ["mlp"] and "skip" not in own["0"]
    in_memory = cut_modules(model, reference.groups, plan.kept, lambda small: True)
    assert sum(p.numel() for p in in_memory[0].parameters()) == small.num_parameters()


def test_a_cut_model_is_cut_again():
    model = make("llama", **DEEP).double()
    first = plan_of(discover(model), {"model.layers/self_attn": [1], "model.layers/mlp": [1, 2]})
    small = slice(model, first)
    reference = Reference(small)
    found = sublayers(reference.groups)
    assert found["self_attn"].blocks == tuple(f"model.layers.{n}.self_attn" for n in (0, 2, 3))
    second = plan_of(reference.groups, {"model.layers/self_attn": [1], "model.layers/mlp": [1]})
    smaller = slice(small, second, reference.groups)
    skips = {n: own["skip"] for n, own in smaller.config.to_dict()["per_layer_config"].items() if "skip" in own}
    assert skips == {"1": ["attention", "mlp"], "2": ["attention", "mlp"], "3": ["mlp"]}
    wanted = reference.logits(probe_ids(small), second.kept)
    assert (plain_logits(smaller, probe_ids(small)) - wanted).abs().max() < 1e-9
    at_once = slice(model, first.compose(second))
    assert torch.equal(plain_logits(at_once, probe_ids(small)), plain_logits(smaller, probe_ids(small)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "gpt_oss"])
def test_proofs(family):
    proofs = {p.family.rpartition("/")[2]: p for p in prove(tiny(family), ["sublayer"])}
    for name, proof in proofs.items():
        named = name not in ("mixer",) and (family, name) != ("gpt_oss", "mlp")  # this one returns a pair
        assert proof.route == ("config" if named else "modules") and proof.max_difference < 1e-9
        assert named or f"cannot be built without its {name}" in proof.reason


def test_what_must_stay_stays():
    model = make("llama", **DEEP)
    groups = discover(model)
    scores = {g.name: torch.arange(g.units, dtype=torch.float32) for g in groups.of_kinds(["sublayer", "layer"])}
    largest = max_sparsity(groups, ["sublayer"], uniform=False)
    plan = allocate(groups, scores, Budget(largest), kinds=["sublayer"], uniform=False)
    assert plan.kept == {"model.layers/self_attn": (0,), "model.layers/mlp": (3,)}
    both = allocate(groups, scores, Budget(unit_sparsity=0.5), kinds=["sublayer", "layer"], uniform=False)
    assert 0 in both.kept["model.layers/layer"]
    ends = {"protect_first": 1, "protect_last": 1}
    plan = allocate(groups, scores, Budget(unit_sparsity=0.5), kinds=["sublayer"], uniform=False, **ends)
    assert plan.kept == {"model.layers/self_attn": (0, 3), "model.layers/mlp": (0, 3)}
    with pytest.raises(PlanError, match=r"removes unit 0 of model\.layers/self_attn, which must stay"):
        slice(model, plan_of(groups, {"model.layers/self_attn": [0]}))


def test_uniform_widths_refuse_them():
    model = make("llama")
    groups = discover(model)
    refused = expressible(model, groups, ["sublayer"]).refused
    assert set(refused) == {"model.layers/self_attn", "model.layers/mlp"}
    assert all("--per-layer (or --tier per-layer)" in reason for reason in refused.values())
    assert not expressible(model, groups, ["sublayer"], uniform=False).refused
    with pytest.raises(BudgetError, match="--per-layer"):
        allocate(groups, random_scores(groups, ["sublayer"]), Budget(0.1), kinds=["sublayer"])


def test_plans_after_removed_layers_are_not_taken_for_others():
    groups = discover(make("llama", **DEEP))
    first = plan_of(groups, {"model.layers/layer": [1]})
    later = PruningPlan({"model.layers/mlp": (0, 1)}, {"model.layers/mlp": 3})
    with pytest.raises(PlanError, match=r"model\.layers/mlp has 4 units here, 3 in the plan"):
        first.compose(later).check(groups)


def hand_groups(layers, **sizes):
    whole = llama_groups(layers=layers, **sizes)
    added = []
    for name, stays in (("self_attn", (0,)), ("mlp", ())):
        blocks = tuple(f"model.layers.{n}.{name}" for n in range(layers))
        added.append(Group(f"model.layers/{name}", "sublayer", layers, blocks=blocks, stays=stays))
    return Groups((*whole.groups, *added), whole.shapes, whole.buffers, whole.tied)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_budgets_are_exact(data):
    layers = data.draw(st.integers(2, 4))
    groups = hand_groups(layers, ffn=data.draw(st.lists(st.integers(2, 9), min_size=layers, max_size=layers)))
    more = data.draw(st.lists(st.sampled_from(["ffn_channel", "kv_group", "layer"]), unique=True))
    kinds = ["sublayer", *more]
    scores = random_scores(groups, kinds, data.draw(st.integers(0, 99)))
    options = {"kinds": kinds, "uniform": False, "ranking": data.draw(st.sampled_from(["local", "global"]))}
    sparsity = data.draw(st.floats(0, 0.5))
    try:
        plan = allocate(groups, scores, Budget(sparsity), **options)
    except BudgetError as error:
        said = float(str(error).split("largest reachable sparsity is ")[1].split(";")[0])
        plan = allocate(groups, scores, Budget(said), **options)
        sparsity = said
    plan.check(groups)
    left = plan.provenance["allocation"]["parameters_left"]
    assert left == count_alive(groups, plan.kept)
    gone = groups.removed_prefixes(plan.kept)
    assert not any(name.startswith(gone) for name in plan.kept)
    assert not any(b.startswith(gone) for b in groups.removed_blocks(plan.kept))
    assert 0 in plan.kept.get("model.layers/self_attn", (0,)) and 0 in plan.kept.get("model.layers/layer", (0,))
    for name, kept in plan.kept.items():  # nothing goes before what is less important, and could go as well
        group = groups.named(name)
        held = {u for u, block in enumerate(group.blocks) if u in group.stays or block.startswith(gone)}
        free = [u for u in kept if u not in held and group.blocks[u : u + 1] != ("model.layers.0",)]
        assert not free or scores[name][list(plan.removed(name))].max() <= scores[name][free].min()
    if kinds == ["sublayer"]:
        target = groups.total_parameters * (1 - sparsity)
        for group in groups.of_kinds(kinds):
            order = sorted(range(layers), key=lambda u: (u in group.stays, scores[group.name][u].item(), u))
            here = len(plan.kept.get(group.name, range(layers)))
            for count in {max(1, here - 1), min(layers, here + 1)}:
                trial = {**plan.kept, group.name: order[layers - count :]}
                assert abs(left - target) <= abs(count_alive(groups, trial) - target) + 1e-6


def test_scores_are_sums_over_what_goes():
    model = make("llama")
    groups = discover(model).only(["sublayer"])
    state = dict(model.named_parameters())
    found = score(model, groups, [], Magnitude(2), "sum")
    for group in groups:
        for unit, block in enumerate(group.blocks):
            own = sum(t.detach().square().sum().item() for n, t in state.items() if n.startswith(block + "."))
            assert found[group.name][unit] == pytest.approx(own, rel=1e-5)
    batches = [probe_ids(model)]
    assert all((v > 0).all() for v in score(model, groups, batches, Taylor(), "sum").values())
    change = leave_one_out(model, groups, batches)["model.layers/mlp"][1]
    before = model(batches[0], labels=batches[0]).loss.item()
    with mask(model, plan_of(groups, {"model.layers/mlp": [1]}), groups):
        assert change == pytest.approx(model(batches[0], labels=batches[0]).loss.item() - before, abs=1e-6)


def test_scores_are_refreshed_while_sublayers_go():
    model = make("llama", **DEEP)
    kinds = ("sublayer", "ffn_channel", "kv_group")
    pruner = LLMPruner(Budget(0.4), Taylor(), kinds=kinds, ranking="global", iterations=2, uniform=False)
    result = run(model, [probe_ids(model)], pruner)
    left = result.model.num_parameters()
    assert left == result.groups.remaining_parameters(result.plan.kept)
    assert left / model.num_parameters() == pytest.approx(0.6, abs=0.002)
    assert result.groups.removed_blocks(result.plan.kept)


def test_adapters_go_with_their_sublayers():
    adapter = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(make("llama", **DEEP).double(), adapter).eval()
    groups = discover(model)
    names = {g.name.rpartition("/")[2]: g.name for g in groups.of_kinds(["sublayer"])}
    plan = plan_of(groups, {names["self_attn"]: [2], names["mlp"]: [1]})
    small = slice(model, plan, groups)
    ids = torch.arange(3, 17).view(2, 7)
    with torch.no_grad(), mask(model, plan, groups):
        assert (model(ids).logits - small(ids).logits).abs().max() < 1e-9
    assert small.get_base_model().config.to_dict()["per_layer_config"]["2"]["skip"] == ["attention"]


def test_the_command_line_leaves_out_sublayers(checkpoint_folder, text_file, tmp_path, secateur):
    flags = ["--calibration", text_file, "--samples", 2, "--seq-len", 16]
    alone = ["--kinds", "sublayer", "--sparsity", 0.2, *flags]
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "no", "--method", "llm-pruner", *alone)
    assert code == 2 and "--per-layer" in err and not (tmp_path / "no").exists()
    code, _, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "out", "--method", "llm-pruner", "--per-layer", *alone
    )
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["parity"]["max_logit_difference"] == 0.0
    own = json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"]
    assert own and all(set(fields) == {"skip"} for fields in own.values())
    assert "attention" not in own.get("0", {}).get("skip", [])
