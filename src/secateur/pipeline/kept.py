"""What a long measurement found so far, kept beside its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError

Entry = list[Any]


class Kept:
    """Entries that are appended to a file as they come, so that a kill loses one at most.

    The first line of the file is the hash of what the entries depend on, each other line an entry. The file appears
    with the first entry that is added.

    Attributes:
        key: that hash.
        entries: those that were found, and those added since.
        found: whether there was a file to go on with.
    """

    def __init__(self, file: Path | None, key: str, resume: bool, refusal: SecateurError) -> None:
        """Read what is there.

        Args:
            file: None to keep nothing.
            resume: go on with the file if there is one; else it is begun anew.
            refusal: raised if that file has another key, or is damaged.
        """
        self.file, self.key = file, key
        self.entries: list[Entry] = []
        self.found = resume and file is not None and file.exists()
        self._begun = False
        if self.found and file is not None:
            try:
                first, *lines = file.read_text(encoding="utf-8").split("\n")
                entries = [json.loads(line) for line in lines if line.endswith("]")]
            except (OSError, ValueError) as error:  # damaged, or not a file of ours at all
                raise refusal from error
            if first != json.dumps(key):
                raise refusal
            self.entries = entries

    def add(self, entry: Entry) -> None:
        """Keep an entry."""
        self.entries.append(entry)
        if self.file is None:
            return
        if self._begun:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
            return
        # What was read is written again: its last line may have been cut short.
        temporary = self.file.with_name(self.file.name + ".part")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in (self.key, *self.entries)), encoding="utf-8")
        temporary.replace(self.file)
        self._begun = True

    def forget(self) -> None:
        """Remove the file: the result holds everything."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def beside(result: Path | None) -> Path | None:
    """Where entries are kept while a result is not there yet."""
    return None if result is None else result.with_name(result.name + ".work")


def key_of(facts: Mapping[str, Any]) -> str:
    """Hash of everything that something depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_output(result: Path | None, resume: bool, error: type[SecateurError]) -> None:
    """Find out before anything is measured whether the result can be written.

    Raises:
        SecateurError: of the given kind: it cannot, or there is nothing to resume from.
    """
    if resume and result is None:
        raise error("--resume goes on from what is kept beside the result: say which with --json FILE")
    check_writable(result, error)


def check_writable(file: Path | None, error: type[SecateurError]) -> None:
    """Find out whether a file can be written.

    Raises:
        SecateurError: of the given kind, if it cannot.
    """
    if file is not None and (not file.absolute().parent.is_dir() or file.is_dir()):
        raise error(f"{file} cannot be written: it is a folder, or there is none to hold it")
