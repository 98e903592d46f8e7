"""Coupled structures as pure data: which positions of which parameters can only be removed together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from secateur.errors import PlanError

Role = Literal["producer", "consumer"]
IndexArray = NDArray[np.int64]
# What can be pruned where a proof is found: everything but the tokens a model knows. `other` is what the structure does
# not tell more of.
OFFERED_KINDS = (
    "ffn_channel", "attention_head", "kv_group", "query_head", "head_dim", "value_dim", "hidden", "layer", "sublayer",
    "expert", "expert_group", "expert_channel", "latent", "ssm_channel", "ssm_head", "lora_rank", "other",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter that takes part in a group.

    Attributes:
        parameter: name in the model's state dict.
        dim: the dimension of the parameter.
        index: [units, width]; row u holds the positions on that dimension which belong to unit u, whatever the layout
            (contiguous block, strided, interleaved, several segments of a fused projection).
        role: `consumer` if a contraction sums over this axis (input columns of `down_proj`), else `producer`.
    """

    parameter: str
    dim: int
    index: IndexArray
    role: Role = "producer"


@dataclass(frozen=True, eq=False)
class Group:
    """All axes that share one index set. Removing unit u removes row u of every member's `index`.

    Attributes:
        name: stable and readable, for example `model.layers.0.mlp/ffn_channel`.
        kind: `ffn_channel`, `attention_head`, `kv_group`, `query_head`, `hidden`, `layer`, `sublayer`, or `other`.
        units: how many units there are.
        members: the axes; empty for `layer` and `sublayer`.
        blocks: for these two kinds only, the module path of each unit.
        refusals: why the group must not be pruned; empty if it may.
        at_least: units that must stay (a router that picks two experts needs two).
        stays: numbers of units that must stay whatever their scores.
        results: for kind `sublayer`, how many values each block returns in a tuple, 0 if it returns just a tensor.
    """

    name: str
    kind: str
    units: int
    members: tuple[Member, ...] = ()
    blocks: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    at_least: int = 1
    stays: tuple[int, ...] = ()
    results: int = 0

    @property
    def prunable(self) -> bool:
        return not self.refusals

    def check_zeroing(self) -> None:
        """Make sure that zeroed units are as good as removed ones.

        Raises:
            PlanError: they lie on rows whose norm DoRA divides by.
        """
        if any(".lora_magnitude_vector." in m.parameter for m in self.members):
            raise PlanError(
                f"{self.name} lies on rows that DoRA divides by their norm, so zeroing them gives no number: cut it in "
                "one step (iterations=1), or merge the adapter first"
            )

    @property
    def family(self) -> str:
        """The name with layer numbers replaced by `*`: groups of one family play the same part in each layer."""
        return re.sub(r"\.\d+(?=[./]|$)", ".*", self.name)

    @property
    def layer(self) -> int | None:
        """Number of the layer the group lies in, or None for a group that spans layers."""
        found = re.search(r"\.(\d+)(?=[./]|$)", self.name)
        return int(found.group(1)) if found else None

    def layer_of(self, path: str) -> int:
        """For a group of blocks, the number of the layer that a block or parameter lies in."""
        home = self.name.partition("/")[0]
        return int(path.removeprefix(home + ".").partition(".")[0])


Kept = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Groups(Sequence[Group]):
    """The groups of one model, with the shapes needed to count parameters.

    Attributes:
        groups: every group, refused ones included.
        shapes: shape of every parameter and persistent buffer in the state dict, tied ones once.
        buffers: the names in `shapes` that are buffers; they are cut like parameters but not counted.
        tied: further state-dict names of a parameter -> the name it is listed under.
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        return self.groups[i]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def named(self, name: str) -> Group:
        """The group called `name`.

        Raises:
            PlanError: there is none.
        """
        if name not in self._by_name:
            raise PlanError(f"the model has no group {name!r}; `secateur groups MODEL` lists those it has")
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def on_axis(self) -> Mapping[tuple[str, int], tuple[Group, ...]]:
        """(parameter, dim) -> the groups that lie on that axis."""
        found: dict[tuple[str, int], tuple[Group, ...]] = {}
        for group in self.groups:
            for axis in dict.fromkeys((m.parameter, m.dim) for m in group.members):
                found[axis] = (*found.get(axis, ()), group)
        return found

    @property
    def prunable(self) -> tuple[Group, ...]:
        return tuple(g for g in self.groups if g.prunable)

    def of_kinds(self, kinds: Sequence[str]) -> tuple[Group, ...]:
        """The prunable groups of these kinds."""
        return tuple(g for g in self.prunable if g.kind in kinds)

    def only(self, kinds: Sequence[str]) -> Groups:
        """The same model with just its prunable groups of these kinds."""
        return replace(self, groups=self.of_kinds(kinds))

    def kinds_in_blocks(self) -> tuple[str, ...]:
        """FFN channels and heads, under the names they have here.

        Where one KV head serves all queries, its query heads are the only heads there are.
        """
        has = {g.kind for g in self.groups}
        heads = {"attention_head", "kv_group"} & has or {"query_head"}
        return tuple(sorted({"ffn_channel", "expert_channel"} & has | heads))

    def families(self, kinds: Sequence[str]) -> dict[str, list[Group]]:
        """The prunable groups of these kinds, by family."""
        found: dict[str, list[Group]] = {}
        for group in self.of_kinds(kinds):
            found.setdefault(group.family, []).append(group)
        return found

    @property
    def total_parameters(self) -> int:
        """Number of parameters of the uncut model, tied ones counted once."""
        return sum(int(np.prod(s)) for n, s in self.shapes.items() if n not in self.buffers)

    def kept_positions(self, kept: Kept) -> dict[str, dict[int, IndexArray]]:
        """Which positions survive on every axis that changes: parameter -> dim -> ascending positions.

        Parameters inside removed blocks are absent; `removed_blocks` names those blocks.
        """
        masks: dict[tuple[str, int], NDArray[np.bool_]] = {}
        removed = self.removed_prefixes(kept)
        for name, units in kept.items():
            group = self.named(name)
            gone = np.setdiff1d(np.arange(group.units), np.asarray(units, dtype=np.int64))
            if gone.size == 0:
                continue
            for m in group.members:
                if m.parameter.startswith(removed):
                    continue
                mask = masks.setdefault((m.parameter, m.dim), np.ones(self.shapes[m.parameter][m.dim], dtype=bool))
                mask[m.index[gone].ravel()] = False
        positions: dict[str, dict[int, IndexArray]] = {}
        for (parameter, dim), mask in masks.items():
            positions.setdefault(parameter, {})[dim] = np.flatnonzero(mask)
        return positions

    def removed_blocks(self, kept: Kept, kinds: Sequence[str] = ("layer", "sublayer")) -> tuple[str, ...]:
        """Module paths of the layers and sublayers that go."""
        gone: list[str] = []
        for name, units in kept.items():
            group, stay = self.named(name), set(units)
            if group.kind in kinds:
                gone += [block for u, block in enumerate(group.blocks) if u not in stay]
        return tuple(gone)

    def removed_prefixes(self, kept: Kept) -> tuple[str, ...]:
        """What the names of parameters, blocks and groups inside removed blocks begin with."""
        return tuple(block + end for block in self.removed_blocks(kept) for end in "./")

    def remaining_shapes(self, kept: Kept) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer that is left when only the `kept` units stay."""
        positions = self.kept_positions(kept)
        gone = self.removed_prefixes(kept)
        left: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes.items():
            if name.startswith(gone):
                continue
            dims = positions.get(name, {})
            left[name] = tuple(len(dims[d]) if d in dims else size for d, size in enumerate(shape))
        return left

    def remaining_parameters(self, kept: Kept) -> int:
        """Number of parameters left when only the `kept` units stay (groups not named keep everything)."""
        shapes = self.remaining_shapes(kept)
        return sum(int(np.prod(s)) for n, s in shapes.items() if n not in self.buffers)

    def after(self, kept: Kept) -> Groups:
        """The groups of the model that keeps these units, by the names and in the order they have here.

        Raises:
            PlanError: layers or sublayers go, or groups overlap so that a unit would lose more positions than others.
        """
        if gone := self.removed_blocks(kept):
            raise PlanError(f"{gone[0]} goes as a whole, so the groups that are left have other names")
        positions, shapes = self.kept_positions(kept), self.remaining_shapes(kept)

        def moved(member: Member, units: Sequence[int]) -> Member:
            index = member.index[list(units)]
            stay = positions.get(member.parameter, {}).get(member.dim)
            if stay is None:
                return replace(member, index=index)
            alive = np.isin(index, stay)
            if len(set(alive.sum(1).tolist())) > 1:
                raise PlanError(f"units on {member.parameter} dimension {member.dim} would differ in size")
            return replace(member, index=np.searchsorted(stay, index[alive]).reshape(len(units), -1))

        left = []
        for group in self.groups:
            units = kept.get(group.name, range(group.units))
            members = tuple(moved(m, units) for m in group.members)
            stays = tuple(new for new, old in enumerate(units) if old in group.stays)
            count = len(units) if group.members else group.units
            left.append(replace(group, units=count, members=members, stays=stays))
        return replace(self, groups=tuple(left), shapes=shapes)
