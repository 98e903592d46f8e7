"""Coupled structures built by hand, without a model, and their parameters counted element by element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from secateur.groups import Group, Groups, Kept, Member


def llama_groups(
    *,
    layers: int = 3,
    hidden: int = 6,
    ffn: int | Sequence[int] = 5,
    kv: int = 2,
    rep: int = 2,
    head_dim: int = 2,
    vocab: int = 7,
    fused: bool = False,
    tied: bool = True,
) -> Groups:
    """A Llama: attention with `kv` KV heads of `rep` query heads each, a gated MLP, an embedding.

    `ffn` may differ by layer. With `fused`, q, k and v lie in one matrix, one after the other. If `tied`, the embedding
    is the output head too.
    """
    widths = [ffn] * layers if isinstance(ffn, int) else list(ffn)
    heads = kv * rep
    q = np.arange(heads * head_dim).reshape(kv, rep, head_dim)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes["model.inv_freq"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    spans: list[tuple[str, int]] = [(name, len(shape) - 1) for name, shape in shapes.items()]
    groups = []
    for layer, width in enumerate(widths):
        at = f"model.layers.{layer}"
        o = (heads * head_dim, 1, f"{at}.self_attn.o_proj.weight")
        k = np.arange(kv * head_dim).reshape(kv, head_dim)
        if fused:
            qkv = f"{at}.self_attn.qkv_proj.weight"
            kv_starts = [heads * head_dim, (heads + kv) * head_dim]
            per_kv = [Member(qkv, 0, np.hstack([q.reshape(kv, -1), *[s + k for s in kv_starts]]))]
            per_q = [Member(qkv, 0, q.transpose(1, 0, 2).reshape(rep, -1))]
            shapes[qkv] = ((heads + 2 * kv) * head_dim, hidden)
            reads = [qkv]
        else:
            reads = [f"{at}.self_attn.{p}_proj.weight" for p in "qkv"]
            per_kv = [Member(reads[0], 0, q.reshape(kv, -1)), Member(reads[1], 0, k), Member(reads[2], 0, k)]
            per_q = [Member(reads[0], 0, q.transpose(1, 0, 2).reshape(rep, -1))]
            shapes |= dict(zip(reads, [(heads * head_dim, hidden), *[(kv * head_dim, hidden)] * 2], strict=True))
        shapes[o[2]] = (hidden, heads * head_dim)
        per_kv.append(Member(o[2], 1, q.reshape(kv, -1), "consumer"))
        per_q.append(Member(o[2], 1, q.transpose(1, 0, 2).reshape(rep, -1), "consumer"))
        groups.append(Group(f"{at}.self_attn/kv_group", "kv_group", kv, tuple(per_kv)))
        groups.append(Group(f"{at}.self_attn/query_head", "query_head", rep, tuple(per_q)))
        channel = np.arange(width)[:, None]
        gate, up, down = (f"{at}.mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
        shapes |= {gate: (width, hidden), up: (width, hidden), down: (hidden, width), f"{at}.norm.weight": (hidden,)}
        members = (Member(gate, 0, channel), Member(up, 0, channel), Member(down, 1, channel, "consumer"))
        groups.append(Group(f"{at}.mlp/ffn_channel", "ffn_channel", width, members))
        spans += [*[(name, 1) for name in (*reads, gate, up)], (o[2], 0), (down, 0), (f"{at}.norm.weight", 0)]
    position = np.arange(hidden)[:, None]
    groups.append(Group("hidden", "hidden", hidden, tuple(Member(name, dim, position) for name, dim in spans)))
    table = Member("model.embed_tokens.weight", 0, np.arange(vocab)[:, None])
    groups.append(Group("model.embed_tokens/table", "table", vocab, (table,), refusals=("looked up by token number",)))
    blocks = tuple(f"model.layers.{layer}" for layer in range(layers))
    groups.append(Group("model.layers/layer", "layer", layers, blocks=blocks))
    names = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    return Groups(tuple(groups), shapes, frozenset({"model.inv_freq"}), names)


def random_scores(groups: Groups, kinds: Sequence[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Scores in (0, 1), some of them equal."""
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.randint(1, 30, (g.units,), generator=generator) / 30 for g in groups.of_kinds(kinds)}


def alive_elements(groups: Groups, kept: Kept) -> dict[str, np.ndarray]:
    """For every parameter and buffer, which single elements are left."""
    alive = {name: np.ones(shape, dtype=bool) for name, shape in groups.shapes.items()}
    for name, units in kept.items():
        group = groups.named(name)
        for unit in set(range(group.units)) - set(units):
            for m in group.members:
                np.moveaxis(alive[m.parameter], m.dim, 0)[m.index[unit]] = False
            for parameter, mask in alive.items():
                if group.blocks and parameter.startswith(group.blocks[unit] + "."):
                    mask[:] = False
    return alive


def count_alive(groups: Groups, kept: Kept) -> int:
    """The number of parameters left."""
    return sum(int(m.sum()) for n, m in alive_elements(groups, kept).items() if n not in groups.buffers)
