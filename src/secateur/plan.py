"""A pruning plan: which units stay, and where the decision came from. Readable, diffable, replayable."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from secateur.errors import PlanError
from secateur.groups import Group, Groups

SCHEMA = 1
KIND_IN_NAME = re.compile(r"^.*/|-\d+$")  # all of a group's name but its kind


def format_ranges(units: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5, 7, 8)` -> `"0-2,5,7-8"`."""
    runs = []
    for _, run in groupby(enumerate(units), key=lambda pair: pair[1] - pair[0]):
        numbers = [u for _, u in run]
        runs.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ",".join(runs)


def parse_ranges(text: str) -> tuple[int, ...]:
    """The inverse of `format_ranges`.

    Raises:
        ValueError: the text is not a list of ascending ranges.
    """
    units: list[int] = []
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or (units and numbers[0] <= units[-1]):
            raise ValueError(f"units must ascend: {text!r}")
        units.extend(numbers)
    return tuple(units)


@dataclass(frozen=True)
class PruningPlan:
    """The units that stay, for every group that loses some.

    Attributes:
        kept: group name -> units that stay, ascending.
        units: group name -> number of units before the cut.
        provenance: criterion, data, seed, versions, checkpoint hash: whatever the decision depends on.
    """

    kept: Mapping[str, tuple[int, ...]]
    units: Mapping[str, int]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def removed(self, name: str) -> tuple[int, ...]:
        """The units of group `name` that go."""
        kept = set(self.kept[name])
        return tuple(u for u in range(self.units[name]) if u not in kept)

    def widths(self, whole: Sequence[Group] = ()) -> list[dict[str, Any]]:
        """A row for each group: `group`, `kind`, `layer` (None if it spans layers), `units` before and `kept`.

        Of layers and sublayers `which` says in addition which ones stay, as ranges (`"0-2,5"`).

        Args:
            whole: groups that could have been cut; those that the plan does not name keep all of their units.
        """
        names = dict.fromkeys([*(g.name for g in whole), *self.kept])
        units = {g.name: g.units for g in whole} | dict(self.units)
        rows = []
        for name in names:
            kept = self.kept.get(name, tuple(range(units[name])))
            group = Group(name, KIND_IN_NAME.sub("", name), units[name])
            row: dict[str, Any] = {
                "group": name,
                "kind": group.kind,
                "layer": group.layer,
                "units": units[name],
                "kept": len(kept),
            }
            which = {"which": format_ranges(kept)} if group.kind in ("layer", "sublayer") else {}
            rows.append(row | which)
        return rows

    def check(self, groups: Groups) -> None:
        """Make sure that the plan belongs to the model these groups were discovered on.

        Raises:
            PlanError: a group is missing, refused, of another size, or would lose every unit or one that must stay.
        """
        for name, kept in self.kept.items():
            group = groups.named(name)
            if group.units != self.units[name]:
                raise PlanError(
                    f"the plan was made for another model: {name} has {group.units} units here, "
                    f"{self.units[name]} in the plan"
                )
            if kept and kept[-1] >= group.units:
                raise PlanError(f"the plan keeps unit {kept[-1]} of {name}, which has only {group.units}")
            if any(b <= a for a, b in pairwise((-1, *kept))):
                raise PlanError(f"the units that the plan keeps of {name} do not ascend: {kept}")
            if len(kept) == group.units:
                continue
            if not group.prunable:
                raise PlanError(f"{name} cannot be pruned: {group.refusals[0]}")
            if not kept:
                raise PlanError(f"the plan removes every unit of {name}; at least one must stay")
            if gone := set(group.stays) - set(kept):
                raise PlanError(f"the plan removes unit {min(gone)} of {name}, which must stay")

    def check_checkpoint(self, sha256: str | None) -> None:
        """Make sure that the plan was made for the checkpoint with this hash, if it says for which one it was made.

        Raises:
            PlanError: it was made for another one.
        """
        made_for = self.provenance.get("model_sha256")
        if made_for and made_for != sha256:
            raise PlanError(
                f"the plan was made for another model: sha256 {made_for[:12]}..., here {str(sha256)[:12]}..."
            )

    def compose(self, later: PruningPlan) -> PruningPlan:
        """This plan followed by `later`, which was made on the model this one leaves.

        Raises:
            PlanError: `later` was made on another model.
        """
        kept, units = dict(self.kept), dict(self.units)
        for name, chosen in later.kept.items():
            first_name = self._name_before(name)
            before = self.kept.get(first_name, tuple(range(later.units[name])))
            if len(before) != later.units[name]:
                raise PlanError(
                    f"the plans do not follow each other: the first leaves {len(before)} units of {first_name}, "
                    f"the second starts from {later.units[name]}"
                )
            kept[first_name] = tuple(before[u] for u in chosen)
            units.setdefault(first_name, later.units[name])
        return PruningPlan(kept, units, {**self.provenance, **later.provenance})

    def following(self, first: PruningPlan) -> PruningPlan:
        """The plan for the model `first` leaves after which the same units are left as after this one.

        Raises:
            PlanError: this plan keeps a unit that `first` removes.
        """
        kept, units = {}, {}
        for name, chosen in self.kept.items():
            before = first.kept.get(name, tuple(range(self.units[name])))
            place = {unit: number for number, unit in enumerate(before)}
            if back := sorted(set(chosen) - place.keys()):
                raise PlanError(f"unit {back[0]} of {name} was removed before, so it cannot be kept")
            kept[name], units[name] = tuple(place[unit] for unit in chosen), len(before)
        return PruningPlan(kept, units, self.provenance)

    def _name_before(self, name: str) -> str:
        """What this plan's model calls the group that the model it leaves calls `name`: layers move up."""
        for group, kept in self.kept.items():
            path = group.removesuffix("/layer")
            found = re.match(re.escape(path) + r"\.(\d+)(?=[./])", name) if path != group else None
            if found and int(found.group(1)) < len(kept):
                return f"{path}.{kept[int(found.group(1))]}{name[found.end() :]}"
        return name

    def diff(self, other: PruningPlan) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Group name -> (units only this plan keeps, units only `other` keeps), for groups that differ."""
        found = {}
        for name in sorted({*self.kept, *other.kept}):
            everything = tuple(range(self.units.get(name, other.units.get(name, 0))))
            mine, theirs = set(self.kept.get(name, everything)), set(other.kept.get(name, everything))
            if mine != theirs:
                found[name] = (tuple(sorted(mine - theirs)), tuple(sorted(theirs - mine)))
        return found

    def to_json(self) -> str:
        """JSON text; kept units are written as ranges (`"0-2,5"`)."""
        groups = {n: {"units": self.units[n], "kept": format_ranges(k)} for n, k in self.kept.items()}
        return json.dumps({"schema": SCHEMA, "provenance": dict(self.provenance), "groups": groups}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str = "the text") -> PruningPlan:
        """The inverse of `to_json`.

        Args:
            origin: what the text is, for messages.

        Raises:
            PlanError: the text is not a plan.
        """
        no_plan, wanted = f"{origin} is not a pruning plan", "expected the plan.json that `secateur prune` writes"
        if not text.strip():
            raise PlanError(f"{no_plan}: it is empty; {wanted}")
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise PlanError(f"{no_plan}: no JSON, or cut short ({error.msg}, {place}); {wanted}") from error
        if not isinstance(data, dict) or not isinstance(data.get("groups"), dict) or "schema" not in data:
            raise PlanError(f"{no_plan}: it lacks `schema` and `groups`; {wanted}")
        if data["schema"] != SCHEMA:
            raise PlanError(f"{origin} has plan schema {data['schema']}; this version of Secateur reads {SCHEMA}")
        kept: dict[str, tuple[int, ...]] = {}
        units: dict[str, int] = {}
        for name, entry in data["groups"].items():
            try:
                kept[name], units[name] = parse_ranges(entry["kept"]), int(entry["units"])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                example = '{"units": 8, "kept": "0-2,5"}'
                raise PlanError(f"{no_plan}: group {name} is {entry!r}, where {example} shows the form") from error
        provenance = data.get("provenance", {})
        if not isinstance(provenance, dict):
            raise PlanError(f"{no_plan}: its `provenance` is no mapping; {wanted}")
        return cls(kept, units, provenance)

    def save(self, path: Path | str) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> PruningPlan:
        """Read a plan file.

        Raises:
            PlanError: the file is missing or is not a plan.
        """
        if Path(path).is_dir():
            raise PlanError(f"cannot read the plan {path}: it is a folder; give the file, such as {path}/plan.json")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        return cls.from_json(text, f"the plan {path}")
