"""Cut a checkpoint folder into another one tensor by tensor: memory is bounded whatever the size of the model.

The model itself is never built with weights. Class and configuration of the result come from `surgery.unloaded`; what
is written, where, and from which rows of which file is laid out before the first byte, so that sizes are known.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.checkpoint.card import is_remote
from secateur.checkpoint.folders import check_space
from secateur.checkpoint.lineage import copy_beside, files_beside
from secateur.checkpoint.loading import hashing, load_skeleton, weight_files
from secateur.checkpoint.names import Piece, names_to_write, pieces_on_disk
from secateur.checkpoint.quantised import refuse_quantised
from secateur.checkpoint.shards import FLOATS, INDEX, SHARD_SIZE, Shards, Written, divided, write_index, write_shards
from secateur.checkpoint.tensorfiles import Cut, Stored, header_bytes, read_header
from secateur.discovery import discover
from secateur.errors import CheckpointError, PlanError, StreamingError
from secateur.groups import Groups, Kept
from secateur.plan import PruningPlan
from secateur.surgery.folding import pattern
from secateur.surgery.state import new_name, renumbering
from secateur.surgery.unloaded import UnloadedCut, unloaded_cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StreamReport:
    """What was done.

    Attributes:
        source: the model before the cut, on the meta device.
        model: the cut model, on the meta device.
        sha256: of the source.
        dense: parameters before the cut.
        pruned: parameters after it.
        bytes_read: of the tensors that were cut, whole.
        bytes_written: of the weight files.
        seconds: spent on reading, cutting and writing.
        tensors: name on disk -> what was written there.
    """

    source: PreTrainedModel
    model: PreTrainedModel
    sha256: str
    dense: int
    pruned: int
    bytes_read: int
    bytes_written: int
    seconds: float
    tensors: Mapping[str, Written]

    def to_json(self) -> dict[str, Any]:
        names = ("bytes_read", "bytes_written", "seconds")
        return {name: getattr(self, name) for name in names}


def cut_streaming(
    source: Path,
    plan: PruningPlan,
    folder: Path,
    *,
    max_shard_size: int = SHARD_SIZE,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> StreamReport:
    """Fill the existing `folder` with the checkpoint `source` without what `plan` removes; `verify_streamed` checks it.

    Tensors equal those of `slice` and `save_pretrained` bit for bit; each keeps the dtype it is stored in. Tied tensors
    are written once. What lies beside the weights (tokenizer, generation settings) is copied.

    Args:
        source: a folder with safetensors.
        max_shard_size: bytes; a larger tensor gets a file of its own.

    Raises:
        StreamingError: the checkpoint can only be cut after it was loaded, and why.
        PlanError: the plan does not fit the model.
        CheckpointError: the source is damaged, or the disk has no room for the result.
    """
    with hashing(source) as hashed:  # a second read, beside the first
        stored = stored_tensors(source)
        skeleton = _skeleton(source, stored, trust_remote_code)
        groups = discover(skeleton)
        plan.check(groups)
        kept = {n: k for n, k in plan.kept.items() if len(k) < groups.named(n).units}
        try:
            target = unloaded_cut(skeleton, groups, kept)
        except PlanError as error:
            raise StreamingError(str(error)) from error
        tensors = _layout(skeleton, groups, kept, target, stored)
        shards = divided(tensors, max_shard_size)
        beside = files_beside(source)
        size = sum(len(header_bytes(shard)) + sum(cut.nbytes for _, cut in shard) for shard in shards.values())
        check_space(folder, size + sum(f.stat().st_size for f in beside))
        _write_settings(target.model, folder)
        copy_beside(source, folder)
        begin = time.perf_counter()
        write_shards(folder, shards, tensors, progress)
        seconds = time.perf_counter() - begin
        write_index(folder, shards, target.model)
        sha256 = hashed.result()
    plan.check_checkpoint(sha256)
    _verify(folder, shards, tensors)
    read = sum(t.nbytes for t in {w.cut.stored: Cut(w.cut.stored, {}) for w in tensors.values()}.values())
    counts = (groups.total_parameters, groups.remaining_parameters(kept))
    return StreamReport(skeleton, target.model, sha256, *counts, read, size, round(seconds, 3), tensors)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, wherever it lies.

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    weight_files(folder)
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither model.safetensors nor {INDEX}, so its weights cannot be found")
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    headers = {file: read_header(folder / file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in headers[file]:
            raise CheckpointError(f"{folder / file} lacks {name}, which the index says it holds; copy it again")
    return {name: headers[file][name] for name, file in places.items()}


def _skeleton(source: Path, stored: Mapping[str, Stored], trust_remote_code: bool) -> PreTrainedModel:
    """The model on the meta device, in the dtype of its configuration, or else of the first weights."""
    skeleton = load_skeleton(source, trust_remote_code=trust_remote_code)
    refuse_quantised(source, skeleton.config)
    if is_remote(skeleton):
        raise StreamingError(
            f"{type(skeleton).__name__} comes with the checkpoint, and may read weights in its own way"
        )
    if skeleton.config.dtype is None:
        skeleton.config.dtype = next((FLOATS[t.dtype] for t in stored.values() if t.dtype in FLOATS), torch.float32)
    return skeleton


def _layout(
    skeleton: PreTrainedModel, groups: Groups, kept: Kept, target: UnloadedCut, stored: Mapping[str, Stored]
) -> dict[str, Written]:
    """Name on disk -> what is written there.

    Raises:
        CheckpointError: weights are missing, or have other shapes than the configuration says.
        StreamingError: tensors lie on disk in a way that cannot be followed.
    """
    moved, gone = renumbering(groups, kept), groups.removed_prefixes(kept)
    positions = groups.kept_positions(kept)
    sources = _sources(pieces_on_disk(skeleton, stored), groups, stored)
    old = {new_name(name, moved): name for name in groups.shapes if not name.startswith(gone)}
    old |= {new_name(name, moved): of for name, of in groups.tied.items()}
    tensors: dict[str, Written] = {}
    for name, (piece, shape) in names_to_write(target.model).items():
        parameter = old[piece.parameter]
        staying = positions.get(parameter, {})
        origin = sources.get(piece.before(parameter, staying))
        if origin is None:
            if any(p.parameter == parameter for p in sources):
                raise StreamingError(f"{name} would be stored in other pieces than those it is read from")
            if parameter in groups.buffers:
                raise StreamingError(f"{parameter} is not stored, and the class computes it")
            raise CheckpointError(f"the checkpoint lacks weights its config.json asks for: {parameter}")
        cut = Cut(origin, piece.kept(staying, origin.shape[0] if origin.shape else 1))
        if cut.shape != shape:
            raise CheckpointError(
                f"{origin.file} has {parameter} with shape {list(origin.shape)}, of which the cut leaves "
                f"{list(cut.shape)}; {list(shape)} is what config.json asks for"
            )
        scalings = tuple((f, x) for f, x in target.scalings if f.parameter == pattern(piece.parameter))
        if scalings and origin.dtype not in FLOATS:
            raise StreamingError(f"{parameter} is stored as {origin.dtype} and must be scaled")
        tensors[name] = Written(cut, scalings)
    return tensors


def _sources(pieces: Mapping[Piece, str], groups: Groups, stored: Mapping[str, Stored]) -> dict[Piece, Stored]:
    """Where each piece lies, under the name that its parameter is listed under; copies of tied tensors are compared.

    Raises:
        StreamingError: tensors that should be the same are not, so that transformers would not tie them.
    """
    found = {piece: stored[name] for piece, name in pieces.items() if piece.parameter not in groups.tied}
    for piece, name in pieces.items():
        if piece.parameter in groups.tied:
            first = found.setdefault(Piece(groups.tied[piece.parameter]), stored[name])
            if first is not stored[name] and not _equal(first, stored[name]):
                raise StreamingError(f"{name} is stored besides the tensor it is tied to, and has other values")
    return found


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are the same."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as file, other.file.open("rb") as second:
        blocks = zip(Cut(one, {}).blocks(file), Cut(other, {}).blocks(second), strict=True)
        return all(np.array_equal(a, b) for a, b in blocks)


def _write_settings(model: PreTrainedModel, folder: Path) -> None:
    """Configuration and code of the class, as `save_pretrained` writes them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of writing no weights
    try:
        model.save_pretrained(folder, state_dict={})
    finally:
        if shown:
            logging.enable_progress_bar()


def _verify(folder: Path, shards: Shards, tensors: Mapping[str, Written]) -> None:
    """Read back the headers of what was written.

    Raises:
        CheckpointError: they are not what was meant.
    """
    found = stored_tensors(folder)
    wanted = {name: (written.cut.stored.dtype, written.cut.shape) for name, written in tensors.items()}
    if {name: (t.dtype, t.shape) for name, t in found.items()} != wanted or set(shards) != {
        f.name for f in folder.glob("*.safetensors")
    }:
        raise CheckpointError("the checkpoint just written does not hold the tensors that it should; removed")
