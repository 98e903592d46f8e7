"""Write a model as GGUF, the file that llama.cpp runs: directly, since its converter is wrong for per-layer widths."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.checkpoint import check_space
from secateur.errors import CheckpointError
from secateur.export.gguf_layouts import Layout, choose, family_of
from secateur.export.gguf_sizes import ZERO_FFN, Sizes, read_sizes
from secateur.export.gguf_tensors import Piece, arrange, biases, read_tensors
from secateur.export.gguf_tokenizer import Vocabulary, vocabulary

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# dtype -> types of tensors and of the whole file in GGUF
DTYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
DEFAULT = "f16"
FLOAT32 = ("ffn_gate_inp.weight",)  # routers, whose rounding would send tokens to other experts
FLOAT16_MAX = 65504.0
# Field of a configuration -> method of `gguf.GGUFWriter` that says it.
FIELDS = {
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "layer_norm_eps": "add_layer_norm_eps",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "use_parallel_residual": "add_parallel_residual",
    "num_experts": "add_expert_count",
    "num_experts_per_tok": "add_expert_used_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
}


@dataclass(frozen=True)
class Contents:
    """What a file holds, known from the shapes alone: the parts of the tensors are views of the model's parameters.

    Attributes:
        tensors: by their names in the file.
    """

    layout: Layout
    sizes: Sizes
    tensors: Mapping[str, Piece]

    @property
    def parameters(self) -> int:
        """Numbers in all tensors, zeros for left-out sublayers included."""
        return sum(math.prod(piece.shape) for piece in self.tensors.values())

    def bytes(self, dtype: str) -> int:
        """Size of the tensors in a file of this dtype; its header and its tokenizer come on top."""
        types = _types(self.tensors, dtype)
        return sum(_stored_bytes(piece, types[name]) for name, piece in self.tensors.items())


@dataclass(frozen=True)
class GGUFExport:
    """What was written.

    Attributes:
        arch: llama.cpp's architecture.
        tensors: how many; `parameters`: how many numbers they hold, zeros for left-out sublayers included.
        bytes: size of the file.
        context: tokens that the file says the model takes.
        notes: what was added or changed on the way, and where llama.cpp differs.
    """

    arch: str
    path: Path
    dtype: str
    tensors: int
    parameters: int
    bytes: int
    context: int
    notes: tuple[str, ...]


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output: Path | str,
    dtype: str = DEFAULT,
    *,
    overwrite: bool = False,
) -> GGUFExport:
    """Write `model` and its tokenizer to the file `output`, whole or not at all.

    Args:
        dtype: `f32`, `f16`, `bf16` or `q8_0`, for matrices; vectors stay float32.

    Raises:
        CheckpointError: llama.cpp has no home for the model, its weights do not fit the dtype, the file exists, or it
            cannot be written. Nothing is left behind.
    """
    output = Path(output)
    if dtype not in DTYPES:
        raise CheckpointError(f"unknown GGUF dtype {dtype!r}; use {', '.join(DTYPES)}")
    held = contents(model)
    layout, sizes, tensors = held.layout, held.sizes, held.tensors
    words = vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    types = _types(tensors, dtype)
    context, window_note = _context(sizes, layout)
    with _output_file(output, overwrite=overwrite) as file:
        check_space(file.parent, _size(tensors, types) + words.nbytes)
        _write(file, _header(model, layout, sizes, context, words, dtype), tensors, types)
    return GGUFExport(
        arch=layout.arch,
        path=output,
        dtype=dtype,
        tensors=len(tensors),
        parameters=held.parameters,
        bytes=output.stat().st_size,
        context=context,
        notes=(*_skip_notes(sizes), *window_note, *_type_notes(types, dtype), *words.notes),
    )


def contents(model: PreTrainedModel) -> Contents:
    """What the file of a model holds; its weights are not needed.

    Raises:
        CheckpointError: llama.cpp has no home for the model, or the gguf package is missing.
    """
    _import()
    family = family_of(model.config)
    sizes = read_sizes(model)
    found = read_tensors(model, sizes, family)
    layout = choose(family, model.config, sizes, biases(found))
    return Contents(layout, sizes, arrange(found, sizes, family, layout))


def _import() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError('writing GGUF needs the gguf package: pip install "secateur[gguf]"') from error


def _types(tensors: Mapping[str, Piece], dtype: str) -> dict[str, GGMLQuantizationType]:
    """The type of each tensor: float32 for vectors and routers, float16 where rows do not fill the blocks of a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[DTYPES[dtype][0]]
    found = {}
    for name, piece in tensors.items():
        if len(piece.shape) == 1 or name.endswith(FLOAT32):
            found[name] = GGMLQuantizationType.F32
        elif piece.shape[-1] % GGML_QUANT_SIZES[wanted][0]:
            found[name] = GGMLQuantizationType.F16
        else:
            found[name] = wanted
    return found


def _stored_bytes(piece: Piece, kind: GGMLQuantizationType) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return int(math.prod(piece.shape) // block * size)


def _context(sizes: Sizes, layout: Layout) -> tuple[int, tuple[str, ...]]:
    """The context length to write: within it, llama.cpp's sliding windows are those of the model."""
    windows = [layer.window if layer.window and layer.window < sizes.context else None for layer in sizes.layers]
    narrowest = min((w for w in windows if w is not None), default=sizes.context)
    wanted = tuple(w is not None for w in windows)
    if not any(wanted) or (wanted == layout.windows(sizes) and len({w for w in windows if w}) == 1):
        return sizes.context, ()
    note = (
        f"context length {narrowest} and not {sizes.context}: llama.cpp's {layout.arch} does not know the model's "
        f"sliding windows of {narrowest} tokens, which make no difference up to that length"
    )
    return narrowest, (note,)


def _header(
    model: PreTrainedModel, layout: Layout, sizes: Sizes, context: int, words: Vocabulary, dtype: str
) -> GGUFWriter:
    """A writer that holds all metadata and no tensors."""
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(None, layout.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    # llama.cpp treats tokens in another way if it finds phi-3 in the name, and stops if some are absent
    writer.add_name(f"{model.num_parameters():,} parameters, written by Secateur")
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(len(words.tokens))
    writer.add_context_length(context)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(len(sizes.layers))
    # a list where layers differ; llama.cpp reads the two forms alike
    writer.add_head_count(_scalar([layer.heads for layer in sizes.layers]))
    writer.add_head_count_kv(_scalar([layer.kv_heads for layer in sizes.layers]))
    writer.add_feed_forward_length(_scalar([layer.ffn for layer in sizes.layers]))
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.rotary)
    writer.add_rope_freq_base(sizes.theta)
    if layout.window_period:
        writer.add_sliding_window(min((la.window for la in sizes.layers if la.window), default=context))
    for field, method in FIELDS.items():
        if (value := getattr(config, field, None)) is not None:
            getattr(writer, method)(value)
    words.write(writer)
    return writer


def _scalar(counts: list[int]) -> int | list[int]:
    return counts[0] if len(set(counts)) == 1 else counts


def _write(
    file: Path, writer: GGUFWriter, tensors: Mapping[str, Piece], types: Mapping[str, GGMLQuantizationType]
) -> None:
    """Header, metadata, and the tensors, of which only one at a time is converted in memory."""
    import gguf

    for name, piece in tensors.items():
        bytes_ = _stored_bytes(piece, types[name])
        writer.add_tensor_info(name, piece.shape, np.dtype(np.float32), bytes_, raw_dtype=types[name])
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, piece in tensors.items():
            values = piece.values().numpy()
            if types[name] == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > FLOAT16_MAX:
                raise CheckpointError(f"{name} has weights beyond float16 (65504); export as bf16 or f32")
            writer.write_tensor_data(gguf.quantize(values, types[name]))
    finally:
        writer.close()


def _size(tensors: Mapping[str, Piece], types: Mapping[str, GGMLQuantizationType]) -> int:
    """Bytes of all tensors in the file, each filled up to a multiple of the alignment."""
    from gguf import GGUF_DEFAULT_ALIGNMENT as ALIGNMENT

    return sum(-(-_stored_bytes(piece, types[name]) // ALIGNMENT) * ALIGNMENT for name, piece in tensors.items())


@contextmanager
def _output_file(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary file that becomes `output` if the block succeeds, and vanishes if it does not."""
    if output.is_dir() or (output.exists() and not overwrite):
        raise CheckpointError(f"{output} exists; choose another file or pass --overwrite")
    temporary = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(output)
    except OSError as error:
        # numpy reports a full disk without an error number
        reason = error.strerror or f"{error}; is the disk full?"
        raise CheckpointError(f"cannot write {output}: {reason}; nothing was written") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _skip_notes(sizes: Sizes) -> Iterator[str]:
    """Where zeros stand for sublayers that are left out."""
    for sublayer, zeros in (("attention", "one head"), ("mlp", f"{ZERO_FFN} channels")):
        if numbers := [str(i) for i, layer in enumerate(sizes.layers) if sublayer in layer.skip]:
            yield (
                f"{zeros} of zeros for the {sublayer} left out of layer {', '.join(numbers)}: llama.cpp does not load "
                "some models without, and silently miscomputes others"
            )


def _type_notes(types: Mapping[str, GGMLQuantizationType], dtype: str) -> Iterator[str]:
    """Which tensors could not have the type that was asked for."""
    narrow = [name for name, kind in types.items() if kind.name == "F16" and dtype == "q8_0"]
    if narrow:
        yield (
            f"{len(narrow)} tensors are float16, because their rows are no multiple of 32 ({narrow[0]}, ...): prune "
            "with --round-to 32 to avoid it"
        )
