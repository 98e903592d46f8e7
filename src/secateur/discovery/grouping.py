"""From a trace to named groups: collect the positions of every leaf axis, tell what kind of unit it is, name it."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from secateur.discovery.axes import Axis, NotSeparableError, positions
from secateur.discovery.kinds import Structure, common_module
from secateur.discovery.recorder import Trace
from secateur.discovery.stand_ins import replaced_parameters
from secateur.groups import Group, Groups, IndexArray, Member

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_groups(model: PreTrainedModel, trace: Trace) -> tuple[Groups, dict[str, Axis]]:
    """The groups of a traced model, and the leaf axis of each by name."""
    structure = Structure(trace, {name: axes for name, axes in trace.parameters.items() if is_stored(model, name)})
    names = _names(structure)
    groups = [_group_of(structure, leaf, kind, name) for leaf, (kind, name) in names.items()]
    groups += _block_groups(structure, {name for _, name in names.values()})
    shapes = {name: tuple(a.size for a in axes) for name, axes in structure.stored.items()}
    buffers = frozenset(n for n, _ in model.named_buffers() if n in shapes)
    replaced = replaced_parameters(model)
    groups = [_refuse_replaced(_refuse_unread(_refuse_buffers(g, buffers), trace, shapes), replaced) for g in groups]
    groups.sort(key=lambda g: (g.layer is None, g.layer or 0))
    leaf_of = {name: leaf for leaf, (_, name) in names.items()}
    return Groups(tuple(groups), shapes, buffers, _tied(model, shapes)), leaf_of


def is_stored(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter or buffer is part of the state dict."""
    path, _, attribute = name.rpartition(".")
    return attribute not in model.get_submodule(path)._non_persistent_buffers_set


def _tied(model: PreTrainedModel, shapes: Iterable[str]) -> dict[str, str]:
    """Further names of each parameter -> the name it is listed under."""
    everything = dict(model.named_parameters(remove_duplicate=False))
    listed = {id(everything[n]): n for n in shapes if n in everything}
    return {n: listed[id(t)] for n, t in everything.items() if n != listed.get(id(t), n)}


def _names(structure: Structure) -> dict[Axis, tuple[str, str]]:
    """Leaf -> its kind and name: the deepest module that holds all its parameters, or where that is not enough to
    tell leaves apart, the module of the first parameter that produces it."""
    kinds = {leaf: structure.kind(leaf) for leaf in structure.places if leaf.size > 1}
    homes = {leaf: f"{_home(structure, leaf, kind)}/{kind}".lstrip("/") for leaf, kind in kinds.items()}
    shared = Counter(homes.values())
    found: dict[Axis, tuple[str, str]] = {}
    taken: Counter[str] = Counter()
    for leaf, kind in kinds.items():
        name = homes[leaf]
        if shared[name] > 1 and "/" in name:
            places = structure.places[leaf]
            first = next((p for p in places if not structure.is_contracted(p)), places[0])[0]
            name = f"{first.rpartition('.')[0]}/{kind}"
        taken[name] += 1
        found[leaf] = kind, name if taken[name] == 1 else f"{name}-{taken[name]}"
    return found


def _home(structure: Structure, leaf: Axis, kind: str) -> str:
    """The module a group is named after; none for a hidden dimension that passes through several layers."""
    parameters = [name for name, _ in structure.places[leaf]]
    if kind == "hidden" and len({structure.blocks[name] for name in parameters}) > 1:
        return ""
    return common_module(parameters)


def _group_of(structure: Structure, leaf: Axis, kind: str, name: str) -> Group:
    refusals = sorted({h.text for h in leaf.hazards.values()})
    members = []
    seen: dict[Axis, IndexArray | None] = {}  # many parameters share one axis, and then one array
    for parameter, dim in structure.places[leaf]:
        axis = structure.stored[parameter][dim].find()
        if axis not in seen:
            try:
                seen[axis] = positions(axis, leaf)
            except NotSeparableError:
                seen[axis] = None
                refusals.append(f"the units of {parameter} dimension {dim} are no set of positions")
        index = seen[axis]
        if index is not None:
            role = "consumer" if structure.is_contracted((parameter, dim)) else "producer"
            members.append(Member(parameter, dim, index, role))  # type: ignore[arg-type]
    if kind in ("expert", "expert_group") and not structure.owns_weights(leaf):
        refusals.append("a router chooses among these units, but the trace does not show which weights belong to each")
    return Group(name, kind, leaf.size, tuple(members), (), tuple(refusals), structure.at_least(leaf))


def _block_groups(structure: Structure, taken: set[str]) -> list[Group]:
    """Lists of blocks whose output lies on the same axis as their input: any of them can be bypassed; and what may be
    left out of single ones of them."""
    lists: dict[str, list[str]] = defaultdict(list)
    for path, (entering, leaving) in structure.trace.blocks.items():
        if entering.find() is leaving.find():
            lists[path.rpartition(".")[0]].append(path)
    outer = [p for p in lists if not any(p.startswith(f"{other}.") for other in lists if other != p)]
    found = []
    for path in outer:
        if len(lists[path]) > 1:
            found.append(Group(f"{path}/layer", "layer", len(lists[path]), blocks=tuple(lists[path])))
            found += _sublayer_groups(structure, path, lists[path], {*taken, f"{path}/layer"})
    return found


def _sublayer_groups(structure: Structure, home: str, layers: list[str], taken: set[str]) -> list[Group]:
    """For each child that only adds to what passes through these layers, the layers that have it.

    The first block with attention stays: cached decoding reads the length of the cache there.
    """
    trace = structure.trace
    streams = {layer: trace.blocks[layer][0].find() for layer in layers}
    positions: dict[str, list[str]] = defaultdict(list)
    for path, child in trace.children.items():
        layer, _, position = path.rpartition(".")
        if layer not in streams or path not in trace.added[layer]:
            continue
        if child.entering.find() is child.leaving.find() is streams[layer]:
            positions[position].append(path)
    attending = {name for leaf in structure.heads for name, _ in structure.places.get(leaf, ())}
    found = []
    for position, blocks in positions.items():
        if len(blocks) < 2:
            continue
        name = f"{home}/{position}" if f"{home}/{position}" not in taken else f"{home}/{position}-2"
        with_heads = (u for u, block in enumerate(blocks) if any(p.startswith(block + ".") for p in attending))
        stays = tuple(itertools.islice(with_heads, 1))
        results = sorted({trace.children[block].results for block in blocks})
        alike = results in ([0], [2])
        refusals = () if alike else ("its blocks do not all return a tensor, or all a pair that begins with one",)
        group = Group(name, "sublayer", len(blocks), blocks=tuple(blocks), refusals=refusals)
        found.append(replace(group, stays=stays, results=results[0]))
    return found


def _refuse_buffers(group: Group, buffers: frozenset[str]) -> Group:
    """Units that own no parameter are positions of a table that the model computes for itself."""
    if group.members and all(m.parameter in buffers for m in group.members):
        return replace(group, refusals=(*group.refusals, "only buffers lie on it, so nothing trained would go"))
    return group


def _refuse_replaced(group: Group, replaced: Mapping[str, str]) -> Group:
    """Units of parameters that other tensors stand in for while the model runs; that reason comes first."""
    within = (r for path, r in replaced.items() for m in group.members if m.parameter.startswith(path + "."))
    reason = next(within, None)
    return group if reason is None else replace(group, refusals=(reason, *group.refusals))


def _refuse_unread(group: Group, trace: Trace, shapes: dict[str, tuple[int, ...]]) -> Group:
    """A parameter the trace never reached may share any axis of fitting size: refuse those groups."""
    sizes = {shapes[m.parameter][m.dim] for m in group.members}
    for name in trace.unread:
        if sizes & set(shapes.get(name, ())):
            reason = f"{name} takes no part in the forward pass, so it is unknown whether it shares this dimension"
            return replace(group, refusals=(*group.refusals, reason))
    return group
