"""Evaluation: how good a model is, each number with its protocol."""

from secateur.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
