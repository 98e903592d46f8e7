"""A checkpoint that brings its own modelling code, which Secateur has never seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from secateur import checkpoint

CODE = '''
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutput


class OddConfig(PreTrainedConfig):
    model_type = "odd"

    def __init__(self, width=40, depth=2, heads=4, groups=2, head_size=6, inner=28, vocab_size=320, **kwargs):
        self.width, self.depth, self.heads, self.groups = width, depth, heads, groups
        self.head_size, self.inner, self.vocab_size = head_size, inner, vocab_size
        self.hidden_size, self.num_hidden_layers = width, depth
        super().__init__(**kwargs)


class Layer(nn.Module):
    """Values, keys and queries in one projection, in this order; a gate beside its value, interleaved."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.norm = nn.LayerNorm(c.width)
        self.fused = nn.Linear(c.width, (2 * c.groups + c.heads) * c.head_size)
        self.out = nn.Linear(c.heads * c.head_size, c.width)
        self.inner = nn.Linear(c.width, 2 * c.inner)
        self.back = nn.Linear(c.inner, c.width)

    def forward(self, x):
        c, (b, t, _) = self.c, x.shape
        each = c.groups * c.head_size
        v, k, q = self.fused(self.norm(x)).split([each, each, c.heads * c.head_size], dim=-1)
        v, k = (y.view(b, t, c.groups, 1, c.head_size).expand(-1, -1, -1, c.heads // c.groups, -1) for y in (v, k))
        v, k = (y.reshape(b, t, c.heads, c.head_size).transpose(1, 2) for y in (v, k))
        q = q.view(b, t, c.heads, c.head_size).transpose(1, 2)
        scores = q @ k.transpose(2, 3) / 2.4
        causal = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, t, -1))
        gate, value = self.inner(x).view(b, t, c.inner, 2).unbind(-1)
        return x + self.back(torch.relu(gate) * value)


class OddForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OddConfig
    _supports_sdpa = False

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
        return CausalLMOutput(loss=loss, logits=logits)
'''


@pytest.fixture(scope="module")
def odd_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "model"
    folder.mkdir()
    (folder / "modeling_odd.py").write_text(CODE)
    auto_map = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    config = {"model_type": "odd", "architectures": ["OddForCausalLM"], "auto_map": auto_map, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    built = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModelForCausalLM.from_config(built, trust_remote_code=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_without_consent_its_code_does_not_run(odd_folder, tmp_path, secateur):
    code, _, err = secateur("prune", odd_folder, "-o", tmp_path / "o", "--sparsity", 0.2)
    assert code == 2 and err.count("error: ") == 1 and "--trust-remote-code" in err and not (tmp_path / "o").exists()


def test_its_layout_is_discovered_and_proven(odd_folder, tmp_path, secateur):
    flags = ["--verify", "--trust-remote-code", "--json", tmp_path / "g.json"]
    code, _, err = secateur("groups", odd_folder, *flags)
    assert code == 0, err
    families = json.loads((tmp_path / "g.json").read_text())["families"]
    proven = {f["kind"]: f["proof"]["route"] for f in families if f["prunable"]}
    wanted = {"ffn_channel", "kv_group", "query_head", "hidden", "layer"}
    assert wanted <= set(proven) and all(proven[kind] == "config" for kind in wanted)


def test_it_is_pruned_and_its_code_goes_along(odd_folder, text_file, tmp_path, secateur):
    flags = ["--sparsity", 0.2, "--calibration", text_file, "--samples", 4, "--seq-len", 32, "--text", text_file]
    output = tmp_path / "small"
    code, _, err = secateur("prune", odd_folder, "-o", output, "--method", "llm-pruner", "--trust-remote-code", *flags)
    assert code == 0, err
    small = checkpoint.load(output, trust_remote_code=True).model
    assert small.config.inner < 28 and (output / "modeling_odd.py").exists()
    script = (
        "from transformers import AutoModelForCausalLM as A; "
        f"print(A.from_pretrained({str(output)!r}, trust_remote_code=True).num_parameters())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) == small.num_parameters()
