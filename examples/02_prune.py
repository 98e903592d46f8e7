"""Remove a fifth of a model's parameters in ten lines.

python examples/02_prune.py [MODEL] [OUTPUT]
"""

import sys

import secateur as sc

source = sys.argv[1] if len(sys.argv) > 1 else "demo"
output = sys.argv[2] if len(sys.argv) > 2 else "pruned"
loaded = sc.load(source)
model, tokenizer = loaded.model, loaded.tokenizer
tokens = sc.calibration_tokens(sc.load_corpus("demo-calibration"), tokenizer, samples=10, seq_len=64, seed=42)

groups = sc.discover(model)
chosen = groups.only(["ffn_channel", "kv_group"])
scores = sc.score(model, chosen, [tokens], sc.Taylor(order=1))
plan = sc.allocate(chosen, scores, sc.Budget(param_sparsity=0.2))
small = sc.slice(model, plan)
sc.save(small, output, tokenizer=tokenizer, plan=plan, overwrite=True)

evaluation = sc.load_corpus("demo-eval")
for name, m in (("dense", model), ("pruned", small)):
    p = sc.perplexity(m, tokenizer, evaluation, seq_len=128)
    print(f"{name:8s} {m.num_parameters():,} parameters, perplexity {p.value:.2f} on {p.tokens} tokens")
