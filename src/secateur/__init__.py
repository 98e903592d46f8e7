"""Secateur: make a large language model smaller and faster by cutting whole structures out of it.

    groups = secateur.discover(model)
    scores = secateur.score(model, groups, batches, secateur.Taylor(order=1))
    plan = secateur.allocate(groups, scores, secateur.Budget(param_sparsity=0.2))
    small = secateur.slice(model, plan)
    secateur.save(small, "out/")

Names are imported when first used, so that `import secateur` is quick and does not import transformers. It makes
`from_pretrained` load checkpoints whose layers differ in width without `trust_remote_code=True`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.first_use import on_first_use
from secateur.registration import register_with_transformers

if TYPE_CHECKING:
    from secateur.allocation import Budget, allocate
    from secateur.benchmark import bench
    from secateur.checkpoint import load, save
    from secateur.data import calibration_tokens, load_corpus
    from secateur.discovery import discover
    from secateur.errors import SecateurError
    from secateur.evaluation import Knowledge, knowledge_distribution
    from secateur.evaluation.perplexity import perplexity
    from secateur.groups import Group, Groups, Member
    from secateur.importance import Gate, Magnitude, Random, Taylor, leave_one_out, score
    from secateur.importance.components import ComponentCriterion
    from secateur.methods.loraprune import LoRAPrune
    from secateur.methods.lorashear import LoRAShear
    from secateur.methods.prunedlora import PrunedLoRA, prune_adapter
    from secateur.plan import PruningPlan
    from secateur.recovery import Distillation, RecoverySettings, draw_mix, recover
    from secateur.surgery import mask, prove, slice
    from secateur.surgery.rank_schedule import PrunedLoRASettings

_HOME = {
    "Budget": "allocation",
    "ComponentCriterion": "importance.components",
    "Distillation": "recovery",
    "Gate": "importance",
    "Group": "groups",
    "Groups": "groups",
    "Knowledge": "evaluation",
    "LoRAPrune": "methods.loraprune",
    "LoRAShear": "methods.lorashear",
    "Magnitude": "importance",
    "Member": "groups",
    "PrunedLoRA": "methods.prunedlora",
    "PrunedLoRASettings": "surgery.rank_schedule",
    "PruningPlan": "plan",
    "Random": "importance",
    "RecoverySettings": "recovery",
    "SecateurError": "errors",
    "Taylor": "importance",
    "allocate": "allocation",
    "bench": "benchmark",
    "calibration_tokens": "data",
    "discover": "discovery",
    "draw_mix": "recovery",
    "knowledge_distribution": "evaluation",
    "leave_one_out": "importance",
    "load": "checkpoint",
    "load_corpus": "data",
    "mask": "surgery",
    "perplexity": "evaluation",
    "prove": "surgery",
    "prune_adapter": "methods.prunedlora",
    "recover": "recovery",
    "save": "checkpoint",
    "score": "importance",
    "slice": "surgery",
}

__version__ = "0.1.0"
__all__ = [
    "Budget", "ComponentCriterion", "Distillation", "Gate", "Group", "Groups", "Knowledge", "LoRAPrune", "LoRAShear",
    "Magnitude", "Member", "PrunedLoRA", "PrunedLoRASettings", "PruningPlan", "Random", "RecoverySettings",
    "SecateurError", "Taylor", "allocate", "bench", "calibration_tokens", "discover", "draw_mix",
    "knowledge_distribution", "leave_one_out", "load", "load_corpus", "mask", "perplexity", "prove", "prune_adapter",
    "recover", "save", "score", "slice",
]  # fmt: skip

__getattr__ = on_first_use(__name__, _HOME)

register_with_transformers()
