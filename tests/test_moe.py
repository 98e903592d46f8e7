"""Mixtures of experts through the whole job: score, allocate, cut, recover, save, reload."""

import json

import pytest
import torch
import zoo
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from secateur.allocation import Budget, allocate
from secateur.discovery import discover
from secateur.discovery.reference import Reference, plain_logits
from secateur.discovery.trace import probe_ids
from secateur.errors import BudgetError
from secateur.importance import CRITERIA, Taylor, leave_one_out, score
from secateur.surgery import expressible, slice

TYPES = ["mixtral", "qwen3_moe"]
KINDS = ["expert", "expert_channel"]


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("criterion", [n for n in CRITERIA if not n.startswith("gate")])  # experts have no gate
def test_every_criterion_scores_experts(model_type, criterion):
    model = zoo.tiny_model(model_type)
    groups = discover(model).of_kinds(KINDS)
    scores = score(model, groups, [torch.arange(3, 19).view(2, 8)], CRITERIA[criterion])
    assert {g.kind for g in groups} == set(KINDS)
    assert all(torch.isfinite(scores[g.name]).all() and scores[g.name].shape == (g.units,) for g in groups)


def test_an_expert_that_no_token_reaches_scores_nothing_that_its_router_does_not():
    """One token cannot reach ten experts: those left out have no gradient in their matrices, and that is no error."""
    model = zoo.tiny_model("mixtral")
    group = discover(model).of_kinds(["expert"])[0]
    scores = score(model, [group], [torch.tensor([[3, 4]])], Taylor())[group.name]
    change = leave_one_out(model, [group], [torch.tensor([[3, 4]])])[group.name]
    assert torch.isfinite(scores).all() and torch.isfinite(change).all()
    assert scores.argmax() in scores.topk(2 * zoo.TOP_K).indices and (scores < scores.max() / 10).any()


@pytest.mark.parametrize("model_type", TYPES)
def test_experts_and_their_channels_are_cut_to_the_budget_and_reload(model_type, tmp_path):
    model = zoo.tiny_model(model_type)
    groups = discover(model)
    can = expressible(model, groups, KINDS)
    assert not can.refused
    scores = score(model, groups.of_kinds(KINDS), [torch.arange(3, 19).view(2, 8)], Taylor())
    plan = allocate(groups, scores, Budget(param_sparsity=0.25), feasible=can.feasible, ties=can.ties)
    small = slice(model, plan, groups)
    layers = len(groups.of_kinds(["expert"]))
    expert = layers * 3 * zoo.HIDDEN * zoo.EXPERT_FFN  # the smallest step: one expert in every layer
    assert abs(small.num_parameters() - 0.75 * model.num_parameters()) <= expert
    assert (
        plain_logits(small, probe_ids(model)) - Reference(model).logits(probe_ids(model), plan.kept)
    ).abs().max() < 1e-4
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (plain_logits(again, probe_ids(model)) - plain_logits(small, probe_ids(model))).abs().max() < 1e-6


def test_a_router_keeps_as_many_experts_as_it_picks():
    model = zoo.tiny_model("mixtral")
    groups = discover(model)
    scores = score(model, groups.of_kinds(["expert"]), [], CRITERIA["l2"])
    with pytest.raises(BudgetError, match=r"0\.8"):
        allocate(groups, scores, Budget(unit_sparsity=0.9))
    kept = allocate(groups, scores, None, kind_ratios={"expert": 0.8}).kept
    assert {len(units) for units in kept.values()} == {zoo.TOP_K}


def test_the_command_line_prunes_and_recovers_experts(secateur, tokenizer, text_file, tmp_path):
    sizes = zoo.tiny_config("mixtral").to_dict() | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    config = CONFIG_MAPPING["mixtral"](**{k: v for k, v in sizes.items() if k not in ("model_type", "architectures")})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    flags = ["--calibration", text_file, "--samples", 4, "--seq-len", 32, "--text", text_file]
    flags += ["--sparsity", 0.3, "--kinds", "expert_channel,expert=0.2"]
    code, _, err = secateur("prune", tmp_path / "dense", "-o", tmp_path / "small", "--method", "llm-pruner", *flags)
    assert code == 0, err
    small = json.loads((tmp_path / "small" / "config.json").read_text())
    assert small["num_local_experts"] == 8 and small["intermediate_size"] % 8 == 0
    flags = ["--data", text_file, "--steps", 2, "--seq-len", 32, "--batch-size", 4, "--text", text_file]
    code, _, err = secateur("recover", tmp_path / "small", "-o", tmp_path / "recovered", *flags)
    assert code == 0, err
    results = json.loads((tmp_path / "recovered" / "results.json").read_text())
    assert results["parity"]["max_logit_difference"] < 1e-5
