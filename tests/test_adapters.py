"""Models with LoRA adapters in their modules, and models whose weights are packed."""

import copy

import numpy as np
import pytest
import torch
from architecture_checks import shifted
from families import make
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from test_experts import make as make_moe
from transformers import AutoModelForCausalLM

from secateur import checkpoint
from secateur.allocation import Budget
from secateur.checkpoint import save_adapted
from secateur.discovery import discover
from secateur.discovery.reference import Reference, plain_logits
from secateur.discovery.trace import probe_ids
from secateur.errors import CheckpointError, DiscoveryError, PlanError
from secateur.importance import CRITERIA, leave_one_out
from secateur.methods.llm_pruner import LLMPruner, run
from secateur.plan import PruningPlan
from secateur.surgery import mask, slice
from secateur.surgery.adapters import Adapted, base_model
from secateur.surgery.attributes import cut_modules
from secateur.surgery.trial import LogitCheck, with_noise

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"down_proj": 7},
    },
}


def adapt(model, seed=1, **settings):
    """A model with random, non-zero factors in every linear module but the head."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **{
            "r": 5, "lora_alpha": 10, "target_modules": "all-linear", "exclude_modules": ["lm_head"],
            "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings,
        }
    )  # fmt: skip
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return adapted


def choose(groups, kinds, share=0.5, seed=0):
    """A plan that keeps random units, others in each group."""
    generator = np.random.default_rng(seed)
    chosen = groups.of_kinds(kinds)
    counts = {g.name: max(1, int(g.units * share)) for g in chosen}
    kept = {
        n: tuple(sorted(generator.choice(groups.named(n).units, c, replace=False).tolist())) for n, c in counts.items()
    }
    return PruningPlan(kept, {g.name: g.units for g in chosen})


def difference(a, b):
    ids = probe_ids(a)
    return float((plain_logits(a, ids) - plain_logits(b, ids)).abs().max())


def places(group, under):
    return {(m.parameter.partition(under)[2], m.dim) for m in group.members if under in m.parameter}


def test_a_shifted_component_is_no_cut_of_the_rank():
    model = with_noise(adapt(make("llama"), r=4))
    reference = Reference(model)
    group = next(g for g in reference.groups if g.kind == "lora_rank")
    kept = {group.name: tuple(range(1, group.units))}
    check = LogitCheck(model, kept, reference)
    assert cut_modules(model, reference.groups, kept, check.same)
    for number in range(len(group.members)):
        assert not cut_modules(model, shifted(reference.groups, group, number), kept, check.same)


def test_groups_take_rows_of_b_and_columns_of_a_along():
    groups = discover(adapt(make("llama")))
    channel = groups.named("base_model.model.model.layers.0.mlp/ffn_channel")
    assert places(channel, "layers.0.mlp.") == {
        ("gate_proj.base_layer.weight", 0), ("gate_proj.lora_B.default.weight", 0),
        ("up_proj.base_layer.weight", 0), ("up_proj.lora_B.default.weight", 0),
        ("down_proj.base_layer.weight", 1), ("down_proj.lora_A.default.weight", 1),
    }  # fmt: skip
    rank = groups.named("base_model.model.model.layers.1.self_attn.o_proj/lora_rank")
    assert (rank.kind, rank.units, rank.layer) == ("lora_rank", 5, 1)
    assert places(rank, "o_proj.") == {("lora_A.default.weight", 0), ("lora_B.default.weight", 1)}
    assert len(groups.of_kinds(["lora_rank"])) == 2 * 7


def test_the_base_has_the_groups_it_has_without_adapters():
    dense = make("phi3")
    adapted = Adapted(adapt(copy.deepcopy(dense)))
    alone = discover(dense)
    assert {g.name for g in adapted.base_groups} == {g.name for g in alone}
    assert set(adapted.in_base.values()) >= {g.name for g in alone.prunable}
    assert all(torch.equal(t, dense.state_dict()[n]) for n, t in base_model(adapted.model).state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("family", "kinds", "more"),
    [
        ("llama", ("ffn_channel", "query_head"), {}),
        ("qwen2", ("hidden",), {}),
        ("phi3", ("ffn_channel", "layer"), {}),
        ("gpt2", ("ffn_channel",), {"lora_bias": True}),
    ],
)
def test_cutting_with_adapters_is_merging_and_then_cutting(family, kinds, more, variant):
    if variant == "dora":
        more = {}  # which has no biases
    model = adapt(make(family).double(), **VARIANTS[variant], **more)
    adapted = Adapted(model)
    plan = choose(adapted.groups, kinds)
    small = slice(model, plan, adapted.groups)
    assert isinstance(small, PeftModel)
    assert sum(p.numel() for p in small.parameters()) == adapted.groups.remaining_parameters(plan.kept)

    merged = copy.deepcopy(model).merge_and_unload()
    kept = {adapted.in_base[n]: k for n, k in plan.kept.items()}
    groups = discover(merged)
    expected = slice(merged, PruningPlan(kept, {n: groups.named(n).units for n in kept}), groups)
    assert difference(small, expected) < 1e-9
    with small.disable_adapter():
        assert difference(small, expected) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_shrink_and_the_scale_stays(variant):
    model = adapt(make("llama").double(), **VARIANTS[variant])
    groups = discover(model)
    plan = choose(groups, ["lora_rank"])
    small = slice(model, plan, groups)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name in plan.kept:
            for member in groups.named(name).members:
                tensor = zeroed.get_parameter(member.parameter)
                tensor.index_fill_(member.dim, torch.tensor(plan.removed(name)), 0)
    assert difference(small, zeroed) < 1e-9 < difference(small, model)
    before, after = (m.get_submodule("base_model.model.model.layers.0.self_attn.k_proj") for m in (model, small))
    assert (before.r["default"], after.r["default"]) == (5, 2)
    assert after.scaling["default"] == pytest.approx(before.scaling["default"])


@pytest.mark.parametrize("variant", ["rslora", "dora", "ranks"])
def test_base_and_adapter_load_with_plain_peft(variant, tmp_path):
    model = adapt(make("llama"), **VARIANTS[variant])
    plan = choose(discover(model), ["ffn_channel", "query_head", "lora_rank", "layer"])
    small = slice(model, plan)
    save_adapted(small, tmp_path / "small", plan=plan)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    again = PeftModel.from_pretrained(base, tmp_path / "small" / "adapter")
    assert difference(again, small) < 1e-6
    assert (tmp_path / "small" / "plan.json").exists() and base.config.num_hidden_layers == 1
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        save_adapted(small, tmp_path / "small")
    with pytest.raises(CheckpointError, match="holds an adapter without its model"):
        checkpoint.load(tmp_path / "small" / "adapter")


def test_what_is_cut_can_be_trained_and_cut_again():
    model = adapt(make("llama"), use_dora=True)
    small = slice(model, choose(discover(model), ["ffn_channel", "lora_rank"], 0.75))
    trainable = {n for n, p in small.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in n for n in trainable)
    ids = probe_ids(small)
    small(input_ids=ids, labels=ids).loss.backward()
    assert all(small.get_parameter(n).grad is not None for n in trainable)
    again = slice(small, choose(discover(small), ["ffn_channel", "lora_rank"], 0.75))
    assert again.get_submodule("base_model.model.model.layers.0.mlp.up_proj").r["default"] == 2


def test_the_method_runs_on_a_model_with_adapters():
    model = adapt(make("llama"))
    ids = torch.randint(3, 131, (2, 12))
    result = run(model, [ids], LLMPruner(Budget(0.2), CRITERIA["taylor-1"], iterations=2))
    assert isinstance(result.model, PeftModel) and not result.left_whole
    settings = LLMPruner(None, CRITERIA["l2"], kinds=("lora_rank",), kind_ratios={"lora_rank": 0.4})
    ranks = {m.r["default"] for m in Adapted(run(model, [ids], settings).model).layers.values()}
    assert ranks == {3}


def test_hidden_and_heads_that_a_class_ties_are_cut_with_adapters():
    model = adapt(make("gpt2").double())
    small = slice(model, choose(discover(model), ["hidden", "attention_head"]))
    assert small.config.n_embd == 24 and small.config.n_head == 3


def test_two_adapters_at_once():
    model = adapt(make("llama").double())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    small = slice(model, choose(discover(model), ["ffn_channel"]))
    assert small.active_adapters == ["default", "second"]
    assert small.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_B["second"].weight.shape == (22, 3)


def test_rows_under_dora_are_not_zeroed():
    model = adapt(make("llama"), use_dora=True)
    groups = discover(model)
    plan = choose(groups, ["ffn_channel"])
    with pytest.raises(PlanError, match="DoRA divides by their norm"), mask(model, plan, groups):
        pass
    with pytest.raises(PlanError, match="DoRA divides by their norm"):
        leave_one_out(model, groups.of_kinds(["ffn_channel"]), [probe_ids(model)])


def test_adapters_on_stacked_parameters_are_refused():
    dense = make_moe("mixtral")
    model = adapt(dense, target_parameters=[n for n, p in dense.named_parameters() if p.dim() == 3])
    groups = discover(model)
    for kind in ("expert", "expert_channel", "hidden"):
        reasons = [g.refusals for g in groups if g.kind == kind]
        assert all(r and "adapted through target_parameters" in r[0] for r in reasons), kind
    with pytest.raises(PlanError, match=r"stacked parameters \(target_parameters.*merge them first"):
        slice(model, choose(groups, ["kv_group"]), groups)


def test_other_adapters_are_refused():
    ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(PlanError, match="only LoRA adapters are cut with their model, and these are IA3"):
        Adapted(get_peft_model(make("llama"), ia3))
    with pytest.raises(PlanError, match="is trained as a whole beside the adapters"):
        Adapted(adapt(make("mistral"), modules_to_save=["norm"]))
    with pytest.raises(PlanError, match="has a bias"):
        Adapted(adapt(make("llama"), lora_bias=True))
    merged = adapt(make("llama"))
    merged.merge_adapter()
    with pytest.raises(PlanError, match="unmerge_adapter"):
        Adapted(merged)


class PackedLinear(torch.nn.Linear):
    """A linear module that keeps int8 weights and a scale, as quantised ones do."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, bias=False)
        scale = dense.weight.detach().abs().max() / 127
        self.weight = torch.nn.Parameter((dense.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale)


def test_packed_weights_are_refused():
    model = make("llama")
    model.model.layers[1].mlp.up_proj = PackedLinear(model.model.layers[1].mlp.up_proj)
    message = r"layers\.1\.mlp\.up_proj\.weight is quantised \(PackedLinear, torch\.int8\).*prune the float checkpoint"
    with pytest.raises(DiscoveryError, match=message):
        discover(model)
