"""Folders written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import CheckpointError

JUST_MADE = 10.0  # seconds in which a folder may not be locked yet


@contextmanager
def output_folder(output: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `output` if the block succeeds, and vanishes if it does not.

    It is locked while the block runs, so that what a killed process left behind is told apart and removed.

    Raises:
        CheckpointError: `output` exists and is not empty (unless `overwrite`), or cannot be written.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise CheckpointError(f"{output} exists and is not empty; choose another folder or pass --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        lock = _lock(temporary)
    except OSError as error:
        raise CheckpointError(f"cannot write beside {output}: {error.strerror}") from error
    try:
        yield temporary
        _readable(temporary)
        _replace(temporary, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"no space left while writing {output}; nothing was written") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _readable(folder: Path) -> None:
    """Give the permissions of files made in the ordinary way; some writers make theirs for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def check_space(folder: Path, needed: int) -> None:
    """Make sure that so many bytes can be written.

    Raises:
        CheckpointError: the disk has less room.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{needed / 1e9:,.2f} GB are needed in {folder.parent}, and {free / 1e9:,.2f} GB are free; nothing was "
            "written: make room, or write to another disk"
        )


def _prefix(output: Path) -> str:
    return f".{output.name}.secateur-"


def _lock(folder: Path) -> int | None:
    """Lock a folder until the file descriptor returned is closed or the process ends, however it does.

    None if another process holds it, or the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(output: Path) -> None:
    """Remove temporary folders for this output whose processes are gone: not locked, and not just being made."""
    for folder in output.parent.glob(glob.escape(_prefix(output)) + "*"):
        try:
            lock = _lock(folder) if time.time() - folder.stat().st_mtime > JUST_MADE else None
        except OSError:  # gone meanwhile, or not ours
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _replace(temporary: Path, output: Path) -> None:
    """Rename, moving an existing folder out of the way first."""
    if output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
        output.replace(old / "old")
        temporary.replace(output)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(output)
