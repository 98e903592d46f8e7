"""The way back from stock models padded with zeros to models whose layers differ in width."""

import pytest
import torch
from families import make
from test_per_layer import CASES, GROUPED, built, cut

from secateur.discovery import discover
from secateur.discovery.reference import plain_logits
from secateur.discovery.trace import probe_ids
from secateur.errors import PlanError
from secateur.plan import PruningPlan
from secateur.surgery import pad, slice, unpad


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", CASES)
def test_what_was_padded_comes_back(family):
    small = cut(family)
    again = unpad(pad(small))
    assert type(again) is type(small) and same_tensors(again, small)
    assert [c.to_dict() for c in again.config.per_layer_config] == [c.to_dict() for c in small.config.per_layer_config]


def test_sublayers_that_were_skipped_are_skipped_again():
    three = {"num_attention_heads": 3, "num_key_value_heads": 1}
    model = built("llama", {1: {"skip": ["attention"]}, 2: {"skip": ["mlp"], **three}})
    again = unpad(pad(model))
    assert [getattr(c, "skip", []) for c in again.config.per_layer_config] == [[], ["attention"], ["mlp"]]
    assert same_tensors(again, model)


def test_layers_with_other_numbers_of_queries_per_key():
    model = make("mistral", **{**GROUPED, "num_attention_heads": 12, "num_key_value_heads": 3})
    groups = discover(model)
    kept = {g.name: range(4 - g.layer) for g in groups.of_kinds(["query_head"])}
    kept |= {g.name: range(1 + g.layer) for g in groups.of_kinds(["kv_group"])}
    small = slice(model, PruningPlan(kept, {n: groups.named(n).units for n in kept}), groups)
    assert same_tensors(unpad(pad(small)), small)


def test_training_keeps_zeros_zero():
    small = cut("llama")
    padded = pad(small).train()
    optimizer = torch.optim.AdamW(padded.parameters(), lr=1e-2)
    ids = torch.arange(3, 40)[None]
    for _ in range(3):
        padded(ids, labels=ids).loss.backward()
        optimizer.step()
    again = unpad(padded)
    assert again.num_parameters() == small.num_parameters() and not same_tensors(again, small)
    assert torch.allclose(plain_logits(again, ids), plain_logits(padded, ids), atol=1e-5)


def test_a_model_without_zeros_has_nothing_to_leave_out():
    model = make("llama")
    with pytest.raises(PlanError, match="no unit of any layer is all zeros"):
        unpad(model)
    with torch.no_grad():  # a channel that only its output hides is still there
        model.model.layers[0].mlp.down_proj.weight[:, 3] = 0
    with pytest.raises(PlanError, match="no unit of any layer is all zeros"):
        unpad(model)


def test_at_least_one_unit_stays():
    model = make("llama")
    with torch.no_grad():
        for part in model.model.layers[0].self_attn.parameters():
            part.zero_()
    again = unpad(model)  # the first layer keeps its attention
    assert again.config.per_layer_config[0].num_key_value_heads == 1
    assert torch.allclose(plain_logits(again, probe_ids(model)), plain_logits(model, probe_ids(model)), atol=1e-5)
