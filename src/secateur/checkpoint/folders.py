"""Folders written whole or not at all."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import CheckpointError


@contextmanager
def output_folder(output: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `output` if the block succeeds, and vanishes if it does not.

    Raises:
        CheckpointError: `output` exists and is not empty (unless `overwrite`), or cannot be written.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise CheckpointError(f"{output} exists and is not empty; choose another folder or pass --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {output}: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        _replace(temporary, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"no space left while writing {output}; nothing was written") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, output: Path) -> None:
    """Rename, moving an existing folder out of the way first."""
    if output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
        output.replace(old / "old")
        temporary.replace(output)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(output)
