"""Compensation in the cut model, beside the dense one: exact where zeroing is not as good as cutting, too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from secateur.compensation.passes import in_order, inputs, moments, reading
from secateur.compensation.solving import Compensated, Compensation, Reader
from secateur.errors import PlanError
from secateur.groups import Groups
from secateur.plan import PruningPlan
from secateur.readers import input_dim
from secateur.surgery.state import new_name, renumbering

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cuts_hidden(plan: PruningPlan, groups: Groups) -> bool:
    """Whether the hidden dimension loses units."""
    return any(groups.named(name).kind == "hidden" and plan.removed(name) for name in plan.kept)


def compensate_sliced(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    plan: PruningPlan,
    batches: Sequence[Tensor],
    groups: Groups,
    how: Compensation,
) -> list[Compensated]:
    """Solve the matrices of `small` that read what `plan` removed again, in place, for the results of `dense`.

    These are the matrices that read FFN channels and heads, and those that read the hidden dimension. Each is solved on
    the inputs that it has once all before it are solved, for the rows that stay of what it puts out in the dense model.
    For the target `halfway` inputs that stay are halfway between the two models, and those that go are the dense one's.
    Left as they are: matrices that are something else, too (an output layer tied to the embedding), and stacked ones.

    Args:
        small: what `slice` made of `dense` by `plan`.
        batches: calibration token ids, each [sequences, length].
        groups: of `dense`.
        how: a `ridge` whose target is `halfway` or `dense`.

    Raises:
        PlanError: no module can be compensated, one carries adapters, or a module sees other tokens in the dense model.
        NonFiniteError: activations are NaN or infinite.
    """
    pairs = _Pairs(small, dense, plan, groups, how)
    if not pairs.paths:
        raise PlanError("nothing to compensate: what reads what goes is tied to other modules (--compensate)")
    training, done = (small.training, dense.training), []
    small.eval()
    dense.eval()
    try:
        order = in_order(small, {path: small.get_submodule(new) for path, new in pairs.paths.items()}, batches)
        for together in track(order, "compensating", console=Console(file=sys.stderr), transient=True):
            readers = [pairs.reader(path) for path in together]
            first, module = readers[0], dense.get_submodule(together[0])
            x_of = partial(inputs, small, first.module, len(first.keep))
            y_of = partial(inputs, dense, module, first.target.shape[1])
            fit, check = moments(first, batches, x_of, y_of, how.dense_share)
            done += [reader.solve(fit, check, how) for reader in readers]
    finally:
        small.train(training[0])
        dense.train(training[1])
    return done


class _Pairs:
    """The matrices to solve, each in the dense and in the cut model.

    Attributes:
        paths: path of the module in the dense model -> in the cut one.
    """

    def __init__(
        self, small: PreTrainedModel, dense: PreTrainedModel, plan: PruningPlan, groups: Groups, how: Compensation
    ) -> None:
        self.small, self.dense = small, dense
        self.positions = groups.kept_positions(plan.kept)
        moved, gone = renumbering(groups, plan.kept), groups.removed_prefixes(plan.kept)
        self.paths = {
            path: new_name(path, moved)
            for path in reading(dense, plan, groups, how, hidden=True)
            if not f"{path}.".startswith(gone) and _only_reads(dense, groups, path)
        }

    def reader(self, path: str) -> Reader:
        """The module of the cut model, and W_S y as its target: rows S of the dense matrix, inputs y there.

        Where slicing has scaled the matrix (to make up for a scalar that the class derives from a size), so is W_S.
        """
        columns = input_dim(self.dense.get_submodule(path))
        assert columns is not None
        name = f"{path}.weight"
        matrix = self.dense.get_parameter(name).detach().movedim(columns, 1)
        kept = {dim: torch.from_numpy(keep).to(matrix.device) for dim, keep in self.positions[name].items()}
        rows = matrix[kept[1 - columns]] if 1 - columns in kept else matrix
        stays = torch.ones(len(kept[columns]), dtype=torch.bool)
        reader = Reader(path, self.small.get_submodule(self.paths[path]), stays)
        cut = rows[:, kept[columns]].double()
        size = float(cut.square().sum())
        scale = float((reader.weight.double() * cut).sum()) / size if size > 0 else 1.0
        reader.target, reader.places = rows * scale, kept[columns]
        return reader


def _only_reads(dense: PreTrainedModel, groups: Groups, path: str) -> bool:
    """Whether the weight of this linear module is that of linear modules alone under each of its names."""
    name = f"{path}.weight"
    others = [other for other, of in groups.tied.items() if of == name]
    modules = [dense.get_submodule(other.rpartition(".")[0]) for other in others]
    return all(input_dim(module) == input_dim(dense.get_submodule(path)) for module in modules)
