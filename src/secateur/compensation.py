"""Compensation: what reads the units that stay takes over from those that go. No training, no gradients.

| symbol | here |
| --- | --- |
| W, matrix that reads units [out, in]; K, R its columns that stay and that go | `Reader` |
| x, input of the module in the model as it is cut before it; y, in the dense model | one pass over calibration text |
| H = sum x x', C = sum y x' over tokens [in, in] | `Moments` |
| W_K <- W_K + W_R H_RK (H_KK + lambda d I)^-1, d the mean of diag H_KK | `ridge`, target `current` |
| W_K <- W_K + (W C_K - W_K H_KK) (H_KK + lambda d I)^-1 | `ridge`, target `dense` |
| b <- b + W_R mean(x_R) (FLAP, An et al. 2023, arXiv:2312.11983, Eq. 5) | `bias`, where the module has one |

The first is the least-squares answer to "put out what you put out before", damped: with a large lambda the columns that
stay are left as they are, so that the worst choice is no compensation. (Shrinking towards W_K instead of zero is ours.)
With the target `dense` it is "put out what the dense model would", errors of earlier layers repaired, too.

Modules are taken in the order in which the model calls them. Of each matrix lambda is the one of `STRENGTHS` whose
answer on three quarters of the sequences errs least on the last quarter; the answer is then computed on all of them.
Sums are in float32 or better, equations are solved in float64. One pair of sums is held at a time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from secateur.discovery import discover
from secateur.errors import NonFiniteError, PlanError
from secateur.groups import Groups
from secateur.packed import refuse_packed
from secateur.plan import PruningPlan
from secateur.readers import base_of, input_dim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
AT_ONCE = 8  # sequences in a pass
EVERY = 4  # one sequence of so many chooses among them
ALONE = 1e-2  # where there is no sequence to choose by


@dataclass(frozen=True)
class Compensation:
    """How to compensate.

    Attributes:
        form: `ridge` changes the columns that stay, `bias` only the bias.
        target: what a module is to put out: what it put out before with inputs as they are now (`current`), or what the
            dense model's module puts out (`dense`, twice the time).
    """

    form: Literal["ridge", "bias"] = "ridge"
    target: Literal["current", "dense"] = "current"


@dataclass(frozen=True)
class Compensated:
    """What was done to one module.

    Attributes:
        module: its path.
        strength: lambda; infinite where no change errs least, None for a bias.
        before, after: squared error of its results, relative to the results' squares, without and with compensation;
            on the sequences that chose lambda, or on all where there are none such.
    """

    module: str
    strength: float | None
    before: float
    after: float


@contextmanager
def compensated(
    model: PreTrainedModel,
    plan: PruningPlan,
    batches: Sequence[Tensor],
    how: Compensation | None = None,
    groups: Groups | None = None,
) -> Iterator[list[Compensated]]:
    """Hold a model whose linear modules make up for what `plan` removes; slice it inside. It is restored afterwards.

    Columns that go are zero inside. Left as they are: the hidden dimension, whole layers, and units that something
    else than a linear module reads (stacked experts).

    Args:
        batches: calibration token ids, each [sequences, length].

    Raises:
        PlanError: the plan does not fit, weights are packed or carry adapters, or no module can be compensated.
        NonFiniteError: activations are NaN or infinite.
    """
    how = how or Compensation()
    refuse_packed(model, "compensated", PlanError)
    groups = groups or discover(model)
    plan.check(groups)
    readers = _in_order(model, _readers(model, plan, groups, how), batches)
    training, done = model.training, []
    model.eval()
    try:
        shown = track(readers, "compensating", console=Console(file=sys.stderr), transient=True)
        for reader in shown:
            fit, check = _moments(model, reader, readers, batches, how)
            done.append(reader.solve(fit, check, how))
        yield done
    finally:
        for reader in readers:
            reader.restore()
        model.train(training)


class Reader:
    """A linear module that reads units, some of which go.

    Attributes:
        path: of the module.
        module: itself.
        keep: which of its inputs stay [in].
    """

    def __init__(self, path: str, module: nn.Module, keep: Tensor) -> None:
        self.path, self.module, self.keep = path, module, keep
        self.transposed = input_dim(module) == 0
        self._dense: Tensor = module.weight.detach().clone()  # type: ignore[operator]
        bias = getattr(module, "bias", None)
        self._bias = bias.detach().clone() if bias is not None else None

    @property
    def weight(self) -> Tensor:
        """The dense matrix [out, in]."""
        return self._dense.T if self.transposed else self._dense

    def restore(self) -> None:
        """Put the dense matrix and bias back."""
        self._put(self.weight, self._bias)

    def solve(self, fit: Moments, check: Moments | None, how: Compensation) -> Compensated:
        """Change the module; what it errs is told."""
        whole = fit if check is None else fit + check
        dense, plain = self.weight.double(), self.weight.double() * self.keep.to(self.weight.device)
        if how.form == "bias":
            assert self._bias is not None
            lost = (dense - plain) @ whole.mean.double()
            self._put(plain, self._bias.double() + lost)
            return Compensated(self.path, None, whole.error(dense, plain), whole.error(dense, plain, lost))
        judge = whole if check is None else check
        answers = {s: judge.error(dense, self._ridge(fit, s)) for s in (STRENGTHS if check else (ALONE,))}
        strength = min(answers, key=lambda s: answers[s])
        self._put(self._ridge(whole, strength), self._bias)
        return Compensated(self.path, strength, judge.error(dense, plain), answers[strength])

    def _ridge(self, moments: Moments, strength: float) -> Tensor:
        """The matrix [out, in], zero in columns that go."""
        dense = self.weight.double()
        keep = self.keep.nonzero().squeeze(1).to(dense.device)
        answer = torch.zeros_like(dense)
        answer[:, keep] = dense[:, keep]
        if math.isinf(strength) or not len(keep):
            return answer
        own = moments.own.double()[keep][:, keep]
        scale = float(own.diagonal().mean())
        if scale <= 0:  # the text never gets here
            return answer
        missing = dense @ moments.cross.double()[:, keep] - dense[:, keep] @ own
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
    """Sums over tokens: of the inputs x that a module has, and of those y that its results are to be made from.

    Attributes:
        own: sum of x x' [in, in].
        cross: sum of y x'; for the target `current` y is x.
        wanted: sum of y y'.
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
        """Sum of (W y - W' x - shift)^2 over the sum of (W y)^2.

        Args:
            dense: W [out, in].
            answer: W' [out, in].
            shift: added to the results, for inputs y = x [out].
        """
        own, cross, wanted = self.own.double(), self.cross.double(), self.wanted.double()
        size = float(((dense @ wanted) * dense).sum())
        left = size - 2 * float(((dense @ cross) * answer).sum()) + float(((answer @ own) * answer).sum())
        if shift is not None:
            left += self.tokens * float(shift @ shift - 2 * shift @ ((dense - answer) @ self.mean.double()))
        return max(0.0, left) / size if size > 0 else 0.0


def _readers(model: PreTrainedModel, plan: PruningPlan, groups: Groups, how: Compensation) -> list[Reader]:
    """The modules to compensate, in no order."""
    keeps: dict[str, Tensor] = {}
    for name in plan.kept:
        group, gone = groups.named(name), list(plan.removed(name))
        for m in group.members if gone and group.kind != "hidden" else ():
            path, _, leaf = m.parameter.rpartition(".")
            module = model.get_submodule(path)
            if m.role != "consumer" or leaf != "weight" or m.dim != input_dim(base_of(module)):
                continue
            if base_of(module) is not module:
                raise PlanError(f"{path} carries an adapter: merge it before you compensate")
            keep = keeps.setdefault(path, torch.ones(groups.shapes[m.parameter][m.dim], dtype=torch.bool))
            keep[torch.from_numpy(m.index[gone].ravel())] = False
    if how.form == "bias":
        keeps = {p: k for p, k in keeps.items() if getattr(model.get_submodule(p), "bias", None) is not None}
    if not keeps:
        what = "has a bias" if how.form == "bias" else "reads what goes"
        raise PlanError(f"nothing to compensate: no linear module {what} (prune.compensate, --compensate)")
    return [Reader(path, model.get_submodule(path), keep) for path, keep in keeps.items()]


class _ReachedError(Exception):
    """The module in question has been called: what comes after it does not matter."""


@torch.no_grad()
def _in_order(model: PreTrainedModel, readers: Sequence[Reader], batches: Sequence[Tensor]) -> list[Reader]:
    """The readers as the model calls them; those that it does not call come last."""
    calls: dict[str, None] = {}
    handles = [r.module.register_forward_pre_hook(lambda m, a, p=r.path: calls.setdefault(p)) for r in readers]
    try:
        model(input_ids=batches[0][:1].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    order = list(calls)
    return sorted(readers, key=lambda r: order.index(r.path) if r.path in calls else len(order))


def _moments(
    model: PreTrainedModel, reader: Reader, readers: Sequence[Reader], batches: Sequence[Tensor], how: Compensation
) -> tuple[Moments, Moments | None]:
    """Sums over the sequences that fit, and over those that choose lambda (None if there are too few)."""
    enough, number = sum(len(batch) for batch in batches) >= EVERY, 0
    parts: list[list[Tensor]] = [[], []]
    for batch in batches:
        chooses = (torch.arange(number, number + len(batch)) % EVERY == EVERY - 1) & enough
        number += len(batch)
        for part, rows in zip(parts, (batch[~chooses], batch[chooses]), strict=True):
            part += [some for some in rows.split(AT_ONCE) if len(some)]
    before = readers[: readers.index(reader)]
    sums = [_summed(model, reader, before, part, how) if part else None for part in parts]
    assert sums[0] is not None
    return sums[0], sums[1]


@torch.no_grad()
def _summed(
    model: PreTrainedModel, reader: Reader, before: Sequence[Reader], batches: Sequence[Tensor], how: Compensation
) -> Moments:
    size = len(reader.keep)
    weight = reader.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    own, cross, wanted = (torch.zeros(size, size, dtype=wide, device=weight.device) for _ in range(3))
    total, tokens = torch.zeros(size, dtype=wide, device=weight.device), 0
    for batch in batches:
        x = _inputs(model, reader, batch).to(wide)
        own += x.T @ x
        total += x.sum(0)
        tokens += len(x)
        if how.target == "dense":
            with _dense(before):
                y = _inputs(model, reader, batch).to(wide)
            if len(y) != len(x):
                raise PlanError(
                    f"{reader.path} sees other tokens in the dense model, so its results there are no target: take the "
                    "target current"
                )
            cross += y.T @ x
            wanted += y.T @ y
    if not torch.isfinite(own).all():
        raise NonFiniteError(f"the inputs of {reader.path} are not finite; check the calibration data and the dtype")
    if how.target == "current":
        cross = wanted = own
    return Moments(own, cross, wanted, total / max(1, tokens), tokens)


def _inputs(model: PreTrainedModel, reader: Reader, ids: Tensor) -> Tensor:
    """What goes into the module [tokens, in]; nothing after it is computed. No tokens where it is not called."""
    found: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].flatten(0, -2))
        raise _ReachedError

    handle = reader.module.register_forward_pre_hook(look)
    try:
        model(input_ids=ids.to(model.device), use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return found[0] if found else torch.zeros(0, len(reader.keep), device=reader.weight.device)


@contextmanager
def _dense(readers: Sequence[Reader]) -> Iterator[None]:
    """The dense matrices for a while, in modules that have been compensated already."""
    now = [(r.module.weight.detach().clone(), getattr(r.module, "bias", None)) for r in readers]  # type: ignore[operator]
    biases = [None if bias is None else bias.detach().clone() for _, bias in now]
    for reader in readers:
        reader.restore()
    try:
        yield
    finally:
        for reader, (weight, _), bias in zip(readers, now, biases, strict=True):
            reader._put(weight.T if reader.transposed else weight, bias)
