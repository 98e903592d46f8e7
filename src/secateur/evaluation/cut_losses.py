"""What cuts cost on some sequences, each by itself: the measure of a search for widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from secateur.errors import NonFiniteError, PlanError
from secateur.evaluation.alone import Alone
from secateur.evaluation.passes import NO_PREFIX, Passes
from secateur.evaluation.perplexity import Window, batch_loss
from secateur.evaluation.removing import Removed, as_it_is, losses_without
from secateur.groups import Group, Groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AT_ONCE = 8  # sequences in a pass
Key = tuple[tuple[str, tuple[int, ...]], ...]


class Repair(Protocol):
    """What makes up for cuts."""

    def prepare(self, cuts: Sequence[Removed]) -> None:
        """Get ready for these."""

    def in_place(self, cut: Removed) -> AbstractContextManager[None]:
        """The model with what makes up for a cut, in the layers that it lies in."""


class CutLosses:
    """Losses of a model without some units [nats per token]; no cut is measured twice.

    Cuts that lie in one layer are measured from that layer on, where that gives the same (see `Passes`). What is known
    is of the model as it was when it was measured: once it is masked or compensated, make a new one.

    Args:
        model: restored bit for bit.
        groups: of the model.
        chosen: groups that cuts are made of.
        batches: token ids, each [sequences, length]; every token but the first of a sequence is predicted.
        repair: makes up for each cut; None for nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Groups,
        chosen: Iterable[Group],
        batches: Sequence[Tensor],
        repair: Repair | None = None,
    ) -> None:
        self.model, self.groups, self.chosen, self.repair = model, groups, tuple(chosen), repair
        self.batches = [windows_of_rows(rows) for batch in batches for rows in batch.split(AT_ONCE)]
        self._alone = Alone(model, groups, list(dict.fromkeys(g.kind for g in self.chosen)))
        self._passes: Passes | None = None
        self._known: dict[Key, float] = {}

    @torch.no_grad()
    def __call__(self, cuts: Sequence[Removed]) -> list[float]:
        """The loss without each of these; infinite where a copy cannot be cut so.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        keys = [_key(cut) for cut in cuts]
        wanted = {key: cut for key, cut in zip(keys, cuts, strict=True) if key not in self._known}
        if wanted:
            training = self.model.training
            self.model.eval()
            try:
                self._known |= self._measured(wanted)
            finally:
                self.model.train(training)
        return [self._known[key] for key in keys]

    def _measured(self, wanted: dict[Key, Removed]) -> dict[Key, float]:
        if self._passes is None:
            self._passes = Passes(self.model, self.groups, self.chosen, self.batches)
        passes = self._passes
        if not torch.isfinite(torch.tensor(passes.dense)):
            raise NonFiniteError(f"the loss on the calibration text is {passes.dense}; check the dtype of the model")
        some = {key: cut for key, cut in wanted.items() if cut}
        if self.repair is not None:
            self.repair.prepare(list(some.values()))
        repaired = as_it_is if self.repair is None else self.repair.in_place
        found = {
            key: float("inf") if isinstance(loss, PlanError) else loss
            for key, loss in losses_without(passes, self._alone, some, "widths", repaired)
        }
        return found | ({(): passes.dense} if () in wanted else {})


def windows_of_rows(rows: Tensor) -> list[Window]:
    """Sequences [sequences, length] as windows."""
    return [(row.cpu(), len(row) - 1) for row in rows]


def _key(cut: Removed) -> Key:
    return tuple(sorted((name, tuple(units)) for name, units in cut.items()))


@torch.no_grad()
def losses_of_rows(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Mean loss of each sequence, all tokens but its first predicted, float64 [sequences]."""
    training = model.training
    model.eval()
    try:
        sums = [batch_loss(model, windows_of_rows(row[None]), NO_PREFIX)[0] for row in rows]
    finally:
        model.train(training)
    return torch.tensor(sums, dtype=torch.float64) / (rows.shape[1] - 1)
