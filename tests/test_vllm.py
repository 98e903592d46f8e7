"""What vLLM is given. Its wheels need CUDA, so how it reads the layout is written down here again in plain PyTorch."""

import copy
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from families import LLAMA_LIKE, make
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from secateur import checkpoint
from secateur.discovery import discover
from secateur.errors import CheckpointError
from secateur.export import nas_layout
from secateur.export.vllm import export_vllm, vllm_notes
from secateur.modeling_per_layer import config_class
from secateur.plan import PruningPlan
from secateur.surgery import slice

WIDE = {**LLAMA_LIKE, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4}
UNEVEN = {
    1: {"num_attention_heads": 10, "num_key_value_heads": 5, "intermediate_size": 28},
    2: {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 9},
    3: {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 1},
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip


def built(model_type="llama", per_layer=UNEVEN, **sizes):
    """A per-layer model in which no parameter is constant."""
    torch.manual_seed(0)
    base = config_class(CONFIG_MAPPING[model_type])
    window = {"sliding_window": None} if model_type == "mistral" else {}
    config = base(**{**WIDE, **window, **sizes}, per_layer_config=per_layer)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


class DeciLM:
    """The loader's side of the contract: parameters that `config.json` asks for, and the forward pass over them."""

    def __init__(self, folder):
        self.config = c = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert c.model_type == "nemotron-nas" and c.architectures == ["DeciLMForCausalLM"]
        self.given = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        self.hidden, self.heads, self.width = c.hidden_size, c.num_attention_heads, c.head_dim
        outer = self.take({"model.embed_tokens.weight": (c.vocab_size, self.hidden), "model.norm.weight": self.hidden})
        self.embedding, self.norm = outer.values()
        head = None if c.tie_word_embeddings else self.take({"lm_head.weight": (c.vocab_size, self.hidden)})
        self.head = self.embedding if head is None else head["lm_head.weight"]
        self.layers = [self.layer(number, block) for number, block in enumerate(c.block_configs)]
        assert len(self.layers) == c.num_hidden_layers
        assert not self.given, f"names the loader does not know: {list(self.given)}"

    def take(self, shapes):
        taken = {name: self.given.pop(name) for name in shapes}
        for name, shape in shapes.items():
            assert list(taken[name].shape) == list(shape if isinstance(shape, tuple) else (shape,)), name
        return taken

    def linear(self, name, inputs, outputs, bias):
        shapes = {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": outputs} if bias else {})
        return [*self.take(shapes).values(), None][:2]

    def layer(self, number, block):
        at, c = f"model.layers.{number}.", self.config
        own = SimpleNamespace(attention=not block.attention.no_op, ffn=not block.ffn.no_op)
        if own.attention:
            output_bias = getattr(c, "attention_bias", False) or getattr(c, "bias", False)
            bias = c.qkv_bias if hasattr(c, "qkv_bias") else output_bias
            assert self.heads % block.attention.n_heads_in_group == 0
            own.keys = self.heads // block.attention.n_heads_in_group
            sizes = {"q": self.heads * self.width, "k": own.keys * self.width, "v": own.keys * self.width}
            parts = [self.linear(f"{at}self_attn.{p}_proj", self.hidden, n, bias) for p, n in sizes.items()]
            own.qkv = [torch.cat([w for w, _ in parts]), torch.cat([b for _, b in parts]) if bias else None]
            own.split = list(sizes.values())
            own.o = self.linear(f"{at}self_attn.o_proj", self.heads * self.width, self.hidden, output_bias)
            own.norm = self.take({f"{at}input_layernorm.weight": self.hidden}).popitem()[1]
        if own.ffn:
            assert not hasattr(block.ffn, "ffn_mult") and c.hidden_act == "silu"
            width, bias = block.ffn.intermediate_size, getattr(c, "mlp_bias", False)
            own.gate, own.up = (self.linear(f"{at}mlp.{p}_proj", self.hidden, width, bias) for p in ("gate", "up"))
            own.down = self.linear(f"{at}mlp.down_proj", width, self.hidden, bias)
            own.ffn_norm = self.take({f"{at}post_attention_layernorm.weight": self.hidden}).popitem()[1]
        return own

    def add_and_norm(self, weight, states, residual):
        """The fused kernel: states are added to the residual, and the sum is normed; both are returned."""
        residual = states if residual is None else states + residual
        single = residual.float()
        scale = torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return weight * (single * scale).to(states.dtype), residual

    def logits(self, ids):
        states, residual = F.embedding(ids, self.embedding), None
        for own in self.layers:
            if own.attention:
                states, residual = self.add_and_norm(own.norm, states, residual)
                states = self.attend(own, states)
            if own.ffn:
                assert residual is not None, "the fused norm of a layer 0 without attention has no residual to add to"
                states, residual = self.add_and_norm(own.ffn_norm, states, residual)
                states = F.linear(F.silu(F.linear(states, *own.gate)) * F.linear(states, *own.up), *own.down)
        return F.linear(self.add_and_norm(self.norm, states, residual)[0], self.head)

    def attend(self, own, states):
        q, k, v = F.linear(states, *own.qkv).split(own.split, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.width)).transpose(1, 2) for x in (q, k, v))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (x.repeat_interleave(self.heads // own.keys, dim=1) for x in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.width**-0.5)
        return F.linear(mixed.transpose(1, 2).flatten(2), *own.o)

    def rotate(self, x):
        angles = torch.arange(x.shape[2], dtype=torch.float)[:, None] * self.frequencies()
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1).to(x.dtype) for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def frequencies(self):
        rope = self.config.rope_parameters
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, self.width, 2, dtype=torch.float) / self.width)
        if rope["rope_type"] == "default":
            return plain
        assert rope["rope_type"] == "llama3"
        low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        smooth = ((old * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return plain * (smooth + (1 - smooth) / rope["factor"])


def check(model, folder, **options):
    """Export in double precision, read as the contract says, and compare the logits; what the export returned."""
    model = model.double()
    done = export_vllm(model, folder, **options)
    assert (done.path, done.layout) == (folder, "nemotron-nas")
    ids = torch.randint(3, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    engine = DeciLM(folder)
    with torch.no_grad():
        wanted, got = model(ids).logits, engine.logits(ids)
    assert (got - wanted).abs().max() < 1e-9 * wanted.abs().max()
    stored = sum(t.numel() for file in folder.glob("*.safetensors") for t in load_file(file).values())
    absent = tuple(nas_layout.unused_norms(model.config))
    unused = sum(p.numel() for n, p in model.named_parameters() if n.startswith(absent))
    assert done.parameters == stored == model.num_parameters() - unused + done.padded_parameters
    return done, engine.config


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE}),
        ("mistral", {}),
        ("qwen2", {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ],
)
def test_the_layout_computes_what_the_model_computes(model_type, sizes, tmp_path):
    done, config = check(built(model_type, **sizes), tmp_path / "out")
    assert config.num_attention_heads == 12 and done.padded_parameters > 0
    assert [b.attention.n_heads_in_group for b in config.block_configs] == [2, 2, 3, 12]
    assert [b.ffn.intermediate_size for b in config.block_configs] == [44, 28, 9, 1]
    assert config.qkv_bias is (model_type == "qwen2" or "attention_bias" in sizes)


def test_what_was_pruned_in_single_precision(tmp_path):
    model = make("llama", num_hidden_layers=3)
    groups = discover(model)
    families = groups.of_kinds(["ffn_channel", "kv_group"])
    kept = {g.name: tuple(range(g.layer, g.units)) for g in families}
    small = slice(model, PruningPlan(kept, {g.name: g.units for g in families}), groups)
    export_vllm(small, tmp_path / "out")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.allclose(DeciLM(tmp_path / "out").logits(ids), small(ids).logits, atol=1e-5)


def test_sublayers_that_are_left_out(tmp_path):
    per_layer = {1: {"skip": ["attention"]}, 2: {"skip": ["mlp"]}, 3: {"skip": ["attention", "mlp"]}}
    done, config = check(built(per_layer=per_layer), tmp_path / "out")
    assert [b.attention.no_op for b in config.block_configs] == [False, True, False, True]
    assert [b.ffn.no_op for b in config.block_configs] == [False, False, True, True]
    assert done.padded_parameters == 0 and not any("padding" in note for note in done.notes)


@pytest.mark.parametrize(
    ("counts", "stored", "groups"),
    [
        ([(12, 6), (10, 5)], 12, [2, 2]),
        ([(8, 8), (5, 5)], 8, [1, 1]),
        ([(8, 2), (6, 2), (4, 1)], 8, [4, 4, 8]),
        ([(7, 1), (6, 3)], 8, [8, 2]),  # 7 has no divisors: one more query head saves four KV heads
        ([(6, 1), (4, 2), (4, 2), (4, 2)], 6, [6, 3, 3, 3]),
        ([(6, 2), (5, 1)], 6, [3, 6]),
        ([(9, 3), (8, 1), (7, 7)], 9, [3, 9, 1]),
    ],
)
def test_the_fewest_heads_are_stored(counts, stored, groups, tmp_path):
    per_layer = {n: {"num_attention_heads": q, "num_key_value_heads": k} for n, (q, k) in enumerate(counts)}
    _, config = check(built(per_layer=per_layer, num_hidden_layers=len(counts)), tmp_path / "out")
    assert config.num_attention_heads == stored
    assert [b.attention.n_heads_in_group for b in config.block_configs] == groups


def test_a_kv_head_is_stored_again_where_its_group_is_too_large(monkeypatch, tmp_path):
    """Not what is chosen for these counts, but what must be when nothing else divides."""
    monkeypatch.setattr(
        nas_layout,
        "_stored_as",
        lambda stored, counts: [nas_layout.Heads(q, k, 16, g) for (q, k), g in zip(counts, (2, 4), strict=True)],
    )
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    per_layer = {0: heads, 1: {**heads, "num_attention_heads": 10}}
    _, config = check(built(per_layer=per_layer, num_hidden_layers=2), tmp_path / "out")
    assert config.num_attention_heads == 16


def test_padding_is_what_the_sizes_say(tmp_path):
    per_layer = {1: {"num_attention_heads": 8, "num_key_value_heads": 4}}
    done, _ = check(built(per_layer=per_layer, num_hidden_layers=2), tmp_path / "out")
    assert done.padded_parameters == 2 * (12 - 8) * 4 * 48  # rows of q_proj and columns of o_proj; four KV heads stay
    assert f"{done.padded_parameters:,} parameters are padding" in done.notes[1]
    assert f"{done.padded_parameters:,}" in (tmp_path / "out" / "README.md").read_text()


def test_the_folder_is_complete_and_its_configuration_loads_anywhere(tokenizer, tmp_path):
    folder = tmp_path / "out"
    model = built(vocab_size=len(tokenizer))
    model.generation_config.max_new_tokens = 7
    export_vllm(model, folder, tokenizer=tokenizer)
    names = {file.name for file in folder.iterdir()}
    assert names >= {"config.json", "configuration_decilm.py", "model.safetensors", "tokenizer.json",
                     "generation_config.json", "README.md"}  # fmt: skip
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert again("the old")["input_ids"] == tokenizer("the old")["input_ids"]
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == 7
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    code = (
        "import sys; sys.modules['secateur'] = None; from transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"config.save_pretrained({str(folder) + '-again'!r}); print(config.block_configs[1].ffn.intermediate_size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "28", done.stderr[-2000:]
    again = json.loads((tmp_path / "out-again" / "config.json").read_text())
    assert again["block_configs"] == json.loads((folder / "config.json").read_text())["block_configs"]


def test_half_precision(tmp_path):
    model = built().to(torch.bfloat16)
    export_vllm(model, tmp_path / "out")
    config = copy.deepcopy(AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True))
    assert config.dtype == torch.bfloat16 and config.block_configs[2].ffn.intermediate_size == 9
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.layers.2.mlp.up_proj.weight"], model.model.layers[2].mlp.up_proj.weight)


def test_uniform_models_are_saved_as_they_are(tokenizer, tmp_path):
    model = make("mistral", vocab_size=len(tokenizer))
    done = export_vllm(model, tmp_path / "out", tokenizer=tokenizer)
    assert done.layout == "transformers" and done.parameters == model.num_parameters() and not done.padded_parameters
    assert "takes as it is" in done.notes[0] and "3 KV heads" in done.notes[2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == model.num_parameters()
    assert checkpoint.load(tmp_path / "out").tokenizer is not None


def test_a_qwen2_whose_heads_do_not_fill_the_hidden_size(tmp_path):
    """vLLM's Qwen2 takes a head to be hidden_size / num_attention_heads wide, whatever config.json says."""
    narrow = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    done, config = check(make("qwen2", **narrow), tmp_path / "out")
    assert done.padded_parameters == 0 and (config.num_attention_heads, config.head_dim) == (4, 8)
    assert export_vllm(make("qwen2"), tmp_path / "full").layout == "transformers"
    windowed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    with pytest.raises(CheckpointError, match=r"heads must add up to the hidden size; .* a window of 8 tokens"):
        export_vllm(make("qwen2", **narrow, **windowed), tmp_path / "windowed")


@pytest.mark.parametrize(
    ("model_type", "per_layer", "sizes", "message"),
    [
        ("qwen3", UNEVEN, {}, "llama, mistral, qwen2, not qwen3; export it padded .* or to gguf"),
        ("mistral", UNEVEN, {"sliding_window": 16}, "window of 16 tokens"),
        ("qwen2", UNEVEN, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "window of 8 tok"),
        ("llama", UNEVEN, {"hidden_act": "gelu"}, "silu as its activation, not gelu"),
        ("llama", {1: {"rms_norm_eps": 0.1}}, {}, "rms_norm_eps cannot differ between layers"),
    ],
)
def test_what_has_no_layout_is_refused(model_type, per_layer, sizes, message, tmp_path):
    model = built(model_type, per_layer, **sizes)
    with pytest.raises(CheckpointError, match=f"vLLM has no layout for this model: .*{message}"):
        export_vllm(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert vllm_notes(model.config)[0].startswith("no layout in vLLM")


def test_classes_that_are_not_of_transformers_are_refused(tmp_path):
    model = make("llama")
    model.__class__ = type("Mine", (type(model),), {})
    with pytest.raises(CheckpointError, match="Mine is no class of transformers"):
        export_vllm(model, tmp_path / "out")


def test_a_failed_export_leaves_the_old_folder(monkeypatch, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "keep").write_text("1")
    model = built()
    with pytest.raises(CheckpointError, match="not empty"):
        export_vllm(model, folder)
    monkeypatch.setattr(nas_layout.Heads, "query_places", lambda heads: list(range(heads.queries)))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn\.k_proj\.weight as just written"):
        export_vllm(model, folder, overwrite=True)
    assert [f.name for f in tmp_path.iterdir()] == ["out"] and [f.name for f in folder.iterdir()] == ["keep"]
    monkeypatch.undo()
    export_vllm(model, folder, overwrite=True)
    assert not (folder / "keep").exists()


def test_notes_say_which_tensor_parallel_sizes_work(tmp_path):
    notes = vllm_notes(make("llama", num_attention_heads=6, num_key_value_heads=3, intermediate_size=44).config)
    assert notes == (
        "6 query heads cannot be divided for tensor parallelism of 4, 8; possible: 1, 2",
        "3 KV heads cannot be divided for tensor parallelism of 2, 4, 8; possible: 1",
        "44 FFN channels cannot be divided for tensor parallelism of 8; possible: 1, 2, 4",
    )
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 64}
    assert vllm_notes(make("llama", **sizes).config) == ()
    assert vllm_notes(make("llama", **sizes, vocab_size=260).config, [3])[-1].startswith("260 tokens")
    assert vllm_notes(make("gpt2", n_head=8, n_inner=44).config)[0].startswith("44 FFN channels")


def test_notes_on_experts():
    config = CONFIG_MAPPING["qwen3_moe"](num_attention_heads=8, num_key_value_heads=8, intermediate_size=64,
                                         num_experts=6, moe_intermediate_size=12)  # fmt: skip
    assert vllm_notes(config) == (
        "12 channels of an expert cannot be divided for tensor parallelism of 8; possible: 1, 2, 4",
        "6 experts cannot be divided for tensor parallelism of 8; possible: 1, 2, 4",
    )


def test_notes_on_unequal_layers_are_about_what_is_stored(tmp_path):
    model = built()
    notes = vllm_notes(model.config, [2, 4])
    assert notes == (
        "6 KV heads in layers 0, 1 cannot be divided for tensor parallelism of 4; possible: 1, 2",
        "1 FFN channels in layer 3 cannot be divided for tensor parallelism of 2, 4; possible: 1",
        "9 FFN channels in layer 2 cannot be divided for tensor parallelism of 2, 4; possible: 1",
    )
    export_vllm(model, tmp_path / "out")
    assert vllm_notes(AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True), [2, 4]) == notes
