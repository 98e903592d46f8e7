"""What a narrow twin tells about a wide model is what the wide model itself tells, in less time and memory."""

import pytest
from families import make
from transformers import AutoModelForCausalLM, MixtralConfig

import secateur.surgery.slicing as slicing
from secateur.discovery import discover
from secateur.plan import PruningPlan
from secateur.surgery import expressible
from secateur.surgery.live import LiveModel
from secateur.surgery.rule_cache import cache_folder

KINDS = ["ffn_channel", "attention_head", "kv_group", "query_head", "hidden", "layer"]


def rules_of(model):
    groups = discover(model)
    can = expressible(model, groups, KINDS)
    solver = slicing.checked_solver(model, groups)
    rules = [solver.rule(f) or solver.tied_rule(f) for f in groups.families(KINDS)]
    return can.ties, can.refused, [(r.families, r.fields, dict(r.pins), r.folds) for r in rules]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])  # plain, no head_dim, a scalar to fold, a tie
def test_rules_proven_on_a_narrow_twin_are_those_of_the_model(monkeypatch, tmp_path, family):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = {"n_embd": 96, "n_inner": 88} if family == "gpt2" else {"hidden_size": 96, "intermediate_size": 88}
    model = make(family, **sizes)
    own = rules_of(model)
    for file in cache_folder().glob("*.json"):
        file.unlink()
    monkeypatch.setattr(slicing, "SMALL", 0)

    def whole(*_):
        raise AssertionError("tried on a model with the widths of the whole")

    monkeypatch.setattr(slicing, "trial_subject", whole)
    assert rules_of(model) == own


@pytest.mark.parametrize("kind", ["kv_group", "query_head"])
def test_heads_whose_width_the_class_derives_keep_it(kind, monkeypatch, tmp_path):
    """A `head_dim` of twice the width that is halved with the heads has the right shapes too, at this share alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = MixtralConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=131,
    )  # fmt: skip
    assert config.head_dim is None
    model = AutoModelForCausalLM.from_config(config)
    rule = slicing.checked_solver(model, discover(model)).rule(f"model.layers.*.self_attn/{kind}")
    assert rule.pins == {"head_dim": 12} and "head_dim" not in rule.fields
    live = LiveModel(model)
    kept = {g.name: range(g.units // 2) for g in live.groups.of_kinds([kind])}
    live.check_cut(PruningPlan(kept, {name: live.groups.named(name).units for name in kept}))
