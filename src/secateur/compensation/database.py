"""Matrices solved ahead, one for each way in which their inputs are cut, so that many cuts can be tried quickly.

SPDY (Frantar and Alistarh 2022, arXiv:2201.13096) puts models together from a database of layers that were compressed
one by one; so do we with the matrices that read what goes, each solved on the inputs that it has in the model as it is.
What a cut really gets is solved anew, on inputs that are cut before it (`compensated`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.compensation.passes import inputs, moments, reading
from secateur.compensation.solving import ALONE, Compensation, Reader
from secateur.errors import PlanError
from secateur.groups import Groups
from secateur.plan import PruningPlan
from secateur.readers import input_dim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keeps = dict[str, Tensor]  # path of a linear module -> which of its inputs stay [in]


class Database:
    """Matrices of a model, solved for cuts of it by `ridge`, target `current`, damped by `ALONE`.

    The sums of one module are held at a time, and no answer: they lie in files.

    Args:
        batches: calibration token ids, each [sequences, length].
        folder: for the files.
    """

    def __init__(self, model: PreTrainedModel, groups: Groups, batches: Sequence[Tensor], folder: Path) -> None:
        self.model, self.groups, self.batches, self.folder = model, groups, batches, folder
        self._files: dict[tuple[str, bytes], Path] = {}

    def prepare(self, cuts: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """Solve what these cuts (group -> units that go) need and is not there yet; where nothing can be, nothing is.

        Raises:
            NonFiniteError: activations are NaN or infinite.
        """
        wanted: dict[str, dict[bytes, Tensor]] = {}
        for cut in cuts:
            for path, keep in self._keeps(cut).items():
                if (path, _key(keep)) not in self._files:
                    wanted.setdefault(path, {})[_key(keep)] = keep
        shown = track(wanted.items(), "solving", console=Console(file=sys.stderr), transient=True)
        for path, keeps in shown if wanted else ():
            self._solve(path, keeps)

    @contextmanager
    def in_place(self, cut: Mapping[str, Sequence[int]]) -> Iterator[None]:
        """The matrices solved for a cut, in the model, which is restored bit for bit; the cut must be prepared."""
        before: dict[str, Tensor] = {}
        try:
            for path, keep in self._keeps(cut).items():
                weight = self._weight(path)
                before[path] = weight.detach().clone()
                answer = load_file(self._files[path, _key(keep)])["kept"].to(weight.device)
                with torch.no_grad():
                    columns = weight if input_dim(self.model.get_submodule(path)) else weight.T
                    columns.zero_()[:, keep.to(weight.device)] = answer
            yield
        finally:
            for path, weight in before.items():
                with torch.no_grad():
                    self._weight(path).copy_(weight)

    def _weight(self, path: str) -> Tensor:
        weight = self.model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        return weight

    def _keeps(self, cut: Mapping[str, Sequence[int]]) -> Keeps:
        """What each matrix keeps of its inputs; nothing where no linear module reads what goes."""
        units = {name: self.groups.named(name).units for name in cut}
        kept = {name: tuple(sorted(set(range(units[name])) - set(gone))) for name, gone in cut.items()}
        try:
            return reading(self.model, PruningPlan(kept, units), self.groups, Compensation("ridge"), hidden=False)
        except PlanError:
            return {}

    def _solve(self, path: str, keeps: Mapping[bytes, Tensor]) -> None:
        module = self.model.get_submodule(path)
        reader = Reader(path, module, next(iter(keeps.values())))
        fit, check = moments(reader, self.batches, partial(inputs, self.model, module, len(reader.keep)), None)
        whole = fit if check is None else fit + check
        for key, keep in keeps.items():
            reader.keep = keep
            answer = reader.ridge(whole, ALONE).to(reader.weight.dtype)[:, keep]
            file = self.folder / f"{len(self._files)}.safetensors"
            save_file({"kept": answer.contiguous()}, file)
            self._files[path, key] = file


def _key(keep: Tensor) -> bytes:
    return keep.numpy().tobytes()
