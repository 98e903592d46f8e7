"""What kind of unit a leaf axis counts, told from what happened to it and never from a name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from secateur.discovery.axes import Axis, leaves
from secateur.discovery.recorder import Trace

Place = tuple[str, int]  # (parameter, dimension)


class Structure:
    """The leaves of a traced model, where they lie and what they do.

    Attributes:
        stored: parameter -> its axes, for everything in the state dict.
        places: leaf -> the (parameter, dimension) pairs it lies on, in the model's order.
        blocks: parameter -> the outermost layer it lies in, if any.
    """

    def __init__(self, trace: Trace, stored: Mapping[str, list[Axis]]) -> None:
        self.trace = trace
        self.stored = stored
        self._leaves: dict[Axis, frozenset[Axis]] = {}
        self.places: dict[Axis, list[Place]] = {}
        for name, axes in stored.items():
            for dim, axis in enumerate(axes):
                for leaf in dict.fromkeys(leaves(axis)):
                    self.places.setdefault(leaf, []).append((name, dim))
        self.blocks = {name: self._block_of(name) for name in stored}

    def leaves_of(self, axis: Axis) -> frozenset[Axis]:
        """The leaves an axis is made of."""
        axis = axis.find()
        if axis not in self._leaves:
            self._leaves[axis] = frozenset(leaves(axis))
        return self._leaves[axis]

    def _block_of(self, name: str) -> str | None:
        levels = name.split(".")
        prefixes = (".".join(levels[:n]) for n in range(1, len(levels)))
        return next((path for path in prefixes if path in self.trace.blocks), None)

    @cached_property
    def contracted(self) -> dict[str, set[Axis]]:
        """Parameter -> its axes that some matrix product sums over."""
        found: dict[str, set[Axis]] = {}
        for name, axis in self.trace.consumed:
            found.setdefault(name, set()).add(axis.find())
        return found

    def is_contracted(self, place: Place) -> bool:
        name, dim = place
        return self.stored[name][dim].find() in self.contracted.get(name, ())

    @cached_property
    def stream(self) -> frozenset[Axis]:
        """Leaves of what enters and leaves the layers; without known layers, the leaf that lies on most parameters."""
        ends = {axis.find() for pair in self.trace.blocks.values() for axis in pair}
        found = frozenset(leaf for axis in ends for leaf in self.leaves_of(axis) if leaf in self.places)
        if found or not self.places:
            return found
        return frozenset([max(self.places, key=lambda leaf: len(self.places[leaf]))])

    @cached_property
    def heads(self) -> dict[Axis, str]:
        """The leaves that count attention heads: beside a softmax over the sequence, other than batch and sequence.

        Heads that were repeated to meet the queries (`broadcast`) are queries sharing a key/value head; a head leaf
        beside such a leaf is a KV group, and one without is a plain attention head.
        """
        kinds: dict[Axis, str] = {}
        for reduced, others in self.trace.softmaxed:
            if not any("data" in leaf.hazards for leaf in self.leaves_of(reduced)):
                continue
            around = self._units(others)
            shared = any("broadcast" in leaf.traits for leaf in around)
            for leaf in around:
                kinds[leaf] = "query_head" if "broadcast" in leaf.traits else "kv_group" if shared else "attention_head"
        return kinds

    def _units(self, axes: Iterable[Axis]) -> set[Axis]:
        """The leaves that are neither batch nor sequence."""
        found = {leaf for axis in {a.find() for a in axes} for leaf in self.leaves_of(axis)}
        return {leaf for leaf in found if leaf.size > 1 and "data" not in leaf.hazards}

    @cached_property
    def scan_heads(self) -> set[Axis]:
        """The leaves that count heads of linear attention and state spaces: a batch of products, with no softmax."""
        return self._units(batch for batch, _ in self.trace.paired) - set(self.heads)

    @cached_property
    def matched(self) -> set[Axis]:
        """The leaves over which two activations are multiplied, such as queries with keys."""
        return self._units(inner for _, inner in self.trace.paired)

    @cached_property
    def expert_leaves(self) -> set[Axis]:
        """The leaves that a router chooses from."""
        return {leaf for leaf in self.places if "chosen" in leaf.traits and "data" not in leaf.hazards}

    def at_least(self, leaf: Axis) -> int:
        """How many units must stay so that every top-k still finds as many as it takes."""
        needs = [-(-k * leaf.size // axis.size) for axis, k in self.trace.chosen if leaf in self.leaves_of(axis)]
        return max([1, *needs])

    def beside(self, leaf: Axis, others: Iterable[Axis]) -> bool:
        """Whether the leaf and one of `others` are factors of one dimension of a parameter, or of one part of it."""
        wanted = set(others) - {leaf}
        parts = (part for name, dim in self.places[leaf] for part in summands(self.stored[name][dim]))
        return any(leaf in found and found & wanted for found in map(self.leaves_of, parts))

    def kind(self, leaf: Axis) -> str:
        """The kind of unit the leaf counts."""
        if leaf in self.heads:
            return self.heads[leaf]
        if "output" in leaf.hazards:
            return "vocabulary"
        if "table" in leaf.hazards:
            return "table"
        if leaf in self.expert_leaves:
            return "expert_group" if self._is_outer_expert(leaf) else "expert"
        if leaf in self.stream:
            return "hidden"
        if self._is_rank(leaf):
            return "lora_rank"
        return self._head_kind(leaf) or self._channel_kind(leaf)

    def _is_outer_expert(self, leaf: Axis) -> bool:
        """Whether routers first choose this leaf, a group of experts, and then experts within it."""
        axes = [self.stored[name][dim] for name, dim in self.places[leaf]]
        return any(len(self.leaves_of(a) & self.expert_leaves) > 1 and next(leaves(a)) is leaf for a in axes)

    def owns_weights(self, leaf: Axis) -> bool:
        """Whether units of a router's choice have weights of their own: blocks of a dimension, or stacked matrices."""
        return self.beside(leaf, set(self.places) - self.expert_leaves) or any(
            len(self.stored[name]) > 2 for name, _ in self.places[leaf]
        )

    def _head_kind(self, leaf: Axis) -> str | None:
        """Heads without softmax and the dimensions within heads."""
        if self.beside(leaf, self.heads):
            return "value_dim" if leaf not in self.matched and "constant" not in leaf.hazards else "head_dim"
        if leaf in self.scan_heads and leaf not in self.matched:
            return "ssm_head"
        if "convolved" in leaf.traits or self.beside(leaf, self.scan_heads):
            return "ssm_channel"
        if leaf in self.matched and "constant" in leaf.hazards:
            return "head_dim"
        return None

    def _channel_kind(self, leaf: Axis) -> str:
        """What a matrix product sums over within one layer: channels and bottlenecks."""
        places = self.places[leaf]
        consumers = [place for place in places if self.is_contracted(place)]
        blocks = {self.blocks[name] for name, _ in places}
        if not consumers or "constant" in leaf.hazards or len(blocks) > 1:
            return "other"
        if any(self.leaves_of(axis) & self.expert_leaves for name, _ in places for axis in self.stored[name]):
            return "expert_channel"
        if "activated" not in leaf.traits:
            return "latent"
        return "ffn_channel"

    def _is_rank(self, leaf: Axis) -> bool:
        """Whether the leaf is the bottleneck of two factors that run beside one matrix with the same outer axes."""
        places = self.places[leaf]
        if "activated" in leaf.traits or len(places) != 2 or any(len(self.stored[name]) != 2 for name, _ in places):
            return False
        down, up = sorted(places, key=self.is_contracted)
        if self.is_contracted(down) or not self.is_contracted(up):
            return False
        outer = {tuple(leaves(self.stored[name][1 - dim])) for name, dim in places}
        home = common_module([down[0], up[0]])
        same = [
            name
            for name, axes in self.stored.items()
            if name.startswith(home + ".") and len(axes) == 2 and {tuple(leaves(a)) for a in axes} == outer
        ]
        return bool(home) and len(same) == 1


def summands(axis: Axis) -> Iterator[Axis]:
    """What is concatenated in an axis; the axis itself if nothing is."""
    axis = axis.find()
    if not axis.is_sum:
        yield axis
    for part in axis.parts if axis.is_sum else ():
        yield from summands(part)


def common_module(names: Iterable[str]) -> str:
    """The deepest module that holds all these parameters."""
    levels = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for parts in zip(*levels, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
