"""Folders written whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import CheckpointError

JUST_MADE = 10.0  # seconds in which a folder may not be locked yet
FULL = (errno.ENOSPC, errno.EDQUOT)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def output_folder(output: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `output` if the block succeeds, and vanishes if it does not.

    It is locked while the block runs, so that what a killed process left behind is told apart and removed. A kill at
    any moment leaves either what was there before, or the new folder whole. Where the system cannot exchange two
    folders in one step, what was there before may be left under another name; the next run puts it back.

    Raises:
        CheckpointError: `output` exists and is not empty (unless `overwrite`), or cannot be written.
    """
    output = Path(output)
    put_back(output)
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
    except Exception as error:
        if disk_is_full(error):
            raise CheckpointError(f"no space left while writing {output}; nothing was written") from error
        raise
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


@contextmanager
def put_aside(output: Path) -> Iterator[Callable[[], None]]:
    """Take a folder's name from it while the block fills a new one; it is removed then, or put back if there is none.

    What a process killed before it made a new one leaves behind is put back by `put_back`.

    Yields:
        A function that removes it now, for when there is something in its place.

    Raises:
        CheckpointError: it cannot be renamed, or another process has put aside one of its name.
    """
    before = _before(output)
    if before.exists():  # though `put_back` removes what nobody holds
        raise CheckpointError(f"{before} is in the way: another run overwrites {output}, or remove it")
    lock = None
    try:
        try:
            lock = _lock(output)  # so that no other process puts it back
            output.replace(before)
        except OSError as error:
            raise CheckpointError(f"cannot overwrite {output}: {error.strerror}") from error
        yield lambda: _remove(before)
    finally:
        if output.exists():
            _remove(before)
        elif before.exists():
            before.replace(output)
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
    """Make sure that so many bytes can be written into an existing folder.

    Raises:
        CheckpointError: the disk has less room.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        disk = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_mount())
        raise CheckpointError(
            f"{needed / 1e9:,.2f} GB are needed on the disk mounted at {disk}, and {free / 1e9:,.2f} GB are free; "
            "nothing was written: make room, or write to another disk"
        )


def disk_is_full(error: Exception) -> bool:
    """Whether an error says so: by its number, or, as safetensors does, in its text alone."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) in FULL or (number is not None and int(number[1]) in FULL)


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
            _remove(folder)
            os.close(lock)


def _replace(temporary: Path, output: Path) -> None:
    """Rename; an existing folder takes the temporary name in the same step, or is moved out of the way first."""
    if not output.exists():
        temporary.replace(output)
    elif not _exchange(temporary, output):
        with put_aside(output):
            temporary.replace(output)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths swap what they name, in one step; False where system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


def _before(output: Path) -> Path:
    """Where the old folder is between two renames."""
    named = output.absolute()  # `.` has no name
    return named.with_name(f".{named.name}.before-overwrite")


def put_back(output: Path) -> None:
    """Give an old folder the name again that a killed process took from it; remove one that was replaced.

    Not while that process lives.
    """
    before = _before(output)
    with suppress(OSError):
        if before.exists() and (lock := _lock(before)) is not None:
            if output.exists():
                _remove(before)
            else:
                before.replace(output)
            os.close(lock)


def _remove(path: Path) -> None:
    """Remove a folder with all in it, or a file, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
