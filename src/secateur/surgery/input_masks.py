"""Removal while a model trains: the inputs of every matrix that reads a removed unit are multiplied by zero.

A weight set to zero would be trained away from zero again. A masked input cannot be: the unit has no influence on the
loss, its weights get no gradient, and the matrices that read it get none in its columns, LoRA factors included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.discovery.reference import Reference, plain_logits
from secateur.errors import DiscoveryError, PlanError
from secateur.groups import Group, Groups, Kept
from secateur.readers import readers
from secateur.surgery.trial import TOLERANCE

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class InputMasks:
    """Masks on the inputs of linear modules, set and changed while the model trains.

    Attributes:
        model: the model whose modules the groups name; its linear modules may hold adapters.
        groups: of the model as it is built now.
    """

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        self.model = model
        self.groups = groups
        self._handles: list[RemovableHandle] = []

    def set(self, kept: Kept) -> None:
        """Mask all units but those in `kept`, and no others.

        Raises:
            PlanError: what reads one of the groups is not the input of a linear module.
        """
        self.remove()
        alive: dict[str, np.ndarray[Any, np.dtype[np.bool_]]] = {}
        for name, units in kept.items():
            group = self.groups.named(name)
            gone = np.setdiff1d(np.arange(group.units), np.asarray(units, dtype=np.int64))
            for reader in readers(self.model, group) if gone.size else ():
                size = self.groups.shapes[reader.parameter][reader.dim]
                path = reader.parameter.rpartition(".")[0]
                alive.setdefault(path, np.ones(size, dtype=bool))[reader.index[gone].ravel()] = False
        for path, mask in alive.items():
            hook = _masking(torch.from_numpy(mask))
            self._handles.append(self.model.get_submodule(path).register_forward_pre_hook(hook))

    def remove(self) -> None:
        """Let every input through again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def holding(self, kept: Kept) -> Iterator[None]:
        """`set` for the length of a block."""
        self.set(kept)
        try:
            yield
        finally:
            self.remove()


def _masking(mask: Tensor) -> Any:
    """A hook that multiplies a module's first operand by `mask`, which moves to where it is needed once."""
    held = {"mask": mask}

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if held["mask"].device != args[0].device or held["mask"].dtype != args[0].dtype:
            held["mask"] = held["mask"].to(args[0])
        return (args[0] * held["mask"], *args[1:])

    return hook


def not_maskable(reference: Reference, kinds: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Family -> why masked inputs do not amount to removal; tried on half of the units of each family.

    A norm over heads, for one, still averages over those whose results nobody reads.

    Args:
        reference: of a float64 model of the same class with the same families.
    """
    generator = np.random.default_rng(seed)
    refused: dict[str, str] = {}
    for family, members in reference.groups.families(kinds).items():
        kept = {g.name: _half(g, generator) for g in members}
        try:
            ids, wanted = reference.without(kept)
            with InputMasks(reference.model, reference.groups).holding(kept):
                masked = plain_logits(reference.model, ids)
        except (PlanError, DiscoveryError) as error:
            refused[family] = f"it cannot be masked while the model trains: {error}"
            continue
        difference = float((masked - wanted).norm() / wanted.norm())
        if not difference <= TOLERANCE[torch.float64]:
            refused[family] = (
                "it cannot be masked while the model trains: something else than linear modules depends on its units "
                f"(logits differ by {difference:.2g} from those without them)"
            )
    return refused


def _half(group: Group, generator: np.random.Generator) -> tuple[int, ...]:
    """About half of the units, at random, those that must stay among them."""
    count = max(group.units // 2, group.at_least, 1)
    chosen = generator.choice(group.units, count, replace=False).tolist()
    return tuple(sorted({*chosen, *group.stays}))
