"""Evaluation: how good a model is, each number with its protocol."""

from secateur.evaluation.audit import Agreement, Removal, agreements, best, removal_costs, removals
from secateur.evaluation.distribution import Knowledge, Trial
from secateur.evaluation.knowledge import RATIOS, check_ratios, groups_to_cut, knowledge_distribution
from secateur.evaluation.perplexity import Perplexity, perplexity
from secateur.evaluation.picture import check_picture, draw

__all__ = [
    "RATIOS", "Agreement", "Knowledge", "Perplexity", "Removal", "Trial", "agreements", "best", "check_picture",
    "check_ratios", "draw", "groups_to_cut", "knowledge_distribution", "perplexity", "removal_costs", "removals",
]  # fmt: skip
