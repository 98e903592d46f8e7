"""Evaluation: how good a model is, each number with its protocol."""

from secateur.evaluation.audit import Agreement, Removal, agreements, best, luck, removal_costs, removals
from secateur.evaluation.continuation import NEW_TOKENS, continuation
from secateur.evaluation.distribution import Knowledge, Trial
from secateur.evaluation.knowledge import RATIOS, check_ratios, groups_to_cut, knowledge_distribution
from secateur.evaluation.perplexity import Perplexity, perplexity
from secateur.evaluation.picture import check_picture, draw
from secateur.evaluation.scores import TaskScore, average
from secateur.evaluation.zero_shot import Prepared, prepare, setting, zero_shot

__all__ = [
    "NEW_TOKENS", "RATIOS", "Agreement", "Knowledge", "Perplexity", "Prepared", "Removal", "TaskScore", "Trial",
    "agreements", "average", "best", "check_picture", "check_ratios", "continuation", "draw", "groups_to_cut",
    "knowledge_distribution", "luck", "perplexity", "prepare", "removal_costs", "removals", "setting", "zero_shot",
]  # fmt: skip
