"""Sparsity over time: how much has been removed after each step of an iterative run.

Steps are counted as done: 0 is the dense model, `steps` the end, where every schedule is exactly at its final sparsity
(LoRAPrune's code refuses its own last step and ends one step short).
"""

from __future__ import annotations

from secateur.errors import BudgetError


def one_shot(step: int, steps: int, final: float, initial: float = 0.0) -> float:
    """Everything at the first step.

    Args:
        step: steps done, 0 to `steps`.
        steps: length of the run.
        final: sparsity at the end, a fraction in [0, 1).
        initial: sparsity before the first step.

    Raises:
        BudgetError: the step lies outside the run, or the sparsities do not ascend within [0, 1).
    """
    _check(step, steps, final, initial)
    return final if step > 0 else initial


def linear(step: int, steps: int, final: float, initial: float = 0.0) -> float:
    """The same share more at each step (LLM-Pruner's iterative pruning).

    Args:
        step: steps done, 0 to `steps`.
        steps: length of the run.
        final: sparsity at the end, a fraction in [0, 1).
        initial: sparsity before the first step.

    Raises:
        BudgetError: the step lies outside the run, or the sparsities do not ascend within [0, 1).
    """
    _check(step, steps, final, initial)
    return final if step == steps else initial + (final - initial) * step / steps


def cubic(
    step: int, steps: int, final: float, initial: float = 0.0, *, warmup: float = 0.1, cooldown: float = 0.1
) -> float:
    """Fast at first, slow towards the end: `sf + (si - sf) (1 - (t - w) / (T - w - c))^3`.

    The ramp of Zhu and Gupta (arXiv:1710.01878), as LoRAPrune (arXiv:2305.18403) uses it: `initial` holds during the
    warm-up of w = warmup T steps, `final` during the cool-down of c = cooldown T steps.

    Args:
        step: steps done, t, from 0 to `steps`.
        steps: length of the run, T.
        final: sparsity at the end, sf, a fraction in [0, 1).
        initial: sparsity before the ramp, si.
        warmup: share of the steps before the ramp.
        cooldown: share of the steps after the ramp.

    Raises:
        BudgetError: the step lies outside the run, the sparsities do not ascend within [0, 1), or warm-up and
            cool-down leave no time for the ramp.
    """
    _check(step, steps, final, initial)
    if warmup < 0 or cooldown < 0 or warmup + cooldown >= 1:
        raise BudgetError(
            f"warm-up {warmup} and cool-down {cooldown} are shares of the run, from 0 up and below 1 together"
        )
    done = (step - warmup * steps) / (steps * (1 - warmup - cooldown))
    if step == steps or done >= 1:
        return final
    return final + (initial - final) * (1 - max(done, 0.0)) ** 3


def _check(step: int, steps: int, final: float, initial: float) -> None:
    if steps < 1 or not 0 <= step <= steps:
        raise BudgetError(f"step {step} of {steps}: steps are counted as done, from 0 to a total of at least 1")
    if not 0 <= initial <= final < 1:
        raise BudgetError(f"sparsity cannot go from {initial} to {final}: expected 0 <= initial <= final < 1")
