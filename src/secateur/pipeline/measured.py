"""Losses kept while they are measured, so that a kill loses one at most."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from secateur.errors import KnowledgeError

Losses = Mapping[tuple[str, int], float]


class Measured:
    """Losses measured so far, kept beside the result.

    The first line of the file is the hash of what they depend on, each other line a loss.

    Args:
        result: file for the result; nothing is kept if None.
        key: hash of the model and everything else the losses depend on.
        resume: take what is there as measured.
        of_result: the losses in a finished result.

    Attributes:
        losses: (what was cut, a number) -> nats per token.

    Raises:
        KnowledgeError: what is to be resumed has another key.
    """

    def __init__(self, result: Path | None, key: str, resume: bool, of_result: Callable[[Path], Losses]) -> None:
        self.key = key
        self.file = None if result is None else result.with_name(result.name + ".work")
        self.losses: dict[tuple[str, int], float] = {}
        if result is not None and self.file is not None and resume:
            if self.file.exists():
                self._read(self.file)
            elif result.exists():
                found = of_result(result)
                self._check(json.loads(result.read_text(encoding="utf-8")).get("key"), result)
                self.losses = dict(found)
        self._begun = False

    def add(self, cut: str, number: int, loss: float) -> None:
        """Keep a loss."""
        self.losses[cut, number] = loss
        if self.file is None:
            return
        if not self._begun:  # what was read is written again: the last line may have been cut short
            temporary = self.file.with_name(self.file.name + ".part")
            lines = [json.dumps(self.key), *(json.dumps([*at, value]) for at, value in self.losses.items())]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            temporary.replace(self.file)
            self._begun = True
            return
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([cut, number, loss]) + "\n")

    def forget(self) -> None:
        """Remove the file: the result holds everything."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _read(self, file: Path) -> None:
        first, *lines = file.read_text(encoding="utf-8").split("\n")
        self._check(json.loads(first) if first.endswith('"') else None, file)
        for line in lines:
            if line.endswith("]"):
                cut, number, loss = json.loads(line)
                self.losses[cut, number] = loss

    def _check(self, key: str | None, file: Path) -> None:
        if key != self.key:
            raise KnowledgeError(
                f"{file} holds what was measured of another model, text or setting, or by other versions; leave out "
                "--resume to begin anew, or choose another --json"
            )
