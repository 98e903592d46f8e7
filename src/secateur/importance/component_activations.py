"""Second moments of what the A of a LoRA adapter puts out, for the criterion that needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Activations:
    """Sums of z z' over tokens, z = A x, as modules compute them in training; gradients must be wanted.

    Attributes:
        found: module -> (sum [r, r], tokens) since the last look.
    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self._hooks: list[RemovableHandle] = []

    def begin(self, modules: Mapping[str, nn.Module]) -> None:
        """Collect what these modules, the A of each module with an adapter, put out; nothing else from now on."""
        self.end()
        for name, module in modules.items():

            def collect(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                if torch.is_grad_enabled():
                    z = output.detach().flatten(0, -2)
                    z = z if z.dtype == torch.float64 else z.float()
                    total, tokens = self.found.get(name, (0, 0))
                    self.found[name] = (total + z.T @ z, tokens + torch.tensor(float(len(z)), device=z.device))

            self._hooks.append(module.register_forward_hook(collect))

    def taken(self) -> dict[str, Tensor]:
        """The means since the last look, over all processes; they are forgotten here."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for pair in self.found.values():
                for tensor in pair:
                    torch.distributed.all_reduce(tensor)
        means = {name: total / tokens for name, (total, tokens) in self.found.items()}
        self.found.clear()
        return means

    def end(self) -> None:
        """Stop collecting."""
        while self._hooks:
            self._hooks.pop().remove()
