"""Modules whose stored tensors are not the matrices they multiply with, so that no row or column of them can be cut."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from secateur.errors import DiscoveryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADVICE = "prune the float checkpoint and quantise the result"
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse_quantised(model: PreTrainedModel) -> None:
    """Refuse a model with packed weights.

    Raises:
        DiscoveryError: some parameter is no plain floating-point tensor; says which, and what to do instead.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            packed = parameter.dtype not in PLAIN or _is_packed_type(type(parameter.data))
            if packed or hasattr(parameter, "quant_state") or "CB" in vars(parameter):
                raise DiscoveryError(
                    f"{path}.{name} is quantised ({type(module).__name__}, {parameter.dtype}), and packed weights have "
                    f"no rows or columns to cut: {ADVICE}"
                )


def _is_packed_type(kind: type) -> bool:
    """Whether a tensor class stores its values in another form, as those of torchao do."""
    return kind is not torch.Tensor and kind.__module__.partition(".")[0] == "torchao"


def replaced_parameters(model: PreTrainedModel) -> dict[str, str]:
    """Path of a module -> why none of its parameters can be cut, where adapters replace a parameter while it runs."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora.layer import ParamWrapper

    reason = "adapted through target_parameters, which replaces the parameter while it runs: merge the adapter first"
    return {path: f"{path} is {reason}" for path, module in model.named_modules() if isinstance(module, ParamWrapper)}
