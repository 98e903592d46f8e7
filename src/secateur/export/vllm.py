"""Checkpoints that vLLM serves.

vLLM has an implementation of its own for most classes of transformers and reads their ordinary checkpoints. Layers of
unequal width it takes in one layout only, that of nemotron-nas (`nas_layout`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from secateur import checkpoint
from secateur.errors import CheckpointError
from secateur.export import configuration_decilm, nas_layout
from secateur.modeling_per_layer import MODEL_TYPE
from secateur.surgery.per_layer import is_per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

STOCK_LAYOUT, NAS_LAYOUT = "transformers", "nemotron-nas"
VOCABULARY_BLOCK = 64  # vLLM fills the vocabulary up to a multiple of this
AGE = "a release of 2026 or later: older ones do not read rope_parameters, which transformers 5 writes"
STOCK = f"an ordinary checkpoint of transformers, which vLLM takes as it is: vllm serve {{folder}} ({AGE})"
NAS = f"vllm serve {{folder}} --trust-remote-code, a flag that only the configuration needs ({AGE})"
INSTEAD = (
    "export it padded to the widths of the largest layer, which vLLM takes as it is, or to gguf for llama.cpp, or "
    "prune with the same widths in every layer (without --per-layer)"
)
READ_BACK = "vLLM cannot be run here; every tensor was read back and is the model's"
USE = """```
vllm serve FOLDER{flag}
```"""
TRUSTED = (
    "The code that is trusted is `configuration_decilm.py`, which gives the entries of `block_configs` attributes."
)
PADDED = (
    "{padded:,} of the parameters are zeros or copies that stand in for heads that layers do not have: all layers have "
    "the same number of query heads in this layout"
)
# Where vLLM's own class (0.33) does less than the class of transformers with the same name.
HEADS_FILL_HIDDEN = ("qwen2",)  # a head is hidden_size / num_attention_heads wide, whatever head_dim says
NO_OUTPUT_BIAS = ("qwen3", "qwen3_moe")  # attention_bias gives q, k and v one, and not the output projection


@dataclass(frozen=True)
class VllmExport:
    """What was written.

    Attributes:
        layout: `transformers` (an ordinary checkpoint) or `nemotron-nas`.
        parameters: elements of all tensors, tied ones counted once.
        padded_parameters: how many of them are zeros or copies that the layout asks for.
        notes: how to serve it, and what limits tensor parallelism.
    """

    path: Path
    layout: str
    parameters: int
    padded_parameters: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Something that vLLM divides among the devices of a tensor-parallel group.

    Attributes:
        fields: what configurations call its size.
        works: whether that size can be divided among that many devices.
    """

    what: str
    fields: tuple[str, ...]
    works: Callable[[int, int], bool]


def _divides(size: int, devices: int) -> bool:
    return size % devices == 0


SPLITS = (
    Split("query heads", ("num_attention_heads",), _divides),
    # fewer KV heads than devices are repeated
    Split("KV heads", ("num_key_value_heads", "num_kv_heads"), lambda n, d: n % d == 0 or d % n == 0),
    Split("FFN channels", ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), _divides),
    Split("channels of an expert", ("moe_intermediate_size",), _divides),
    Split("channels of the shared expert", ("shared_expert_intermediate_size",), _divides),
    Split("experts", ("num_experts", "num_local_experts", "n_routed_experts"), lambda n, d: d <= n),
    Split("tokens", ("vocab_size",), lambda n, d: -(-n // VOCABULARY_BLOCK) * VOCABULARY_BLOCK % d == 0),
)


def export_vllm(
    model: PreTrainedModel,
    output: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> VllmExport:
    """Write a checkpoint that vLLM serves.

    A model with the same widths in every layer is saved like any other, if vLLM's class of that name takes them. One
    whose layers differ in width is written in the nemotron-nas layout, with the query heads of every layer filled up to
    a common count.

    Raises:
        CheckpointError: vLLM has no layout for the model, or the folder is in use.
    """
    output = Path(output)
    if layout_for(model) != STOCK_LAYOUT:
        return _export_nas(model, output, tokenizer, overwrite)
    checkpoint.save(model, output, tokenizer=tokenizer, overwrite=overwrite)
    notes = (STOCK.format(folder=output), *vllm_notes(model.config))
    return VllmExport(output, STOCK_LAYOUT, model.num_parameters(), 0, notes)


def layout_for(model: PreTrainedModel) -> str:
    """`transformers` for an ordinary checkpoint, or `nemotron-nas`.

    Raises:
        CheckpointError: vLLM has no layout for the model.
    """
    import transformers

    config, name = model.config, type(model).__name__
    if is_per_layer(model):
        if reason := nas_layout.refusal(config):
            raise CheckpointError(f"vLLM has no layout for this model: {reason}; {INSTEAD}")
        return NAS_LAYOUT
    if getattr(transformers, name, None) is not type(model):
        raise CheckpointError(
            f"{name} is no class of transformers, and vLLM has no implementation of its own for it; serve the "
            "checkpoint with transformers"
        )
    if config.model_type in NO_OUTPUT_BIAS and config.attention_bias:
        raise CheckpointError(
            f"vLLM's {name} has no bias in the output projection of attention, which this model has; serve the "
            "checkpoint with transformers"
        )
    if config.model_type not in HEADS_FILL_HIDDEN or nas_layout.heads_fill_hidden(config):
        return STOCK_LAYOUT
    if reason := nas_layout.refusal(config):
        raise CheckpointError(
            f"vLLM's {name} has no head_dim, so heads must add up to the hidden size; in the layout that has one, "
            f"{reason}: serve the checkpoint with transformers"
        )
    return NAS_LAYOUT


def _export_nas(
    model: PreTrainedModel, output: Path, tokenizer: PreTrainedTokenizerBase | None, overwrite: bool
) -> VllmExport:
    from huggingface_hub import save_torch_state_dict

    fields = nas_layout.layout_of(model.config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    tensors, padded = nas_layout.tensors_of(model)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    with checkpoint.output_folder(output, overwrite=overwrite) as folder:
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        shutil.copy(configuration_decilm.__file__, folder)
        checkpoint.check_space(folder, sum(tensor.nbytes for tensor in tensors.values()))
        save_torch_state_dict(tensors, folder, max_shard_size=checkpoint.SHARD_SIZE)
        _read_back(model, folder)
        model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        notes = [NAS.format(folder=output)]
        if padded:
            heads = fields["num_attention_heads"]
            notes.append(f"{padded:,} parameters are padding: every layer has {heads} query heads in this layout")
        done = VllmExport(output, NAS_LAYOUT, parameters, padded, (*notes, *vllm_notes(model.config)))
        checkpoint.write_about(vllm_form(model, done), folder, results={"parity": None, "parity_reason": READ_BACK})
    return done


def vllm_form(model: PreTrainedModel, done: VllmExport) -> checkpoint.Form:
    """What the card of an exported model says of its form."""
    limits = vllm_notes(model.config)
    if done.layout == STOCK_LAYOUT:
        plain = checkpoint.checkpoint_form(model)
        use = f"{USE.format(flag='')}\n\n{plain.use}"
        return replace(plain, use=use, tags=("vllm",), notes=limits)
    dtype = str(model.dtype).removeprefix("torch.")
    use = f"{USE.format(flag=' --trust-remote-code')}\n\n{TRUSTED}"
    padded = (PADDED.format(padded=done.padded_parameters),) if done.padded_parameters else ()
    what = f"nemotron-nas layout of vLLM, {dtype}"
    return checkpoint.Form(what, done.parameters, use, "vllm", ("vllm",), (*padded, *limits))


def _read_back(model: PreTrainedModel, folder: Path) -> None:
    """Compare the tensors that were written with those of the model.

    Raises:
        CheckpointError: they differ.
    """
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        if name := nas_layout.differing(model, load_file(file)):
            raise CheckpointError(f"{name} as just written is not what the model has; removed")


def vllm_notes(config: PreTrainedConfig, tensor_parallel: Iterable[int] = (2, 4, 8)) -> tuple[str, ...]:
    """What keeps vLLM from dividing a model among several devices, one line each, with the sizes that work.

    Layers of unequal width are looked at as they are stored for vLLM; for a model that cannot be, that is what is said.
    """
    if config.model_type == MODEL_TYPE:
        if reason := nas_layout.refusal(config):
            return (f"no layout in vLLM: {reason}",)
        config = configuration_decilm.DeciLMConfig(**nas_layout.layout_of(config))
    layers = _layers(config)
    notes = []
    for split in SPLITS:
        sizes = [_size(layer, split.fields) for layer in layers]
        for size in sorted({size for size in sizes if size}):
            bad = [devices for devices in tensor_parallel if not split.works(size, devices)]
            if bad:
                good = [1, *(devices for devices in tensor_parallel if devices not in bad and devices != 1)]
                where = _where([number for number, own in enumerate(sizes) if own == size], len(layers))
                notes.append(
                    f"{size:,} {split.what}{where} cannot be divided for tensor parallelism of {_list(bad)}; "
                    f"possible: {_list(good)}"
                )
    return tuple(notes)


def _layers(config: PreTrainedConfig) -> list[Any]:
    """For every layer something with the fields of a stock configuration."""
    blocks = getattr(config, "block_configs", None)
    if blocks is None:
        return list(config.per_layer_config)
    heads = config.num_attention_heads
    layers = []
    for block in blocks:
        own = SimpleNamespace(vocab_size=config.vocab_size)
        if not block.attention.no_op:
            own.num_attention_heads = heads
            own.num_key_value_heads = heads // block.attention.n_heads_in_group
        if not block.ffn.no_op:
            own.intermediate_size = block.ffn.intermediate_size
        layers.append(own)
    return layers


def _size(layer: Any, fields: tuple[str, ...]) -> int | None:
    """The first of the fields that the layer has a value for."""
    return next((value for name in fields if (value := getattr(layer, name, None)) is not None), None)


def _where(layers: list[int], of: int) -> str:
    return "" if len(layers) == of else f" in layer{'s' if len(layers) > 1 else ''} {_list(layers)}"


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
