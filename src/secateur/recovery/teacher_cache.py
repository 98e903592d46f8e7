"""What a teacher says of every training example, on disk: the teacher is asked once and need not stay in memory.

A folder holds `index.json`, which says what it was made of, and shards `00000.safetensors`, ...: for every token that
predicts a labelled one, in the order of the examples, `log_probs` [tokens, k] in float32, `indices` [tokens, k] of the
k likeliest tokens, and `rest` [tokens], the log-probability of all others, at one temperature. Which examples a shard
holds follows from the index, so a shard that is there is done, and filling goes on after a kill with the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from secateur.errors import CheckpointError, first_line
from secateur.recovery.divergence import SoftTargets
from secateur.recovery.examples import IGNORED, Example
from secateur.recovery.sources import padded
from secateur.recovery.teacher import Batch, Lesson, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.recovery.settings import Distillation

SCHEMA = 1
INDEX = "index.json"
SHARD_BYTES = 2**28
NAMES = ("log_probs", "indices", "rest")
NO_MATTER = ("transformers_version", "use_cache", "architectures", "dtype", "torch_dtype")  # in a configuration


@dataclass(frozen=True)
class Shard:
    """A file of the cache: examples `begin` to `end`, and so many tokens of theirs."""

    file: Path
    begin: int
    end: int
    tokens: int


class CachedTeacher:
    """A teacher whose words were written down.

    Args:
        shards: all of them, whole.
        places: digest of an example -> number of its shard, its first token in there, how many tokens it has.
    """

    def __init__(self, shards: Sequence[Shard], places: dict[bytes, tuple[int, int, int]]) -> None:
        self.places = places
        self.files = [safe_open(shard.file, "pt") for shard in shards]  # mapped, not read

    def __call__(self, batch: Batch) -> Lesson:
        ids, mask, labels = (batch[name].cpu() for name in ("input_ids", "attention_mask", "labels"))
        rows = []
        for row, real in enumerate(mask.bool()):
            number, begin, tokens = self.places[digest(ids[row][real].tolist(), labels[row][real].tolist())]
            rows.append([self.files[number].get_slice(name)[begin : begin + tokens] for name in NAMES])
        log_probs, indices, rest = (torch.cat(part).to(batch["labels"].device) for part in zip(*rows, strict=True))
        return Lesson(SoftTargets(log_probs, indices.long(), rest))


def filled_cache(
    teacher: Teacher, dense: PreTrainedModel, examples: Sequence[Example], settings: Distillation, batch: int, how: str
) -> CachedTeacher:
    """The cache in the settings' folder, in which what is missing is asked of the teacher first.

    Args:
        teacher: the dense model.
        dense: the model itself, whose weights and configuration the index tells by their hash.
        batch: examples to ask at a time.
        how: precision of the teacher's pass.

    Raises:
        CheckpointError: the folder holds something else, or there is no room for the cache.
        NonFiniteError: the teacher's logits are NaN.
    """
    assert settings.cache is not None
    folder = Path(settings.cache)
    known = {digest(e["input_ids"], e["labels"]): e for e in examples}  # equal examples are asked once
    vocabulary = int(dense.get_input_embeddings().weight.shape[0])
    top_k = min(settings.top_k, vocabulary)
    key = {
        "schema": SCHEMA,
        "examples": hashlib.sha256(b"".join(known)).hexdigest(),  # of the tokens and labels: data, tokenizer, length
        "teacher": model_sha256(dense),
        "precision": how,
        "top_k": top_k,
        "temperature": settings.temperature,
    }
    index_type = torch.uint16 if vocabulary <= 2**16 else torch.int32
    per_token = top_k * (4 + index_type.itemsize) + 4
    counts = [sum(label != IGNORED for label in e["labels"][1:]) for e in known.values()]
    shards = list(_parted(folder, counts, per_token))
    missing = _missing(folder, key, shards)
    needed = sum(shard.tokens for shard in missing) * per_token
    told = f"{len(counts):,} examples, {sum(counts):,} tokens of {per_token:,} bytes: {sum(counts) * per_token:,} bytes"
    print(f"- teacher cache {folder}: {told}, {needed:,} to write", file=sys.stderr, flush=True)
    rows = list(known.values())
    try:
        _begin(folder, key, needed)
        for shard in missing:
            _write(shard, rows[shard.begin : shard.end], teacher, batch, index_type)
            print(f"- teacher cache: {shard.end:,} examples are done", file=sys.stderr, flush=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the teacher cache {folder} cannot be written: {first_line(error)}") from error
    return CachedTeacher(shards, _places(list(known), counts, shards))


def digest(ids: Sequence[int], labels: Sequence[int]) -> bytes:
    """What an example is known by: the hash of its tokens and labels."""
    return hashlib.blake2b(np.array([ids, labels], dtype=np.int32).tobytes(), digest_size=16).digest()


def model_sha256(model: PreTrainedModel) -> str:
    """Hash of a model's weights, buffers and configuration, wherever they came from."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in NO_MATTER and not k.startswith("_")}
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _parted(folder: Path, counts: Sequence[int], per_token: int) -> Iterator[Shard]:
    """The shards of a cache: whole examples, up to `SHARD_BYTES`, at least one each."""
    begin, tokens, number = 0, 0, 0
    for place, count in enumerate(counts):
        if tokens and (tokens + count) * per_token > SHARD_BYTES:
            yield Shard(folder / f"{number:05}.safetensors", begin, place, tokens)
            begin, tokens, number = place, 0, number + 1
        tokens += count
    yield Shard(folder / f"{number:05}.safetensors", begin, len(counts), tokens)


def _missing(folder: Path, key: dict[str, Any], shards: Sequence[Shard]) -> list[Shard]:
    """Which shards of this key are not in the folder yet; nothing is changed.

    Raises:
        CheckpointError: it is something else, or a cache of another key.
    """
    index = folder / INDEX
    try:
        found = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else None
    except ValueError as error:
        raise CheckpointError(f"{index} is damaged: {first_line(error)}; remove the folder, or name another") from error
    if found is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} is no teacher cache: name a folder that is empty or not there yet")
    elif differ := [name for name, value in key.items() if found.get(name) != value]:
        raise CheckpointError(
            f"the teacher cache {folder} was made with another {', another '.join(differ)}: remove it to have it made "
            "anew, or name another folder (--distill-cache, recovery.distill.cache)"
        )
    return [shard for shard in shards if not _is_whole(shard, key["top_k"])]


def _begin(folder: Path, key: dict[str, Any], needed: int) -> None:
    """Make the folder and its index, if there is room for the rest.

    Raises:
        CheckpointError: there is not.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise CheckpointError(
            f"the teacher cache {folder} needs {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free: give less "
            "data, a smaller --distill-top-k (top_k), or no cache"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / INDEX).exists():
        text = json.dumps(key, indent=1) + "\n"
        _whole(folder / INDEX, lambda part: part.write_text(text, encoding="utf-8"))


def _is_whole(shard: Shard, top_k: int) -> bool:
    try:
        with safe_open(shard.file, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in NAMES]
    except (OSError, SafetensorError):  # not there, or cut off
        return False
    return shapes == [[shard.tokens, top_k], [shard.tokens, top_k], [shard.tokens]]


def _write(shard: Shard, examples: Sequence[Example], teacher: Teacher, batch: int, index_type: torch.dtype) -> None:
    """Ask the teacher of a shard's examples, and write what it says."""
    found: list[SoftTargets] = []
    for begin in range(0, len(examples), batch):
        some = examples[begin : begin + batch]
        fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        found.append(teacher({name: padded([e[name] for e in some], fill) for name, fill in fills.items()}).targets)
    tensors = {
        "log_probs": torch.cat([t.log_probs for t in found]),
        "indices": torch.cat([t.indices.to(index_type) for t in found if t.indices is not None]),
        "rest": torch.cat([t.rest for t in found if t.rest is not None]),
    }
    _whole(shard.file, lambda part: part.write_bytes(save(tensors)))  # save_file would make it ours alone


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that it is whole or not there."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    write(part)
    part.replace(path)


def _places(digests: Sequence[bytes], counts: Sequence[int], shards: Sequence[Shard]) -> dict[bytes, Any]:
    places = {}
    for number, shard in enumerate(shards):
        at = 0
        for example in range(shard.begin, shard.end):
            places[digests[example]] = (number, at, counts[example])
            at += counts[example]
    return places
