"""What the trace sees where a module multiplies with something else than the parameter it stores."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from secateur.errors import DiscoveryError
from secateur.packed import Packed, is_bitsandbytes_linear, packed_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNKNOWN = (
    "of which the dense form is not known: discover the model without its weights (`secateur groups`, or "
    "secateur.checkpoint.load_skeleton), prune the float checkpoint and quantise the result"
)


def known_packed(model: PreTrainedModel) -> dict[str, Packed]:
    """The packed weights of a model, by name.

    Raises:
        DiscoveryError: the dense form of one is not known; says which, and what to do instead.
    """
    found = packed_weights(model)
    for packed in found.values():
        if not packed.shape:
            raise DiscoveryError(f"{packed.text} in a way ({packed.library}) {UNKNOWN}")
    return found


def multiply_densely(model: PreTrainedModel, packed: Mapping[str, Packed]) -> None:
    """Let modules that unpack a matrix themselves multiply with the dense one that the trace puts in its place.

    Sets attributes of the modules; see `setting.unchanged`.
    """
    for name in packed:
        module = model.get_submodule(name.rpartition(".")[0])
        if is_bitsandbytes_linear(module):
            module.forward = partial(_linear, module)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """x W^T + b in the dtype of x, as bitsandbytes returns it."""
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return nn.functional.linear(x, module.weight.to(x.dtype), bias)


def replaced_parameters(model: PreTrainedModel) -> dict[str, str]:
    """Path of a module -> why none of its parameters can be cut, where adapters replace a parameter while it runs."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora.layer import ParamWrapper

    reason = "adapted through target_parameters, which replaces the parameter while it runs: merge the adapter first"
    return {path: f"{path} is {reason}" for path, module in model.named_modules() if isinstance(module, ParamWrapper)}
