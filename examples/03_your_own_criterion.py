"""A criterion is a function: here, the size of a unit's weights times that of their gradients, compared with Taylor.

python examples/03_your_own_criterion.py [MODEL]
"""

import sys

import torch

import secateur as sc


def weight_times_gradient(group: sc.Group, weights: dict, grads: dict) -> torch.Tensor:
    """One score per unit: the product of the norms of its consumers' columns and of their gradients."""
    total = torch.zeros(group.units)
    for m in group.members:
        if m.role == "consumer":
            w, g = (
                t[m.parameter].float().movedim(m.dim, 0)[torch.from_numpy(m.index)].flatten(1) for t in (weights, grads)
            )
            total += w.norm(dim=1) * g.norm(dim=1)
    return total


loaded = sc.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
tokens = sc.calibration_tokens(sc.load_corpus("demo-calibration"), loaded.tokenizer, samples=10, seq_len=64, seed=42)
groups = sc.discover(loaded.model)
chosen = groups.only(["ffn_channel", "kv_group"])
for name, criterion in (("own", weight_times_gradient), ("taylor", sc.Taylor(order=1)), ("l2", sc.Magnitude(p=2))):
    scores = sc.score(loaded.model, chosen, [tokens], criterion)
    plan = sc.allocate(chosen, scores, sc.Budget(param_sparsity=0.2))
    small = sc.slice(loaded.model, plan)
    p = sc.perplexity(small, loaded.tokenizer, sc.load_corpus("demo-eval"), seq_len=128)
    print(f"{name:8s} perplexity {p.value:.2f}")
