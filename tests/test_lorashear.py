"""LoRAShear: displacement and saliency against slow copies, the half-space step by hand, and whole runs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import make
from hypothesis import given
from hypothesis import strategies as st
from test_loraprune import adapted, losses, trained
from transformers import TrainerCallback

import secateur as sc
from secateur import pipeline, report
from secateur.config import parse_recipe
from secateur.discovery.reference import plain_logits
from secateur.discovery.trace import probe_ids
from secateur.errors import BudgetError, NonFiniteError, PlanError
from secateur.importance.displacement import Displacement, displacement, saliency
from secateur.methods.lorashear import LoRAShear, _lambda
from secateur.surgery.live import LiveModel
from secateur.surgery.shrinking import merge_and_restart, scale_units

FFN, KV = "model.layers.0.mlp/ffn_channel", "model.layers.0.self_attn/kv_group"


@pytest.fixture
def live():
    return LiveModel(adapted(make("llama").double()))


def stacked(layers, part, units):
    """Weights (or displacements) of each unit as one vector, [units, elements]."""
    rows = [
        layer.base_layer.weight if part == "x" else layer.get_delta_weight("default")
        for layer in layers
    ]  # fmt: skip
    return torch.cat([r.detach().reshape(units, -1) for r in rows], 1)


def producers_of(live, name):
    block = live.base.model.layers[0]
    if name == FFN:
        return [block.mlp.gate_proj, block.mlp.up_proj]
    return [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]


@pytest.mark.parametrize("name", [FFN, KV])
def test_norms_and_products_are_those_of_the_whole_matrices(live, name):
    group = live.groups.named(name)
    found = displacement(live.base, group)
    x, moved = (stacked(producers_of(live, name), part, group.units) for part in ("x", "moved"))
    torch.testing.assert_close(found.squared, x.square().sum(1))
    torch.testing.assert_close(found.along, (x * moved).sum(1))
    torch.testing.assert_close(found.moved, moved.square().sum(1))


def test_biases_count_and_turned_matrices_are_read_the_right_way():
    live = LiveModel(adapted(make("gpt2").double(), target_modules=["c_fc", "c_proj"]))
    name = "transformer.h.0.mlp/ffn_channel"
    layer = live.base.transformer.h[0].mlp.c_fc
    found = displacement(live.base, live.groups.named(name))
    weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    torch.testing.assert_close(found.squared, weight.square().sum(0) + bias.square())
    torch.testing.assert_close(found.along, (weight * layer.get_delta_weight("default")).sum(0).detach())


def test_what_is_not_finite_stops_with_its_name(live):
    live.base.model.layers[0].mlp.up_proj.lora_B["default"].weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        displacement(live.base, live.groups.named(FFN))


def test_saliency_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
    d = torch.tensor([[0.3, 0.4], [0.0, -1.0], [0.0, 0.5]])
    found = Displacement(x.square().sum(1), (x * d).sum(1), d.square().sum(1))
    parts = {
        "magnitude": torch.tensor([5.0, 1.0, 2.0]),
        "cosine": torch.tensor([2.0, 0.0, 1.0]),
        "first": torch.tensor([2.5, 1.0, 0.0]),
        "second": torch.tensor([3.125, 0.5, 0.0]),
    }
    for name, values in parts.items():
        torch.testing.assert_close(saliency({"g": found}, [name])["g"], values / values.norm())
    everything = sum(values / values.norm() for values in parts.values()) / 4
    torch.testing.assert_close(saliency({"g": found}, list(parts))["g"], everything)
    guided = {"g": torch.tensor([1.0, 2.0, 2.0])}
    torch.testing.assert_close(saliency({"g": found}, ["guided"], guided)["g"], guided["g"] / 3)


def test_proxies_are_normalised_over_all_groups():
    one, two = (Displacement(torch.tensor([v]), torch.zeros(1), torch.zeros(1)) for v in (9.0, 16.0))
    found = saliency({"a": one, "b": two}, ["magnitude"])
    torch.testing.assert_close(torch.cat(list(found.values())), torch.tensor([0.6, 0.8]))


positive = st.floats(0.01, 10)


@given(norm=positive, moved=positive, cosine=st.floats(-1, 1), steps=st.integers(1, 50))
def test_the_strength_turns_the_displacement_and_ends_in_time(norm, moved, cosine, steps):
    """lambda lies between what keeps x from growing and what turns the displacement around, if x grows at all."""
    along = norm * moved * cosine
    found = Displacement(*(torch.tensor([v], dtype=torch.float64) for v in (norm**2, along, moved**2)))
    strength = float(_lambda(found))
    if along > 0:
        low, high = along / norm, moved**2 * norm / along
        assert min(strength, low) <= max(high, 10.0) + 1e-9
        assert strength < high + 1e-9 or strength == pytest.approx((low + high) / 2)
    else:
        assert strength == 0.01
    pruning = LoRAShear(0.5)
    factor = float(pruning._half_space(found, steps))
    taken = max(strength, norm / steps)
    inside = norm**2 + along - taken * norm >= 0
    assert factor == (pytest.approx(1 - taken / norm) if inside else 0)


@pytest.mark.parametrize(
    "norm, along, moved, wanted",
    [
        (2.0, -1.0, 0.5, 0.01),  # the displacement shortens x: the least strength, lambda_0
        (2.0, 0.0, 0.5, 0.01),
        (4.0, 0.001, 0.1, 0.01),  # 20 * 0.001 / 4 = 0.005, raised to lambda_0
        (2.0, 0.2, 0.5, 2.0),  # 20 * 0.2 / 2; turned around at 0.25 * 2 / 0.2 = 2.5
        (1.0, 0.9, 1.0, (0.9 + 1 / 0.9) / 2),  # 18, beyond what turns it around: the middle of both bounds
        (0.001, 0.01, 100.0, 10.0),  # 20 * 0.01 / 0.001 = 200, lowered to 1000 lambda_0; turned around at 1000
    ],
)
def test_the_strength_is_otov2s_by_hand(norm, along, moved, wanted):
    found = Displacement(*(torch.tensor([v], dtype=torch.float64) for v in (norm**2, along, moved**2)))
    assert float(_lambda(found)) == pytest.approx(wanted)


def test_a_whole_period_of_half_space_steps_is_equation_2_after_every_step(tmp_path):
    """Against a slow copy that keeps whole matrices: x <- x + moved - lambda x / |x|, or zero."""
    pruning = LoRAShear(0.3, periods=1, warmup=0.2, cooldown=0.4)
    seen, steps = [], []

    class Before(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if pruning.redundant:
                layers, group = producers_of(pruning.live, FFN), pruning.live.groups.named(FFN)
                self.units = pruning.redundant[FFN]
                seen.append([stacked(layers, part, group.units)[self.units] for part in ("x", "moved")])

    class After(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if len(seen) > len(steps):
                group = pruning.live.groups.named(FFN)
                steps.append(stacked(producers_of(pruning.live, FFN), "x", group.units)[before.units])

    before = Before()
    trained(adapted(make("llama").double()), [before, pruning, After()], tmp_path, steps=10)
    assert len(steps) == 4
    for number, ((x, moved), now) in enumerate(zip(seen, steps, strict=True)):
        left = 4 - number
        found = Displacement(x.square().sum(1), (x * moved).sum(1), moved.square().sum(1))
        norm = x.norm(dim=1)
        strength = torch.maximum(_lambda(found), norm / left)
        new = x + moved - strength[:, None] * x / norm.clamp_min(1e-300)[:, None]
        inside = ((new * x).sum(1) >= 0) & (norm > 0) & (left > 1)
        torch.testing.assert_close(now, torch.where(inside[:, None], new, torch.zeros_like(new)))
    assert not steps[-1].any() and steps[0].any()


def test_a_half_space_step_is_equation_2(live):
    group = live.groups.named(FFN)
    layers = producers_of(live, FFN)
    x, moved = (stacked(layers, part, group.units) for part in ("x", "moved"))
    before = live.logits()
    factors = torch.ones(group.units, dtype=torch.float64)
    factors[[2, 7]] = torch.tensor([0.6, 0.0], dtype=torch.float64)
    scale_units(live.base, group, factors, absorb=True)
    now = stacked(layers, "x", group.units)
    torch.testing.assert_close(now[2], 0.6 * x[2] + moved[2])
    assert not now[7].any() and not stacked(layers, "moved", group.units)[[2, 7]].any()
    others = [u for u in range(group.units) if u not in (2, 7)]
    torch.testing.assert_close(now[others], x[others])
    torch.testing.assert_close(stacked(layers, "moved", group.units)[others], moved[others])
    assert not torch.equal(live.logits(), before)


@pytest.mark.parametrize("absorb", [True, False])
def test_a_step_in_bfloat16_is_that_in_float32_rounded_once(absorb):
    exact = LiveModel(adapted(make("llama").bfloat16().float()))
    rounded = LiveModel(adapted(make("llama").bfloat16()))
    rounded.model.load_state_dict(exact.model.state_dict())
    for name, parameter in rounded.model.named_parameters():
        if "lora_" in name:  # as PEFT keeps adapters
            parameter.data = dict(exact.model.named_parameters())[name].data.clone()
    group = exact.groups.named(FFN)
    factors = torch.linspace(0.9, 0.999, group.units, dtype=torch.float64)
    for live in (exact, rounded):
        scale_units(live.base, group, factors, absorb=absorb)
    for wanted, found in zip(producers_of(exact, FFN), producers_of(rounded, FFN), strict=True):
        assert torch.equal(found.base_layer.weight, wanted.base_layer.weight.bfloat16())
        torch.testing.assert_close(found.lora_B["default"].weight, wanted.lora_B["default"].weight)


class Stacked(torch.optim.Optimizer):
    """Keeps two moments of a parameter in one tensor, as AdEMAMix does."""

    def __init__(self, params, dtype=torch.float32, blocks=False):
        super().__init__(params, {"lr": 1.0})
        self.kept, self.blocks = dtype, blocks

    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            shape = (7,) if self.blocks else (2, *p.shape)
            self.state.setdefault(p, {"step": 0, "m1_m2": torch.zeros(shape, dtype=self.kept)})["m1_m2"] += 1


def test_what_the_optimizer_keeps_of_rows_of_b_that_become_zero_is_cleared(live):
    group, parameters = live.groups.named(FFN), [p for p in live.model.parameters() if p.requires_grad]
    adam, stacked_moments = torch.optim.AdamW(parameters), Stacked(parameters)
    ids = probe_ids(live.base)
    live.model(input_ids=ids, labels=ids).loss.backward()
    factors = torch.ones(group.units, dtype=torch.float64)
    factors[[2, 7]] = torch.tensor([0.5, 0.0], dtype=torch.float64)
    for optimizer in (adam, stacked_moments):
        optimizer.step()
        scale_units(live.base, group, factors, optimizer, absorb=True)
    for layer in producers_of(live, FFN):
        b = layer.lora_B["default"].weight
        kept = [adam.state[b]["exp_avg"], adam.state[b]["exp_avg_sq"], *stacked_moments.state[b]["m1_m2"]]
        for moment in kept:
            assert not moment[7].any() and moment[2].any() and moment[0].any()


@pytest.mark.parametrize("form", [{"blocks": True}, {"dtype": torch.uint8}])
def test_moments_that_cannot_be_cleared_row_by_row_end_the_run_at_its_first_step(form, tmp_path):
    pruning, model = LoRAShear(0.2, periods=2, warmup=0.2), adapted(make("llama"))
    optimizer = Stacked([p for p in model.parameters() if p.requires_grad], **form)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(PlanError, match=r"m1_m2 .* cleared row by row .*optim='adamw_torch'"):
        trained(model, [pruning], tmp_path, steps=10, optimizers=(optimizer, constant))
    assert pruning.live.base.model.layers[0].mlp.up_proj.lora_B["default"].weight.any()
    assert len(pruning.history) < 2


def test_a_merge_leaves_the_function_and_the_gradients_by_b(live):
    """So that an optimizer may go on with what it keeps of B."""
    ids, layer = probe_ids(live.base), live.base.model.layers[0].mlp.up_proj
    b = layer.lora_B["default"].weight
    found = []
    for _ in range(2):
        live.model.zero_grad()
        live.model(input_ids=ids, labels=ids).loss.backward()
        found.append((live.logits(), b.grad.clone()))
        merge_and_restart(live.base)
        assert not b.any()
    (before, slope), (after, slope_after) = found
    assert slope.any()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
    torch.testing.assert_close(slope_after, slope, rtol=0, atol=1e-10)


PAPER = {"merge": True, "proxies": ("magnitude", "cosine", "first", "second")}
FORMS = [{"push": "half-space"}, PAPER, {"push": "linear"}]


FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "falcon-mqa", "phi3", "gemma2", "qwen2")
CASES = [(f, form) for f in FAMILIES for form in FORMS if form != PAPER or f in ("llama", "gpt2", "phi3")]


@pytest.mark.parametrize("family, form", CASES)
def test_redundant_units_are_exactly_zero_and_cutting_changes_no_logit(family, form, tmp_path):
    pruning = LoRAShear(0.15, periods=2, warmup=0.2, cooldown=0.3, **form)
    trained(adapted(make(family).double()), [pruning], tmp_path, steps=10)
    live = pruning.live
    for name in pruning.candidates:
        removed = list(live.plan.removed(name)) if name in live.plan.kept else []
        found = displacement(live.base, live.groups.named(name))
        assert not found.squared[removed].any() and not found.moved[removed].any()
        assert found.squared.count_nonzero() == live.groups.named(name).units - len(removed)
    result = pruning.finish()
    live._masks.remove()  # nothing but the weights holds what has gone at zero
    zeroed = live.logits()
    small = plain_logits(result.model, probe_ids(result.model))
    torch.testing.assert_close(small, zeroed, rtol=0, atol=1e-9)
    assert abs(result.model.num_parameters() / live.groups.total_parameters - 0.85) < 0.03


def test_the_linear_push_is_a_straight_line_to_zero(tmp_path):
    pruning = LoRAShear(0.3, push="linear", periods=1, warmup=0.2, cooldown=0.4)
    norms = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if pruning.redundant and not norms:
                norms.append(displacement(pruning.live.base, pruning.live.groups.named(FFN)).squared.sqrt())
                self.units = pruning.redundant[FFN]
            elif norms:
                norms.append(displacement(pruning.live.base, pruning.live.groups.named(FFN)).squared.sqrt())

    watch = Watch()
    trained(adapted(make("llama").double()), [pruning, watch], tmp_path, steps=10)
    start = norms[0][watch.units]
    for step, now in enumerate(norms[:5]):
        torch.testing.assert_close(now[watch.units], start * (4 - step) / 4)


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_the_budget_is_met_in_equal_shares_of_the_periods(ranking, tmp_path):
    pruning = LoRAShear(0.3, periods=3, ranking=ranking, warmup=0.1, cooldown=0.5)
    trained(adapted(make("llama")), [pruning], tmp_path, steps=20)
    assert [row["step"] for row in pruning.history] == [5, 7, 10]
    assert [row["share"] for row in pruning.history] == pytest.approx([0.1, 0.2, 0.3])
    assert pruning.history[-1]["sparsity"] == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_run_goes_on_to_the_same_model(form, tmp_path):
    """Also from the middle of a period."""

    def run(folder, resume=None):
        torch.manual_seed(0)
        pruning = LoRAShear(0.3, periods=2, warmup=0.2, cooldown=0.3, **form)
        trainer = trained(
            adapted(make("llama")), [pruning], folder, steps=12, resume=resume, save_strategy="steps", save_steps=4,
            seed=3,
        )  # fmt: skip
        return pruning.finish().model, losses(trainer)

    whole, wanted = run(tmp_path / "whole")
    for checkpoint in ("checkpoint-8", "checkpoint-4"):
        again, found = run(tmp_path / "whole", str(tmp_path / "whole" / checkpoint))
        assert found[-4:] == wanted[-4:]
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name


def test_protected_groups_stay_whole(tmp_path):
    pruning = LoRAShear(0.2, uniform=False, protect=(FFN,), periods=2, warmup=0.2)
    trained(adapted(make("llama")), [pruning], tmp_path, steps=10)
    assert FFN not in pruning.finish().plan.kept


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "say how much"),
        ({"sparsity": 0.2, "warmup": 0.6, "cooldown": 0.5}, "below 1 together"),
        ({"sparsity": 0.2, "periods": 0}, "one period or more"),
        ({"sparsity": 0.2, "proxies": ("cosine", "taylor")}, "expected one or more of magnitude, cosine"),
        ({"sparsity": 0.2, "proxies": ()}, "expected one or more of magnitude, cosine"),
        ({"sparsity": 0.2, "epsilon": 2.0}, r"epsilon is 2.0; expected a number in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_run_are_refused(arguments, words):
    with pytest.raises(BudgetError, match=words):
        LoRAShear(**arguments)


def test_more_periods_than_steps_are_refused(tmp_path):
    with pytest.raises(BudgetError, match="50 periods do not fit into 12 steps"):
        trained(adapted(make("llama")), [LoRAShear(0.2, periods=50)], tmp_path)


def test_adapters_with_a_bias_are_refused():
    with pytest.raises(PlanError, match="lora_bias"):
        LoRAShear(0.2).prepare(adapted(make("llama"), lora_bias=True))


def test_a_model_that_is_merged_first_is_cut_to_the_same(live):
    """Adapters in place and not zero: cutting before the merge equals merging before the cut."""
    scores = {g.name: torch.rand(g.units) for g in live.groups.of_kinds(["ffn_channel", "kv_group"])}
    plan = sc.allocate(live.groups, scores, sc.Budget(0.1), uniform=False)
    merged = copy.deepcopy(live.model).merge_and_unload()
    wanted = sc.slice(merged, plan)
    live.mask(plan)
    live.compact()
    found = live.model.merge_and_unload()
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=1e-12)


def test_the_command_prunes_and_pushes_like_any_other(secateur, checkpoint_folder, text_file, tmp_path):
    common = ["--method", "lorashear", "--sparsity", "0.3", "--steps", "8", "--periods", "2", "--seq-len", "16",
              "--batch-size", "2", "--data", text_file, "--push", "linear"]  # fmt: skip
    paper = ["--merge", "--proxies", "cosine,first"]
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "out", *common, *paper)
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    settings = results["protocol"]["settings"]
    assert (settings["push"], settings["merge"], settings["proxies"]) == ("linear", True, ["cosine", "first"])
    assert results["params"]["sparsity"] == pytest.approx(0.3, abs=0.01)
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "o", *common, "--variant", "grad")
    assert code == 2 and "lorashear has no use for --variant" in err and not (tmp_path / "o").exists()
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "o", *common[:-1], "sideways")
    assert code == 2 and "half-space" in err and not (tmp_path / "o").exists()


def test_the_command_spares_what_an_analysis_finds_and_mixes_its_data(secateur, checkpoint_folder, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n".join(line[::-1] for line in text_file.read_text().splitlines()) + "\n")
    knowledge, out = tmp_path / "knowledge.json", tmp_path / "out"
    code, _, err = secateur(
        "analyze", checkpoint_folder, "--text", text_file, "--seq-len", "16", "--samples", "8", "--json", knowledge
    )
    assert code == 0, err
    code, _, err = secateur(
        "prune", checkpoint_folder, "-o", out, "--method", "lorashear", "--sparsity", "0.2", "--steps", "8",
        "--periods", "2", "--seq-len", "16", "--batch-size", "2", "--data", text_file, "--data", other,
        "--mix", "dynamic", "--knowledge", knowledge, "--protect-share", "0.3", "--per-layer",
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    mix, plan = results["training"]["mix"], sc.PruningPlan.load(out / "plan.json")
    assert [r["step"] for r in mix["rounds"]] == list(range(8)) and (out / "mix.svg").exists()
    assert all(set(r["sources"]) == {"stories", "other"} for r in mix["rounds"])
    protected = plan.provenance["knowledge"]["protected"]
    (run,) = report.read_runs([out])
    assert {"knowledge", "sparsity"} <= {picture.name for picture in report.pictures(run)}
    assert protected and not set(protected) & set(plan.kept)
    assert results["params"]["sparsity"] == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("merge", [False, True])
def test_no_adapter_is_written_where_earlier_ones_were_merged(checkpoint_folder, text_file, tmp_path, merge):
    recipe = parse_recipe(
        {
            "model": {"source": str(checkpoint_folder)},
            "method": {"name": "lorashear", "merge": merge, "periods": 2},
            "prune": {"param_sparsity": 0.3},
            "recovery": {"data": [str(text_file)], "steps": 8, "seq_len": 16, "batch_size": 2},
        }
    )
    pipeline.prune_while_training(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "adapter").exists() != merge
    with pytest.raises(PlanError, match="merged adapters into the weights that stay"):
        pruning = LoRAShear(0.3, merge=True)
        pruning.live = object()
        pruning.save_adapter(tmp_path / "alone")
