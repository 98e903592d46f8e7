"""Which source gives how much: the arithmetic of a data mix, without model and without state.

LoRAShear (Chen et al. 2023, arXiv:2310.18356, Alg. 5) asks for more of the sources on which the cut model got worse and
a balanced share of the rest, and publishes no formula, size or threshold: all formulas here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MIN_GAIN = 0.01  # relative improvement of the worst source that counts as one; ours


def degradation(now: float, dense: float) -> float:
    """How much worse a loss is than the dense model's, max(0, (now - dense) / dense); ours.

    Args:
        now, dense: losses on the same text [nats per token], `dense` positive.
    """
    return max(0.0, (now - dense) / dense)


def shares(degradations: Sequence[float], sizes: Sequence[int], balance: float) -> list[float]:
    """Share of each source in the next subset; they sum to 1.

    p_s = (1 - balance) D_s / sum(D) + balance n_s / sum(n); ours, for "prioritise the sources with larger degradation,
    keep a balanced share of the rest". Where nothing is degraded, p_s = n_s / sum(n).

    Args:
        degradations: D_s >= 0.
        sizes: n_s, examples of each source.
        balance: part of the subset that follows the sizes, in [0, 1].
    """
    total, amount = math.fsum(degradations), sum(sizes)
    if total == 0:
        return [n / amount for n in sizes]
    return [(1 - balance) * (d / total) + balance * (n / amount) for d, n in zip(degradations, sizes, strict=True)]


def counts(wanted: Sequence[float], total: int) -> list[int]:
    """Whole numbers with this sum in proportion to shares, by largest remainders; of equal ones the first get more."""
    whole = [math.floor(share * total + 1e-9) for share in wanted]
    remainders = [share * total - n for share, n in zip(wanted, whole, strict=True)]
    for i in sorted(range(len(wanted)), key=lambda i: -remainders[i])[: total - sum(whole)]:
        whole[i] += 1
    return whole


def drawn(size: int, before: int, count: int, seed: Sequence[int]) -> list[int]:
    """Numbers of the next examples of a source, without replacement until it is used up, then in a new order.

    The whole sequence depends on `seed` alone, so that a run that goes on needs to know only how many were drawn.

    Args:
        size: examples of the source.
        before: how many were drawn already.
        count: how many to draw now.
        seed: numbers >= 0.
    """
    passes = range(before // size, (before + count - 1) // size + 1) if count else ()
    orders = [np.random.default_rng([*seed, number]).permutation(size) for number in passes]
    first = before - before // size * size
    return [int(i) for order in orders for i in order][first : first + count]


def stalled(worst: Sequence[float], patience: int) -> bool:
    """Whether the worst degradation has not fallen by `MIN_GAIN` of its best value in the last `patience` rounds; ours.

    Args:
        worst: max_s D_s before the first round of a stage and after each one.
        patience: rounds; 0 for never.
    """
    best, without = worst[0], 0
    for value in worst[1:]:
        best, without = (value, 0) if value < best * (1 - MIN_GAIN) else (best, without + 1)
    return bool(patience) and without >= patience


def rounds_by_stage(rounds: int, sizes: Sequence[int]) -> list[int]:
    """Rounds of each stage in proportion to its examples, at least one each; ours.

    Args:
        rounds: of all stages, as many as there are stages or more.
        sizes: examples of each stage.
    """
    spare = rounds - len(sizes)
    wanted = [max(0.0, rounds * n / sum(sizes) - 1) for n in sizes]
    total = math.fsum(wanted)
    return [1 + n for n in counts([w / total for w in wanted] if total else [1 / len(sizes)] * len(sizes), spare)]
