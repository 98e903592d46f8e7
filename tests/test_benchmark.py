import json
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from secateur import benchmark
from secateur.benchmark import Spread, bench, count_macs
from secateur.errors import DataError

FAST = {"prompt_length": 8, "new_tokens": 3, "repetitions": 3, "warmup": 1}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "pad_token_id": 0}


def tiny(intermediate_size=24, **changes):
    config = {**SIZES, "num_key_value_heads": 2, "intermediate_size": intermediate_size, "max_position_embeddings": 64}
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**config, "bos_token_id": 1, "eos_token_id": 2, **changes}))


def llama_macs(c, length):
    """Closed form: four projections, scores and their sum over values, three FFN products, the head."""
    kv_width = c.head_dim * c.num_key_value_heads
    width = c.head_dim * c.num_attention_heads
    weights = c.hidden_size * (2 * width + 2 * kv_width + 3 * c.intermediate_size)
    attention = 2 * length * width
    return length * (c.num_hidden_layers * (weights + attention) + c.hidden_size * c.vocab_size)


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"head_dim": 6}, {"tie_word_embeddings": True}])
def test_macs_agree_with_the_closed_form(length, changes):
    model = tiny(**changes)
    assert count_macs(model, length) == llama_macs(model.config, length)


def test_macs_of_llama_7b_without_weights():
    """LLM-Pruner prints 424.02 G for 64 tokens, with norms and activations, which make up the difference."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())
    assert count_macs(model, 64) == llama_macs(model.config, 64)
    assert count_macs(model, 64) / 1e9 == pytest.approx(424.02, rel=3e-4)


def test_macs_count_the_experts_a_token_meets():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, **experts))
    layer = 32 * (2 * 32 + 2 * 16) + 4 * 32 + 2 * 3 * 32 * 16 + 2 * 8 * 32
    assert count_macs(model, 8) == 8 * (2 * layer + 32 * 50)


def test_parameters_and_weight_memory():
    model = tiny()
    found = bench(model, **FAST).model
    layer = 32 * (2 * 32 + 2 * 16) + 3 * 24 * 32 + 2 * 32
    assert found.parameters == 2 * layer + 32 + 2 * 50 * 32
    assert found.non_embedding_parameters == found.parameters - 50 * 32
    rotary = sum(b.numel() for b in model.buffers())
    assert found.weight_bytes == 4 * (found.parameters + rotary)
    half = bench(tiny(dtype=torch.bfloat16), **FAST).model
    assert half.dtype == "bfloat16"
    assert half.weight_bytes == 2 * found.parameters + 4 * rotary


def test_tied_weights_count_once():
    found = bench(tiny(tie_word_embeddings=True), **FAST).model
    assert found.parameters == bench(tiny(), **FAST).model.parameters - 50 * 32
    assert found.non_embedding_parameters == found.parameters - 50 * 32


def test_speeds_follow_from_the_medians_and_the_protocol():
    found = bench(tiny(), batch_size=2, **FAST)
    m = found.model
    assert m.prefill_tokens_per_s == pytest.approx(2 * 8 / m.prefill_s.median)
    assert m.decode_tokens_per_s == pytest.approx(2 / m.decode_s.median)
    assert m.macs_per_token == m.prefill_macs / 8
    for spread in (m.prefill_s, m.decode_s):
        assert 0 < spread.q1 <= spread.median <= spread.q3
    assert m.peak_memory_bytes is None and m.kv_cache
    assert (found.against, found.ratios) == (None, None)
    protocol = found.protocol
    assert {k: protocol[k] for k in FAST} == FAST
    assert (protocol["batch_size"], protocol["threads"]) == (2, torch.get_num_threads())
    assert protocol["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(found.to_json())) == found.to_json()


def test_spread():
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.q1, spread.median, spread.q3) == (2.0, 3.0, 4.0)


class Clock:
    """A clock that only the models move: every forward pass takes the time given for its model."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        for model, (prefill, decode) in seconds.items():
            model.register_forward_pre_hook(self.passing(model, prefill, decode), with_kwargs=True)

    def passing(self, model, prefill, decode):
        def hook(module, args, kwargs):
            ids = args[0] if args else kwargs["input_ids"]
            self.now += prefill if ids.shape[1] > 1 else decode
            self.calls.append((model, ids.shape[1]))

        return hook


def test_each_time_is_that_of_its_own_passes(monkeypatch):
    small, dense = tiny(12), tiny(24)
    clock = Clock(monkeypatch, {small: (0.5, 0.125), dense: (2.0, 0.25)})
    found = bench(small, against=dense, **FAST)
    assert found.model.prefill_s == Spread(0.5, 0.5, 0.5)
    assert found.model.decode_s == Spread(0.125, 0.125, 0.125)
    assert found.against.prefill_s.median == 2.0
    assert found.ratios["prefill_s"] == 0.25
    assert found.ratios["prefill_tokens_per_s"] == 4.0
    assert found.ratios["decode_s"] == 0.5
    assert found.ratios["parameters"] == found.model.parameters / found.against.parameters < 1
    assert found.ratios["prefill_macs"] == found.model.prefill_macs / found.against.prefill_macs < 1
    assert "peak_memory_bytes" not in found.ratios
    # (prefill, prefill of the generation, two single tokens) per model and repetition; turns alternate
    timed = [model for model, length in clock.calls if length > 1][::2][: 2 * (1 + 3)]
    assert timed == [small, dense, small, dense, dense, small, small, dense]
    assert sum(length == 1 for model, length in clock.calls if model is small) == (1 + 3) * (3 - 1)


def test_ratios_pair_the_repetitions(monkeypatch):
    """A machine that becomes ten times slower halfway leaves the ratio of two equal models at one."""
    slow = iter([1.0, 1.0, 1.0, 1.0, 10.0, 10.0])
    monkeypatch.setattr(benchmark, "_run_once", fake_run(slow))
    model = tiny()
    found = bench(model, against=model, **{**FAST, "warmup": 0})
    assert found.ratios["prefill_s"] == found.ratios["decode_s"] == 1.0
    assert found.model.prefill_s.median == 1.0
    assert np.isclose(found.model.prefill_s.q3, 5.5)


def fake_run(seconds):
    def run(model, prompts, new_tokens, seen):
        took = next(seconds)
        seen.prefill.append(took)
        seen.decode.append(took)

    return run


def test_generation_runs_to_its_length_whatever_the_model_says():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits equal: greedy decoding always picks token 0
    model.generation_config.eos_token_id = 0
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    bench(model, **{**FAST, "new_tokens": 6, "repetitions": 1, "warmup": 0})
    assert len(seen) >= 1 + 6


def test_the_models_keep_their_mode_and_their_weights():
    model = tiny().train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    bench(model, **FAST)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert not parameter.is_inference()
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_length": 60, "new_tokens": 10}, "exceed the model's 64 positions"),
        ({"new_tokens": 1}, "1 new ones"),
        ({"repetitions": 0}, "0 times"),
        ({"prompt_length": 0}, "prompts of 0 tokens"),
        ({"batch_size": 0}, "batches of 0"),
        ({"warmup": -1}, "after -1 runs"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes, words):
    with pytest.raises(DataError, match=words):
        bench(tiny(), **{**FAST, **changes})


def test_models_on_different_devices_are_refused():
    with torch.device("meta"):
        other = tiny()
    with pytest.raises(DataError, match="cpu and meta"):
        bench(tiny(), against=other, **FAST)


@pytest.mark.gpu
def test_peak_memory_on_an_accelerator():
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    device = torch.accelerator.current_accelerator()
    found = bench(tiny().to(device), against=tiny(12).to(device), **FAST)
    assert found.model.peak_memory_bytes > found.model.weight_bytes
    assert found.ratios["peak_memory_bytes"] > 0
