"""GGUF files: llama.cpp itself runs them and must give the log-probabilities of transformers, token by token."""

import copy
import errno
import sys

import gguf
import numpy as np
import pytest
import torch
from families import LLAMA_LIKE, make
from test_per_layer import uneven_plan
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from secateur import checkpoint
from secateur.discovery import discover
from secateur.errors import CheckpointError
from secateur.export import compare, export_gguf, gguf_layouts, gguf_tensors, llama_cpp
from secateur.export import gguf as writing
from secateur.modeling_per_layer import config_class
from secateur.surgery import slice

SILU, GELU = 5e-5, 1e-2  # largest difference of log-probabilities in float32; llama.cpp's GELU is a table of float16
ROPE = {"rope_theta": 1e4, "factor": 8.0}
LLAMA3 = {
    **ROPE,
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
ODD = {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 8}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
# name -> model type, sizes, llama.cpp's architecture
UNIFORM = {
    "llama": ("llama", {"num_hidden_layers": 2}, "llama"),
    "llama-odd": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10}, "llama"),
    "llama-bias": ("llama", {**BIASES, **TIED}, "llama"),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}, "llama"),
    "llama-linear": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}, "llama"),
    "mistral-odd": ("mistral", ODD, "llama"),
    "qwen2": ("qwen2", {}, "qwen2"),
    "qwen2-tied": ("qwen2", TIED, "qwen2"),
    "qwen2-odd": ("qwen2", ODD, "llama"),
    "qwen3": ("qwen3", {"head_dim": 10}, "qwen3"),
    "qwen3-odd-tied": ("qwen3", {**ODD, **TIED}, "qwen3"),
    "phi3": ("phi3", {}, "phi3"),
    "phi3-odd-tied": ("phi3", {**ODD, **TIED}, "llama"),
    "phi3-partial": ("phi3", {"rope_parameters": PARTIAL}, "phi3"),
    "mixtral": ("mixtral", {"num_local_experts": 3, **ODD}, "llama"),
    "qwen3-moe": ("qwen3_moe", MOE, "qwen3moe"),
    "gemma2": ("gemma2", {"head_dim": 10, "sliding_window": 8, "num_hidden_layers": 4}, "gemma2"),
    "gemma2-27b": ("gemma2", {"num_hidden_layers": 46, "head_dim": 8, "num_attention_heads": 4,
                              "num_key_value_heads": 2, "query_pre_attn_scalar": 20}, "gemma2"),
    "neox": ("gpt_neox", {"num_key_value_heads": None}, "gptneox"),
    "neox-tied-sequential": ("gpt_neox", {"num_key_value_heads": None, "use_parallel_residual": False, **TIED},
                             "gptneox"),
}  # fmt: skip
GROUPED = {"num_hidden_layers": 3, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4}
PER_LAYER = {
    "llama": ("llama", {}, "deci"),
    "llama-bias-untied-llama3": ("llama", {**BIASES, "tie_word_embeddings": False, "rope_parameters": LLAMA3}, "deci"),
    "mistral": ("mistral", {}, "deci"),
    "qwen2": ("qwen2", {}, "deci"),
    "phi3": ("phi3", {}, "deci"),
    "qwen3-tied": ("qwen3", TIED, "openelm"),
}
SKIPS = {0: {"skip": ["mlp"]}, 1: {"skip": ["attention"]}, 2: {"skip": ["mlp"]}, 4: {"skip": ["attention", "mlp"]}}
runs_llama_cpp = pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")


def loud(model):
    """With weights so large that every layer matters to the logits."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.05))
    return model.eval()


def built(model_type, per_layer=None, **sizes):
    torch.manual_seed(0)
    base = CONFIG_MAPPING[model_type]
    values = {**LLAMA_LIKE, "num_hidden_layers": 3, "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, **sizes}
    config = base(**values) if per_layer is None else config_class(base)(**values, per_layer_config=per_layer)
    return loud(AutoModelForCausalLM.from_config(config))


def cut(family, **sizes):
    """Pruned with other widths in every layer."""
    model = loud(make(family, vocab_size=320, **{**GROUPED, **sizes}))
    groups = discover(model)
    return slice(model, uneven_plan(groups, ("ffn_channel", "kv_group")), groups)


def parity(model, tokenizer, folder, dtype="f32"):
    done = export_gguf(model, tokenizer, folder / "model.gguf", dtype, overwrite=True)
    return done, compare(done.path, model, list(range(3, 27)), new_tokens=4)


@runs_llama_cpp
@pytest.mark.parametrize("case", UNIFORM)
def test_uniform_models(case, tokenizer, tmp_path):
    model_type, sizes, arch = UNIFORM[case]
    done, found = parity(built(model_type, **sizes), tokenizer, tmp_path)
    assert done.arch == arch
    assert found.max_difference < (GELU if arch in ("gemma2", "gptneox") else SILU) and found.same_greedy


@runs_llama_cpp
@pytest.mark.parametrize("case", PER_LAYER)
def test_models_whose_layers_differ(case, tokenizer, tmp_path):
    family, sizes, arch = PER_LAYER[case]
    model = cut(family, **sizes)
    done, found = parity(model, tokenizer, tmp_path)
    assert done.arch == arch and found.max_difference < SILU and found.same_greedy
    assert done.parameters == model.num_parameters() + (model.config.rope_parameters["rope_type"] == "llama3") * 2


@runs_llama_cpp
@pytest.mark.parametrize(
    ("model_type", "sizes"), [("llama", {}), ("qwen2", {}), ("qwen3", {**TIED, "head_dim": 8})], ids=lambda v: str(v)
)
def test_sublayers_left_out(model_type, sizes, tokenizer, tmp_path):
    """llama.cpp's deci is silently wrong without an MLP, and openelm knows no layer without attention."""
    model = built(model_type, SKIPS, num_hidden_layers=5, **sizes)
    done, found = parity(model, tokenizer, tmp_path)
    assert found.max_difference < SILU and found.same_greedy
    assert "one head of zeros for the attention left out of layer 1, 4" in done.notes[0]
    assert "32 channels of zeros for the mlp left out of layer 0, 2, 4" in done.notes[1]


@runs_llama_cpp
def test_a_wrong_layout_would_be_noticed(tokenizer, tmp_path, monkeypatch):
    model = built("llama")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_tensors, "interleave", lambda tensor, _: tensor)
        assert not parity(model, tokenizer, tmp_path)[1].agrees("q8_0")
    gemma = built("gemma2", **UNIFORM["gemma2-27b"][1])
    monkeypatch.setattr(gguf_layouts.Layout, "score_scale", lambda _, sizes: sizes.score_scale)
    assert not parity(gemma, tokenizer, tmp_path)[1].agrees("q8_0")


@pytest.fixture(scope="module")
def demo():
    """The bundled model, in float32, pruned with other widths in every layer."""
    whole = checkpoint.load("demo", dtype="float32")
    groups = discover(whole.model)
    return slice(whole.model, uneven_plan(groups, ("ffn_channel", "kv_group")), groups), whole.tokenizer


PROMPT = "The river rises in the north of the country and"


@runs_llama_cpp
@pytest.mark.parametrize("dtype", llama_cpp.TOLERANCE)
def test_the_bundled_model_pruned_per_layer_continues_a_prompt_alike(demo, tmp_path, dtype):
    model, tokenizer = demo
    ids = tokenizer(PROMPT)["input_ids"]
    done = export_gguf(model, tokenizer, tmp_path / "demo.gguf", dtype)
    found = compare(done.path, model, ids, dtype, new_tokens=16)
    assert done.arch == "deci" and found.agrees(dtype) and found.positions == len(ids) + 16
    assert found.mean_difference < found.max_difference
    if dtype == "f32":
        text = model.generate(torch.tensor([ids]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
        assert found.max_difference < SILU and list(found.continuation) == text[0, len(ids) :].tolist()
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        assert found.perplexity_before == pytest.approx(loss.exp().item(), rel=1e-5)
        assert found.perplexity_after == pytest.approx(found.perplexity_before, rel=1e-4)


@runs_llama_cpp
def test_tokens_that_rounding_swaps(tokenizer, tmp_path):
    """Two tokens made equally likely but for less than bf16 tells apart, and then by more."""
    model = built("llama")
    done = export_gguf(model, tokenizer, tmp_path / "a.gguf", "bf16")
    ids = list(range(3, 27))
    first = compare(done.path, model, ids, "bf16", new_tokens=1)
    (token,) = first.continuation
    for shift, agrees in ((1 + 1e-4, True), (1.5, False)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            rows = other.get_output_embeddings().weight
            rows[token + 1] = rows[token] * shift
        found = compare(done.path, other, ids, "bf16", new_tokens=1)
        assert not found.same_greedy and found.rounding > 0 and found.greedy_gap > 0
        if agrees:
            assert found.greedy_gap < 2 * found.rounding
        else:
            assert found.greedy_gap > 0.5


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_metadata_says_the_widths_of_every_layer(tokenizer, tmp_path):
    done = export_gguf(cut("llama"), tokenizer, tmp_path / "model.gguf")
    fields, tensors = read(done.path)
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [12, 10, 8] and fields["deci.attention.head_count_kv"] == [6, 5, 4]
    assert fields["deci.feed_forward_length"] == [44, 36, 28] and fields["deci.attention.key_length"] == 4
    assert fields["tokenizer.ggml.model"] == "gpt2" and len(fields["tokenizer.ggml.tokens"]) == 320
    assert tuple(tensors["blk.1.attn_q.weight"].shape) == (48, 40)
    assert done.tensors == len(tensors) and done.bytes == done.path.stat().st_size


def test_types_of_tensors(tokenizer, tmp_path):
    model = built("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40)
    done = export_gguf(model, tokenizer, tmp_path / "model.gguf", "q8_0")
    _, tensors = read(done.path)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == "F16" and done.notes[0].startswith("3 tensors are float16")
    up = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    stored = gguf.dequantize(tensors["blk.0.ffn_up.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    assert np.abs(stored - up).max() < np.abs(up).max() / 127


@runs_llama_cpp
@pytest.mark.parametrize("dtype", llama_cpp.TOLERANCE)
def test_every_type_holds_experts(dtype, tokenizer, tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    done, found = parity(built("mixtral", num_local_experts=3, **sizes), tokenizer, tmp_path, dtype)
    assert not [note for note in done.notes if "float16" in note] and found.agrees(dtype)


def test_sliding_windows_that_llama_cpp_does_not_know_shorten_the_context(tokenizer, tmp_path):
    done = export_gguf(built("mistral", sliding_window=64), tokenizer, tmp_path / "model.gguf")
    assert read(done.path)[0]["llama.context_length"] == 64 and "context length 64" in done.notes[0]
    types = ["full_attention", "sliding_attention", "full_attention"]
    done = export_gguf(built("gemma2", sliding_window=64, layer_types=types), tokenizer, done.path, overwrite=True)
    fields, _ = read(done.path)
    assert fields["gemma2.context_length"] == fields["gemma2.attention.sliding_window"] == 64


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: make("opt"),
            "models of type opt have no verified home in llama.cpp .* run this one with transformers",
        ),
        (lambda: cut("qwen3"), "openelm: the output matrix must be the embedding.*export it with --to padded"),
        (
            lambda: built("llama", {1: {"intermediate_size": 24}}, hidden_act="gelu"),
            "deci: the activation must be silu, not gelu.; run it with transformers",
        ),
        (lambda: cut("gemma2"), "gemma2: layers must be equally wide.*--to padded"),
        (
            lambda: built("mixtral", {1: {"num_local_experts": 3}}, num_local_experts=4),
            "llama: layers must be equally wide.*--to padded",
        ),
        (lambda: built("qwen3", attention_bias=True), "qwen3: no biases on attn_k, attn_out, attn_q, attn_v"),
        (lambda: built("llama", hidden_act="gelu"), "the activation must be silu, not gelu"),
        (lambda: built("qwen3_moe", **{**MOE, "norm_topk_prob": False}), "norm_topk_prob must be True"),
        (
            lambda: built("qwen3_moe", **{**MOE, "mlp_only_layers": [0]}),
            r"qwen3moe has no place for model.layers.0.mlp.gate_proj",
        ),
        (lambda: built("gpt_neox", num_key_value_heads=None, attention_bias=False), "attention_bias must be True"),
        (lambda: built("qwen3", rope_parameters=LLAMA3), "qwen3: rotary frequencies cannot be scaled"),
        (
            lambda: built("llama", rope_parameters={**ROPE, "rope_type": "yarn"}),
            "rotary codes of type yarn were not verified",
        ),
    ],
)
def test_refusals_say_why_and_what_else(model, message, tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        export_gguf(model(), tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_bad_requests(tokenizer, tmp_path, monkeypatch):
    model, file = built("llama"), tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match="unknown GGUF dtype 'q4_k'; use f32, f16, bf16, q8_0"):
        export_gguf(model, tokenizer, file, "q4_k")
    with pytest.raises(CheckpointError, match="holds its tokenizer"):
        export_gguf(model, None, file)
    with pytest.raises(CheckpointError, match="up to number 319 and the model 131 embeddings"):
        export_gguf(built("llama", vocab_size=131), tokenizer, file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r'pip install "secateur\[gguf\]"'):
        export_gguf(model, tokenizer, file)
    assert not list(tmp_path.iterdir())


def test_existing_files_stay_unless_told(tokenizer, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="exists; choose another file or pass --overwrite"):
        export_gguf(built("llama"), tokenizer, file)
    assert file.read_text() == "mine"
    assert export_gguf(built("llama"), tokenizer, file, overwrite=True).bytes == file.stat().st_size
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; nothing was written"),
        (OSError("4096 requested and 17 written"), "4096 requested and 17 written; is the disk full?"),
    ],
)
def test_a_full_disk_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch, failure, message):
    def fail(*_):
        raise failure

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(CheckpointError, match=message):
        export_gguf(built("llama"), tokenizer, tmp_path / "folder" / "model.gguf")
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_the_room_looked_for_is_the_size_of_the_file(dtype, tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(writing, "check_space", lambda folder, needed: asked.append((folder, needed)))
    model = built("llama", hidden_size=96, intermediate_size=256, vocab_size=len(tokenizer), **TIED)
    done = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype)
    ((folder, needed),) = asked
    assert folder == tmp_path and done.bytes - 8000 < needed <= done.bytes  # names and settings


def test_weights_beyond_float16(tokenizer, tmp_path):
    model = built("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_up.weight has weights beyond float16.*bf16 or f32"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
    export_gguf(model, tokenizer, tmp_path / "model.gguf", "bf16")


@runs_llama_cpp
def test_a_file_that_llama_cpp_cannot_load_is_an_error_message(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CheckpointError, match=r"llama.cpp cannot run .*broken.gguf: .*error"):
        compare(broken, make("llama"), [1, 2, 3])


def test_without_llama_cpp_it_is_said_that_nothing_was_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    with pytest.raises(CheckpointError, match=r"was not verified: llama.cpp is not installed"):
        compare(tmp_path / "any.gguf", make("llama"), [1, 2, 3])


def test_dtypes_are_the_same_everywhere():
    assert set(llama_cpp.TOLERANCE) == set(writing.DTYPES)
