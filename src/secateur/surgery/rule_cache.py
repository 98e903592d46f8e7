"""What was found out about a class and its configuration, kept on disk: the search takes seconds, reading it nothing.

An entry belongs to one class, configuration and set of groups under one version of Secateur, transformers and torch.
It can only save time: every cut is compared with the original's logits again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.groups import Groups
from secateur.surgery.field_rule import FieldRule, Findings
from secateur.surgery.folding import Fold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGES = ("secateur", "transformers", "torch")


def cache_folder() -> Path:
    """`secateur/rules` in the user's cache folder (`XDG_CACHE_HOME`, by default ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur" / "rules"


class RuleCache:
    """The entry of one model."""

    def __init__(self, model: PreTrainedModel, groups: Groups) -> None:
        key = {
            "versions": {name: version(name) for name in PACKAGES},
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "config": model.config.to_dict(),
            "groups": [(g.name, g.units, g.refusals) for g in groups],
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self.file = cache_folder() / f"{digest}.json"

    def load(self) -> Findings:
        """What is stored; nothing if there is nothing usable."""
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            rules = {frozenset(e["families"]): _rule(e["rule"]) for e in stored["rules"]}
            misfits = {family: tuple(fields) for family, fields in stored["misfits"].items()}
            ties = {family: None if tied is None else frozenset(tied) for family, tied in stored["ties"].items()}
            return Findings(rules, misfits, ties)
        except (OSError, ValueError, TypeError, KeyError):
            return Findings()

    def save(self, findings: Findings) -> None:
        """Replace the entry; a cache that cannot be written is no cache, and no error."""
        rules = [
            {"families": sorted(families), "rule": None if rule is None else dataclasses.asdict(rule)}
            for families, rule in findings.rules.items()
        ]
        ties = {family: None if tied is None else sorted(tied) for family, tied in findings.ties.items()}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False, encoding="utf-8") as part:
                json.dump({"rules": rules, "misfits": findings.misfits, "ties": ties}, part, default=str)
            Path(part.name).replace(self.file)
        except OSError:
            return


def _rule(data: Mapping[str, Any] | None) -> FieldRule | None:
    if data is None:
        return None
    lists = {k: tuple(v) for k, v in data.items() if k not in ("pins", "folds")}
    folds = tuple(Fold(**{**f, "power": Fraction(f["power"])}) for f in data["folds"])
    return FieldRule(**lists, pins=dict(data["pins"]), folds=folds)
