"""Removing components of a LoRA adapter by a criterion: what is known of them, which go, and how the others change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from secateur.importance.component_activations import Activations
from secateur.importance.components import ComponentCriterion, Pair, State
from secateur.surgery.ranks import Components

if TYPE_CHECKING:
    from torch.optim import Optimizer

Keep = Literal["alpha", "scale"]


class Pruner:
    """The components of one adapter, with what is known of them.

    Args:
        model: a `PeftModel`; changed in place.
        criterion: which components go, and how the others change.
        adapter: its name; the active one if not given.
        keep: what of a module stays when its rank falls, its `alpha` or its `scale`.

    Attributes:
        parts: the adapter.
        initial: ranks at the start.
        present: module -> indices of components that are left, of those that are stored.
        averages: module -> what the criterion keeps.
        compact: whether removed components leave at once, or are set to zero.
    """

    def __init__(
        self, model: Any, criterion: ComponentCriterion, adapter: str | None = None, keep: Keep = "scale"
    ) -> None:
        self.parts = Components(model, adapter)
        self.criterion = criterion
        self.keep = keep
        self.initial = self.parts.ranks
        self.present = {name: torch.arange(rank) for name, rank in self.initial.items()}
        self.averages: dict[str, State] = {name: {} for name in self.initial}
        self.compact = True
        self.activations = Activations()

    @property
    def ranks(self) -> dict[str, int]:
        """Components left of each module."""
        return {name: len(index) for name, index in self.present.items()}

    def begin(self) -> None:
        """Look at activations, if the criterion needs them, until `end`; DoRA must not remember B A meanwhile."""
        layers = self.parts.layers
        if self.criterion.kind == "activation":
            self.activations.begin({name: layer.lora_A[self.parts.adapter] for name, layer in layers.items()})
        for layer in layers.values():
            layer.lora_magnitude_vector.train()

    def end(self) -> None:
        """Stop looking."""
        self.activations.end()
        for layer in self.parts.layers.values():
            layer.lora_magnitude_vector.train(layer.training)

    def observe(self, past: float | None = None) -> None:
        """Take the gradients that are there into the averages; `past` as for the criterion."""
        found = self.activations.taken()
        for name, state in self.averages.items():
            self.criterion.observe(self._pair(name, found.get(name)), state, past)

    def cheapest(self, count: int, floor: int) -> dict[str, int]:
        """How many to remove from each module, so that `count` go where they cost least; each keeps `floor`."""
        queues: list[tuple[float, int, str, list[float]]] = []
        for number, (name, rank) in enumerate(self.ranks.items()):
            if (most := min(count, rank - floor)) > 0:
                order = self.criterion.verdict(self._pair(name), self.averages[name], most, name).order
                costs = [cost for _, cost in reversed(order)]
                queues.append((costs.pop(), number, name, costs))
        heapify(queues)
        taken: dict[str, int] = {}
        for _ in range(count):
            _, number, name, costs = queues[0]
            taken[name] = taken.get(name, 0) + 1
            heapreplace(queues, (costs.pop() if costs else float("inf"), number, name, costs))
        return taken

    def remove(self, counts: Mapping[str, int], optimizer: Optimizer | None = None) -> float:
        """Remove so many components from each module, the cheapest, and change the others.

        Returns:
            What the criterion says this adds to the loss [its own unit].

        Raises:
            NonFiniteError: a score is NaN or infinite.
            PlanError: the optimizer's state cannot be cut along; nothing is changed then.
        """
        self.parts.check(counts, optimizer)
        gone: dict[str, Tensor] = {}
        cost, before = 0.0, self.ranks
        for name, count in counts.items():
            pair, present = self._pair(name), self.present[name]
            verdict = self.criterion.verdict(pair, self.averages[name], count, name)
            removed = [j for j, _ in verdict.order]
            cost += sum(c for _, c in verdict.order)
            stay = torch.ones(len(present), dtype=torch.bool)
            stay[removed] = False
            self._change(name, verdict.changes(removed))
            gone[name], self.present[name] = present[~stay], present[stay]
            self.averages[name] = {key: _kept(tensor, stay) for key, tensor in self.averages[name].items()}
        if self.compact:
            self.settle(optimizer)
        else:
            self.parts.clear(gone, optimizer)
        if self.keep == "alpha":
            self._rescale({name: before[name] / (before[name] - count) for name, count in counts.items()}, optimizer)
        return cost

    def settle(self, optimizer: Optimizer | None = None) -> None:
        """Let what is not present leave the adapter."""
        stored = self.parts.ranks
        self.parts.remove({n: index for n, index in self.present.items() if len(index) < stored[n]}, optimizer)
        self.present = {name: torch.arange(len(index)) for name, index in self.present.items()}

    def _rescale(self, shares: Mapping[str, float], optimizer: Optimizer | None) -> None:
        """Let scales grow as ranks fall by these shares, alpha / r with alpha left as it is; for rsLoRA by the root."""
        scales = self.parts.scales
        for name, share in shares.items():
            grown = math.sqrt(share) if self.parts.layers[name].use_rslora[self.parts.adapter] else share
            scales[name] *= grown
            self.averages[name] = self.criterion.rescaled(self.averages[name], grown)
        self.parts.rescale({name: scales[name] for name in shares}, optimizer)

    def _pair(self, name: str, activations: Tensor | None = None) -> Pair:
        up, down, index = self.parts.up(name), self.parts.down(name), self.present[name]

        def part(tensor: Tensor | None, like: Tensor, dim: int) -> Tensor:
            whole = torch.zeros_like(like) if tensor is None else tensor.detach()
            whole = whole if whole.dtype == torch.float64 else whole.float()
            return whole if len(index) == whole.shape[dim] else whole.index_select(dim, index.to(whole.device))

        if activations is not None:
            activations = part(part(activations, activations, 0), activations, 1)
        return Pair(part(up, up, 1), part(down, down, 0), part(up.grad, up, 1), part(down.grad, down, 0), activations)

    def _change(self, name: str, changes: Mapping[str, Tensor]) -> None:
        for factor, change in changes.items():
            weight, dim = (self.parts.up(name), 1) if factor == "b" else (self.parts.down(name), 0)
            weight.data.index_add_(dim, self.present[name].to(weight.device), change.to(weight.dtype))


def _kept(tensor: Tensor, stay: Tensor) -> Tensor:
    """The part of a vector or square matrix over components that stays."""
    stay = stay.to(tensor.device)
    return tensor[stay] if tensor.dim() == 1 else tensor[stay][:, stay]
