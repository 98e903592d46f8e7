"""Losses kept while they are measured, so that a kill loses one at most."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from secateur.errors import KnowledgeError
from secateur.pipeline.kept import Kept, beside

Losses = Mapping[tuple[str, int], float]


class Measured:
    """Losses measured so far, kept beside the result; or taken from the result itself.

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
        file = beside(result)
        self._kept = Kept(file, key, resume, _another(file))
        if result is not None and resume and not self._kept.found and result.exists():
            found = of_result(result)
            if json.loads(result.read_text(encoding="utf-8")).get("key") != key:
                raise _another(result)
            self._kept.entries = [[*at, loss] for at, loss in found.items()]
        self.losses: dict[tuple[str, int], float] = {(cut, number): loss for cut, number, loss in self._kept.entries}

    def add(self, cut: str, number: int, loss: float) -> None:
        """Keep a loss."""
        self.losses[cut, number] = loss
        self._kept.add([cut, number, loss])

    def forget(self) -> None:
        """Remove the file: the result holds everything."""
        self._kept.forget()


def _another(file: Path | None) -> KnowledgeError:
    return KnowledgeError(
        f"{file} holds what was measured of another model, text or setting, or by other versions; leave out --resume "
        "to begin anew, or choose another --json"
    )
