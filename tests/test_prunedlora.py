"""PrunedLoRA: the criterion against optimisers and brute force, and runs that remove, resume, save and load."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from families import make
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import secateur as sc
from secateur.discovery.trace import probe_ids
from secateur.errors import BudgetError, CheckpointError, NonFiniteError, PlanError
from secateur.importance.components import ComponentCriterion, Pair, Quadratic, greedy
from secateur.methods import prunedlora
from secateur.methods.prunedlora import PAPER, STATE, PrunedLoRA, prune_adapter
from secateur.surgery.component_pruning import Pruner
from secateur.surgery.rank_schedule import PrunedLoRASettings
from secateur.surgery.ranks import Components

RIVALS = [ComponentCriterion(kind) for kind in ("magnitude", "taylor", "sensitivity", "activation")]
OURS = [
    ComponentCriterion(),
    ComponentCriterion(factors="both"),
    ComponentCriterion(factors="a", newton=0.5),
    ComponentCriterion(joint=False, recover=False),
    replace(PAPER, recover=False),
]
PLAIN: dict = {}
ROOT, DORA = {"use_rslora": True}, {"use_dora": True}


def adapted(model, rank: int = 8, seed: int = 0, **options) -> PeftModel:
    """The model with adapters that already do something."""
    options = {"target_modules": "all-linear", "lora_alpha": rank} | options
    peft = get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **options), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return peft


def examples(count: int = 64, vocabulary: int = 100) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, vocabulary, (count, 16), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": r, "labels": r} for r in rows])


def trained(model, callbacks, folder, steps: int = 12, resume: str | None = None, **options) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=5e-3, use_cpu=True, logging_steps=1, report_to="none",
        disable_tqdm=True, **{"save_strategy": "no", "per_device_train_batch_size": 4} | options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=examples(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(probe_ids(model)).logits


def problem(columns: int = 6, rows: int = 9, newton: float = 1.0, seed: int = 0) -> tuple[Quadratic, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient, more = (torch.randn(rows, columns, generator=generator).double() for _ in range(3))
    curvature = more.T @ more + 0.1 * torch.eye(columns)
    return Quadratic(weight, curvature, gradient, newton), curvature


def minimised(quadratic: Quadratic, curvature, gradient, removed) -> tuple[float, torch.Tensor]:
    """The constrained minimum by LBFGS over the free columns."""
    free = [j for j in range(len(curvature)) if j not in removed]
    start = torch.zeros(len(quadratic.weight), len(free), dtype=torch.float64, requires_grad=True)

    def change() -> torch.Tensor:
        whole = -quadratic.weight.clone()
        keep = torch.zeros_like(whole)
        keep[:, free] = start
        mask = torch.ones(len(curvature), dtype=torch.float64)
        mask[list(removed)] = 0
        return keep + whole * (1 - mask)

    def loss() -> torch.Tensor:
        d = change()
        return (gradient * d).sum() + (d @ curvature * d).sum() / 2

    optimizer = torch.optim.LBFGS([start], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return float(loss().detach()), change().detach()


@pytest.mark.parametrize("newton", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("removed", [(2,), (0, 4), (1, 2, 5)])
def test_the_closed_form_is_what_an_optimiser_finds(newton, removed):
    generator = torch.Generator().manual_seed(0)
    weight, gradient, more = (torch.randn(9, 6, generator=generator).double() for _ in range(3))
    curvature = more.T @ more + 0.1 * torch.eye(6)
    quadratic = Quadratic(weight, curvature, gradient, newton)
    least, change = minimised(quadratic, curvature, newton * gradient, removed)
    torch.testing.assert_close(quadratic.change(list(removed)), change, rtol=0, atol=1e-6)
    free, _ = minimised(quadratic, curvature, newton * gradient, ())
    assert quadratic.increase(list(removed)) == pytest.approx(least - free, rel=1e-8)
    assert not (weight + quadratic.change(list(removed)))[:, list(removed)].abs().max() > 1e-12
    if len(removed) == 1:
        assert float(quadratic.scores()[removed[0]]) == pytest.approx(least - free, rel=1e-8)


def test_each_greedy_step_is_the_best_one_by_brute_force():
    quadratics = [problem(seed=seed)[0] for seed in (1, 2)]
    chosen: list[int] = []
    before = 0.0
    for j, cost in greedy(quadratics, 6):
        losses = {k: sum(q.increase([*chosen, k]) for q in quadratics) for k in range(6) if k not in chosen}
        assert j == min(losses, key=losses.get)
        assert cost == pytest.approx(losses[j] - before, rel=1e-6, abs=1e-9)
        chosen, before = [*chosen, j], losses[j]


def test_joint_choice_beats_single_scores_and_comes_near_the_best_set():
    joint = single = best = 0.0
    for seed in range(40):
        q = problem(columns=8, seed=seed, newton=0.0)[0]
        joint += q.increase([j for j, _ in greedy([q], 3)])
        single += q.increase(q.scores().argsort()[:3].tolist())
        best += min(q.increase(list(s)) for s in itertools.combinations(range(8), 3))
    assert best <= joint < single and joint < 1.1 * best


@pytest.fixture
def stepped():
    """A small Llama with adapters and their gradients, double precision."""
    peft = adapted(make("llama").double())
    pruner = Pruner(peft, ComponentCriterion())
    ids = probe_ids(peft)
    peft(input_ids=ids, labels=ids).loss.backward()
    return peft, pruner


def test_both_factors_of_a_component_have_the_same_inner_product_with_their_gradients(stepped):
    _, pruner = stepped
    for name in pruner.initial:
        pair = pruner._pair(name)
        of_b, of_a = (pair.b * pair.grad_b).sum(0), (pair.a * pair.grad_a).sum(1)
        torch.testing.assert_close(of_b, of_a, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("criterion", [ComponentCriterion(newton=1.0, factors="both"), *RIVALS[:2]])
def test_scores_do_not_depend_on_how_a_component_is_split_between_its_factors(criterion, stepped):
    _, pruner = stepped
    name = next(iter(pruner.initial))
    pair = pruner._pair(name)
    c = torch.linspace(0.1, 10, 8).double()
    other = Pair(pair.b * c, pair.a / c[:, None], pair.grad_b / c, pair.grad_a * c[:, None])
    products = []
    for each in (pair, other):
        state: dict[str, torch.Tensor] = {}
        criterion.observe(each, state)
        verdict = criterion.verdict(each, state, 3, name)
        change = verdict.changes([j for j, _ in verdict.order])
        products.append((verdict.order, each.b + change.get("b", 0), each.a + change.get("a", 0)))
    (order, b, a), (again, scaled_b, scaled_a) = products
    assert [j for j, _ in order] == [j for j, _ in again]
    torch.testing.assert_close(scaled_b, b * c, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(scaled_a, a / c[:, None], rtol=1e-6, atol=1e-12)


def test_the_paper_form_gives_every_component_the_same_score():
    """What is wrong with the Gram of one gradient and its Newton term, and is not with an average over steps."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(64, 16, generator=generator) * 1e-3 for _ in range(20)]
    weight = torch.randn(64, 16, generator=generator) * 1e-4 * torch.linspace(0.1, 10, 16)
    spreads, steps = [], []
    for criterion in (PAPER, ComponentCriterion(factors="both")):
        state: dict[str, torch.Tensor] = {}
        for g in noise:
            pair = Pair(weight, weight.T, g, g.T)
            criterion.observe(pair, state)
        verdict = criterion.verdict(pair, state, 16, "module")
        costs = [c for _, c in verdict.order]
        spreads.append(max(costs) / min(costs))
        steps.append(float(verdict.changes([0, 1])["b"].norm() / weight.norm()))
    assert spreads[0] < 10 < 1000 < spreads[1]
    assert steps[0] > 100 > 1 > steps[1]  # and its change is far larger than what it changes


@pytest.mark.parametrize("options", [PLAIN, ROOT, DORA, {"lora_bias": True}, {"lora_dropout": 0.1}])
def test_removal_is_setting_to_zero(options):
    family = "gpt2" if "lora_bias" in options else "llama"
    peft = adapted(make(family).double(), **options)
    with torch.no_grad():
        peft.eval()(probe_ids(peft))  # DoRA now remembers B A
    parts = Components(peft)
    keep = {n: torch.arange(8)[torch.arange(8) != k % 8] for k, n in enumerate(parts.layers)}
    before = logits(peft)
    parts.clear({n: torch.tensor([k % 8]) for k, n in enumerate(parts.layers)})
    zeroed = logits(peft.train())
    parts.remove(keep)
    assert set(parts.ranks.values()) == {7}
    torch.testing.assert_close(logits(peft), zeroed, rtol=0, atol=1e-12)
    assert float((zeroed - before).abs().max()) > 1e-4


@pytest.mark.parametrize("scope", ["adapter", "global"])
@pytest.mark.parametrize("keep", ["alpha", "scale"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 5}, {"use_dora": True}, {"bias": "all"}])
def test_the_saved_adapter_is_loaded_by_peft_alone(scope, keep, options, tmp_path):
    family = "gpt2" if "bias" in options else "llama"
    base = make(family).double()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    pruning = PrunedLoRA(3, every=2, scope=scope, keep=keep)
    trainer = trained(adapted(base, **options), [pruning], tmp_path / "run")
    ranks = pruning.finish()
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = make(family).double()
    fresh.load_state_dict(before)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter", autocast_adapter_dtype=False)
    wanted = logits(trainer.model)
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(again.merge_and_unload()), wanted, rtol=0, atol=1e-8)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    if scope == "adapter":
        assert config["r"] == 3 and not config["rank_pattern"] and not config["alpha_pattern"]
        assert options.get("lora_alpha") or config["lora_alpha"] == (8 if keep == "alpha" else 3)
    else:
        assert len(set(ranks.values())) > 1 and min(ranks.values()) >= 1
        assert sum(ranks.values()) == 3 * len(ranks) and config["rank_pattern"]
        assert len(config["alpha_pattern"]) == (len(config["rank_pattern"]) if keep == "scale" else 0)
    if keep == "alpha":
        assert config["lora_alpha"] == options.get("lora_alpha", 8)


@pytest.mark.parametrize("options", [PLAIN, ROOT, DORA])
def test_another_scale_changes_nothing_but_how_far_steps_go(options):
    """Gradients and moments are those of the new factors."""
    model = adapted(make("llama").double(), **options)
    parts, ids = Components(model), probe_ids(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0, betas=(0.0, 0.0))

    def stepped() -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        states = {name: optimizer.state[parts.up(name)] | {"grad": parts.up(name).grad} for name in parts.layers}
        return {f"{name} {key}": t.clone() for name, state in states.items() for key, t in state.items()}

    stepped()
    before = logits(model)
    parts.rescale({name: 4 * scale for name, scale in parts.scales.items()}, optimizer)
    changed = {f"{n} {k}": t for n in parts.layers for k, t in optimizer.state[parts.up(n)].items() if k != "step"}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)
    again = stepped()
    for key, tensor in changed.items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-9, atol=1e-15)
    assert all(layer.lora_alpha["default"] == 32 for layer in parts.layers.values())


@pytest.mark.parametrize("kind", ["fisher", "activation", "taylor", "sensitivity"])
def test_averages_follow_the_scale(kind, stepped):
    """They are what the new factors and gradients give."""
    _, pruner = stepped
    criterion = ComponentCriterion(kind, ema=0.0)
    name = next(iter(pruner.initial))
    up, down = pruner.parts.up(name), pruner.parts.down(name)
    z = torch.randn(5, down.shape[0], dtype=down.dtype)
    states: list[dict] = [{}, {}]
    for state, root in zip(states, (1.0, 1.5), strict=True):
        pair = Pair(up.data / root, down.data / root, up.grad * root, down.grad * root, z.T @ z / root**2)
        criterion.observe(pair, state)
    followed = criterion.rescaled(states[0], 1.5**2)
    assert all(torch.allclose(followed[key], tensor) for key, tensor in states[1].items())


@pytest.mark.parametrize("criterion", [*OURS, *RIVALS])
def test_every_criterion_reaches_the_target_and_moments_follow(criterion, tmp_path):
    pruning = PrunedLoRA(2, every=3, criterion=criterion)
    trainer = trained(adapted(make("llama")), [pruning], tmp_path, gradient_accumulation_steps=2)
    assert set(pruning.finish().values()) == {2}
    optimizer = trainer.optimizer.optimizer
    sizes = {tuple(p.shape) for p in optimizer.param_groups[0]["params"]}
    assert all(2 in size for size in sizes)
    for parameter in optimizer.param_groups[0]["params"]:
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    means = [row["mean"] for row in pruning.history]
    assert means[0] == 8 and means[-1] == 2 and means == sorted(means, reverse=True)


@pytest.mark.parametrize("keep", ["alpha", "scale"])
def test_removed_at_once_is_zeroed_and_removed_in_the_end(keep, tmp_path):
    """What distributed training does ends at the same adapter: no moment brings a component back."""
    found = []
    for compact in (True, False):
        torch.manual_seed(0)
        model = adapted(make("llama").double(), lora_dropout=0.0)
        pruning = PrunedLoRA(3, every=2, keep=keep, criterion=ComponentCriterion(ema=0.5))

        class Set(TrainerCallback):
            def on_step_begin(self, args, state, control, pruning=pruning, compact=compact, **_):
                pruning.pruner.compact = compact

        trained(model, [pruning, Set()], tmp_path / str(compact), weight_decay=0.01)
        found.append(logits(model))
        assert set(Components(model).ranks.values()) == {3}
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("scope", ["adapter", "global"])
@pytest.mark.parametrize("keep", ["alpha", "scale"])
def test_a_killed_run_resumes_to_the_same_adapter_to_the_bit(scope, keep, tmp_path):
    def run(folder, callbacks=(), checkpoint=None):
        torch.manual_seed(0)
        model = adapted(make("llama"), lora_dropout=0.1)
        pruning = PrunedLoRA(3, every=2, scope=scope, keep=keep, cooldown=0.3)
        if checkpoint:
            pruning.prepare(model, checkpoint)
        trained(model, [pruning, *callbacks], folder, resume=checkpoint, save_strategy="steps", save_steps=4)
        return pruning.finish(), model.state_dict(), pruning.history

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 6:
                raise KeyboardInterrupt

    ranks, whole, history = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", [Die()])
    resumed_ranks, resumed, again = run(tmp_path / "part", checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    assert ranks == resumed_ranks and history == again and whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_inside_a_trl_trainer(tokenizer, tmp_path):
    from trl import SFTConfig, SFTTrainer

    model = make("llama", vocab_size=len(tokenizer))
    texts = Dataset.from_list([{"text": "the old man opened a door and saw his small garden"}] * 32)
    pruning = PrunedLoRA(2, every=2)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            str(tmp_path), max_steps=8, per_device_train_batch_size=4, use_cpu=True, report_to="none", bf16=False,
            save_strategy="no", disable_tqdm=True, max_length=16,
        ),
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[pruning],
    )  # fmt: skip
    trainer.train()
    assert set(pruning.finish().values()) == {2}
    trainer.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_bfloat16_and_gradient_checkpointing(tmp_path):
    model = adapted(make("llama").bfloat16())
    pruning = PrunedLoRA(2, every=2, criterion=ComponentCriterion("activation"))
    trained(model, [pruning], tmp_path, gradient_checkpointing=True)
    assert set(pruning.finish().values()) == {2}


def test_steps_that_overflow_are_left_out(tmp_path, monkeypatch):
    """A scaler of float16 skips them: their gradients are no numbers, and nothing leaves at one of them."""
    steps = iter(range(1, 100))
    monkeypatch.setattr(prunedlora, "unscaled", lambda optimizer: next(steps) not in (2, 3))
    seen = []
    monkeypatch.setattr(Pruner, "observe", lambda self, whole=Pruner.observe: (seen.append(1), whole(self)))
    pruning = PrunedLoRA(6, every=2, components=1)
    trained(adapted(make("llama")), [pruning], tmp_path)
    assert [(row["step"], row["mean"]) for row in pruning.history] == [(0, 8), (4, 6)]
    assert len(seen) == 2  # at 1 and 4, which makes up for 2


def test_only_the_named_adapter_of_two(tmp_path):
    model = adapted(make("llama"))
    model.add_adapter("other", LoraConfig(r=5, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    kept = {n: p.clone() for n, p in model.named_parameters() if ".default." in n}
    pruning = PrunedLoRA(2, every=2)
    trained(model, [pruning], tmp_path)
    assert len(pruning.finish()) == 2 and model.peft_config["other"].r == 2 and model.peft_config["default"].r == 8
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)


@pytest.mark.parametrize("options", [PLAIN, DORA])
def test_an_adapter_pruned_after_training(options):
    model = adapted(make("llama").double(), **options).eval()
    ids = probe_ids(model)
    history = prune_adapter(model, [ids, ids.flip(1)], PrunedLoRASettings(3, scope="global"), events=3)
    assert [row["mean"] for row in history][-1] == pytest.approx(3) and len(history) == 4
    assert sum(Components(model).ranks.values()) == 3 * len(Components(model).ranks)


@pytest.mark.parametrize("options", [PLAIN, DORA])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_has_no_part_in_pruning_a_trained_adapter(family, options):
    """Neither that of the adapter nor that of the base; all modules are in their own modes afterwards."""
    found = []
    for seed, dropout in ((0, 0.1), (1, 0.1), (2, 0.0)):
        model = adapted(make(family).double(), lora_dropout=dropout, **options).train()
        model.get_submodule("base_model.model.lm_head").eval()
        modes = {name: module.training for name, module in model.named_modules()}
        ids = probe_ids(model)
        torch.manual_seed(seed)
        history = prune_adapter(model, [ids, ids.flip(1)], PrunedLoRASettings(3), events=2)
        assert {name: module.training for name, module in model.named_modules()} == modes
        found.append(([row["cost"] for row in history], logits(model)))
    for costs, result in found[1:]:
        assert costs == found[0][0] and torch.equal(result, found[0][1])


def test_modes_return_where_pruning_fails():
    model = adapted(make("llama")).train()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        prune_adapter(model, [probe_ids(model)], PrunedLoRASettings(2, criterion=ComponentCriterion("activation")))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_adapter_is_pruned_on_batches_with_labels():
    """The same as by token ids, where all tokens are labels; and not the same where few are."""
    ranks = []
    for labels in (None, "all", "last"):
        model = adapted(make("llama").double()).eval()
        ids = probe_ids(model)
        wanted = ids if labels == "all" else torch.where(torch.arange(ids.shape[1]) == ids.shape[1] - 1, ids, -100)
        prune_adapter(model, [ids if labels is None else {"input_ids": ids, "labels": wanted}], PrunedLoRASettings(3))
        ranks.append(logits(model))
    assert torch.equal(ranks[0], ranks[1]) and not torch.equal(ranks[0], ranks[2])


def test_training_that_stopped_early_goes_on(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 4

    pruning = PrunedLoRA(2, every=2, cooldown=0.3, criterion=ComponentCriterion("activation"))
    model = adapted(make("llama"))
    trained(model, [pruning, Stop()], tmp_path / "first")
    assert 2 < pruning.history[-1]["mean"] < 8
    trained(model, [pruning], tmp_path / "second")
    assert set(pruning.finish().values()) == {2}


class TestRefusals:
    def test_no_adapter(self, tmp_path):
        with pytest.raises(PlanError, match="get_peft_model"):
            trained(make("llama"), [PrunedLoRA(2)], tmp_path)

    def test_a_schedule_that_does_not_get_there(self, tmp_path):
        with pytest.raises(BudgetError, match="bring rank 8 to 7 in 12 steps, not to 2"):
            trained(adapted(make("llama")), [PrunedLoRA(2, components=1)], tmp_path)

    @pytest.mark.parametrize("target", [8, 9])
    @pytest.mark.parametrize(("scope", "have"), [("adapter", "no module of more than rank 8"),
                                                 ("global", "an average rank of 8")])  # fmt: skip
    def test_nothing_to_remove(self, target, scope, have, tmp_path):
        message = f"{have}, and {target} is to be left, so that nothing would be removed"
        with pytest.raises(BudgetError, match=message):
            trained(adapted(make("llama")), [PrunedLoRA(target, scope=scope)], tmp_path)
        model = adapted(make("llama"))
        with pytest.raises(BudgetError, match=message):
            prune_adapter(model, [probe_ids(model)], PrunedLoRASettings(target, scope=scope))

    def test_some_modules_at_the_target_are_left_alone(self, tmp_path):
        pruning = PrunedLoRA(4, every=2)
        trained(adapted(make("llama"), rank_pattern={"q_proj": 4, "up_proj": 2}), [pruning], tmp_path)
        ranks = pruning.finish()
        assert {r for name, r in ranks.items() if name.endswith("up_proj")} == {2}
        assert {r for name, r in ranks.items() if not name.endswith("up_proj")} == {4}

    def test_the_papers_schedule_gets_there(self, tmp_path):
        pruning = PrunedLoRA(2, components=2, every=3, criterion=replace(PAPER, recover=False))
        trained(adapted(make("llama")), [pruning], tmp_path)
        assert [(row["step"], row["mean"]) for row in pruning.history] == [(0, 8), (3, 6), (6, 4), (9, 2)]

    @pytest.mark.parametrize("options", [{"floor": 3}, {"every": 0}, {"components": 0}, {"warmup": 0.8}])
    def test_numbers_out_of_range(self, options):
        with pytest.raises(BudgetError):
            PrunedLoRA(2, **options)
        with pytest.raises(BudgetError):
            PrunedLoRA(0)

    def test_starts_that_change_the_base(self):
        with pytest.raises(PlanError, match="init_lora_weights='pissa'"):
            PrunedLoRA(2).prepare(adapted(make("llama"), init_lora_weights="pissa"))

    def test_embeddings(self):
        with pytest.raises(PlanError, match="leave it out of target_modules"):
            PrunedLoRA(2).prepare(adapted(make("llama"), target_modules=["embed_tokens", "up_proj"]))

    def test_convolutions(self):
        with pytest.raises(PlanError, match="leave it out of target_modules"):
            PrunedLoRA(2).prepare(
                get_peft_model(torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3)), LoraConfig(r=4, target_modules=["0"]))
            )

    def test_stacked_parameters(self):
        import zoo

        stacked = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "lora_dropout": 0.0}
        with pytest.raises(PlanError, match="target_parameters"):
            PrunedLoRA(2).prepare(adapted(zoo.tiny_model("mixtral"), **stacked))

    @pytest.mark.parametrize("what", ["fsdp", "deepspeed", "load_best_model_at_end"])
    def test_training_that_keeps_parts_or_goes_back(self, what):
        arguments = SimpleNamespace(**{what: "on", "world_size": 1, "max_steps": 10})
        with pytest.raises(PlanError, match=f"{what} does not go with components that leave"):
            PrunedLoRA(2).on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=adapted(make("llama")))

    def test_other_kinds(self):
        from peft import AdaLoraConfig

        model = get_peft_model(make("llama"), AdaLoraConfig(total_step=5, target_modules=["up_proj"]))
        with pytest.raises(PlanError, match="this is ADALORA"):
            PrunedLoRA(2).prepare(model)

    def test_stopped_early(self, tmp_path):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop = state.global_step == 4

        pruning = PrunedLoRA(2, every=2, cooldown=0.3)
        trained(adapted(make("llama")), [pruning, Stop()], tmp_path)
        with pytest.raises(PlanError, match="before the target of 2"):
            pruning.finish()

    def test_another_model_than_the_one_prepared(self, tmp_path):
        pruning = PrunedLoRA(2)
        pruning.prepare(adapted(make("llama")))
        with pytest.raises(PlanError, match="prepared for another model"):
            trained(adapted(make("llama")), [pruning], tmp_path)

    def test_a_checkpoint_of_something_else(self, tmp_path):
        with pytest.raises(CheckpointError, match=STATE):
            PrunedLoRA(2).prepare(adapted(make("llama")), tmp_path)

    def test_an_optimizer_whose_state_has_other_shapes(self):
        model = adapted(make("llama"))
        parts = Components(model)
        name = next(iter(parts.layers))
        optimizer = SimpleNamespace(state={parts.up(name): {"row": torch.zeros(3)}})
        with pytest.raises(PlanError, match="take another optimizer"):
            parts.remove({n: torch.arange(3) for n in parts.layers}, optimizer)
        assert set(parts.ranks.values()) == {8}

    def test_scores_that_are_no_numbers(self, stepped):
        _, pruner = stepped
        name = next(iter(pruner.initial))
        pruner.parts.up(name).grad[0, 0] = float("nan")
        pruner.observe()
        with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
            pruner.remove({name: 2})

    def test_a_frozen_adapter(self):
        model = adapted(make("llama"), inference_mode=True)
        with pytest.raises(PlanError, match="is_trainable=True"):
            prune_adapter(model, [probe_ids(model)], PrunedLoRASettings(2))


def test_exported():
    assert sc.PrunedLoRA is PrunedLoRA and sc.LoRAPrune is not None


def test_recipes_and_the_method_have_the_same_defaults():
    from secateur.config import ComponentSettings, TuneSettings

    assert ComponentSettings().model_dump() == asdict(ComponentCriterion())
    assert TuneSettings(target_rank=4).model_dump() == {
        k: v for k, v in asdict(PrunedLoRASettings(4)).items() if k != "adapter"
    }


@pytest.fixture
def told(tmp_path):
    """Options of `secateur tune` on some text."""
    from conftest import story

    data = tmp_path / "data.txt"
    data.write_text("\n".join(story(s) for s in range(12)))
    return [
        "--data", data, "--init-rank", "8", "--steps", "12", "--batch-size", "4", "--seq-len", "32",
        "--learning-rate", "1e-3", "--every", "2",
    ]  # fmt: skip


def test_tune_and_prune_again_by_command(secateur, checkpoint_folder, text_file, told, tmp_path):
    out = tmp_path / "out"
    code, said, err = secateur("tune", checkpoint_folder, "-o", out, *told, "--target-rank", "3", "--text", text_file)
    assert code == 0, err
    assert "rank 8 -> 3" in said and not (tmp_path / "out.work").exists()
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == "tune" and set(results["ranks"].values()) == {3}
    assert results["training"]["ranks"][0]["mean"] == 8 and results["training"]["ranks"][-1]["mean"] == 3
    perplexity = results["perplexity"]["stories"]
    assert perplexity["tuned"] < perplexity["dense"]
    assert results["params"]["final"] * 8 == results["params"]["initial"] * 3
    assert (out / "ranks.svg").read_text().startswith("<?xml")
    base = sc.load(checkpoint_folder)
    tuned = PeftModel.from_pretrained(base.model, out).eval()
    value = sc.perplexity(tuned, base.tokenizer, sc.load_corpus(text_file), seq_len=128, batch_size=8).value
    assert value == pytest.approx(perplexity["tuned"], rel=1e-5)

    code, said, err = secateur(
        "prune", out, "-o", tmp_path / "smaller", "--target-rank", "1", "--calibration", text_file, "--seq-len", "32",
        "--text", text_file, "--iterations", "2",
    )  # fmt: skip
    assert code == 0, err
    again = json.loads((tmp_path / "smaller" / "results.json").read_text())
    stages = again["perplexity"]["stories"]
    assert stages["adapted"] == pytest.approx(perplexity["tuned"], rel=1e-5) and "rank 3 -> 1" in said
    assert stages["adapted"] < stages["pruned"] < stages["dense"]
    assert json.loads((tmp_path / "smaller" / "adapter_config.json").read_text())["r"] == 1
    code, _, err = secateur(
        "prune", tmp_path / "smaller", "-o", tmp_path / "o", "--target-rank", "1", "--calibration", text_file,
        "--seq-len", "32", "--text", text_file,
    )  # fmt: skip
    assert code == 2 and "no module of more than rank 1, and 1 is to be left" in err and not (tmp_path / "o").exists()


def test_a_killed_tune_goes_on(secateur, checkpoint_folder, told, tmp_path, monkeypatch):
    more = [*told, "--target-rank", "2", "--save-every", "4", "--scope", "global"]
    assert secateur("tune", checkpoint_folder, "-o", tmp_path / "whole", *more)[0] == 0

    def killed(self, args, state, control, **_):
        if state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PrunedLoRA, "on_step_end", killed)
        assert secateur("tune", checkpoint_folder, "-o", tmp_path / "out", *more)[0] == 130
    assert not (tmp_path / "out").exists()
    code, _, err = secateur("tune", checkpoint_folder, "-o", tmp_path / "out", *more, "--resume")
    assert code == 0, err
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ranks = [json.loads((tmp_path / f / "results.json").read_text())["training"]["ranks"] for f in ("out", "whole")]
    assert ranks[0] == ranks[1]


def test_a_recipe_that_tunes(checkpoint_folder, told, tmp_path):
    from secateur.config import parse_recipe
    from secateur.pipeline import run_recipe

    recipe = parse_recipe(
        {
            "model": {"source": str(checkpoint_folder)},
            "tune": {"target_rank": 2, "criterion": {"kind": "magnitude"}},
            "recovery": {"data": [str(told[1])], "rank": 4, "steps": 4, "batch_size": 2, "seq_len": 32},
        }
    )
    results = run_recipe(recipe, tmp_path / "run")
    assert set(results["ranks"].values()) == {2} and (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert run_recipe(recipe, tmp_path / "run", resume=True)["ranks"] == results["ranks"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-rank", "8"], "start from a larger one"),
        (["--target-rank", "1", "--components", "1"], "bring rank 8 to 2 in 12 steps, not to 1"),
        (["--target-rank", "2", "--criterion", "best"], "tune.criterion.kind"),
        (["--target-rank", "2", "--method", "loraprune"], "tune knows prunedlora"),
    ],
)
def test_wrong_words(secateur, checkpoint_folder, told, tmp_path, options, message):
    code, _, err = secateur("tune", checkpoint_folder, "-o", tmp_path / "o", *told, *options)
    assert code == 2 and message in err and not (tmp_path / "o").exists()


def test_wrong_words_for_an_adapter(secateur, checkpoint_folder, text_file, tmp_path):
    adapter = tmp_path / "adapter"
    adapted(make("llama"), rank=2).save_pretrained(adapter)
    for options, message in (
        ([], "say which rank to leave it"),
        (["--target-rank", "1", "--sparsity", "0.2"], "an adapter has no use for --sparsity"),
        (["--target-rank", "1", "--base", checkpoint_folder, "--calibration", text_file, "--seq-len", "16"], "not fit"),
        (["--target-rank", "1", "--base", tmp_path / "no"], "no"),
    ):
        code, _, err = secateur("prune", adapter, "-o", tmp_path / "o", *options)
        assert code == 2 and message in err and not (tmp_path / "o").exists()
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "o", "--target-rank", "1")
    assert code == 2 and "has no adapter_config.json" in err


DISTRIBUTED = """
import sys
import torch
from datasets import Dataset
sys.path.insert(0, sys.argv[1])
from test_prunedlora import adapted, make, trained
from secateur.methods.prunedlora import PrunedLoRA
from secateur.importance.components import ComponentCriterion
torch.manual_seed(0)
pruning = PrunedLoRA(3, every=2, scope="global", criterion=ComponentCriterion(sys.argv[3]))
trainer = trained(adapted(make("llama")), [pruning], sys.argv[2], ddp_backend="gloo", per_device_train_batch_size=1,
                  gradient_accumulation_steps=2)
assert torch.distributed.get_world_size() == 2
ranks = pruning.finish()
state = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
both = [torch.zeros_like(state) for _ in range(2)]
torch.distributed.all_gather(both, state)
assert torch.equal(*both), "processes differ"
trainer.save_model(sys.argv[2] + "/adapter")
"""


@pytest.mark.parametrize("kind", ["fisher", "activation"])
def test_two_processes_take_the_same_decisions(kind, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), str(Path(__file__).parent),
               str(tmp_path / "out"), kind]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["r"] <= 8


def test_a_packed_base(secateur, checkpoint_folder, told, tmp_path):
    pytest.importorskip("bitsandbytes")
    more = [*told, "--target-rank", "2", "--quantize", "8bit"]
    code, said, err = secateur("tune", checkpoint_folder, "-o", tmp_path / "out", *more)
    assert code == 0, err
    assert "rank 8 -> 2" in said
