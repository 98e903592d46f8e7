"""One matrix solved again: sums over tokens, damped least squares, how much damping, and what it still errs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.readers import input_dim

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
ALONE = 1e-2  # where there is no sequence to choose by


@dataclass(frozen=True)
class Compensation:
    """How to compensate.

    Attributes:
        form: `ridge` changes the columns that stay; `bias` only the bias, of modules that have one, and its target is
            always `current`.
        target: what a module is to put out: what it put out before with inputs as they are now (`current`), what the
            dense model's module puts out (`dense`), or the mean of the two (`halfway`); with the last two it takes
            twice the time, and matrices that read the hidden dimension are solved, too.
    """

    form: Literal["ridge", "bias"] = "ridge"
    target: Literal["current", "halfway", "dense"] = "current"

    @property
    def dense_share(self) -> float:
        """Of the dense model's results in the target."""
        return {"current": 0.0, "halfway": 0.5, "dense": 1.0}[self.target if self.form == "ridge" else "current"]


@dataclass(frozen=True)
class Compensated:
    """What was done to one module.

    Attributes:
        module: its path.
        strength: lambda; infinite where no change errs least, None for a bias.
        target: what it was solved for, see `Compensation`.
        before, after: squared error of its results, relative to the results' squares, without and with compensation;
            on the sequences that chose lambda, or on all where there are none such.
    """

    module: str
    strength: float | None
    target: str
    before: float
    after: float


class Reader:
    """A linear module that reads units, some of which go.

    Attributes:
        path: of the module.
        module: itself.
        keep: which of its inputs stay [in].
        target: the matrix whose results with inputs z [tokens, n] are wanted [out, n]; its own if not set.
        places: which of these n its own inputs are [in].
    """

    def __init__(self, path: str, module: nn.Module, keep: Tensor) -> None:
        self.path, self.module, self.keep = path, module, keep
        self.transposed = input_dim(module) == 0
        self._dense: Tensor = module.weight.detach().clone()  # type: ignore[operator]
        bias = getattr(module, "bias", None)
        self._bias = bias.detach().clone() if bias is not None else None
        self.target, self.places = self.weight, torch.arange(self.weight.shape[1], device=self.weight.device)

    @property
    def weight(self) -> Tensor:
        """The matrix before compensation [out, in]."""
        return self._dense.T if self.transposed else self._dense

    def restore(self) -> None:
        """Put the matrix and bias from before compensation back."""
        self._put(self.weight, self._bias)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """The matrix and bias from before compensation for a while; nothing is copied."""
        held = [(self.module.weight, self._dense)]
        if self._bias is not None:
            held.append((self.module.bias, self._bias))
        now = [parameter.data for parameter, _ in held]
        try:
            for parameter, before in held:
                parameter.data = before
            yield
        finally:
            for (parameter, _), data in zip(held, now, strict=True):
                parameter.data = data

    def solve(self, fit: Moments, check: Moments | None, how: Compensation) -> Compensated:
        """Change the module; what it errs is told."""
        whole = fit if check is None else fit + check
        dense, plain = self.target.double(), self.weight.double() * self.keep.to(self.weight.device)
        if how.form == "bias":
            lost, bias = (dense - plain) @ whole.mean.double(), self._bias
            if bias is None:
                lost = torch.zeros_like(lost)
            self._put(plain, None if bias is None else bias.double() + lost)
            return Compensated(self.path, None, "current", whole.error(dense, plain), whole.error(dense, plain, lost))
        judge = whole if check is None else check
        answers = {s: judge.error(dense, self.ridge(fit, s)) for s in (STRENGTHS if check else (ALONE,))}
        strength = min(answers, key=lambda s: answers[s])
        self._put(self.ridge(whole, strength), self._bias)
        return Compensated(self.path, strength, how.target, judge.error(dense, plain), answers[strength])

    def ridge(self, moments: Moments, strength: float) -> Tensor:
        """The matrix [out, in], zero in columns that go."""
        plain = self.weight.double()
        keep = self.keep.nonzero().squeeze(1).to(plain.device)
        answer = torch.zeros_like(plain)
        answer[:, keep] = plain[:, keep]
        if math.isinf(strength) or not len(keep):
            return answer
        own = moments.own.double()[keep][:, keep]
        scale = float(own.diagonal().mean())
        if scale <= 0:  # the text never gets here
            return answer
        missing = self.target.double() @ moments.cross.double()[:, keep] - plain[:, keep] @ own
        own.diagonal().add_(strength * scale)
        answer[:, keep] += torch.cholesky_solve(missing.T, torch.linalg.cholesky(own)).T
        return answer

    @torch.no_grad()
    def _put(self, weight: Tensor, bias: Tensor | None) -> None:
        self.module.weight.copy_(weight.T if self.transposed else weight)  # type: ignore[operator]
        if bias is not None:
            self.module.bias.copy_(bias)  # type: ignore[operator]


@dataclass(frozen=True)
class Moments:
    """Sums over tokens: of the inputs x that a module has, and of those z that its results are to be made from.

    Attributes:
        own: sum of x x' [in, in].
        cross: sum of z x' [n, in]; for the target `current` z is x.
        wanted: sum of z z' [n, n].
        mean: of x [in].
        tokens: how many.
    """

    own: Tensor
    cross: Tensor
    wanted: Tensor
    mean: Tensor
    tokens: int

    def __add__(self, other: Moments) -> Moments:
        tokens = self.tokens + other.tokens
        mean = (self.mean * self.tokens + other.mean * other.tokens) / max(1, tokens)
        return Moments(self.own + other.own, self.cross + other.cross, self.wanted + other.wanted, mean, tokens)

    def error(self, dense: Tensor, answer: Tensor, shift: Tensor | None = None) -> float:
        """Sum of (W z - W' x - shift)^2 over the sum of (W z)^2.

        Args:
            dense: W [out, n].
            answer: W' [out, in].
            shift: added to the results, for inputs z = x [out].
        """
        own, cross, wanted = self.own.double(), self.cross.double(), self.wanted.double()
        size = float(((dense @ wanted) * dense).sum())
        left = size - 2 * float(((dense @ cross) * answer).sum()) + float(((answer @ own) * answer).sum())
        if shift is not None:
            left += self.tokens * float(shift @ shift - 2 * shift @ ((dense - answer) @ self.mean.double()))
        return max(0.0, left) / size if size > 0 else 0.0
