"""Forward passes that begin at a layer: what earlier layers put out in the dense model is computed once and kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.errors import first_line
from secateur.evaluation.perplexity import Window, batch_loss
from secateur.groups import Group, Groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}  # relative, of a loss; half precision below
HALF_TOLERANCE = 1e-4
NO_PREFIX = torch.empty(0, dtype=torch.long)


class Passes:
    """Mean loss of a model on some windows of text, while what is changed in it lies in one layer or later.

    The dense outputs of one layer are held for all windows, and each earlier layer's forward is replaced by one that
    returns them; the model's own forward runs, so nothing needs to be known about what is around the layers. Only the
    outputs of one layer are in memory at a time: windows x tokens x hidden numbers. That this gives the dense losses
    is tried for every layer on the first and the last batch, before anything else is measured; the two differ, so that
    a layer which leaves something behind for later ones is found out.

    Attributes:
        dense: loss of the unchanged model [nats per token].
        tokens: how many are predicted.
        note: why all passes are whole ones; empty if they are not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Groups,
        chosen: Sequence[Group],
        batches: Sequence[list[Window]],
        *,
        cached: bool = True,
    ) -> None:
        self.model = model
        self.batches = batches
        self._layers = _in_order(model, _layers_around(chosen, groups), batches[0])
        found = [_run(model, batch) for batch in batches]
        self._sums = [total for total, _ in found]
        self.tokens = sum(count for _, count in found)
        self.dense = sum(self._sums) / self.tokens
        self.note = self._why_whole() if cached else "whole passes were asked for"
        self._held = DenseOutputs(model, self._modules, batches)

    @property
    def from_cache(self) -> bool:
        """Whether passes begin at a later layer where they can."""
        return not self.note

    @property
    def layers(self) -> int:
        """How many layers a whole pass runs, as far as they are known."""
        return max(1, len(self._layers))

    def layer_of(self, group: Group) -> int | None:
        """Number, in the order they run, of the layer that a group lies in; None if it is in none or in several."""
        homes = {
            next((i for i, path in enumerate(self._layers) if m.parameter.startswith(path + ".")), None)
            for m in group.members
        }
        return homes.pop() if len(homes) == 1 else None

    def begin_at(self, layer: int | None) -> None:
        """Let the passes that follow begin at a layer, None for whole ones. Layers must come in ascending order."""
        self._held.advance_to(0 if self.note or layer is None else layer)

    def loss(self, other: PreTrainedModel | None = None) -> float:
        """Mean loss as the model is now, or of another model in whole passes [nats per token]."""
        if other is not None:
            return sum(_run(other, batch)[0] for batch in self.batches) / self.tokens
        total = 0.0
        for number, batch in enumerate(self.batches):
            with self._held.in_place(number):
                total += _run(self.model, batch)[0]
        return total / self.tokens

    @property
    def _modules(self) -> list[nn.Module]:
        return [self.model.get_submodule(path) for path in self._layers]

    def _why_whole(self) -> str:
        """Why passes cannot begin at later layers; empty if they can."""
        if not self._layers:
            return "no layers were found that run once each, one after the other"
        ends = sorted({0, len(self.batches) - 1})
        held = DenseOutputs(self.model, self._modules, [self.batches[i] for i in ends])
        tolerance = TOLERANCE.get(self.model.dtype, HALF_TOLERANCE)
        for layer in range(1, len(self._layers)):
            try:
                held.advance_to(layer)
                with held.in_place(0):
                    again = _run(self.model, self.batches[0])[0]
            except Exception as error:  # classes fail as they like if a layer leaves out what later ones ask for
                return f"passes cannot begin at {self._layers[layer]}: {first_line(error)}"
            if not math.isclose(again, self._sums[0], rel_tol=tolerance):
                return f"a pass that begins at {self._layers[layer]} gives another loss than a whole one"
        return ""


class DenseOutputs:
    """What one layer of the dense model puts out for every batch.

    Attributes:
        layer: number of the layer that passes begin at; it is the one before whose outputs are held.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], batches: Sequence[list[Window]]) -> None:
        self.model = model
        self.layers = layers
        self.batches = batches
        self.layer = 0
        self._outputs: list[Any] = [None] * len(batches)

    def advance_to(self, layer: int) -> None:
        """Run layer after layer, each on the outputs of the one before, until those of the one before `layer` are held.

        Going back to layer 0 needs nothing; going back elsewhere begins anew.
        """
        if layer < self.layer:
            self.layer, self._outputs = 0, [None] * len(self.batches)
        while self.layer < layer:
            for number in range(len(self.batches)):
                self._outputs[number] = self._output(number)
            self.layer += 1

    def _output(self, number: int) -> Any:
        """What the layer where passes begin puts out for a batch; those after it pass this on."""
        found: list[Any] = []
        handle = self.layers[self.layer].register_forward_hook(lambda *call: found.append(_copied(call[-1])))
        try:
            with self.in_place(number), returning(self.layers[self.layer + 1 :], lambda: found[-1]):
                _run(self.model, self.batches[number])
        finally:
            handle.remove()
        return found[-1]

    @contextmanager
    def in_place(self, number: int) -> Iterator[None]:
        """Let earlier layers give what is held for a batch, a fresh copy each time: layers may add to it in place."""
        with returning(self.layers[: self.layer], lambda: _copied(self._outputs[number])):
            yield


@contextmanager
def returning(modules: Sequence[nn.Module], value: Callable[[], Any]) -> Iterator[None]:
    """Replace what modules compute; restored afterwards."""

    def forward(*_: Any, **__: Any) -> Any:
        return value()

    own: Mapping[nn.Module, Any] = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            if before is not None:
                module.forward = before
            elif "forward" in module.__dict__:
                del module.forward


def _copied(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


def _run(model: PreTrainedModel, batch: list[Window]) -> tuple[float, int]:
    """Summed loss of a batch, and of how many tokens."""
    return batch_loss(model, batch, NO_PREFIX)


def _layers_around(chosen: Sequence[Group], groups: Groups) -> list[str]:
    """Paths of the layers of every list of layers that a chosen group lies in."""
    inside = {m.parameter for group in chosen for m in group.members}
    lists = [group.blocks for group in groups if group.kind == "layer"]
    return [b for blocks in lists if any(p.startswith(tuple(f"{b}." for b in blocks)) for p in inside) for b in blocks]


def _in_order(model: PreTrainedModel, paths: Sequence[str], batch: list[Window]) -> list[str]:
    """The layers in the order they run; none unless each runs once and none inside another."""
    ran: list[str] = []
    open_layers: list[str] = []
    nested: list[str] = []

    def begin(path: str) -> None:
        nested.extend(open_layers)
        open_layers.append(path)
        ran.append(path)

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: begin(path)))
        handles.append(module.register_forward_hook(lambda *_: _closed(open_layers)))
    try:
        _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return ran if not nested and sorted(ran) == sorted(paths) else []


def _closed(open_layers: list[str]) -> None:
    """Forget the layer that has just ended; a hook that returns nothing leaves its output alone."""
    open_layers.pop()
