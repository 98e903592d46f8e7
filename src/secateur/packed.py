"""Weights that are stored packed (quantised): which they are, and the dense matrices they stand for.

The dense form is known of the linear modules of bitsandbytes and of the tensor classes of torchao, which keep the shape
of the matrix. Of other libraries it is not: some permute or rotate what they pack, so that rows are no units any more.
A Conv1D (of GPT-2) that bitsandbytes packs becomes a linear module, [out, in] where the model itself has [in, out].
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VECTORS = 1024  # unit vectors that a packed matrix is applied to at a time
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REMEDY = (
    "load the float checkpoint (from_pretrained without quantization_config), or unpack a bitsandbytes model right "
    "after it was loaded and before it runs, which repacks it: model = model.dequantize()"
)


@dataclass(frozen=True)
class Packed:
    """A weight that is stored packed.

    Attributes:
        text: which it is, as the beginning of a reason that a user reads.
        shape: of the matrix as it multiplies, [out, in] for a linear module; () if it is not known.
        library: top-level package of the class that packs it.
    """

    text: str
    shape: tuple[int, ...]
    library: str


def packed_weights(model: nn.Module) -> dict[str, Packed]:
    """Name of a parameter or buffer -> what is known of it, for all that are stored packed."""
    found: dict[str, Packed] = {}
    for path, module in model.named_modules():
        for name, tensor in _packed_tensors(module):
            kind = type(tensor.data) if _library(type(tensor.data)) != "torch" else type(module)
            full = f"{path}.{name}".lstrip(".")
            text = f"{full} is quantised ({kind.__name__}, {tensor.dtype})"
            found[full] = Packed(text, _dense_shape(module, name, tensor), _library(kind))
    return found


def refuse_packed(model: PreTrainedModel | nn.Module, what: str, error: type[SecateurError]) -> None:
    """Make sure that all weights are plain numbers.

    Args:
        what: cannot be done with packed ones, as a participle.

    Raises:
        SecateurError: of the class `error`; some weights are packed. Says which, and what to do instead.
    """
    for packed in packed_weights(model).values():
        raise error(f"{packed.text}, and packed weights cannot be {what}: {REMEDY}")


def is_bitsandbytes_linear(module: nn.Module) -> bool:
    library: Any = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, library.nn.Linear8bitLt | library.nn.Linear4bit)


def dense_weight(module: nn.Module) -> Tensor:
    """A linear module's weight as numbers, [out, in] or turned as it is stored; if packed, what it multiplies by."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not packed_weights(module):
        return weight.detach()
    columns, rows = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    dense = torch.empty(rows, columns, device=weight.device)
    for tile in torch.arange(columns, device=weight.device).split(VECTORS):
        dense[:, tile] = unpacked_columns(module, tile)
    return dense


@torch.no_grad()
def unpacked_columns(module: nn.Module, columns: Tensor) -> Tensor:
    """Columns of the matrix that a packed linear module multiplies by, float32 [out, columns]; no more is unpacked.

    A packed weight is not unpacked but applied to unit vectors, since its memory layout may change while the model
    runs (bitsandbytes reorders 4-bit weights on a CPU) and only the module itself always knows it.
    """
    bias: Any = getattr(module, "bias", None)
    units = torch.zeros(len(columns), int(module.in_features), device=columns.device)  # type: ignore[arg-type]
    units[torch.arange(len(columns), device=columns.device), columns] = 1
    out: Tensor = module(units).float()
    return (out if bias is None else out - bias.float()).T


def ready_to_train(model: nn.Module) -> None:
    """Undo what running for inference leaves behind in 4-bit modules of bitsandbytes on some CPUs.

    Their weights are reordered then, and reordered ones multiply without gradients, silently. Asking a module for its
    state puts them back.
    """
    library: Any = sys.modules.get("bitsandbytes")
    for module in model.modules() if library is not None else ():
        if isinstance(module, library.nn.Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                module.state_dict()


def _packed_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module, its children aside, that hold matrices in another form."""
    for name, parameter in module.named_parameters(recurse=False):
        kinds = {_library(type(parameter)), _library(type(parameter.data))}
        if parameter.dtype not in FLOATS or kinds != {"torch"}:
            yield name, parameter
    stored = [(n, b) for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
    own = [*module.named_parameters(recurse=False), *stored]
    scaled = any(t.dtype in FLOATS for _, t in own) and not any(t.dtype in FLOATS and t.dim() > 1 for _, t in own)
    for name, buffer in stored if scaled else ():
        if buffer.dim() > 1 and buffer.dtype not in (*FLOATS, torch.bool):
            yield name, buffer


def _dense_shape(module: nn.Module, name: str, tensor: Tensor) -> tuple[int, ...]:
    if _library(type(tensor.data)) == "torchao":
        return tuple(tensor.shape)
    if name == "weight" and is_bitsandbytes_linear(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    return ()


def _library(kind: type) -> str:
    return kind.__module__.partition(".")[0]
