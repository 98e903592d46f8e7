"""A decoder with grouped queries whose single input projection yields, for each group, its queries, key and value, and
after them gate and up of every channel side by side."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from .configuration_tiny import TinyFusedConfig


def rotated(x, frequencies):
    angles = torch.arange(x.shape[-2], device=x.device, dtype=frequencies.dtype)[:, None] * frequencies
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], -1)


class Block(nn.Module):
    """Attention and a gated layer side by side on one normalised input."""

    def __init__(self, config):
        super().__init__()
        self.groups, self.queries, self.size = config.groups, config.queries_per_group, config.head_width
        self.per_group = (self.queries + 2) * self.size
        self.channels = config.channels
        self.norm = nn.LayerNorm(config.width)
        self.enter = nn.Linear(config.width, self.groups * self.per_group + 2 * self.channels)
        self.leave = nn.Linear(self.groups * self.queries * self.size + self.channels, config.width)

    def forward(self, states, frequencies):
        batch, length, _ = states.shape
        heads, inner = self.enter(self.norm(states)).split([self.groups * self.per_group, 2 * self.channels], -1)
        heads = heads.view(batch, length, self.groups, self.queries + 2, self.size).permute(0, 2, 3, 1, 4)
        queries, key, value = heads.split([self.queries, 1, 1], 2)
        scores = rotated(queries, frequencies) @ rotated(key, frequencies).transpose(-1, -2) * self.size**-0.5
        future = torch.ones(length, length, dtype=torch.bool, device=states.device).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ value
        mixed = mixed.permute(0, 3, 1, 2, 4).reshape(batch, length, -1)
        gate, up = inner.view(batch, length, self.channels, 2).unbind(-1)
        return states + self.leave(torch.cat([mixed, nn.functional.silu(gate) * up], -1))


class TinyFusedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyFusedConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        half = config.head_width // 2
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(half) / half), persistent=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            half = self.config.head_width // 2
            self.frequencies = 100.0 ** -(torch.arange(half) / half)

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, **kwargs):
        states = self.embed(input_ids)
        for block in self.blocks:
            states = block(states, self.frequencies)
        logits = self.head(self.norm(states))
        loss = None
        if labels is not None:
            flat = logits[:, :-1].reshape(-1, logits.shape[-1])
            loss = nn.functional.cross_entropy(flat.float(), labels[:, 1:].reshape(-1))
        return CausalLMOutput(loss=loss, logits=logits)
