"""List what can be removed from a model, and why the rest cannot.

python examples/01_inspect_groups.py [MODEL]
"""

import sys

import secateur as sc
from secateur.checkpoint import load

model = load(sys.argv[1] if len(sys.argv) > 1 else "demo").model
groups = sc.discover(model)
for group in groups:
    if group.layer in (0, None):
        verdict = "prunable" if group.prunable else f"refused: {group.refusals[0]}"
        print(f"{group.name:45s} {group.units:6d} units   {verdict}")
print(f"{groups.total_parameters:,} parameters")
