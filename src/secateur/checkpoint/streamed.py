"""Whether a checkpoint cut without loading it is what it should be: byte by byte, and by logits where memory allows.

Every tensor is read again and compared with the part of the input that it should be, indexed in one piece and not in
the way it was cut. A fresh process finds all names, shapes and ties. Where it fits, the input is loaded and cut in
memory by the same plan, and its logits are compared with those of the output, each in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from secateur.checkpoint.loading import weight_files
from secateur.checkpoint.memory import available_memory
from secateur.checkpoint.parity import Parity, Probed, compared, last_words, load_in_fresh_process
from secateur.checkpoint.shards import Written, scaled
from secateur.checkpoint.stream import StreamReport, stored_tensors
from secateur.checkpoint.tensorfiles import BLOCK, Cut, Stored
from secateur.errors import ParityError
from secateur.plan import PruningPlan

IMPORTS = 3 * 2**29  # bytes that a process takes besides the weights: libraries, and the probe
BYTES = "every tensor was read again and is the part of the input that it should be"
LOGITS = "the input was loaded and cut in memory by the same plan, and its logits compared with those of the output"
LOADS = (
    "transformers finds every name, shape and tie in a fresh process; the same kinds were cut in a small model of the "
    "class, whose logits are those of the original without the removed units; those of this model were not compared: "
    "{reason}"
)


@dataclass(frozen=True)
class StreamCheck:
    """What was found to be right.

    Attributes:
        parity: of the output with the input cut in memory; None if that was not possible.
        text: what was checked, and why logits were not.
    """

    parity: Parity | None
    text: str


def verify_streamed(
    report: StreamReport, source: Path, plan: PruningPlan, folder: Path, *, trust_remote_code: bool = False
) -> StreamCheck:
    """Check what `cut_streaming` wrote into `folder`; the arguments are those of the cut.

    Raises:
        ParityError: it is not what it should be.
    """
    compare_tensors(report, folder)
    needed = sum(file.stat().st_size for file in weight_files(source)) + report.bytes_written + IMPORTS
    available = available_memory()
    wanted: Probed | str = (
        f"loading the model and cutting it takes {needed / 1e9:,.1f} GB of memory, and {available / 1e9:,.1f} GB are "
        "available"
    )
    if needed <= available:
        wanted = _cut_in_memory(source, plan, trust_remote_code)
    if isinstance(wanted, str):
        load_in_fresh_process(folder, "auto", "meta")
        return StreamCheck(None, f"{BYTES}; {LOADS.format(reason=wanted)}")
    return StreamCheck(compared(folder, wanted, "auto", "cpu"), f"{BYTES}; {LOGITS}")


def compare_tensors(report: StreamReport, folder: Path) -> None:
    """Compare every tensor in `folder` with its part of the input.

    Raises:
        ParityError: one differs; names it.
    """
    found = stored_tensors(folder)
    for name, written in report.tensors.items():
        if not _is_part(found[name], written):
            raise ParityError(f"{name} as just written is not what the input holds; removed")


def _is_part(found: Stored, written: Written) -> bool:
    """Whether a stored tensor is the part of another, some rows at a time."""
    if found.dtype != written.cut.stored.dtype or found.shape != written.cut.shape:
        return False
    whole, part = _mapped(written.cut.stored), _mapped(found)
    kept = [written.cut.kept.get(dim, np.arange(size)) for dim, size in enumerate(whole.shape)]
    step = max(1, BLOCK * len(part) // max(part.nbytes, 1))
    for first in range(0, len(part), step):
        wanted = np.asarray(whole[kept[0][first : first + step]])
        for dim, positions in enumerate(kept[1:], 1):
            if dim in written.cut.kept:
                wanted = wanted.take(positions, axis=dim)
        if written.scalings:
            wanted = scaled(wanted, written)
        if not np.array_equal(part[first : first + step], wanted.view(part.dtype)):
            return False
    return True


def _mapped(stored: Stored) -> NDArray[np.unsignedinteger]:
    """A tensor [at least one dimension] as unsigned integers of the size of its numbers, read when it is looked at."""
    shape, dtype = stored.shape or (1,), np.dtype(f"u{stored.itemsize}")
    if not Cut(stored, {}).nbytes:
        return np.empty(shape, dtype)
    return np.memmap(stored.file, dtype, "r", stored.offset, shape)


def _cut_in_memory(source: Path, plan: PruningPlan, trust_remote_code: bool) -> Probed | str:
    """What the input computes after it was loaded and cut, found in a process of its own; or why it cannot be known.

    Raises:
        ParityError: the loaded model cannot be cut by this plan.
    """
    with tempfile.TemporaryDirectory() as scratch:
        plan.save(Path(scratch) / "plan.json")
        output, trust = Path(scratch) / "logits.safetensors", "trust" if trust_remote_code else "plain"
        command = [sys.executable, "-P", "-m", "secateur.checkpoint.sliced_process"]
        command += [str(source), str(Path(scratch) / "plan.json"), trust, str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 2:
            raise ParityError(f"the model cannot be cut so after loading it ({last_words(done)}); removed")
        if done.returncode:
            return f"the process that loaded the model to cut it ended early ({last_words(done)})"
        with safe_open(output, framework="pt") as opened:
            return Probed(opened.get_tensor("ids"), opened.metadata()["text"], opened.get_tensor("logits"))
