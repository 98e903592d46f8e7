"""Safetensors files read and written tensor by tensor, a block of rows at a time, with plain reads and no memory map.

A file is 8 bytes with the length of the header, the header (JSON: name -> dtype, shape, offsets), and the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import SEEK_END, BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.errors import CheckpointError
from secateur.groups import IndexArray

BLOCK = 16 * 2**20  # bytes read at once, unless a single row is longer
LENGTH = 8  # bytes of the number in front of the header
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
        "I64": 64, "U64": 64, "F64": 64}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        offset: of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return BITS[self.dtype] // 8


@dataclass(frozen=True)
class Cut:
    """A part of a stored tensor.

    Attributes:
        stored: the whole.
        kept: dim -> ascending positions that stay; everything on dimensions that are not named.
    """

    stored: Stored
    kept: Mapping[int, IndexArray]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.kept[d]) if d in self.kept else size for d, size in enumerate(self.stored.shape))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.stored.itemsize

    def blocks(self, file: BufferedReader) -> Iterator[NDArray[Any]]:
        """The part, some rows at a time [rows, ...], as unsigned integers of the size of its numbers.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        stored = self.stored
        shape = stored.shape or (1,)
        row = math.prod(shape[1:]) * stored.itemsize
        rows = np.asarray(self.kept.get(0, np.arange(shape[0])), dtype=np.int64)
        for first, last in _spans(rows, max(1, BLOCK // max(row, 1))):
            begin = int(rows[first])
            count = int(rows[last - 1]) - begin + 1
            buffer = np.empty((count, *shape[1:]), dtype=f"u{stored.itemsize}")
            file.seek(stored.offset + begin * row)
            if buffer.size and file.readinto(buffer.data.cast("B")) != buffer.nbytes:
                raise CheckpointError(f"{stored.file} is truncated; copy it again")
            if last - first != count:
                buffer = buffer.take(rows[first:last] - begin, axis=0)
            for dim, positions in self.kept.items():
                if dim:
                    buffer = buffer.take(positions, axis=dim)
            yield buffer


def _spans(rows: IndexArray, most: int) -> Iterator[tuple[int, int]]:
    """Cut ascending row numbers into runs [first, last) of which none spans more than `most` rows."""
    first = 0
    while first < len(rows):
        last = int(np.searchsorted(rows, rows[first] + most))
        yield first, last
        first = last


def read_header(file: Path) -> dict[str, Stored]:
    """Name -> tensor of one file.

    Raises:
        CheckpointError: the file is damaged, or holds numbers that are no plain ones.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH), "little")
            size = opened.seek(0, SEEK_END)
            opened.seek(LENGTH)
            header = json.loads(opened.read(min(length, size)))
        header.pop("__metadata__", None)
        start = LENGTH + length
        found = {
            n: Stored(file, e["dtype"], tuple(e["shape"]), start + e["data_offsets"][0]) for n, e in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is truncated or corrupted: no header can be read; copy it again") from error
    for name, stored in found.items():
        if stored.dtype not in BITS:
            raise CheckpointError(f"{file} holds {name} as {stored.dtype}, packed numbers that cannot be cut")
        if stored.offset + Cut(stored, {}).nbytes > size:
            raise CheckpointError(f"{file} is truncated or corrupted: it ends before {name} does; copy it again")
    return found


def header_bytes(tensors: Sequence[tuple[str, Cut]]) -> bytes:
    """What stands before the data of a file with these tensors in this order, byte for byte as safetensors has it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, cut in tensors:
        header[name] = {
            "dtype": cut.stored.dtype,
            "shape": list(cut.shape),
            "data_offsets": [offset, offset + cut.nbytes],
        }
        offset += cut.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text


def in_file_order(tensors: Mapping[str, Cut]) -> list[tuple[str, Cut]]:
    """As safetensors sorts them: the longest numbers first, so that all are aligned, then by name."""
    return sorted(tensors.items(), key=lambda item: (-item[1].stored.itemsize, item[0]))
