"""The loss without some units, for many cuts one after the other."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from secateur.errors import NonFiniteError, PlanError
from secateur.evaluation.alone import Alone
from secateur.evaluation.passes import Passes

Key = TypeVar("Key")
Removed = Mapping[str, Sequence[int]]  # group -> units that go
Repaired = Callable[[Removed], AbstractContextManager[None]]  # the model with other weights, for one cut


def as_it_is(removed: Removed) -> AbstractContextManager[None]:
    """Nothing makes up for a cut."""
    return nullcontext()


def losses_without(
    passes: Passes, alone: Alone, cuts: Mapping[Key, Removed], title: str, repaired: Repaired = as_it_is
) -> Iterator[tuple[Key, float | PlanError]]:
    """Measure each cut alone, layer by layer, so that the cache of `passes` moves on once.

    Args:
        cuts: what is removed together, by any key.
        title: of the progress bar.
        repaired: gives what makes up for a cut, in the layers that it lies in.

    Yields:
        Key and loss [nats per token], or why a copy cannot be cut so.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    jobs = sorted(((_begin(passes, alone, removed), key) for key, removed in cuts.items()), key=lambda job: job[0])
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(passes.layers - begin for begin, _ in jobs))
        for begin, key in jobs:
            passes.begin_at(begin)
            try:
                with repaired(cuts[key]), alone.without(cuts[key]) as smaller:
                    loss = passes.loss(smaller)
            except PlanError as error:  # a copy that no setting of the class's sizes gives
                yield key, error
                continue
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss is {loss} without {_in_words(alone, cuts[key])}: the dtype is too narrow for what is "
                    "left; try --dtype float32"
                )
            yield key, loss
            bar.advance(task, passes.layers - begin)


def _begin(passes: Passes, alone: Alone, removed: Removed) -> int:
    """The layer that passes without these units may begin at: 0 for whole passes."""
    groups = [alone.groups.named(name) for name in removed]
    if not passes.from_cache or any(group.family not in alone.masked for group in groups):
        return 0
    return min(passes.layer_of(group) or 0 for group in groups)


def _in_words(alone: Alone, removed: Removed) -> str:
    parts = (f"{len(units)} of {alone.groups.named(name).units} units of {name}" for name, units in removed.items())
    return ", ".join(parts)
