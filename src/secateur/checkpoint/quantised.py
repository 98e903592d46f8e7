"""Checkpoints whose weights are packed: told apart, loaded so from float ones, and made from a cut model."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from secateur.errors import CheckpointError, first_line
from secateur.readers import input_dim

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Quantiser = Literal["8bit", "4bit", "int8"]
# Which library packs, and what it is known as there. Others are left out that the Trainer does not train adapters on.
QUANTISERS: Mapping[Quantiser, tuple[str, str]] = {
    "8bit": ("bitsandbytes", "LLM.int8()"),
    "4bit": ("bitsandbytes", "NF4 with double quantisation"),
    "int8": ("torchao", "weight-only int8"),
}
WIDTHS: Mapping[Quantiser, int] = {"4bit": 64}  # what widths must be multiples of; on a GPU other ones do, on a CPU not
CPU_SIZES: Mapping[Quantiser, tuple[int, int]] = {"4bit": (64, 32)}  # multiples that inputs and outputs must be there


def quantisation(config: PreTrainedConfig) -> str | None:
    """Name of the method by which the weights of a checkpoint are quantised, None if they are not."""
    settings: Any = getattr(config, "quantization_config", None)  # a dict as read, an object once a quantiser took it
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def refuse_quantised(source: str | Path, config: PreTrainedConfig) -> None:
    """Make sure that the weights are plain numbers.

    Raises:
        CheckpointError: they are quantised.
    """
    if method := quantisation(config):
        raise CheckpointError(
            f"{source} is quantised ({method}), and packed weights can be neither cut nor trained: prune the float "
            "checkpoint it was made from, recover that, and quantise the result; or train adapters on it while it is "
            "pruned (--method loraprune)"
        )


def quantiser(name: Quantiser) -> Any:
    """The `quantization_config` of transformers by which float weights are packed while they are loaded.

    Raises:
        CheckpointError: the library is not installed.
    """
    library, _ = QUANTISERS[name]
    if importlib.util.find_spec(library) is None:
        raise CheckpointError(f"{name} weights are packed by {library}, which is not installed: pip install {library}")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quantised_copy(model: PreTrainedModel, name: Quantiser) -> PreTrainedModel:
    """A float model with its linear modules packed, except for its head; what it computes is rounded accordingly.

    Raises:
        CheckpointError: the library is not there, does not take these sizes, or packs what cannot be saved.
    """
    library, _ = QUANTISERS[name]
    packing = _savable(name)
    with _saved(model) as folder:
        try:
            for inputs, outputs in _sizes(model):
                _multiply(name, inputs, outputs, model.dtype, model.device)
            packed: PreTrainedModel = type(model).from_pretrained(
                folder, dtype=model.dtype, quantization_config=packing, device_map={"": model.device}
            )
            with torch.no_grad():
                copy.deepcopy(packed).eval()(torch.zeros(1, 2, dtype=torch.long, device=model.device))
        except Exception as error:  # kernels refuse sizes in ways of their own
            raise CheckpointError(
                f"{library} does not pack the cut model as {name}: {first_line(error)}; widths that are multiples of "
                "64 (--round-to 64) suit it, or leave --quantize-output out"
            ) from error
    return packed.eval()


def check_packable(model: PreTrainedModel, name: Quantiser, device: torch.device) -> None:
    """Make sure that `quantised_copy` will take a model of these sizes, which may be without weights.

    One matrix of each size is packed and multiplied by.

    Raises:
        CheckpointError: the library is not there, or does not take a size; says whose.
    """
    library, _ = QUANTISERS[name]
    _savable(name)
    for (inputs, outputs), path in _sizes(model).items():
        try:
            _multiply(name, inputs, outputs, model.dtype, device)
        except Exception as error:  # kernels refuse sizes in ways of their own
            raise CheckpointError(
                f"{library} does not pack {path}, which maps {inputs} to {outputs} after the cut, as {name}: "
                f"{first_line(error)}; widths that are multiples of 64 suit it: leave --quantize-output out"
            ) from error


def _savable(name: Quantiser) -> Any:
    """The `quantization_config` by which a result is packed.

    Raises:
        CheckpointError: the library is not installed, or saves nothing that can be loaded.
    """
    if QUANTISERS[name][0] != "bitsandbytes":
        raise CheckpointError(f"only 8bit and 4bit results can be saved, not {name}: leave --quantize-output out")
    return quantiser(name)


def _sizes(model: PreTrainedModel) -> dict[tuple[int, int], str]:
    """Inputs and outputs of the linear modules that are packed -> path of the first of that size."""
    head = model.get_output_embeddings()
    paths: dict[tuple[int, int], str] = {}
    for path, module in model.named_modules():
        if module is not head and (columns := input_dim(module)) is not None:
            shape = module.weight.shape
            paths.setdefault((shape[columns], shape[1 - columns]), path)
    return paths


def _multiply(name: Quantiser, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> None:
    """Pack a matrix of zeros in the way of `quantiser`, and multiply by it.

    Raises:
        ValueError: bitsandbytes' kernel for AVX512-BF16 refuses these sizes. Other processors take them, but what is
            packed on one of those must load elsewhere, too.
    """
    if device.type == "cpu" and name in CPU_SIZES and (inputs % CPU_SIZES[name][0] or outputs % CPU_SIZES[name][1]):
        multiples = "{} inputs and {} outputs".format(*CPU_SIZES[name])
        raise ValueError(f"processors with AVX512-BF16 take multiples of {multiples}, not {inputs} and {outputs}")
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    if name == "8bit":
        layer: Any = Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
    else:
        layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight.data.zero_()
    with torch.no_grad():
        layer.to(dtype).to(device).eval()(torch.zeros(1, 2, inputs, dtype=dtype, device=device))


@contextmanager
def _saved(model: PreTrainedModel) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield folder
