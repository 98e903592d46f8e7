"""The central test: the model without the units and the sliced model give the same logits."""

import numpy as np
import pytest
import torch
import zoo
from architecture_checks import shifted
from families import FAMILIES, make
from transformers import AutoModelForCausalLM

from secateur.allocation import Budget, allocate
from secateur.discovery import discover
from secateur.discovery.reference import Reference, plain_logits
from secateur.discovery.trace import probe_ids
from secateur.errors import PlanError
from secateur.importance import Magnitude, score
from secateur.plan import PruningPlan
from secateur.surgery import expressible, mask, prove, slice
from secateur.surgery.attributes import cut_modules
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.trial import LogitCheck


def random_plan(groups, kinds, share=0.5, seed=0, per_layer=False):
    """Keep a share of the units of every group of these kinds, others in each layer."""
    generator = np.random.default_rng(seed)
    kept, units = {}, {}
    for number, g in enumerate(groups.of_kinds(kinds)):
        count = max(1, round(g.units * share) - (number % 2 if per_layer and g.units > 3 else 0))
        kept[g.name] = tuple(sorted(generator.choice(g.units, count, replace=False).tolist()))
        units[g.name] = g.units
    return PruningPlan(kept, units)


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_sliced_for_every_kind(family):
    proofs = prove(make(family))
    assert {p.kind for p in proofs if p.proven} >= {"ffn_channel", "hidden", "layer"}
    for proof in proofs:
        if proof.kind in ("value_dim", "head_dim") and not proof.proven:  # most classes have one width, or derive it
            assert "no field" in proof.reason
        else:
            assert proof.proven and proof.max_difference < 1e-9, proof


NATIVE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"]


@pytest.mark.parametrize("family", NATIVE)
def test_uniform_cut_reloads_with_stock_classes(family, tmp_path):
    model = make(family)
    groups = discover(model)
    plan = random_plan(groups, ["ffn_channel", "kv_group"], share=0.67)
    small = slice(model, plan, groups)
    ids = probe_ids(model)
    with mask(model, plan, groups):
        masked = plain_logits(model, ids)
    assert (plain_logits(small, ids) - masked).abs().max() < 1e-5
    assert small.num_parameters() == groups.remaining_parameters(plan.kept)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain_logits(again, ids), plain_logits(small, ids))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "mistral"])
def test_hidden_heads_and_ffn_together(family):
    model = make(family).double()
    reference = Reference(model)
    plan = random_plan(reference.groups, ["ffn_channel", "kv_group", "query_head", "hidden"], share=0.5)
    small = slice(model, plan, reference.groups)
    wanted = reference.logits(probe_ids(model), plan.kept)
    assert (plain_logits(small, probe_ids(model)) - wanted).abs().max() < 1e-9


def test_head_counts_that_llama_refuses_become_mistral():
    model = make("llama", num_attention_heads=12, num_key_value_heads=6, hidden_size=48)
    groups = discover(model)
    plan = random_plan(groups, ["kv_group"], share=5 / 6)
    small = slice(model, plan, groups)
    assert small.config.num_attention_heads == 10 and small.config.model_type == "mistral"
    assert small.config.sliding_window is None
    assert expressible(model, groups, ["kv_group"]).feasible("model.layers.*.self_attn/kv_group", 5)


def test_llama_stays_llama_where_it_can():
    model = make("llama")
    groups = discover(model)
    small = slice(model, random_plan(groups, ["ffn_channel"]), groups)
    assert small.config.model_type == "llama" and small.config.intermediate_size == 22


def test_layers_are_renumbered_and_their_lists_cut():
    model = make("gemma2", num_hidden_layers=4)
    groups = discover(model)
    plan = PruningPlan({"model.layers/layer": (0, 3)}, {"model.layers/layer": 4})
    small = slice(model, plan, groups)
    assert small.config.layer_types == [model.config.layer_types[i] for i in (0, 3)]
    with mask(model, plan, groups):
        masked = plain_logits(model, probe_ids(model))
    assert (plain_logits(small, probe_ids(model)) - masked).abs().max() < 1e-5


def test_hidden_norm_statistics_are_those_of_the_units_that_stay():
    """Zeroing alone is not removal: norms would still average over the removed dimensions."""
    model = make("llama").double()
    reference = Reference(model)
    plan = random_plan(reference.groups, ["hidden"])
    small = slice(model, plan, reference.groups)
    ids = probe_ids(model)
    with mask(model, plan, reference.groups):
        zeroed = plain_logits(model, ids)
    sliced = plain_logits(small, ids)
    assert (sliced - reference.logits(ids, plan.kept)).abs().max() < 1e-9
    assert (sliced - zeroed).abs().max() > 1e-3


def test_a_scalar_that_the_class_derives_is_folded_into_weights(tmp_path):
    """Gemma scales embeddings by sqrt(hidden_size); they are tied to the head, so a norm undoes what they take up."""
    model = make("gemma2", tie_word_embeddings=True).double()
    reference = Reference(model)
    plan = random_plan(reference.groups, ["hidden"], share=0.5)
    small = slice(model, plan, reference.groups)
    ids = probe_ids(model)
    assert (plain_logits(small, ids) - reference.logits(ids, plan.kept)).abs().max() < 1e-9
    small.float().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (plain_logits(again, ids) - plain_logits(small, ids)).abs().max() < 1e-6


def test_a_scalar_that_no_weight_can_take_up_is_refused():
    model = zoo.tiny_model("biogpt")  # learnt positions are added after the scaling
    groups = discover(model)
    with pytest.raises(PlanError, match="derives a constant"):
        slice(model, random_plan(groups, ["hidden", "attention_head"]), groups)


def test_an_edit_that_could_not_be_tried_is_not_said_to_compute_something_else():
    model = make("llama")

    def untried(rule, share):
        raise PlanError("it could not be tried: another path")

    solver = ConfigSolver(model, discover(model), untried)
    family = "model.layers.*.mlp/ffn_channel"
    assert solver.rule(family) is None
    assert solver.refusal(family).endswith("(intermediate_size), but it could not be tried: another path")


def test_classes_that_tie_families_say_so():
    model = make("gpt2")
    groups = discover(model)
    heads = "transformer.h.*.attn/attention_head"
    alone = expressible(model, groups, ["attention_head", "ffn_channel"])
    assert list(alone.refused) == [heads] and "only together with hidden" in alone.refused[heads]
    with pytest.raises(PlanError, match="only together with hidden"):
        slice(model, random_plan(groups, ["attention_head"]), groups)
    together = expressible(model, groups, ["attention_head", "hidden"])
    assert not together.refused and [set(t) for t in together.ties] == [{heads, "hidden"}]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "falcon-mqa"])
def test_tied_families_are_cut_by_the_same_share_and_reload(family, tmp_path):
    model = make(family)
    groups = discover(model)
    kinds = ["ffn_channel", "query_head" if family == "falcon-mqa" else "attention_head", "hidden"]
    can = expressible(model, groups, kinds)
    assert can.ties
    scores = score(model, groups.of_kinds(kinds), [], Magnitude())
    plan = allocate(groups, scores, Budget(param_sparsity=0.4), feasible=can.feasible, ties=can.ties)
    small = slice(model, plan, groups)
    one_step = 8 * sum(np.prod(s) // 48 for s in groups.shapes.values() if 48 in s) * 2  # a head and its dimensions
    assert abs(small.num_parameters() - 0.6 * model.num_parameters()) < one_step
    kept = {name: len(k) / plan.units[name] for name, k in plan.kept.items()}
    assert len({share for name, share in kept.items() if "ffn" not in name}) == 1
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = probe_ids(model)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in small.state_dict().items())
    assert (plain_logits(again, ids) - plain_logits(small, ids)).abs().max() < 1e-6
    wanted = Reference(model).logits(ids, plan.kept)
    assert (plain_logits(small, ids) - wanted).abs().max() < 1e-5


def test_a_class_that_hard_wires_a_width_is_refused():
    model = make("bloom")
    groups = discover(model)
    reasons = expressible(model, groups, ["ffn_channel"]).refused
    assert "BloomConfig has no field" in reasons["transformer.h.*.mlp/ffn_channel"]


@pytest.mark.parametrize(("family", "kind"), [("bloom", "ffn_channel"), ("gpt2", "attention_head")])
def test_widths_that_no_field_says_run_in_memory(family, kind):
    model = make(family)
    groups = discover(model)
    plan = random_plan(groups, [kind], share=0.5, per_layer=True)
    with pytest.raises(PlanError, match=r"has no field|only together with"):
        slice(model, plan, groups)
    small = slice(model, plan, groups, reloadable=False)
    with mask(model, plan, groups):
        masked = plain_logits(model, probe_ids(model))
    assert (plain_logits(small, probe_ids(model)) - masked).abs().max() < 1e-5
    assert small.num_parameters() == groups.remaining_parameters(plan.kept)


def test_a_shifted_slice_is_caught():
    """Negative control: moving one member's slice to a neighbouring unit must change the logits."""
    model = make("llama").double()
    reference = Reference(model)
    caught = 0
    chosen = [g for g in reference.groups.of_kinds(["ffn_channel", "kv_group", "query_head"]) if g.layer == 0]
    for group in chosen:
        kept = {group.name: tuple(range(group.units - 1))}
        check = LogitCheck(model, kept, reference)
        for number in range(len(group.members)):
            wrong = shifted(reference.groups, group, number)
            assert cut_modules(model, wrong, kept, check.same) is None, (group.name, group.members[number].parameter)
            caught += 1
    assert caught == sum(len(g.members) for g in chosen)


def test_mask_is_reversible_even_after_an_error():
    model = make("qwen2")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plan = random_plan(discover(model), ["ffn_channel", "kv_group", "hidden", "layer"])
    with pytest.raises(RuntimeError, match="stop"), mask(model, plan):
        assert not torch.equal(model.state_dict()["model.norm.weight"], before["model.norm.weight"])
        raise RuntimeError("stop")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_slice_leaves_the_original_alone_and_shares_nothing():
    model = make("llama")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small = slice(model, random_plan(discover(model), ["ffn_channel"]))
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_plan_for_another_model_is_refused():
    plan = random_plan(discover(make("llama", intermediate_size=60)), ["ffn_channel"])
    with pytest.raises(PlanError, match="another model"):
        slice(make("llama"), plan)
    with pytest.raises(PlanError, match="no group"):
        slice(make("gpt2"), plan)
    rotary = next(g for g in discover(make("llama")) if g.kind == "head_dim" and not g.prunable)
    with pytest.raises(PlanError, match="inv_freq"):
        slice(make("llama"), PruningPlan({rotary.name: (0,)}, {rotary.name: rotary.units}))


def test_bf16_models_are_checked_and_cut():
    model = make("llama").to(torch.bfloat16)
    small = slice(model, random_plan(discover(model), ["ffn_channel", "kv_group"], share=0.67))
    assert small.dtype == torch.bfloat16


def test_the_twin_stands_in_for_models_without_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make("llama", num_hidden_layers=5).config)
    proofs = prove(model)
    proven = [p for p in proofs if p.proven]
    assert {p.kind for p in proven} == {"ffn_channel", "kv_group", "query_head", "hidden", "layer", "sublayer"}
    assert all(p.route == "config" and p.max_difference < 1e-9 for p in proven)
