"""What a knowledge distribution protects from a cut."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.checkpoint import Checkpoint
from secateur.config import PruneSettings
from secateur.evaluation import Knowledge
from secateur.pipeline.results import Results


@dataclass(frozen=True)
class Protection:
    """Groups to leave whole, and why.

    Attributes:
        groups: their names, the most sensitive first.
        knowledge: the analysis that says so; None if nothing is protected by one.
        facts: for the protocol: file, hash, share, evaluation text and groups.
    """

    groups: tuple[str, ...] = ()
    knowledge: Knowledge | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def record(self, source: Checkpoint, results: Results) -> None:
        """Note in the protocol of a cut what is protected, and the analysis itself, which a report draws.

        Raises:
            KnowledgeError: the analysis was made of another checkpoint.
        """
        if self.knowledge is not None:
            self.knowledge.check_checkpoint(source.sha256)
            results["protocol"]["knowledge"] = {**self.facts, "analysis": self.knowledge.to_json()}


def protection(prune: PruneSettings) -> Protection:
    """What these settings protect by the knowledge file that they name, if they do.

    Raises:
        KnowledgeError: the file is missing or holds something else.
    """
    if prune.knowledge is None:
        return Protection()
    knowledge = Knowledge.load(prune.knowledge)
    groups = knowledge.most_sensitive(prune.share_to_protect)
    facts = {
        "file": prune.knowledge,
        "sha256": hashlib.sha256(Path(prune.knowledge).read_bytes()).hexdigest(),
        "share": prune.share_to_protect,
        "text": knowledge.dense.text,
        "text_sha256": knowledge.dense.text_sha256,
        "protected": list(groups),
    }
    return Protection(groups, knowledge, facts)
