"""LoRAPrune: the criterion against slow copies of it, and a training run that masks, compacts, resumes and cuts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import make
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import secateur as sc
from secateur.data import load_corpus
from secateur.discovery.reference import plain_logits
from secateur.discovery.trace import probe_ids
from secateur.errors import BudgetError, NonFiniteError, PlanError
from secateur.importance.lora_guided import LoraGuided
from secateur.methods.loraprune import LoRAPrune
from secateur.plan import PruningPlan
from secateur.recovery.mixed_precision import loss_scale, unscaled
from secateur.surgery.live import LiveModel


def adapted(model, rank: int = 4, seed: int = 0, **options) -> PeftModel:
    """The model with adapters that already do something."""
    options = {"target_modules": "all-linear"} | options
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


def trained(
    model, callbacks, folder, steps: int = 12, resume: str | None = None, optimizers=(None, None), **options
) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=5e-3, use_cpu=True, logging_steps=1, report_to="none",
        disable_tqdm=True, **{"save_strategy": "no", "per_device_train_batch_size": 4} | options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=examples(), callbacks=list(callbacks), optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture
def stepped():
    """A small Llama with adapters and their gradients, its groups, and the loss behind the gradients."""
    peft = adapted(make("llama").double())
    ids = probe_ids(peft)
    peft(input_ids=ids, labels=ids).loss.backward()
    return peft, LiveModel(peft)


def element_wise(layer, gradient=None):
    """|G (W + s B A)| with the whole matrices at hand; G as the change of B A under one step of unit length."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    before, after = b @ a, (b - b.grad) @ (a - a.grad)
    g = before - after if gradient is None else gradient
    return (g * (layer.base_layer.weight + layer.scaling["default"] * b @ a)).abs().detach().float()


@pytest.mark.parametrize("columns_at_a_time", [7, 1024])
def test_scores_are_sums_of_the_estimate_over_each_unit(stepped, columns_at_a_time, monkeypatch):
    monkeypatch.setattr("secateur.importance.lora_guided.COLUMNS", columns_at_a_time)
    _, live = stepped
    mlp = live.base.model.layers[1].mlp
    name = "model.layers.1.mlp/ffn_channel"
    found = LoraGuided(normalise=False).scores(live.base, live.groups, {}, [name], {})[name]
    wanted = element_wise(mlp.gate_proj).sum(1) + element_wise(mlp.up_proj).sum(1) + element_wise(mlp.down_proj).sum(0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


def test_a_kv_group_is_scored_with_the_queries_it_serves(stepped):
    _, live = stepped
    attention = live.base.model.layers[0].self_attn
    name = "model.layers.0.self_attn/kv_group"
    found = LoraGuided(normalise=False).scores(live.base, live.groups, {}, [name], {})[name]
    into = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (element_wise(p).sum(1).reshape(3, -1).sum(1) for p in into)
    o = element_wise(attention.o_proj).sum(0).reshape(3, -1).sum(1)
    torch.testing.assert_close(found, q + k + v + o, rtol=1e-4, atol=0)
    parts = [part / part.norm() for part in (q, k, v, o)]
    found = LoraGuided().scores(live.base, live.groups, {}, [name], {})[name]
    torch.testing.assert_close(found, sum(parts), rtol=1e-4, atol=0)


def test_grad_uses_the_gradient_of_the_frozen_weight():
    peft = adapted(make("gpt2").double(), target_modules=["c_fc", "c_proj"])
    live = LiveModel(peft)
    mlp = live.base.transformer.h[0].mlp
    for module in (mlp.c_fc, mlp.c_proj):
        module.base_layer.weight.requires_grad_(True)
    ids = probe_ids(peft)
    peft(input_ids=ids, labels=ids).loss.backward()
    gradients = {f"transformer.h.0.mlp.{n}.weight": getattr(mlp, n).base_layer.weight.grad for n in ("c_fc", "c_proj")}
    name = "transformer.h.0.mlp/ffn_channel"
    found = LoraGuided("grad", normalise=False).scores(live.base, live.groups, {}, [name], gradients)[name]

    def salience(module):
        delta = module.get_delta_weight("default")
        return (module.base_layer.weight.grad * (module.base_layer.weight + delta)).abs().detach().float()

    torch.testing.assert_close(found, salience(mlp.c_fc).sum(0) + salience(mlp.c_proj).sum(1), rtol=1e-4, atol=0)


def test_masked_units_and_removed_units_leave_the_same_scores(stepped):
    _, live = stepped
    name = "model.layers.0.self_attn/kv_group"
    kept = {name: (0, 2), "model.layers.0.mlp/ffn_channel": tuple(range(5, 44))}
    masked = LoraGuided().scores(live.base, live.groups, kept, list(kept), {})
    live.mask(PruningPlan(kept, {n: live.groups.named(n).units for n in kept}))
    live.compact()
    removed = LoraGuided().scores(live.base, live.built, {}, list(kept), {})
    for group in kept:
        torch.testing.assert_close(masked[group], removed[group], rtol=1e-6, atol=0)


def test_a_score_that_is_no_number_stops_with_the_name_of_the_parameter(stepped):
    _, live = stepped
    live.base.model.layers[1].mlp.up_proj.lora_B["default"].weight.grad[3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        LoraGuided().scores(live.base, live.groups, {}, ["model.layers.1.mlp/ffn_channel"], {})


class Watch(TrainerCallback):
    """Notes the units kept after every step."""

    def __init__(self, pruning: LoRAPrune) -> None:
        self.pruning, self.kept = pruning, []

    def on_step_end(self, args, state, control, **_):
        self.kept.append({n: set(k) for n, k in self.pruning.live.plan.kept.items()})


@pytest.mark.parametrize("options", [{}, {"ranking": "global", "uniform": False}, {"variant": "grad"}])
def test_the_budget_is_met_and_removed_units_never_return(options, tmp_path):
    pruning = LoRAPrune(0.3, frequency=1, initial=0.15, **options)
    watch = Watch(pruning)
    trained(adapted(make("llama")), [pruning, watch], tmp_path)
    groups = pruning.live.groups
    layers = 2 if pruning.settings.uniform else 1
    unit, coarse = (
        layers * sum(np.prod(groups.shapes[m.parameter]) // group.units for m in group.members)
        for group in (groups.named("model.layers.0.mlp/ffn_channel"), groups.named("model.layers.0.self_attn/kv_group"))
    )
    assert abs(pruning.sparsity - 0.3) * groups.total_parameters <= unit / 2
    assert 0 <= (0.15 - pruning.history[0]["sparsity"]) * groups.total_parameters < coarse and watch.kept[0]
    base = [p for n, p in pruning.live.base.named_parameters() if "lora_" not in n]
    assert not any(p.requires_grad or p.grad is not None for p in base)
    for before, after in zip(watch.kept, watch.kept[1:], strict=False):
        assert all(after[name] <= kept for name, kept in before.items())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "phi3", "gpt_neox", "gpt2", "falcon-mqa", "opt"])
def test_the_cut_and_merged_model_is_the_masked_one(family):
    live = LiveModel(adapted(make(family).double()))
    kinds = live.groups.kinds_in_blocks()
    can = live.possible(kinds, uniform=True)
    kept = {g.name: tuple(range(1, g.units)) for g in live.groups.of_kinds(kinds) if g.family not in can.refused}
    dense = live.logits()
    live.mask(PruningPlan(kept, {n: live.groups.named(n).units for n in kept}))
    small, difference = live.assembled()
    assert difference <= 1e-9
    assert small.num_parameters() == live.groups.remaining_parameters(kept)
    assert float((plain_logits(small, probe_ids(small)) - dense).abs().max()) > 1e-4  # what went had an effect


def test_norms_over_heads_cannot_be_masked():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 6}
    live = LiveModel(adapted(Olmo2ForCausalLM(Olmo2Config(**sizes, vocab_size=131, pad_token_id=0))))
    refused = live.possible(live.groups.kinds_in_blocks(), uniform=True).refused
    assert "logits differ" in refused["model.layers.*.self_attn/attention_head"]
    assert "model.layers.*.mlp/ffn_channel" not in refused


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compaction_trains_like_masking(family, tmp_path):
    runs = {}
    for every in (None, 3):
        torch.manual_seed(0)
        pruning = LoRAPrune(0.3 if family == "llama" else 0.08, frequency=2, compact_every=every)
        trainer = trained(adapted(make(family).double(), lora_dropout=0.0), [pruning], tmp_path / str(every))
        runs[every] = losses(trainer), pruning, trainer
    np.testing.assert_allclose(runs[3][0], runs[None][0], rtol=1e-9)
    assert runs[3][1].live.plan.kept == runs[None][1].live.plan.kept
    sizes = [sum(p.numel() for p in r[1].live.base.parameters()) for r in (runs[3], runs[None])]
    assert sizes[0] < sizes[1]
    optimizer = runs[3][2].optimizer.optimizer
    for parameter in optimizer.param_groups[0]["params"]:
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    both = [plain_logits(r[1].finish().model, probe_ids(r[1].live.base)) for r in runs.values()]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("compact_every", [None, 3])
def test_a_killed_run_resumes_to_the_same_model_to_the_bit(compact_every, tmp_path):
    def run(folder, callbacks=(), checkpoint=None):
        torch.manual_seed(0)
        model = adapted(make("llama"), lora_dropout=0.1)
        pruning = LoRAPrune(0.3, frequency=2, compact_every=compact_every)
        if checkpoint and compact_every:
            pruning.prepare(model, checkpoint)
        trained(model, [pruning, *callbacks], folder, resume=checkpoint, save_strategy="steps", save_steps=4)
        return pruning.finish().model

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 6:
                raise KeyboardInterrupt

    whole = run(tmp_path / "whole").state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", [Die()])
    resumed = run(tmp_path / "part", checkpoint=str(tmp_path / "part" / "checkpoint-4")).state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_the_adapter_alone_fits_the_cut_base(tmp_path):
    base = make("llama")
    pruning = LoRAPrune(0.3, frequency=2)
    trained(adapted(copy.deepcopy(base)), [pruning], tmp_path / "run")
    result = pruning.finish()
    pruning.save_adapter(tmp_path / "adapter")
    again = PeftModel.from_pretrained(sc.slice(base, result.plan), tmp_path / "adapter").eval()
    ids = probe_ids(base)
    torch.testing.assert_close(again(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_inside_a_trl_trainer(tokenizer, tmp_path):
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    model = make("llama", vocab_size=len(tokenizer))
    texts = Dataset.from_list([{"text": "the old man opened a door and saw his small garden"}] * 32)
    pruning = LoRAPrune(0.3, frequency=2)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            str(tmp_path), max_steps=8, per_device_train_batch_size=4, use_cpu=True, report_to="none", bf16=False,
            save_strategy="no", disable_tqdm=True, max_length=16,
        ),
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[pruning],
    )  # fmt: skip
    trainer.train()
    result = pruning.finish()
    assert result.difference < 1e-4
    dense = make("llama", vocab_size=len(tokenizer)).num_parameters()
    assert abs(1 - result.model.num_parameters() / dense - 0.3) < 0.01


class TestMixedPrecision:
    """Gradients under a scaler are unscaled once, and steps that overflow are left out."""

    def optimizer(self, scale: float = 1024.0):
        weight = torch.nn.Parameter(torch.ones(3))
        inner = torch.optim.SGD([weight], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale((weight * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
        return weight, SimpleNamespace(scaler=scaler, optimizer=inner)

    def test_scaled_gradients(self):
        weight, optimizer = self.optimizer()
        assert loss_scale(optimizer) == 1024
        assert unscaled(optimizer)
        assert weight.grad.tolist() == [1.0, 2.0, 3.0]
        assert unscaled(optimizer)  # clipping, too, would have done it
        assert weight.grad.tolist() == [1.0, 2.0, 3.0]

    def test_overflow(self):
        weight, optimizer = self.optimizer()
        weight.grad[0] = float("inf")
        assert not unscaled(optimizer)

    def test_no_scaler(self):
        assert unscaled(SimpleNamespace(optimizer=None)) and loss_scale(SimpleNamespace(optimizer=None)) == 1


class TestRefusals:
    def test_no_budget(self):
        with pytest.raises(BudgetError, match="how much to remove"):
            LoRAPrune()

    def test_dora(self):
        with pytest.raises(PlanError, match="use_dora=False"):
            LoRAPrune(0.2).prepare(adapted(make("llama"), use_dora=True))

    def test_groups_without_adapters(self):
        with pytest.raises(PlanError, match="no LoRA adapter lies on a weight of"):
            LoRAPrune(0.2).prepare(adapted(make("llama"), target_modules=["up_proj"]))

    def test_nothing_to_finish(self):
        with pytest.raises(PlanError, match="train with this callback first"):
            LoRAPrune(0.2).finish()

    def test_a_run_that_ended_too_early(self, tmp_path):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop = state.global_step == 4

        pruning = LoRAPrune(0.3, frequency=2)
        trained(adapted(make("llama")), [pruning, Stop()], tmp_path)
        with pytest.raises(PlanError, match=r"before the 0\.3 asked for"):
            pruning.finish()

    def test_a_schedule_that_does_not_ascend(self):
        with pytest.raises(BudgetError, match=r"cannot go from 0\.5 to 0\.2"):
            LoRAPrune(0.2, initial=0.5)

    def test_another_model_than_the_one_prepared(self, tmp_path):
        pruning = LoRAPrune(0.2)
        pruning.prepare(adapted(make("llama")))
        with pytest.raises(PlanError, match="prepared for another model"):
            trained(adapted(make("llama")), [pruning], tmp_path)

    def test_hidden_dimensions(self):
        with pytest.raises(PlanError, match="cannot be masked while the model trains"):
            LoRAPrune(0.2, kinds=("hidden",)).prepare(adapted(make("llama")))

    def test_an_optimizer_whose_state_has_other_shapes(self):
        live = LiveModel(adapted(make("llama")))
        name = "model.layers.0.mlp/ffn_channel"
        live.mask(PruningPlan({name: tuple(range(40))}, {name: 44}))
        factor = live.base.model.layers[0].mlp.up_proj.lora_B["default"].weight
        optimizer = SimpleNamespace(state={factor: {"row": torch.zeros(44)}})
        before = {n: p.shape for n, p in live.base.named_parameters()}
        with pytest.raises(PlanError, match="take another optimizer, or masks alone"):
            live.compact(optimizer)
        assert {n: p.shape for n, p in live.base.named_parameters()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibration", "x.txt"], "loraprune has no use for --calibration"),
        (["--kinds", "ffn_channel=0.5"], "one budget for all kinds"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--variant", "best"], "method.variant"),
    ],
)
def test_wrong_words(secateur, checkpoint_folder, tmp_path, options, message):
    given = ["--method", "loraprune", "--sparsity", "0.3", "--steps", "2"]
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "o", *given, *options)
    assert code == 2 and message in err and not list(tmp_path.iterdir())


def test_training_options_are_for_methods_that_train(secateur, checkpoint_folder, tmp_path):
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "o", "--sparsity", "0.3", "--rank", "4")
    assert code == 2 and "auto has no use for --rank" in err
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "o", "--sparsity", "0.3", "--resume")
    assert code == 2 and "--resume: a cut at once begins anew" in err


def test_whole_job(secateur, checkpoint_folder, text_file, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": Path(text_file).read_text()[:2000]}) + "\n" for _ in range(8)))
    code, out, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "out", "--method", "loraprune", "--sparsity", "0.3",
        "--data", data, "--steps", "12", "--batch-size", "4", "--seq-len", "32", "--compact-every", "5",
        "--warmup", "0.25", "--cooldown", "0.25", "--frequency", "3", "--text", text_file,
    )  # fmt: skip
    assert code == 0, err
    assert "asked for" not in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert f"{results['params']['pruned']:,} parameters" in out and "ffn_channel" in out
    assert f"differ by {results['masked_minus_cut']:.1e} from those in training" in out.replace("\n", " ")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "How it was trained while it was cut" in card and "compared with the masked model in training" in card
    assert abs(results["params"]["sparsity"] - 0.3) < 0.01
    assert results["parity"]["max_logit_difference"] <= 1e-5 and results["masked_minus_cut"] < 1e-4
    assert [entry["step"] for entry in results["training"]["sparsity"]] == [3, 6, 9]
    assert results["training"]["sparsity"][-1]["sparsity"] == pytest.approx(results["params"]["sparsity"], abs=1e-6)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out.work").exists()
    cut = sc.load(checkpoint_folder)
    replayed = sc.slice(cut.model, PruningPlan.load(tmp_path / "out" / "plan.json"))
    assert replayed.num_parameters() == results["params"]["pruned"]
    assert load_corpus(data).sha256 == results["training"]["data"][0]["sha256"]


@pytest.mark.parametrize(
    "settings, adapter, words",
    [
        ({"sparsity": 0.97}, {}, "cannot be reached"),
        ({"sparsity": 0.3, "protect_first": 1}, {}, "uniform"),
        ({"sparsity": 0.3, "round_to": 1000}, {}, "cannot be reached"),
        ({"sparsity": 0.3}, {"target_modules": ["embed_tokens", "up_proj", "down_proj", "o_proj"]}, "on an embedding"),
        ({"sparsity": 0.3}, {"target_modules": ["lm_head", "up_proj", "down_proj", "o_proj"]}, "tied"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_first_step(settings, adapter, words):
    with pytest.raises((BudgetError, PlanError), match=words):
        LoRAPrune(**settings).prepare(adapted(make("llama"), **adapter))


def test_modules_that_cannot_be_compacted_are_refused_before_the_first_step():
    with pytest.raises(PlanError, match="compact_every"):
        LoRAPrune(0.2, compact_every=5).prepare(adapted(make("phi3")))


def test_a_model_without_adapters_is_told_how_to_get_some():
    with pytest.raises(PlanError, match="get_peft_model"):
        LoRAPrune(0.3).prepare(make("llama"))


def test_the_best_checkpoint_is_not_put_into_a_pruned_model(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4,
            "save_steps": 4}  # fmt: skip
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **best)
    with pytest.raises(PlanError, match="load_best_model_at_end"):
        LoRAPrune(0.3).on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=adapted(make("llama")))


@pytest.mark.parametrize(
    "wrong", [{"variant": "best"}, {"frequency": 0}, {"ema": 2.0}, {"compact_every": 0}, {"ranking": "some"}]
)
def test_settings_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(BudgetError, match=name):
        LoRAPrune(0.3, **wrong)


def test_the_adapter_is_saved_with_what_peft_saves_of_the_base(tmp_path):
    pruning = LoRAPrune(0.2, frequency=2)
    trained(adapted(make("mistral", tie_word_embeddings=False), target_modules=[
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]), [pruning],
        tmp_path / "run")  # fmt: skip
    pruning.finish()
    pruning.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
