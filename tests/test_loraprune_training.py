"""LoRAPrune in the ways in which the Trainer trains: precisions, accumulation, recomputation, kills; more families."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zoo
from families import make
from safetensors.torch import load_file
from test_loraprune import adapted, element_wise, losses, trained
from test_packed import WIDE
from transformers import TrainerCallback

from secateur import checkpoint
from secateur.checkpoint.parity import Parity
from secateur.discovery.trace import probe_ids
from secateur.errors import PlanError
from secateur.importance.lora_guided import LoraGuided
from secateur.methods.loraprune import LoRAPrune
from secateur.methods.lorashear import LoRAShear
from secateur.recovery.guided import GuidedAverage

FFN, KV = "model.layers.1.mlp/ffn_channel", "model.layers.0.self_attn/kv_group"


def run(model, folder, steps: int = 6, pruning: LoRAPrune | None = None, callbacks=(), **options):
    """Train from the same random numbers; the callback, and the losses."""
    torch.manual_seed(0)
    pruning = pruning or LoRAPrune(0.3, frequency=2)
    return pruning, losses(trained(model, [*callbacks, pruning], folder, steps, **options))


class Averages(TrainerCallback):
    """Notes what the averages are after every step."""

    def __init__(self, pruning: LoRAPrune) -> None:
        self.pruning, self.after = pruning, []

    def on_step_end(self, args, state, control, **_):
        self.after.append({name: average.clone() for name, average in self.pruning.average.values.items()})


class ByHand(TrainerCallback):
    """Computes the importance of two groups of a Llama from whole matrices, before every step."""

    def __init__(self, pruning: LoRAPrune) -> None:
        self.pruning, self.scores, self.own = pruning, [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        layers = model.get_base_model().model.layers
        mlp, attention = layers[1].mlp, layers[0].self_attn
        ffn = element_wise(mlp.gate_proj).sum(1), element_wise(mlp.up_proj).sum(1), element_wise(mlp.down_proj).sum(0)
        into = (element_wise(p).sum(1) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        heads = [sums.reshape(3, -1).sum(1) for sums in (*into, element_wise(attention.o_proj).sum(0))]
        self.scores.append({FFN: sum(p / p.norm() for p in ffn), KV: sum(p / p.norm() for p in heads)})
        live = self.pruning.live
        self.own.append(LoraGuided().scores(live.base, live.groups, {}, [FFN, KV], {}))


def test_the_average_forgets_a_tenth_at_every_step(tmp_path):
    """After two steps from zero: 0.9 * (0.1 s1) + 0.1 s2."""
    pruning = LoRAPrune(0.3, frequency=100)
    hand, averages = ByHand(pruning), Averages(pruning)
    run(adapted(make("llama").double()), tmp_path, 4, pruning, [hand, averages])
    for name in (FFN, KV):
        first, second = (scores[name] for scores in hand.scores[:2])
        torch.testing.assert_close(averages.after[1][name], 0.09 * first + 0.1 * second, rtol=1e-4, atol=0)
        first, second = (scores[name] for scores in hand.own[:2])
        assert torch.equal(averages.after[1][name], 0.9 * ((1 - 0.9) * first) + (1 - 0.9) * second)
        assert averages.after[1][name].dtype == torch.float32 and first.norm() > 0


def twice(model, **settings):
    """Two copies of an adapted model, each with a callback that is prepared for it."""
    pruning = LoRAPrune(0.3, **settings)
    pruning.prepare(model)
    return (pruning, model), copy.deepcopy((pruning, model))


@pytest.mark.parametrize("variant", ["lora", "grad"])
def test_accumulated_gradients_score_like_those_of_one_large_batch(variant, tmp_path):
    found = []
    batches = ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    for (pruning, model), batch in zip(twice(adapted(make("llama").double()), variant=variant), batches, strict=True):
        averages = Averages(pruning)
        run(model, tmp_path, 2, pruning, [averages], **batch)
        found.append(averages.after[0])
    for name, average in found[0].items():
        torch.testing.assert_close(found[1][name], average, rtol=1e-5, atol=0)


@pytest.mark.parametrize("compact_every", [None, 3])
def test_recomputed_activations_change_nothing(compact_every, tmp_path):
    pair = twice(adapted(make("llama").double()), frequency=2, compact_every=compact_every)
    found = [
        run(model, tmp_path, 6, pruning, gradient_checkpointing=recompute)[1]
        for (pruning, model), recompute in zip(pair, (False, True), strict=True)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)
    kept = [pruning.live.plan.kept for pruning, _ in pair]
    assert kept[0] == kept[1] and kept[0]


@pytest.mark.parametrize("options", [{}, {"compact_every": 3}, {"variant": "grad"}])
def test_half_precision_on_the_fly(options, tmp_path):
    """bfloat16 where matrices are multiplied, as the Trainer does it; scores and averages stay float32."""
    pair = twice(adapted(make("llama")), frequency=2, **options)
    plain, found = (
        run(model, tmp_path, 6, pruning, bf16=half, max_grad_norm=0.5)[1]
        for (pruning, model), half in zip(pair, (False, True), strict=True)
    )
    assert found != plain
    np.testing.assert_allclose(found, plain, rtol=0.02)
    pruning = pair[1][0]
    assert all(a.dtype == torch.float32 and torch.isfinite(a).all() for a in pruning.average.values.values())
    assert pruning.finish().difference < 1e-4 and abs(pruning.sparsity - 0.3) < 0.01


def test_a_model_in_bfloat16(tmp_path):
    pruning, _ = run(adapted(make("llama").bfloat16()), tmp_path)
    assert all(a.dtype == torch.float32 for a in pruning.average.values.values())
    assert pruning.finish().model.dtype == torch.bfloat16


class TestScaledLoss:
    """float16: gradients come multiplied by the scaler's factor, and some overflow; the callback sees neither."""

    @pytest.fixture(scope="class")
    def prepared(self):
        model = adapted(make("llama"))
        pruning = LoRAPrune(0.3)
        pruning.prepare(model)
        return model, pruning

    def scored(self, prepared, variant, scale, spoil=False):
        """What one step adds to the averages."""
        model, pruning = prepared
        pruning = copy.copy(pruning)
        pruning.average = GuidedAverage(variant)
        pruning.average.prepare(pruning.live, pruning.candidates)
        pruning.average.begin(pruning.live)
        inner = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        inner.zero_grad()
        ids = probe_ids(model)
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        pruning.average.end()
        if spoil:
            inner.param_groups[0]["params"][0].grad[0, 0] = float("inf")
        optimizer = SimpleNamespace(scaler=scaler, optimizer=inner)
        state = SimpleNamespace(global_step=0, max_steps=10)
        pruning.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
        return pruning.average.values

    @pytest.mark.parametrize("variant", ["lora", "grad"])
    def test_scores_are_those_without_a_scale(self, prepared, variant):
        plain, scaled = self.scored(prepared, variant, 1.0), self.scored(prepared, variant, 1024.0)
        for name, average in plain.items():
            assert average.norm() > 0
            torch.testing.assert_close(scaled[name], average, rtol=1e-5, atol=0)

    def test_a_step_that_overflows_is_left_out(self, prepared):
        assert not any(average.any() for average in self.scored(prepared, "lora", 1024.0, spoil=True).values())


@pytest.mark.parametrize(
    ("family", "sizes", "kinds"),
    [
        ("mistral", {"num_key_value_heads": 1}, {"ffn_channel", "query_head"}),
        ("phi3", {}, {"ffn_channel", "kv_group"}),  # both projections fused
        ("falcon-mqa", {}, {"ffn_channel"}),  # one key and value for all heads, fused with the queries
        ("gpt_neox", {}, {"ffn_channel"}),  # queries, keys and values interleaved
    ],
)
def test_families(family, sizes, kinds, tmp_path):
    pruning, _ = run(adapted(make(family, **sizes)), tmp_path, 4, LoRAPrune(0.2, frequency=1))
    result = pruning.finish()
    groups = pruning.live.groups
    assert {groups.named(name).kind for name in result.plan.kept} == kinds and result.difference < 1e-4
    assert result.model.num_parameters() == groups.remaining_parameters(result.plan.kept)
    assert abs(pruning.sparsity - 0.2) < 0.02


def test_untied_embeddings_keep_a_head_of_their_own(tmp_path):
    model = make("llama", tie_word_embeddings=False)
    head = model.lm_head.weight.detach().clone()
    result = run(adapted(model), tmp_path)[0].finish()
    assert result.model.config.tie_word_embeddings is False and result.difference < 1e-4
    assert torch.equal(result.model.lm_head.weight, head)
    assert not torch.equal(result.model.get_input_embeddings().weight, head)


def test_experts_stay_and_the_attention_around_them_goes(tmp_path):
    """Stacked experts are no linear modules, whose inputs could be masked; the reason is told."""
    model = adapted(zoo.tiny_model("mixtral"), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    with pytest.raises(PlanError, match="not the weight of a linear module"):
        LoRAPrune(0.05, kinds=("expert_channel",)).prepare(model)
    pruning, _ = run(model, tmp_path, 4, LoRAPrune(0.02, frequency=1))
    result = pruning.finish()
    assert {pruning.live.groups.named(name).kind for name in result.plan.kept} == {"kv_group"}
    assert any("expert_channel" in family for family in result.left_whole) and result.difference < 1e-4


def test_fused_projections_are_compacted_in_place(tmp_path):
    """Phi-3's gate and up projections in one matrix; its attention reads sizes from the configuration (refused)."""
    pair = twice(adapted(make("phi3").double()), kinds=("ffn_channel",), frequency=2, compact_every=3)
    (masked, _), (compacted, _) = pair
    masked.settings = replace(masked.settings, compact_every=None)
    found = [run(model, tmp_path, 6, pruning)[1] for pruning, model in pair]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)
    assert compacted.live.plan.kept == masked.live.plan.kept
    layer = compacted.live.base.model.layers[0].mlp
    left = len(compacted.live.plan.kept["model.layers.0.mlp/ffn_channel"])
    assert left < 44 and layer.gate_up_proj.lora_B["default"].weight.shape == (2 * left, 4)
    assert layer.down_proj.base_layer.weight.shape == (48, left)


@pytest.mark.parametrize("optimizer", ["adafactor", "ademamix"])
def test_an_optimizer_whose_state_cannot_be_cut_is_refused_at_the_first_step(optimizer, tmp_path):
    """Adafactor keeps sums over rows and columns; AdEMAMix stacks two moments."""
    pruning = LoRAPrune(0.3, frequency=2, compact_every=6)
    with pytest.raises(PlanError, match=r"the optimizer keeps .* take another optimizer, or masks alone"):
        run(adapted(make("llama")), tmp_path, 8, pruning, optim=optimizer)
    assert not pruning.history
    run(adapted(make("llama")), tmp_path, 8, LoRAPrune(0.3, frequency=2), optim=optimizer)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_8bit", "lion_32bit", "adagrad"])
def test_optimizers_whose_state_is_cut(optimizer, tmp_path):
    run(adapted(make("llama")), tmp_path, 6, LoRAPrune(0.3, frequency=2, compact_every=3), optim=optimizer)


class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 6:
            raise KeyboardInterrupt


def test_a_killed_run_on_a_packed_base_goes_on_to_the_same_model(tmp_path):
    make("llama", **WIDE).save_pretrained(tmp_path / "dense")

    def result(folder, callbacks=(), resume=None):
        torch.manual_seed(0)
        model = adapted(checkpoint.load(tmp_path / "dense", quantise="4bit").model, lora_dropout=0.1)
        saving = {"save_strategy": "steps", "save_steps": 4, "resume": resume}
        pruning, found = run(model, folder, 8, callbacks=callbacks, **saving)
        return pruning.finish().model.state_dict(), found

    whole, wanted = result(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        result(tmp_path / "part", [Die()])
    again, found = result(tmp_path / "part", resume=str(tmp_path / "part" / "checkpoint-4"))
    assert found[-4:] == wanted[-4:] and whole.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("compact_every", ["null", "2"])
def test_a_killed_recipe_goes_on_to_the_same_files(
    secateur, checkpoint_folder, text_file, tmp_path, monkeypatch, compact_every
):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{source: '{checkpoint_folder}'}}\n"
        f"method: {{name: loraprune, frequency: 1, compact_every: {compact_every}}}\n"
        "prune: {param_sparsity: 0.3}\n"
        f"recovery: {{data: ['{text_file}'], steps: 8, batch_size: 4, micro_batch_size: 2, seq_len: 16, save_every: 4}}"
    )
    monkeypatch.setattr(checkpoint, "verify_in_fresh_process", lambda *_: Parity(0.0, 1.0, 1.0, 1, "none"))
    code, _, err = secateur("run", recipe, "-o", tmp_path / "whole")
    assert code == 0, err
    on_step_end = LoRAPrune.on_step_end

    def killed(self, args, state, control, **more):
        on_step_end(self, args, state, control, **more)
        if state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LoRAPrune, "on_step_end", killed)
        assert secateur("run", recipe, "-o", tmp_path / "run")[0] == 130
    assert (tmp_path / "run" / "pruned.work").is_dir() and not (tmp_path / "run" / "pruned").exists()
    code, _, err = secateur("run", recipe, "-o", tmp_path / "run", "--resume")
    assert code == 0 and "step 5 of 8" in err and "step 4 of 8" not in err, err
    whole, again = (load_file(tmp_path / folder / "pruned" / "model.safetensors") for folder in ("whole", "run"))
    assert whole.keys() == again.keys() and all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    names = ("pruned/plan.json", "pruned/adapter/adapter_model.safetensors")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "run" / n).read_bytes() for n in names)
    assert not (tmp_path / "run" / "pruned.work").exists()


def test_adapters_without_gradients_stop_the_run_instead_of_scoring_nothing():
    """As a layer-wise optimizer leaves them, or ZeRO, which keeps gradients elsewhere."""
    model = adapted(make("llama"))
    pruning = LoRAPrune(0.3)
    pruning.prepare(model)
    with pytest.raises(PlanError, match="no adapter has a gradient"):
        LoraGuided().scores(pruning.live.base, pruning.live.groups, {}, list(pruning.candidates), {})
    found = LoraGuided("magnitude").scores(pruning.live.base, pruning.live.groups, {}, list(pruning.candidates), {})
    assert all(scores.any() for scores in found.values())


@pytest.mark.parametrize("what", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("method", [LoRAPrune, LoRAShear])
def test_sharded_training_is_refused_before_it_begins(method, what):
    arguments = SimpleNamespace(**{"load_best_model_at_end": False, "world_size": 1, "max_steps": 10, what: "on"})
    with pytest.raises(PlanError, match=f"{what} keeps parts"):
        method(0.3).on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=adapted(make("llama")))
