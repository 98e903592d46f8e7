"""One cut in place: a tensor of a module, its gradient, and what an optimizer keeps for it, become smaller together.

Parameters stay the objects they are and get smaller data, so that an optimizer and a Trainer that hold them go on with
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.groups import IndexArray

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Cut:
    """Positions to keep on the dimensions of one tensor of a module."""

    module: nn.Module
    leaf: str
    dims: Mapping[int, IndexArray]

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.module, self.leaf)
        return tensor

    def check(self, optimizer: Optimizer | None, remedy: str) -> None:
        """Make sure that the tensor, and what the optimizer keeps for it, can be cut.

        Args:
            remedy: what to do if not, told with the reason.

        Raises:
            PlanError: it keeps state of other shapes than its parameters, or in packed form.
        """
        tensor = self.tensor
        for key, value in _kept_for(optimizer, tensor).items():
            if not isinstance(value, Tensor) or not value.dim():
                continue
            if value.shape != tensor.shape:
                raise PlanError(
                    f"the optimizer keeps {key} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(tensor.shape)}, which cannot be cut along: {remedy}"
                )
            if type(value) not in (Tensor, nn.Parameter):  # of torchao's, which hold blocks with a scale for each
                raise PlanError(f"the optimizer keeps {key} packed ({type(value).__name__}): {remedy}")

    def apply(self, optimizer: Optimizer | None) -> None:
        tensor = self.tensor
        state = _kept_for(optimizer, tensor)
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.dim():
                state[key] = self._kept(value)
        with torch.no_grad():
            if isinstance(tensor, nn.Parameter):
                grad, tensor.grad = tensor.grad, None
                tensor.data = self._kept(tensor.data)
                tensor.grad = None if grad is None else self._kept(grad)
            else:
                setattr(self.module, self.leaf, self._kept(tensor))
        if self.leaf == "weight" and isinstance(self.module, nn.Linear):
            self.module.out_features, self.module.in_features = self.tensor.shape

    def _kept(self, tensor: Tensor) -> Tensor:
        for dim, keep in self.dims.items():
            tensor = tensor.index_select(dim, torch.from_numpy(keep).to(tensor.device))
        return tensor


def _kept_for(optimizer: Optimizer | None, tensor: Tensor) -> dict[str, Any]:
    """What the optimizer keeps for a parameter; nothing for buffers and frozen parameters."""
    state: dict[str, Any] = optimizer.state[tensor] if optimizer is not None and tensor in optimizer.state else {}
    return state
