"""What was found out about classes and their configurations, kept on disk: searching takes seconds, reading nothing.

There are three kinds of entries, under one version of Secateur, transformers and torch each. That of a class holds the
rule for every family, and so kind, of units that was ever found for it: another configuration of the class tries these
first, on the shapes and the logits of its own. What a class cannot express depends on the sizes at hand, as what it can
does (a `head_dim` that is not written, say), so whole answers belong to one class, configuration and set of groups.

Both can only save time: every cut is compared with the original's logits again. Not so the third, whether zeroed
weights amount to removed ones, by family: it belongs to the source it was found by, and is kept only of models made of
modules of transformers and torch, whose code is that of a version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.groups import Groups
from secateur.surgery.alignment import Step
from secateur.surgery.field_rule import FieldRule, Findings
from secateur.surgery.folding import Fold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGES = ("secateur", "transformers", "torch")
MAX_RULES = 200  # of a class; the oldest go


def cache_folder() -> Path:
    """`secateur/rules` in the user's cache folder (`XDG_CACHE_HOME`, by default ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur" / "rules"


class RuleCache:
    """The entries of one model: its own, and that of its class."""

    def __init__(self, model: PreTrainedModel, groups: Groups) -> None:
        of_class = {
            "versions": {name: version(name) for name in PACKAGES},
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
        }
        details = {"config": model.config.to_dict(), "groups": [(g.name, g.units, g.refusals) for g in groups]}
        self.file = cache_folder() / f"{_digest(of_class | details)}.json"
        zeroed = cache_folder() / f"{_digest(of_class | details | {'source': _source()})}.json"
        self.zeroed_file = zeroed if _code_is_known(model) else None
        self.class_file = cache_folder() / f"{_digest(of_class)}.json"

    def load(self) -> Findings:
        """What is stored for the model; nothing if there is nothing usable."""
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            rules = {frozenset(e["families"]): _rule(e["rule"]) for e in stored["rules"]}
            misfits = {family: str(text) for family, text in stored["misfits"].items()}
            ties = {family: None if tied is None else frozenset(tied) for family, tied in stored["ties"].items()}
            steps = {family: Step(**step) for family, step in stored["steps"].items()}
            return Findings(rules, misfits, ties, steps)
        except (OSError, ValueError, TypeError, KeyError):
            return Findings()

    def of_class(self) -> list[FieldRule]:
        """The rules found for any configuration of the class, the latest first."""
        try:
            stored = json.loads(self.class_file.read_text(encoding="utf-8"))
            return [rule for data in stored["rules"] if (rule := _rule(data)) is not None]
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def save(self, findings: Findings) -> None:
        """Replace the entry, and add what is new to that of the class; a cache that cannot be written is no error."""
        rules = [
            {"families": sorted(families), "rule": None if rule is None else dataclasses.asdict(rule)}
            for families, rule in findings.rules.items()
        ]
        ties = {family: None if tied is None else sorted(tied) for family, tied in findings.ties.items()}
        steps = {family: dataclasses.asdict(step) for family, step in findings.steps.items()}
        _write(self.file, {"rules": rules, "misfits": findings.misfits, "ties": ties, "steps": steps})
        known = self.of_class()
        if new := [rule for rule in findings.rules.values() if rule is not None and rule not in known]:
            _write(self.class_file, {"rules": [dataclasses.asdict(rule) for rule in [*new, *known][:MAX_RULES]]})

    def zeroed(self) -> dict[str, bool]:
        """Family -> whether zeroed weights amount to removed ones, as far as it is stored."""
        try:
            stored = json.loads(self.zeroed_file.read_text(encoding="utf-8")) if self.zeroed_file else {}
            return {str(family): bool(same) for family, same in stored.items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def save_zeroed(self, found: Mapping[str, bool]) -> None:
        """Add to what `zeroed` gives."""
        if self.zeroed_file:
            _write(self.zeroed_file, self.zeroed() | dict(found))


def _code_is_known(model: PreTrainedModel) -> bool:
    """Whether versions say what the modules compute."""
    return all(type(m).__module__.partition(".")[0] in ("transformers", "torch") for m in model.modules())


@cache
def _source() -> str:
    """A digest of the code that finds out what zeroed weights amount to."""
    package = Path(__file__).parents[1]
    files = [*package.glob("discovery/*.py"), *package.glob("surgery/*.py"), package / "evaluation" / "alone.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def _write(file: Path, content: Mapping[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as part:
            json.dump(content, part, default=str)
        Path(part.name).replace(file)
    except OSError:
        return


def _rule(data: Mapping[str, Any] | None) -> FieldRule | None:
    if data is None:
        return None
    lists = {k: tuple(v) for k, v in data.items() if k not in ("pins", "folds")}
    folds = tuple(Fold(**{**f, "power": Fraction(f["power"])}) for f in data["folds"])
    return FieldRule(**lists, pins=dict(data["pins"]), folds=folds)
