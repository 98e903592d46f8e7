"""Which modules read what goes, the order in which a model calls them, and sums of what goes into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.compensation.solving import Compensation, Moments, Reader
from secateur.errors import NonFiniteError, PlanError
from secateur.groups import Groups
from secateur.plan import PruningPlan
from secateur.readers import base_of, input_dim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AT_ONCE = 8  # sequences in a pass
EVERY = 4  # one sequence of so many chooses how much a matrix is damped

Inputs = Callable[[Tensor], Tensor]  # token ids [sequences, length] -> what goes into a module [tokens, in]


def reading(
    model: PreTrainedModel, plan: PruningPlan, groups: Groups, how: Compensation, *, hidden: bool
) -> dict[str, Tensor]:
    """Path of each linear module that reads units that go -> which of its inputs stay [in]; in no order.

    Args:
        hidden: whether the hidden dimension counts.

    Raises:
        PlanError: there is none, or one carries an adapter.
    """
    keeps: dict[str, Tensor] = {}
    for name in plan.kept:
        group, gone = groups.named(name), list(plan.removed(name))
        for m in group.members if gone and (hidden or group.kind != "hidden") else ():
            path, _, leaf = m.parameter.rpartition(".")
            module = model.get_submodule(path)
            if m.role != "consumer" or leaf != "weight" or m.dim != input_dim(base_of(module)):
                continue
            if base_of(module) is not module:
                raise PlanError(f"{path} carries an adapter: merge it before you compensate")
            keep = keeps.setdefault(path, torch.ones(groups.shapes[m.parameter][m.dim], dtype=torch.bool))
            keep[torch.from_numpy(m.index[gone].ravel())] = False
    biased = any(getattr(model.get_submodule(path), "bias", None) is not None for path in keeps)
    if not keeps or (how.form == "bias" and not biased):
        what = "that reads what goes has a bias" if keeps else "reads what goes"
        raise PlanError(f"nothing to compensate: no linear module {what} (prune.compensate, --compensate)")
    return keeps


class _ReachedError(Exception):
    """The module in question has been called: what comes after it does not matter."""


@torch.no_grad()
def in_order(model: PreTrainedModel, modules: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> list[list[str]]:
    """The names of modules as the model calls them; those that it does not call come last.

    Neighbours that are given one and the same tensor (the projections of queries, keys and values) stand together.
    """
    given: dict[str, Tensor] = {}

    def look(_: nn.Module, args: tuple[Any, ...], name: str) -> None:
        given.setdefault(name, args[0])

    handles = [m.register_forward_pre_hook(lambda m, a, n=name: look(m, a, n)) for name, m in modules.items()]
    try:
        model(input_ids=batches[0][:1].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    called = [[name for name, _ in some] for _, some in groupby(given.items(), lambda item: id(item[1]))]
    return [*called, *([name] for name in modules if name not in given)]


def moments(
    reader: Reader, batches: Sequence[Tensor], x_of: Inputs, y_of: Inputs | None, dense_share: float = 1.0
) -> tuple[Moments, Moments | None]:
    """Sums over the sequences that fit, and over those that choose lambda (None if there are too few).

    Args:
        x_of: gives the inputs that the module has.
        y_of: gives those that it has in the dense model, None if these are no target.
        dense_share: of the latter in what its results are to be made from, where it has both.

    Raises:
        PlanError: y has other tokens than x.
        NonFiniteError: inputs are NaN or infinite.
    """
    enough, number = sum(len(batch) for batch in batches) >= EVERY, 0
    parts: list[list[Tensor]] = [[], []]
    for batch in batches:
        chooses = (torch.arange(number, number + len(batch)) % EVERY == EVERY - 1) & enough
        number += len(batch)
        for part, rows in zip(parts, (batch[~chooses], batch[chooses]), strict=True):
            part += [some for some in rows.split(AT_ONCE) if len(some)]
    sums = [_summed(reader, part, x_of, y_of, dense_share) if part else None for part in parts]
    assert sums[0] is not None
    return sums[0], sums[1]


@torch.no_grad()
def _summed(
    reader: Reader, batches: Sequence[Tensor], x_of: Inputs, y_of: Inputs | None, dense_share: float
) -> Moments:
    ins, dense_ins = len(reader.keep), reader.target.shape[1]
    weight = reader.weight
    wide, device = torch.promote_types(weight.dtype, torch.float32), weight.device
    own = cross = wanted = torch.zeros(ins, ins, dtype=wide, device=device)
    total, tokens = torch.zeros(ins, dtype=wide, device=device), 0
    if y_of is not None:
        cross = torch.zeros(dense_ins, ins, dtype=wide, device=device)
        wanted = torch.zeros(dense_ins, dense_ins, dtype=wide, device=device)
    for batch in batches:
        x = x_of(batch).to(wide)
        own += x.T @ x
        total += x.sum(0)
        tokens += len(x)
        if y_of is not None:
            y = y_of(batch).to(wide)
            if len(y) != len(x):
                raise PlanError(
                    f"{reader.path} sees other tokens in the dense model, so its results there are no target: take the "
                    "target current"
                )
            z = y.index_copy(1, reader.places, torch.lerp(x, y[:, reader.places], dense_share))
            cross += z.T @ x
            wanted += z.T @ z
    if not torch.isfinite(own).all():
        raise NonFiniteError(f"the inputs of {reader.path} are not finite; check the calibration data and the dtype")
    return Moments(own, cross, wanted, total / max(1, tokens), tokens)


def inputs(model: PreTrainedModel, module: nn.Module, size: int, ids: Tensor) -> Tensor:
    """What goes into a module [tokens, size]; nothing after it is computed. No tokens where it is not called."""
    found: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].flatten(0, -2))
        raise _ReachedError

    handle = module.register_forward_pre_hook(look)
    try:
        model(input_ids=ids.to(model.device), use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return found[0] if found else torch.zeros(0, size, device=model.device)
