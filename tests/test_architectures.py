"""A fixed sample of the architectures that `benchmarks/architectures.py` runs over."""

import json

import architecture_checks
import architectures_page
import numpy as np
import pytest
import zoo

from secateur.discovery import discover
from secateur.discovery.reference import LONG_PROBE, Reference
from secateur.surgery import prove
from secateur.surgery.attributes import cut_modules
from secateur.surgery.trial import LogitCheck, with_noise

# What no dense decoder has: tied widths, latent attention, experts in several layouts, state spaces.
SAMPLE = ["bert", "deepseek_v3", "falcon_h1", "gpt_oss", "mamba", "mixtral", "phi3", "qwen3_moe"]


# Architectures on which units of some kind are proven, at least.
PROMISED = {
    ("ffn_channel",): 168,
    ("attention_head", "kv_group", "query_head"): 125,
    ("hidden",): 130,
    ("expert", "expert_group", "expert_channel"): 50,
    ("layer",): 160,
}

pytestmark = pytest.mark.no_cover  # which doubles the time of tracing, and learns nothing new from another type

# Every fourth type, but for those that take minutes; the whole sweep, which has them, takes half an hour.
MINUTES = {"kimi_linear", "qwen4_exp"}
QUARTER = [t for t in zoo.model_types()[::4] if t not in {*zoo.UNSUPPORTED, *SAMPLE, *MINUTES}]


@pytest.mark.parametrize("model_type", QUARTER)
def test_what_is_offered_is_proven_on_a_quarter_of_all_architectures(model_type):
    found = prove(zoo.tiny_model(model_type))
    assert any(proof.proven for proof in found)
    assert all(proof.max_difference < 1e-9 for proof in found if proof.proven)
    assert all(proof.reason for proof in found if proof.route != "config")


@pytest.mark.parametrize("model_type", SAMPLE)
def test_groups_of_any_architecture_are_right(model_type):
    model = zoo.tiny_model(model_type)
    groups = discover(model)
    found = architecture_checks.families(groups, prove(model))
    proven = [f for f in found if f.get("route") in ("config", "modules")]
    assert proven
    assert all(f["max_difference"] < 1e-9 for f in proven), proven
    assert architecture_checks.without_weights(model)["same"]
    controls = architecture_checks.controls(model, architecture_checks.proven_families(found), wanted=2)
    assert controls["total"] > 0
    assert controls["caught"] == controls["total"], controls["missed"]


@pytest.mark.parametrize(("model_type", "kind"), [("dbrx", "hidden"), ("longcat_flash", "query_head")])
def test_where_tokens_run_single_experts_a_text_is_found_on_which_the_same_ones_run_after_the_cut(model_type, kind):
    (proof,) = prove(zoo.tiny_model(model_type), [kind])
    assert proof.route == "config" and proof.max_difference < 1e-9


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("hy_v4", "model.layers.0.self_attn.indexer.wq_b/other-2"), ("kolibri1", "model.layers.1.mlp/expert")],
)
def test_what_only_decides_a_choice_is_compared_on_a_text_long_enough_for_another_one(model_type, name):
    model = with_noise(zoo.tiny_model(model_type))
    reference = Reference(model)
    assert reference.ids.shape == LONG_PROBE
    group = reference.groups.named(name)
    kept = {group.name: tuple(range(1, group.units))}
    check = LogitCheck(model, kept, reference)
    assert cut_modules(model, reference.groups, kept, check.same)
    for number in range(len(group.members)):
        wrong = architecture_checks.shifted(reference.groups, group, number)
        assert not cut_modules(model, wrong, kept, check.same), group.members[number].parameter


def test_the_sweep_on_record_found_what_is_promised():
    records = [json.loads(file.read_text()) for file in architectures_page.RESULTS.glob("*.json")]
    assert {r["model_type"] for r in records} == set(zoo.model_types())
    traced = [r for r in records if r.get("traced")]
    proven = [{f["kind"] for f in r["families"] if f.get("route") in ("config", "modules")} for r in traced]
    assert sum(bool(r.get("instantiated")) for r in records) >= 181 and len(traced) >= 176
    assert not any(architectures_page.is_wrong(f) for r in traced for f in r["families"])
    for kinds, least in PROMISED.items():
        assert sum(bool(set(kinds) & p) for p in proven) >= least, kinds
    controls = [r["controls"] for r in traced]
    assert sum(c["caught"] for c in controls) == sum(c["total"] for c in controls) >= 500
    assert (
        sum({"hidden", "ffn_channel"} <= set(r["round_trip"]["kinds"]) for r in traced if r["round_trip"]["ok"]) >= 40
    )


def test_a_shifted_member_moves_alone():
    groups = discover(zoo.tiny_model("llama"))
    group = groups.named("hidden")
    wrong = architecture_checks.shifted(groups, group, 1).named("hidden")
    changed = [not np.array_equal(a.index, b.index) for a, b in zip(group.members, wrong.members, strict=True)]
    assert changed == [number == 1 for number in range(len(changed))]


def test_the_page_tells_each_reason_once():
    def record(model_type, layers):
        ffn = {"kind": "ffn_channel", "family": f"{layers}.*.mlp/ffn_channel", "tied": [], "max_difference": 1e-15}
        refusal = f"{model_type.title()}Config has no field that sets the width of {ffn['family']} alone"
        hidden = {"kind": "hidden", "family": "hidden", "route": "config", "tied": ["x"], "max_difference": 0.0}
        families = [ffn | {"route": "modules", "reason": refusal}, hidden]
        families = [f | {"relative_difference_float32": 2e-7} for f in families]
        missing = {"sublayer": "its layers are no sums"}
        return {"model_type": model_type, "instantiated": True, "traced": True, "families": families, "absent": missing}

    failed = {"model_type": "third", "instantiated": False, "reason": "no such library"}
    page = architectures_page.page([record("first", "model.layers"), record("second", "h"), failed], {})
    assert "| FFN channels: proven | 2 of 2 (100.0%) that have them; 0 load with a stock class |" in page
    assert "| first | mem | ok+ |  |" in page
    assert page.count("the class has no field that sets the width of the ffn\\_channel family alone") == 1
    assert "| proven families compared in float32 too | 4 of 4 (100.0%) |" in page
    assert "- `sublayer`: its layers are no sums: first, second" in page
    assert "alone: first, second" in page and "no such library: third" in page
