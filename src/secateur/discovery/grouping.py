"""From a trace to named groups: collect the positions of every leaf axis, tell what kind of unit it is, name it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from secateur.discovery.axes import Axis, NotSeparableError, leaves, positions
from secateur.discovery.trace import Trace
from secateur.groups import Group, Groups, Member

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_KINDS = ("attention_head", "kv_group", "query_head")


def build_groups(model: PreTrainedModel, trace: Trace) -> tuple[Groups, dict[str, Axis]]:
    """The groups of a traced model, and the leaf axis of each by name."""
    stored = {name: axes for name, axes in trace.parameters.items() if _is_stored(model, name)}
    heads = _head_leaves(trace)
    found: dict[str, Group] = {}
    leaf_of: dict[str, Axis] = {}
    for leaf, places in _leaves_of(stored).items():
        if leaf.size == 1:
            continue
        group = _group_of(leaf, places, stored, trace, heads)
        name, copies = group.name, 2
        while name in found:
            name, copies = f"{group.name}.{copies}", copies + 1
        found[name] = replace(group, name=name)
        leaf_of[name] = leaf
    groups = [*found.values(), *_layer_groups(trace)]
    shapes = {name: tuple(a.size for a in axes) for name, axes in stored.items()}
    groups = [_refuse_unread(g, trace, shapes) for g in groups]
    groups.sort(key=lambda g: (g.layer is None, g.layer or 0))
    buffers = frozenset(n for n, _ in model.named_buffers() if n in shapes)
    return Groups(tuple(groups), shapes, buffers, _tied(model, shapes)), leaf_of


def _is_stored(model: PreTrainedModel, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    return attribute not in model.get_submodule(path)._non_persistent_buffers_set


def _tied(model: PreTrainedModel, shapes: Iterable[str]) -> dict[str, str]:
    """Further names of each parameter -> the name it is listed under."""
    everything = dict(model.named_parameters(remove_duplicate=False))
    listed = {id(everything[n]): n for n in shapes if n in everything}
    return {n: listed[id(t)] for n, t in everything.items() if n != listed.get(id(t), n)}


def _leaves_of(stored: dict[str, list[Axis]]) -> dict[Axis, list[tuple[str, int]]]:
    """Leaf -> the (parameter, dimension) pairs it lies on, in the model's order."""
    places: dict[Axis, list[tuple[str, int]]] = {}
    for name, axes in stored.items():
        for dim, axis in enumerate(axes):
            for leaf in dict.fromkeys(leaves(axis)):
                places.setdefault(leaf, []).append((name, dim))
    return places


def _head_leaves(trace: Trace) -> dict[Axis, str]:
    """The leaves that count heads: those beside a softmax over the sequence, other than batch and sequence.

    Heads that were repeated to meet the queries (`broadcast`) are queries sharing a key/value head; a head leaf beside
    such a leaf is a KV group, and one without is a plain attention head.
    """
    kinds: dict[Axis, str] = {}
    for reduced, others in trace.softmaxed:
        if not any(h.cause == "data" for leaf in leaves(reduced) for h in leaf.hazards):
            continue
        around = [leaf for axis in others for leaf in leaves(axis)]
        around = [leaf for leaf in around if leaf.size > 1 and not any(h.cause == "data" for h in leaf.hazards)]
        shared = any("broadcast" in leaf.traits for leaf in around)
        for leaf in around:
            kinds[leaf] = "query_head" if "broadcast" in leaf.traits else "kv_group" if shared else "attention_head"
    return kinds


def _group_of(
    leaf: Axis,
    places: list[tuple[str, int]],
    stored: dict[str, list[Axis]],
    trace: Trace,
    heads: dict[Axis, str],
) -> Group:
    refusals = sorted({h.text for h in leaf.hazards})
    consumed = {name for name, axis in trace.consumed if leaf in set(leaves(axis))}
    members = []
    for name, dim in places:
        try:
            index = positions(stored[name][dim], leaf)
        except NotSeparableError:
            refusals.append(f"the units of {name} dimension {dim} are no set of positions")
            continue
        assert index is not None
        role = "consumer" if name in consumed and _contracted(trace, name, stored[name][dim]) else "producer"
        members.append(Member(name, dim, index, role))  # type: ignore[arg-type]
    kind = _kind_of(leaf, places, stored, trace, heads, bool(consumed))
    return Group(
        f"{_home(places, trace, kind)}/{kind}".lstrip("/"), kind, leaf.size, tuple(members), (), tuple(refusals)
    )


def _contracted(trace: Trace, name: str, axis: Axis) -> bool:
    """Whether some matrix product sums over this dimension of the parameter."""
    return any(n == name and a.find() is axis.find() for n, a in trace.consumed)


def _kind_of(
    leaf: Axis,
    places: list[tuple[str, int]],
    stored: dict[str, list[Axis]],
    trace: Trace,
    heads: dict[Axis, str],
    contracted: bool,
) -> str:
    blocks = {_block_of(name, trace) for name, _ in places}
    if leaf in heads:
        return heads[leaf]
    if any(h.cause in ("table", "output") for h in leaf.hazards):
        return "vocabulary" if any(h.cause == "output" for h in leaf.hazards) else "table"
    if any(heads.get(other) for name, dim in places for other in leaves(stored[name][dim])):
        return "head_dim"
    if len(blocks) > 1 or None in blocks:
        return "hidden"
    if contracted and all(len(stored[name]) <= 2 for name, _ in places):
        return "ffn_channel" if not any(h.cause == "constant" for h in leaf.hazards) else "head_dim"
    return "other"


def _block_of(parameter: str, trace: Trace) -> str | None:
    """The outermost layer a parameter lies in."""
    candidates = [path for path in trace.blocks if parameter.startswith(path + ".")]
    return min(candidates, key=len, default=None)


def _home(places: list[tuple[str, int]], trace: Trace, kind: str) -> str:
    """The module a group is named after: the deepest one that holds all its parameters."""
    names = [name.split(".") for name, _ in places]
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*(parts[:-1] for parts in names), strict=False))
    common = [level[0] for level in shared]
    return "" if kind == "hidden" and len({_block_of(n, trace) for n, _ in places}) > 1 else ".".join(common)


def _layer_groups(trace: Trace) -> list[Group]:
    """Lists of blocks whose output lies on the same axis as their input: any of them can be bypassed."""
    lists: dict[str, list[str]] = defaultdict(list)
    for path, (entering, leaving) in trace.blocks.items():
        if entering.find() is leaving.find():
            lists[path.rpartition(".")[0]].append(path)
    outer = [p for p in lists if not any(p.startswith(f"{other}.") for other in lists if other != p)]
    return [
        Group(f"{path}/layer", "layer", len(lists[path]), blocks=tuple(lists[path]))
        for path in outer
        if len(lists[path]) > 1
    ]


def _refuse_unread(group: Group, trace: Trace, shapes: dict[str, tuple[int, ...]]) -> Group:
    """A parameter the trace never reached may share any axis of fitting size: refuse those groups."""
    sizes = {shapes[m.parameter][m.dim] for m in group.members}
    for name in trace.unread:
        if sizes & set(shapes.get(name, ())):
            reason = f"{name} takes no part in the forward pass, so it is unknown whether it shares this dimension"
            return replace(group, refusals=(*group.refusals, reason))
    return group
