"""The weight files of a checkpoint: divided as transformers does, and written from their first byte to their last."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from secateur.checkpoint.tensorfiles import Cut, header_bytes, in_file_order
from secateur.surgery.folding import Fold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"
SHARD_SIZE = 50 * 10**9  # bytes; what `save_pretrained` of transformers 5 takes by itself
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
Shards = Mapping[str, list[tuple[str, Cut]]]  # file name -> its tensors in order


@dataclass(frozen=True)
class Written:
    """A tensor to write: the part of a stored one, and (fold, factor) to scale it by, in order."""

    cut: Cut
    scalings: tuple[tuple[Fold, float], ...] = ()


def divided(tensors: Mapping[str, Written], most: int) -> Shards:
    """File name -> its tensors in order, divided as transformers does."""
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        {name: written.cut for name, written in tensors.items()},
        get_storage_size=lambda cut: cut.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=most,
    )
    return {
        file: in_file_order({name: tensors[name].cut for name in names})
        for file, names in split.filename_to_tensors.items()
    }


def write_shards(folder: Path, shards: Shards, tensors: Mapping[str, Written], progress: bool) -> None:
    """Write every file from its start to its end."""
    console = Console(stderr=True)
    bar = Progress(
        "cutting", BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console, disable=not progress
    )
    with bar, ExitStack() as opened:
        task = bar.add_task("", total=sum(written.cut.nbytes for written in tensors.values()))
        files = {file: opened.enter_context(file.open("rb")) for file in {w.cut.stored.file for w in tensors.values()}}
        for name, shard in shards.items():
            with (folder / name).open("wb") as out:
                out.write(header_bytes(shard))
                for tensor, cut in shard:
                    _write(out, tensors[tensor], files[cut.stored.file], partial(bar.advance, task))


def _write(out: BinaryIO, written: Written, file: BufferedReader, advance: Callable[[float], None]) -> None:
    """Copy what stays of one tensor."""
    for block in written.cut.blocks(file):
        if written.scalings:
            block = scaled(block, written)
        out.write(np.ascontiguousarray(block).data.cast("B") if block.size else b"")
        advance(block.nbytes)


def scaled(block: NDArray[Any], written: Written) -> NDArray[Any]:
    """The block after its scalings, computed in the dtype it is stored in."""
    integers = torch.from_numpy(block.view(f"i{block.itemsize}"))
    values = integers.view(FLOATS[written.cut.stored.dtype])
    for fold, factor in written.scalings:
        values = fold.scaled(values, factor)
    return values.contiguous().view(integers.dtype).numpy()


def write_index(folder: Path, shards: Shards, model: PreTrainedModel) -> None:
    """The index of a checkpoint of several files, as transformers writes it."""
    if len(shards) == 1:
        return
    size = sum(cut.nbytes for shard in shards.values() for _, cut in shard)
    index = {
        "metadata": {"total_parameters": model.num_parameters(), "total_size": size},
        "weight_map": {name: file for file, shard in shards.items() for name, _ in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
