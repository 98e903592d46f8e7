"""What a component of a LoRA adapter is worth, and the closed-form change of the others when some are removed.

The criterion of PrunedLoRA, as its code has it (the paper's text says little more than its form):

| paper | here |
| --- | --- |
| B [m, r], A [r, n]; component j is column j of B with row j of A | `Pair` |
| G_B, G_A, gradients of the factors | `Pair.grad_b`, `Pair.grad_a` |
| H_B = G_B' G_B + eps I, H_A = G_A G_A' + eps I, [r, r] | `Curvature`: of one gradient, or an average over steps |
| min <G, D> + tr(D H D') / 2 over D with (W + D)_S = 0 | `Quadratic`, for B, and for A transposed |
| score_j = |(W - G H^-1)_j|^2 / (2 (H^-1)_jj), summed over both factors | `Quadratic.scores` |
| D = -G H^-1 - R ((H^-1)_SS)^-1 (H^-1)_S, R = (W - G H^-1)_S | `Quadratic.change` |

Deviations, each an option: H averages the Grams of many steps (`ema`), so that it estimates a Fisher matrix (of one
gradient, G H^-1 is its pseudo-inverse, and every component gets the same score); damping is relative to the mean
diagonal; the Newton term -G H^-1 can be scaled or left out; what is removed is chosen jointly; factors are scored in
the gauge in which |a_j| = |b_j|, on which damping depends; and only one of the factors needs to make up for what goes:
the component is gone when one of its factors is, and changes of both make up for it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.errors import NonFiniteError

Kind = Literal["fisher", "activation", "magnitude", "taylor", "sensitivity"]
Factors = Literal["cheaper", "both", "b", "a"]
State = dict[str, Tensor]
TINY = 1e-30  # on the diagonal of a curvature that may be zero
AVERAGE = 0.85  # of AdaLoRA's sensitivity and its uncertainty (beta_1, beta_2)


@dataclass(frozen=True)
class Pair:
    """The factors of one module and their gradients, detached, float32 or wider.

    Attributes:
        b, grad_b: [m, r].
        a, grad_a: [r, n].
        activations: mean of z z' over tokens, z = A x, [r, r]; for the criterion that needs it.
    """

    b: Tensor
    a: Tensor
    grad_b: Tensor
    grad_a: Tensor
    activations: Tensor | None = None

    @property
    def gauge(self) -> Tensor:
        """c such that c b_j and a_j / c have the same norm; 1 where a factor is zero [r]."""
        c = (self.a.norm(dim=1) / self.b.norm(dim=0)).sqrt()
        return torch.where(torch.isfinite(c) & (c > 0), c, torch.ones_like(c))


class Quadratic:
    """min eta <G, D> + tr(D H D') / 2 over D [d, r], under (W + D)_S = 0 for a set S of columns.

    Args:
        weight: W [d, r].
        curvature: H [r, r], positive definite.
        gradient: G [d, r]; with `newton` = eta = 0 it has no part.

    Everything is computed in float64.
    """

    def __init__(self, weight: Tensor, curvature: Tensor, gradient: Tensor, newton: float = 0.0) -> None:
        self.weight = weight.double()
        inverse = torch.linalg.inv(curvature.double())
        self.inverse = (inverse + inverse.T) / 2
        self.centre = self.weight - newton * gradient.double() @ self.inverse if newton else self.weight

    def scores(self) -> Tensor:
        """How much more is lost at the minimum with one column gone than with none [r]."""
        scores: Tensor = self.centre.square().sum(0) / (2 * self.inverse.diagonal())
        return scores

    def increase(self, removed: Sequence[int]) -> float:
        """The same for a set."""
        rest = self.centre[:, removed]
        block = self.inverse[removed][:, removed]
        return float((rest * torch.linalg.solve(block, rest.T).T).sum() / 2)

    def change(self, removed: Sequence[int]) -> Tensor:
        """D [d, r] at the minimum."""
        block = torch.linalg.solve(self.inverse[removed][:, removed], self.inverse[removed])
        change: Tensor = self.centre - self.weight - self.centre[:, removed] @ block
        return change


def greedy(problems: Sequence[Quadratic], count: int) -> list[tuple[int, float]]:
    """Columns to remove one after the other, each the cheapest given those before, and what each adds to the loss.

    After column j is gone, H^-1 loses its projection on it and W - G H^-1 changes as `change` says; of the latter only
    the Gram matrix is needed, so that a step costs r^2 operations.
    """
    inverses = [p.inverse.clone() for p in problems]
    grams = [p.centre.T @ p.centre for p in problems]
    order: list[tuple[int, float]] = []
    free = torch.ones(len(inverses[0]), dtype=torch.bool, device=inverses[0].device)
    for _ in range(count):
        costs = sum(g.diagonal() / (2 * h.diagonal().clamp_min(TINY)) for g, h in zip(grams, inverses, strict=True))
        assert isinstance(costs, Tensor)
        j = int(torch.where(free, costs, torch.inf).argmin())
        order.append((j, float(costs[j])))
        free[j] = False
        for gram, inverse in zip(grams, inverses, strict=True):
            row = inverse[j] / inverse[j, j]
            half = gram[:, j] - gram[j, j] / 2 * row
            gram.addr_(half, row, alpha=-1).addr_(row, half, alpha=-1)  # in place, as memory takes the time at rank 512
            inverse.addr_(inverse[:, j].clone(), row, alpha=-1)
    return order


@dataclass(frozen=True)
class Verdict:
    """What was found for one module.

    Attributes:
        order: components from the first to go, each with what it adds to the loss (or its score).
        problems: what the change of the others is computed from, factor by factor; empty without a curvature.
        gauge: see `Pair.gauge`.
    """

    order: list[tuple[int, float]]
    problems: tuple[tuple[Literal["b", "a"], Quadratic], ...]
    gauge: Tensor

    def changes(self, removed: Sequence[int]) -> dict[str, Tensor]:
        """What to add to `b` [m, r] and `a` [r, n] when these components go; nothing for rivals without a curvature."""
        found: dict[str, Tensor] = {}
        for factor, problem in self.problems:
            change = problem.change(removed)
            found[factor] = change / self.gauge if factor == "b" else (change * self.gauge).T
        return found


@dataclass(frozen=True)
class ComponentCriterion:
    """One criterion, and the rivals through the same interface.

    Attributes:
        kind: `fisher`, the Gram of gradients; `activation`, the mean of z z' with z = A x as the curvature of B
            (SparseGPT's problem for the adapter's output); `magnitude`, |b_j| |a_j|; `taylor`, |<b_j, dL/db_j>|
            (which equals |<a_j, dL/da_j>|), averaged over steps; `sensitivity`, AdaLoRA's smoothed |w dL/dw| times its
            uncertainty, by component and not by element, so that it takes two numbers for each.
        ema: weight of the past in averages over steps; 0 takes the last gradient alone, as PrunedLoRA's code does.
        damping: added to the diagonal of H.
        relative: damping is a share of the mean diagonal.
        newton: factor on the gradient; 1 in PrunedLoRA's code.
        factors: which factors are scored and changed: `both` in PrunedLoRA's code; `cheaper` is, module by module, the
            one in whose terms less is lost.
        joint: choose greedily, each component given those before; or by single scores.
        balance: score in the gauge in which both factors of a component have the same norm.
        recover: change what stays.
    """

    kind: Kind = "fisher"
    ema: float = 0.9
    damping: float = 1e-2
    relative: bool = True
    newton: float = 0.0
    factors: Factors = "cheaper"
    joint: bool = True
    balance: bool = True
    recover: bool = True

    def observe(self, pair: Pair, state: State, past: float | None = None) -> None:
        """Take one step's gradients into the averages that `state` keeps, [r] or [r, r] each.

        Args:
            past: weight of what is there, instead of `ema`.
        """
        past = self.ema if past is None else past
        if self.kind == "fisher":
            if self.factors != "a":
                _average(state, "b", pair.grad_b.T @ pair.grad_b, past)
            if self.factors != "b":
                _average(state, "a", pair.grad_a @ pair.grad_a.T, past)
        elif self.kind == "activation":
            assert pair.activations is not None
            _average(state, "b", pair.activations, past)
        elif self.kind == "taylor":
            _average(state, "taylor", (pair.b * pair.grad_b).sum(0).abs(), past)
        elif self.kind == "sensitivity":
            now = (pair.b * pair.grad_b).abs().mean(0) + (pair.a * pair.grad_a).abs().mean(1)
            _average(state, "mean", now, AVERAGE)
            _average(state, "uncertainty", (now - state["mean"]).abs(), AVERAGE)

    def rescaled(self, state: State, share: float) -> State:
        """The averages for factors divided by the root of `share`, whose gradients have grown by it."""
        grown = {"fisher": share, "activation": 1 / share}.get(self.kind, 1.0)
        return {key: tensor * grown for key, tensor in state.items()}

    def verdict(self, pair: Pair, state: State, count: int, name: str) -> Verdict:
        """Which `count` components to remove, from the first to go.

        Raises:
            NonFiniteError: a score is NaN or infinite; names the module.
        """
        problems = self._problems(pair, state) if self.kind in ("fisher", "activation") else ()
        if not problems:
            order = _lowest(self._simple(pair, state), count)
        elif self.factors == "cheaper":
            orders = [(self._order([problem], count), (factor, problem)) for factor, problem in problems]
            order, cheaper = min(orders, key=lambda found: sum(cost for _, cost in found[0]))
            problems = (cheaper,)
        else:
            order = self._order([problem for _, problem in problems], count)
        if not torch.isfinite(torch.tensor([cost for _, cost in order])).all():
            raise NonFiniteError(
                f"the scores of the components of {name} are not finite: lower the learning rate, or raise the damping"
            )
        return Verdict(order, problems if self.recover else (), self._gauge(pair))

    def _order(self, problems: Sequence[Quadratic], count: int) -> list[tuple[int, float]]:
        if self.joint:
            return greedy(problems, count)
        return _lowest(torch.stack([p.scores() for p in problems]).sum(0), count)

    def _gauge(self, pair: Pair) -> Tensor:
        return pair.gauge if self.balance else torch.ones_like(pair.gauge)

    def _problems(self, pair: Pair, state: State) -> tuple[tuple[Literal["b", "a"], Quadratic], ...]:
        """The quadratic problem of each factor that takes part, in the gauge."""
        c = self._gauge(pair)
        found: list[tuple[Literal["b", "a"], Quadratic]] = []
        if "b" in state:
            found.append(("b", self._problem(pair.b * c, state["b"] / (c[:, None] * c), pair.grad_b / c)))
        if "a" in state:
            found.append(("a", self._problem(pair.a.T / c, state["a"] * (c[:, None] * c), pair.grad_a.T * c)))
        return tuple(found)

    def _problem(self, weight: Tensor, curvature: Tensor, gradient: Tensor) -> Quadratic:
        damping = self.damping * float(curvature.diagonal().mean()) if self.relative else self.damping
        damped = curvature.double() + (damping + TINY) * torch.eye(len(curvature), device=weight.device)
        return Quadratic(weight, damped, gradient, self.newton)

    def _simple(self, pair: Pair, state: State) -> Tensor:
        """Scores of the rivals without a curvature [r]."""
        if self.kind == "magnitude":
            sizes: Tensor = pair.b.norm(dim=0) * pair.a.norm(dim=1)
            return sizes
        if self.kind == "taylor":
            return state["taylor"]
        return state["mean"] * state["uncertainty"]


def _lowest(scores: Tensor, count: int) -> list[tuple[int, float]]:
    """Components by their single scores, from the lowest."""
    values, index = scores.sort(stable=True)
    return list(zip(index[:count].tolist(), values[:count].tolist(), strict=True))


def _average(state: State, key: str, now: Tensor, past: float) -> None:
    state[key] = past * state[key] + (1 - past) * now if key in state else now
