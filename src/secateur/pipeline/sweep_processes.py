"""How many runs of a sweep go at once, and what each of their processes does."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from secateur.checkpoint import available_memory, load_skeleton
from secateur.config import Recipe
from secateur.errors import RecipeError, SecateurError, one_line
from secateur.pipeline.recipes import run_recipe

PROGRAM = 1 << 30  # bytes that Python and the libraries take
COPIES = 4  # of the weights: the model, the one that is cut or trained, gradients, what they are added up in
LOGITS = 3  # copies of them, in float32


@dataclass(frozen=True)
class Share:
    """How a machine is shared: runs at once, and threads of each."""

    workers: int
    threads: int


def share_of(recipes: Sequence[Recipe], workers: int | None = None) -> Share:
    """How many runs go at once if `workers` does not say so, and with how many threads.

    One where there is an accelerator or a recipe measures speed; else as many as there are cores and as fit into half
    of the memory that is free now, by a rough estimate (`memory_of`).

    Raises:
        RecipeError: several at once are asked for, and speed is to be measured.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    timed = any(recipe.benchmark for recipe in recipes)
    if timed and (workers or 1) > 1:
        raise RecipeError("benchmark measures speed, which runs at the same time would falsify: give --workers 1")
    if workers is None:
        elsewhere = any(r.model.device not in (None, "cpu") for r in recipes) or torch.accelerator.is_available()
        workers = 1 if timed or elsewhere else min(cores, available_memory() // 2 // _largest(recipes))
    workers = max(1, min(workers, len(recipes)))
    return Share(workers, max(1, min(torch.get_num_threads(), cores // workers)))


def _largest(recipes: Sequence[Recipe]) -> int:
    """What the largest of the runs needs [bytes]; each model is looked at once."""
    size = cache(_weights_and_vocabulary)
    return max(memory_of(r, *size(r.model.source, r.model.dtype, r.model.trust_remote_code)) for r in recipes)


def memory_of(recipe: Recipe, weights: int, vocabulary: int) -> int:
    """Memory that a run takes at its peak, roughly [bytes].

    Args:
        weights: size of the dense model's [bytes].
        vocabulary: tokens.
    """
    evaluation, recovery = recipe.evaluation, recipe.recovery
    batches = [evaluation.batch_size * max(evaluation.seq_len)] if evaluation.texts else []
    batches += [recovery.micro_batch_size * recovery.seq_len] if recovery else []
    return PROGRAM + COPIES * weights + LOGITS * 4 * vocabulary * max(batches, default=0)


def _weights_and_vocabulary(source: str, dtype: str | None, trust_remote_code: bool) -> tuple[int, int]:
    skeleton = load_skeleton(source, trust_remote_code=trust_remote_code)
    kind = getattr(torch, dtype) if dtype else skeleton.dtype
    return skeleton.num_parameters() * kind.itemsize, skeleton.config.get_text_config().vocab_size


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        error: what was wrong; None if it is finished.
        exit_code: 2 for wrong input, 1 for a defect, 0 for success.
    """

    error: str | None = None
    exit_code: int = 0


def attempt(recipe: Recipe, folder: Path) -> Outcome:
    """Run a recipe, or go on with it; whatever is wrong is returned, and printed."""
    try:
        run_recipe(recipe, folder, resume=True)
    except SecateurError as error:
        print(f"error: {error}", file=sys.stderr)
        return Outcome(str(error), error.exit_code)
    except Exception as error:
        traceback.print_exc()
        return Outcome(f"{type(error).__name__}: {one_line(error)}", 1)
    return Outcome()
