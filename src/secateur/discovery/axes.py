"""The algebra of tensor dimensions: what a dimension is made of, learnt by unification.

A dimension starts as one opaque axis. Operations teach its structure: a view that splits `H*D` into `(H, D)` defines
the axis as a *product*, a chunk into gate and up defines it as a *sum*, an element-wise operation on two tensors makes
their axes *equal*. What is still undefined when the model has run is a leaf: an index set that nothing ties to a
literal position, which is exactly a set of removable units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from secateur.groups import IndexArray


@dataclass(frozen=True)
class Hazard:
    """Why the units of an axis must not be removed.

    Attributes:
        cause: `data`, `table`, `constant`, `literal`, `layout`, `unknown`, `output`.
        text: the reason, naming the operation or buffer.
    """

    cause: str
    text: str


class Axis:
    """One dimension, or a part of one. Compare axes only through `find()`.

    Attributes:
        size: number of positions.
        parts: what it is made of, if known: concatenated (`is_sum`) or row-major factors.
        hazards: reasons against removal, the first of each cause (one per cause keeps the axes that every layer shares
            cheap); handed down to the parts, so that every leaf knows its own.
        traits: what was seen to happen to the axis, for naming (`broadcast`); handed down likewise.
    """

    __slots__ = ("_link", "hazards", "is_sum", "parts", "size", "traits")

    def __init__(self, size: int, hazards: Sequence[Hazard] = ()) -> None:
        self.size = size
        self.parts: tuple[Axis, ...] = ()
        self.is_sum = False
        self.hazards: dict[str, Hazard] = {h.cause: h for h in hazards}
        self.traits: set[str] = set()
        self._link: Axis | None = None

    def find(self) -> Axis:
        """The representative of everything this axis was found equal to."""
        axis = self
        while axis._link is not None:
            axis = axis._link
        if axis is not self:
            self._link = axis  # path compression
        return axis

    def define(self, parts: Sequence[Axis], *, is_sum: bool) -> None:
        """Give an undefined axis its structure."""
        self.parts, self.is_sum = tuple(parts), is_sum
        for part in self.parts:
            part.mark(self.hazards.values(), self.traits)

    def link(self, other: Axis) -> None:
        """Make an undefined axis an alias of `other`."""
        other.mark(self.hazards.values(), self.traits)
        self._link = other

    def mark(self, hazards: Iterable[Hazard] = (), traits: Set[str] = frozenset()) -> None:
        """Add hazards and traits to this axis and everything it is made of."""
        axis = self.find()
        new = [h for h in hazards if h.cause not in axis.hazards]
        if not new and traits <= axis.traits:
            return
        axis.hazards.update((h.cause, h) for h in new)
        axis.traits |= traits
        for part in axis.parts:
            part.mark(new, traits)


def product(factors: Sequence[Axis]) -> Axis:
    """The axis of a row-major flattening of `factors`."""
    factors = [f for f in (f.find() for f in factors) if f.size != 1]
    flat: list[Axis] = []
    for f in factors:
        flat.extend(f.parts if f.parts and not f.is_sum else (f,))
    if len(flat) == 1:
        return flat[0].find()
    axis = Axis(math.prod(f.size for f in flat))
    if flat:
        axis.define(flat, is_sum=False)
    return axis


def concatenation(parts: Sequence[Axis]) -> Axis:
    """The axis of a concatenation of `parts`."""
    parts = [p for p in parts if p.size]
    if len(parts) == 1:
        return parts[0].find()
    axis = Axis(sum(p.size for p in parts))
    if parts:
        axis.define(parts, is_sum=True)
    return axis


def freeze(axis: Axis, hazard: Hazard) -> None:
    """Forbid the removal of anything below `axis`."""
    axis.mark([hazard])


def conflict(axes: Sequence[Axis], what: str) -> None:
    """Freeze axes whose structures cannot be brought together."""
    for axis in axes:
        freeze(axis, Hazard("layout", what))


def unify(a: Axis, b: Axis, where: str) -> None:
    """Learn that position i of `a` and position i of `b` are the same unit.

    `where` names the operation, for the reason given when the structures do not fit.
    """
    a, b = a.find(), b.find()
    if a is b:
        return
    if a.size != b.size:
        conflict((a, b), f"{where} ties axes of {a.size} and {b.size} positions")
    elif not a.parts:
        a.link(b)
    elif not b.parts:
        b.link(a)
    elif a.is_sum and b.is_sum:
        _align_sums(a, b, where)
    elif not a.is_sum and not b.is_sum:
        _align_products(a, b, where)
    else:
        total, prod = (a, b) if a.is_sum else (b, a)
        pieces = partition(prod, [p.size for p in total.parts], where)
        for part, piece in zip(total.parts, pieces, strict=True):
            unify(part, piece, where)


def _align_sums(a: Axis, b: Axis, where: str) -> None:
    cuts = sorted({*accumulate(p.size for p in a.parts), *accumulate(p.size for p in b.parts)})
    sizes = [stop - start for start, stop in pairwise([0, *cuts])]
    for x, y in zip(partition(a, sizes, where), partition(b, sizes, where), strict=True):
        unify(x, y, where)


def _align_products(a: Axis, b: Axis, where: str) -> None:
    inner = {math.prod(f.size for f in axis.parts[i:]) for axis in (a, b) for i in range(len(axis.parts))}
    steps = [*sorted(inner, reverse=True), 1]
    if any(big % small for big, small in pairwise(steps)):
        conflict((a, b), f"{where} ties two layouts that do not nest")
        return
    sizes = [big // small for big, small in pairwise(steps) if big != small]
    for x, y in zip(factorise(a, sizes, where), factorise(b, sizes, where), strict=True):
        unify(x, y, where)


def partition(axis: Axis, sizes: Sequence[int], where: str) -> list[Axis]:
    """Cut `axis` into consecutive pieces of these sizes, refining its structure where needed."""
    axis = axis.find()
    if len(sizes) == 1:
        return [axis]
    if not axis.parts:
        axis.define([Axis(s) for s in sizes], is_sum=True)
        return list(axis.parts)
    if axis.is_sum:
        return _partition_sum(axis, list(sizes), where)
    inner = math.prod(f.size for f in axis.parts[1:])
    if any(s % inner for s in sizes):
        conflict((axis,), f"{where} cuts through a block of {inner} positions")
        return _frozen_like(axis, sizes)
    outer = partition(axis.parts[0], [s // inner for s in sizes], where)
    return [product([piece, *axis.parts[1:]]) for piece in outer]


def _frozen_like(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Axes for the results of an operation that `axis` could not follow: what they meet later is frozen too."""
    hazards = [*axis.find().hazards.values()]
    return [Axis(s, hazards) for s in sizes]


def _partition_sum(axis: Axis, sizes: list[int], where: str) -> list[Axis]:
    """`partition` of a sum: whole parts go into the pieces, parts that a cut crosses are cut themselves."""
    waiting = [p.find() for p in reversed(axis.parts)]
    pieces: list[Axis] = []
    for size in sizes:
        piece: list[Axis] = []
        while size:
            part = waiting.pop()
            if part.size > size:
                head, tail = partition(part, [size, part.size - size], where)
                waiting.append(tail)
                part = head
            piece.append(part)
            size -= part.size
        pieces.append(concatenation(piece) if piece else Axis(0))
    return pieces


def factorise(axis: Axis, sizes: Sequence[int], where: str) -> list[Axis]:
    """Split `axis` into row-major factors of these sizes, refining its structure where needed."""
    axis = axis.find()
    if len(sizes) == 1:
        return [axis]
    if not axis.parts:
        axis.define([Axis(s) for s in sizes], is_sum=False)
        return list(axis.parts)
    outer, inner = sizes[0], math.prod(sizes[1:])
    if axis.is_sum:
        return _factorise_sum(axis, list(sizes), where)
    head: list[Axis] = []
    rest = [f.find() for f in axis.parts]
    while outer > 1:
        factor = rest.pop(0)
        if outer % factor.size == 0:
            outer //= factor.size
        elif factor.size % outer == 0:
            factor, tail = factorise(factor, [outer, factor.size // outer], where)
            rest.insert(0, tail)
            outer = 1
        else:
            conflict((axis,), f"{where} splits {axis.size} positions into {outer} x {inner} across its blocks")
            return _frozen_like(axis, sizes)
        head.append(factor)
    return [product(head), *factorise(product(rest), sizes[1:], where)]


def _factorise_sum(axis: Axis, sizes: list[int], where: str) -> list[Axis]:
    """`factorise` of a sum: possible if every part holds whole inner blocks, which then are all alike."""
    inner = math.prod(sizes[1:])
    if any(p.size % inner for p in axis.parts):
        conflict((axis,), f"{where} splits a concatenation into blocks of {inner} positions")
        return _frozen_like(axis, sizes)
    pairs = [factorise(p, [p.size // inner, inner], where) if p.size != inner else [Axis(1), p] for p in axis.parts]
    for _, block in pairs[1:]:
        unify(pairs[0][1], block, where)
    return [concatenation([count for count, _ in pairs]), *factorise(pairs[0][1], sizes[1:], where)]


def leaves(axis: Axis) -> Iterator[Axis]:
    """The undefined axes `axis` is made of, left to right, repeated where they repeat."""
    axis = axis.find()
    if not axis.parts:
        yield axis
    for part in axis.parts:
        yield from leaves(part)


class NotSeparableError(Exception):
    """A leaf occurs twice in one product, so its units are no set of positions."""


def positions(axis: Axis, leaf: Axis) -> IndexArray | None:
    """Which positions of `axis` belong to each unit of `leaf`.

    Returns:
        [leaf.size, width], rows ascending; None if the leaf does not occur.

    Raises:
        NotSeparableError: the leaf is a factor twice.
    """
    axis, leaf = axis.find(), leaf.find()
    if axis is leaf:
        return np.arange(leaf.size, dtype=np.int64)[:, None]
    if not axis.parts:
        return None
    found: list[IndexArray] = []
    offset, outer, inner = 0, 1, axis.size
    for part in axis.parts:
        inside = positions(part, leaf)
        if axis.is_sum:
            if inside is not None:
                found.append(inside + offset)
            offset += part.size
            continue
        inner //= part.size
        if inside is not None:
            if found:
                raise NotSeparableError
            blocks = np.arange(outer)[:, None, None] * part.size + inside[:, None, :, None]  # [units, outer, width, 1]
            found.append((blocks * inner + np.arange(inner)).reshape(leaf.size, -1))
        outer *= part.size
    return np.concatenate(found, axis=1) if found else None


def keep_mask(axis: Axis, kept: dict[Axis, NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Which positions of `axis` survive, given the surviving units of some leaves.

    Returns:
        Boolean array [axis.size].
    """
    axis = axis.find()
    if not axis.parts:
        return kept.get(axis, np.ones(axis.size, dtype=bool))
    masks = [keep_mask(part, kept) for part in axis.parts]
    if axis.is_sum:
        return np.concatenate(masks)
    whole = masks[0]
    for mask in masks[1:]:
        whole = (whole[:, None] & mask[None, :]).ravel()
    return whole
