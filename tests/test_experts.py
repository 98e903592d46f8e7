"""Experts in detail: where they lie, what they score, what is written for them; dense layers among sparse ones."""

import json
import sys

import pytest
import torch
import zoo
from peft import PeftModel
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from secateur import checkpoint, cli
from secateur.allocation import Budget, allocate
from secateur.discovery import discover
from secateur.errors import BudgetError
from secateur.importance import CRITERIA, leave_one_out, score
from secateur.importance.taylor import gradients
from secateur.methods.llm_pruner import LLMPruner, run
from secateur.plan import PruningPlan
from secateur.recovery.targets import not_linear, stacked_matrices
from secateur.surgery import mask, slice

COMMON = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10,
    "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 256,
}  # fmt: skip
SIZES = {
    "mixtral": {"num_local_experts": 6, "intermediate_size": 40},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 40, "intermediate_size": 56, "mlp_only_layers": [0]},
}
MODELS = list(SIZES)


def make(model_type: str, vocab_size: int = 131) -> PreTrainedModel:
    """Two layers of experts for Mixtral; a dense one and one of experts for Qwen3-MoE."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**COMMON, **SIZES[model_type], vocab_size=vocab_size)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def text(rows=4, length=16, seed=0):
    return torch.randint(3, 131, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", MODELS)
def test_experts_are_rows_of_the_router_and_of_stacked_matrices(model_type):
    groups = discover(make(model_type))
    expert, channel = (
        groups.named("model.layers.1.mlp/expert"),
        groups.named("model.layers.1.mlp.experts/expert_channel"),
    )
    assert (expert.units, expert.at_least, channel.units) == (6, 2, 40)
    prefix = "model.layers.1.mlp."
    places = {(m.parameter.removeprefix(prefix), m.dim): m.index.tolist() for m in expert.members}
    alone = [[i] for i in range(6)]
    assert places == {("gate.weight", 0): alone, ("experts.gate_up_proj", 0): alone, ("experts.down_proj", 0): alone}
    places = {(m.parameter.removeprefix(prefix), m.dim): m.index.tolist() for m in channel.members}
    assert places["experts.gate_up_proj", 1] == [[i, 40 + i] for i in range(40)]
    assert places["experts.down_proj", 2] == [[i] for i in range(40)]


def test_magnitude_of_an_expert_is_the_sum_over_its_matrices_and_its_row_of_the_router():
    model = make("mixtral")
    group = discover(model).named("model.layers.0.mlp/expert")
    mlp = model.model.layers[0].mlp
    tensors = (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj)
    expected = sum(t.detach().square().flatten(1).sum(1) for t in tensors)
    torch.testing.assert_close(score(model, [group], [], CRITERIA["l2"])[group.name], expected)


@pytest.mark.parametrize("criterion", ["taylor-vector", "taylor-1", "taylor-2", "taylor-mixed"])
def test_experts_that_no_token_reaches_are_worth_nothing(criterion, monkeypatch):
    model = make("mixtral")
    experts = model.model.layers[0].mlp.experts
    name, forward = "model.layers.0.mlp.experts.gate_up_proj", experts.forward
    monkeypatch.setattr(experts, "forward", lambda states, index, weights: forward(states, index % 3, weights))
    values = CRITERIA[criterion].positions(model, {name: [0]}, [text(), text(seed=1)])[name, 0]
    assert (values[:3] != 0).all() and not values[3:].any()

    monkeypatch.setattr(experts, "forward", lambda states, *_: torch.zeros_like(states))  # no gradient at all
    group = discover(make("mixtral")).named("model.layers.0.mlp.experts/expert_channel")
    scores = score(model, [group], [text(), text(seed=1)], CRITERIA[criterion])[group.name]
    assert scores.shape == (40,) and not scores.any()
    assert not gradients(model, [name], [text()])[name].any()


def test_leave_one_out_of_experts_restores_the_model():
    model = make("qwen3_moe")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    group = discover(model).named("model.layers.1.mlp/expert")
    changes = leave_one_out(model, [group], [text()])[group.name]
    assert changes.shape == (6,) and changes.abs().max() > 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize(
    ("kinds", "ratios", "share"),
    [
        (("expert",), {}, 0.15),
        (("expert_channel",), {}, 0.12),
        (("ffn_channel", "expert"), {"expert": 1 / 3}, 0.25),
        (("ffn_channel", "expert_channel", "expert", "kv_group", "hidden"), {}, 0.4),
    ],
)
def test_cut_save_and_reload(model_type, kinds, ratios, share, tmp_path):
    model = make(model_type)
    if model_type == "mixtral" and "ffn_channel" in kinds:
        kinds = tuple(k.replace("ffn_channel", "expert_channel") for k in kinds)
    kinds = tuple(dict.fromkeys(kinds))
    settings = LLMPruner(Budget(share), CRITERIA["taylor-1"], kinds=kinds, kind_ratios=ratios)
    result = run(model, [text()], settings)
    left = result.plan.provenance["allocation"]["parameters_left"]
    assert result.model.num_parameters() == left < model.num_parameters()
    assert not result.left_whole
    kept = {result.groups.named(n).kind: len(k) for n, k in result.plan.kept.items()}
    assert kept.get("expert", 6) >= 2 and kept.get("expert_channel", 40) % 8 == 0
    assert kept["expert"] == 4 if ratios else True
    checkpoint.save(result.model, tmp_path / "small", plan=result.plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(text()).logits, result.model(text()).logits)
    assert again.generate(text(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_experts_are_written_in_the_layout_of_the_hub(tmp_path):
    model = make("mixtral")
    groups = discover(model)
    kept = {g.name: [0, 2, 3, 5] for g in groups if g.kind == "expert"}
    kept |= {g.name: range(8, 40) for g in groups if g.kind == "expert_channel"}
    small = slice(model, PruningPlan(kept, {n: groups.named(n).units for n in kept}), groups)
    checkpoint.save(small, tmp_path / "small")
    with safe_open(tmp_path / "small" / "model.safetensors", framework="pt") as stored:
        prefix = next(k for k in stored.keys() if "layers.1" in k and k.endswith("experts.2.w1.weight"))  # noqa: SIM118
        written = {w: stored.get_tensor(prefix.replace("w1", w)) for w in ("w1", "w2", "w3")}
    experts = model.model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj[3].chunk(2)
    torch.testing.assert_close(written["w1"], gate[8:])
    torch.testing.assert_close(written["w3"], up[8:])
    torch.testing.assert_close(written["w2"], experts.down_proj[3][:, 8:])


def test_recovery_leaves_routers_alone_that_are_linear_by_name_only():
    model = zoo.tiny_model("llama4_text")
    routers = [n for n, _ in model.named_modules() if n.endswith(".router")]
    assert routers and set(not_linear(model)) == {"lm_head", *routers}
    assert not_linear(make("mixtral")) == ["lm_head"]


def test_a_router_keeps_as_many_experts_as_it_chooses():
    groups = discover(make("mixtral"))
    scores = {g.name: torch.rand(g.units) for g in groups if g.kind == "expert"}
    with pytest.raises(BudgetError, match=r"a router chooses 2 of model\.layers\.0\.mlp/expert"):
        allocate(groups, scores, Budget(0.9))
    with pytest.raises(BudgetError, match="2 of its 6 units must stay"):
        allocate(groups, scores, None, kind_ratios={"expert": 0.9})


def test_masked_channels_of_experts_give_the_logits_of_sliced_ones():
    model = make("mixtral")
    groups = discover(model)
    scores = {g.name: torch.rand(g.units) for g in groups if g.kind == "expert_channel"}
    plan = allocate(groups, scores, Budget(0.12))
    small = slice(model, plan, groups)
    with mask(model, plan, groups), torch.no_grad():
        torch.testing.assert_close(model(text()).logits, small(text()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", MODELS)
def test_prune_recover_and_eval_from_the_command_line(model_type, tokenizer, text_file, tmp_path, monkeypatch, capfd):
    model = make(model_type, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")

    def secateur(*arguments):
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capfd.readouterr().err

    kinds = "expert_channel,expert=0.34" if model_type == "mixtral" else "ffn_channel,expert_channel,expert=0.34"
    secateur(
        "prune", tmp_path / "dense", "-o", tmp_path / "small", "--method", "llm-pruner",
        "--kinds", kinds, "--sparsity", 0.28,
        "--calibration", text_file, "--samples", 4, "--seq-len", 32, "--text", text_file,
        "--recover-steps", 2, "--data", text_file,
    )  # fmt: skip
    secateur("eval", tmp_path / "small", "--text", text_file, "--json", tmp_path / "e.json")
    results = json.loads((tmp_path / "small" / "results.json").read_text())
    params, figures = results["params"], results["perplexity"]["stories"]
    assert abs(params["sparsity"] - 0.28) < 0.02 and results["parity"]["max_logit_difference"] == 0.0
    value = json.loads((tmp_path / "e.json").read_text())["perplexity"]["stories"]["value"]
    assert value == pytest.approx(figures["recovered"], rel=1e-6)

    secateur("prune", tmp_path / "dense", "-o", tmp_path / "replayed", "--plan", tmp_path / "small" / "plan.json")
    adapter = json.loads((tmp_path / "small" / "adapter" / "adapter_config.json").read_text())
    assert set(adapter["target_parameters"]) >= set(stacked_matrices(make(model_type)))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "replayed")
    adapted = PeftModel.from_pretrained(base, tmp_path / "small" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(adapted(text()).logits, merged(text()).logits, atol=1e-5, rtol=1e-5)
