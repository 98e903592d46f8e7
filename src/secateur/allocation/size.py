"""The number of parameters as a polynomial in the numbers of units kept: exact, and quick enough to search with."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from secateur.allocation.families import Family
from secateur.errors import PlanError
from secateur.groups import Groups, IndexArray

Monomial = tuple[int, ...]  # the variables multiplied; one that is squared stands twice
Polynomial = Mapping[Monomial, int]


@dataclass(frozen=True, eq=False)
class Size:
    """A polynomial in the counts of families, for example: parameters = 49152 + 96 hidden + 6 hidden ffn.

    A removed block takes all its parameters with it, so every block has a variable of its own that is 1 while it
    stays; the order of removal is known, so the count of its family tells.

    Attributes:
        coefficients: [terms].
        factors: [terms, degree]; variables multiplied, padded with the constant 1, which is the last variable.
            Variable f is the count of family f; the blocks follow.
        block_family: [blocks]; the family that removes the block.
        block_needs: [blocks]; the smallest count of that family with which the block stays.
    """

    coefficients: IndexArray
    factors: IndexArray
    block_family: IndexArray
    block_needs: IndexArray

    def at(self, counts: IndexArray) -> int:
        """The value when every group of family f keeps `counts[f]` units."""
        return int(self.coefficients @ self._values(counts)[self.factors].prod(axis=1))

    def drops(self, counts: IndexArray, family: int, choices: IndexArray) -> IndexArray:
        """By how much each step from one of `choices` to the next lowers the value, others staying at `counts`."""
        if family in self.block_family:
            values = [self.at(np.where(np.arange(len(counts)) == family, c, counts)) for c in choices]
            return np.array([before - after for before, after in pairwise(values)], dtype=np.int64)
        chosen = self.factors == family
        used = chosen.any(axis=1)
        others = np.where(chosen, 1, self._values(counts)[self.factors])[used].prod(axis=1)
        powers = choices[:, None] ** chosen[used].sum(axis=1)
        steps: IndexArray = np.diff(powers @ (self.coefficients[used] * others))
        return -steps

    def _values(self, counts: IndexArray) -> IndexArray:
        blocks = counts[self.block_family] >= self.block_needs
        values: IndexArray = np.concatenate([counts, blocks.astype(np.int64), np.ones(1, dtype=np.int64)])
        return values


def parameters_left(groups: Groups, families: Sequence[Family]) -> Size:
    """The number of parameters left; agrees with `Groups.remaining_parameters` for every choice of counts.

    Raises:
        PlanError: two groups overlap on an axis in such a way that their counts do not determine its size.
    """
    variable = {
        g.name: (f, scale)
        for f, family in enumerate(families)
        for g, scale in zip(family.groups, family.scales, strict=True)
    }
    axes: dict[tuple[str, int], dict[str, list[IndexArray]]] = defaultdict(lambda: defaultdict(list))
    for family in families:
        for group in family.groups:
            for m in group.members:
                axes[m.parameter, m.dim][group.name].append(m.index)
    block_family, block_needs, block_variable = _blocks(families)
    total: Counter[Monomial] = Counter()
    for name, shape in groups.shapes.items():
        if name in groups.buffers:
            continue
        product: Polynomial = {(): 1}
        for dim, size in enumerate(shape):
            factor = _axis_size(f"{name} dimension {dim}", size, axes.get((name, dim), {}), variable)
            product = _times(product, factor)
        inside = [v for block, v in block_variable.items() if name.startswith(block + ".")]
        for monomial, coefficient in product.items():
            total[tuple(sorted((*monomial, *inside)))] += coefficient
    return _compiled(total, len(families), block_family, block_needs)


def units_left(families: Sequence[Family]) -> Size:
    """The number of units left in all groups whose count is not fixed."""
    total: dict[Monomial, int] = {(f,): sum(family.scales) for f, family in enumerate(families) if not family.fixed}
    return _compiled(total, len(families), [], [])


def _blocks(families: Sequence[Family]) -> tuple[list[int], list[int], dict[str, int]]:
    block_family: list[int] = []
    block_needs: list[int] = []
    variable: dict[str, int] = {}
    for f, family in enumerate(families):
        for group, order in zip(family.groups, family.orders, strict=True):
            for place, unit in enumerate(order.tolist() if group.blocks else []):
                variable[group.blocks[unit]] = len(families) + len(block_family)
                block_family.append(f)
                block_needs.append(group.units - place)
    return block_family, block_needs, variable


def _axis_size(
    where: str, size: int, parts: Mapping[str, list[IndexArray]], variable: Mapping[str, tuple[int, int]]
) -> Polynomial:
    """Positions left on one axis; `variable` tells each group's variable and the units that one of it stands for.

    Positions that the same groups lay claim to form a block in which every combination of their units has the same
    number of positions (a query head within its KV group), so the block shrinks by the product of the shares kept.
    """
    if not parts:
        return {(): size}
    owners = list(parts)
    units = [parts[name][0].shape[0] for name in owners]
    unit_at = np.full((len(owners), size), -1, dtype=np.int64)
    for row, name in enumerate(owners):
        for index in parts[name]:
            unit_at[row, index] = np.arange(units[row])[:, None]
    claims = ((unit_at >= 0) << np.arange(len(owners))[:, None]).sum(axis=0)
    left: Counter[Monomial] = Counter()
    for claim in np.unique(claims).tolist():
        rows = [row for row in range(len(owners)) if claim >> row & 1]
        places = unit_at[rows][:, claims == claim]
        each, rest = divmod(places.shape[1], int(np.prod([units[r] for r in rows])))
        if rows and (rest or (np.bincount(np.ravel_multi_index(list(places), [units[r] for r in rows])) != each).any()):
            raise PlanError(
                f"{' and '.join(owners)} overlap irregularly on {where}: the number of units does not determine its "
                "size; cut one of the kinds at a time"
            )
        scale = math.prod(variable[owners[r]][1] for r in rows)
        left[tuple(sorted(variable[owners[r]][0] for r in rows))] += each * scale
    return left


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Counter[Monomial] = Counter()
    for left, m in a.items():
        for right, n in b.items():
            product[tuple(sorted((*left, *right)))] += m * n
    return product


def _compiled(total: Polynomial, families: int, block_family: Sequence[int], block_needs: Sequence[int]) -> Size:
    one = families + len(block_family)
    degree = max((len(m) for m in total), default=0)
    factors = [[*m, *[one] * (degree - len(m))] for m in total]
    return Size(
        np.array(list(total.values()), dtype=np.int64),
        np.array(factors, dtype=np.int64).reshape(len(total), degree),
        np.array(block_family, dtype=np.int64),
        np.array(block_needs, dtype=np.int64),
    )
