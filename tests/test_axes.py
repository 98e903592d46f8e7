"""The algebra of dimensions against brute force: every refinement must agree with plain position arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.discovery.axes import (
    Axis,
    Hazard,
    NotSeparableError,
    concatenation,
    factorise,
    freeze,
    keep_mask,
    leaves,
    partition,
    positions,
    product,
    unify,
)


def test_view_learns_a_product():
    rows = Axis(12)
    heads, width = factorise(rows, [3, 4], "view")
    np.testing.assert_array_equal(positions(rows, heads), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    np.testing.assert_array_equal(positions(rows, width), [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]])


def test_chunk_then_equal_halves_is_an_interleaved_group():
    fused = Axis(10)
    gate, up = partition(fused, [5, 5], "chunk")
    unify(gate, up, "mul")
    np.testing.assert_array_equal(positions(fused, gate), [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]])


def test_rotate_half_ties_the_halves():
    width = Axis(6)
    first, second = partition(width, [3, 3], "slice")
    unify(width, concatenation([second, first]), "mul")
    assert len(set(leaves(width))) == 1


def test_repeated_kv_heads_refine_the_query_heads():
    queries, kv, repeats = Axis(6), Axis(3), Axis(2)
    unify(queries, product([kv, repeats]), "bmm")
    np.testing.assert_array_equal(positions(queries, kv), [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(positions(queries, repeats), [[0, 2, 4], [1, 3, 5]])


def test_product_of_a_sum_distributes():
    """Fused (kv, queries + key + value, width) cut along its middle dimension, as Falcon does."""
    rows = Axis(3 * 4 * 2)
    kv, middle, width = factorise(rows, [3, 4, 2], "view")
    query, key, value = partition(middle, [2, 1, 1], "slice")
    expected = [[(k * 4 + q) * 2 + w for k in range(3) for w in range(2)] for q in range(2)]
    np.testing.assert_array_equal(positions(rows, query), expected)
    assert {key.size, value.size} == {1} and width.size == 2 and kv.size == 3


def test_layouts_that_do_not_nest_freeze_both():
    a, b = Axis(6), Axis(6)
    factorise(a, [2, 3], "view")
    factorise(b, [3, 2], "view")
    unify(a, b, "aten.add")
    assert all(any(h.cause == "layout" and "aten.add" in h.text for h in leaf.hazards.values()) for leaf in leaves(a))


def test_sizes_that_differ_freeze_both():
    a, b = Axis(6), Axis(5)
    unify(a, b, "aten.add")
    assert a.hazards and b.hazards


def test_hazards_reach_leaves_found_before_and_after():
    axis = Axis(12)
    factorise(axis, [3, 4], "view")
    freeze(axis, Hazard("constant", "because"))
    more = [leaf for part in axis.parts for leaf in factorise(part, [part.size, 1][:1], "view")]
    assert all(Hazard("constant", "because") in leaf.hazards.values() for leaf in [*leaves(axis), *more])


def test_hazards_of_a_flattened_batch_reach_the_heads():
    """A constant over batch x heads forbids removing heads, although no parameter has that product."""
    heads, batch = Axis(3), Axis(2)
    unify(product([batch, heads]), Axis(6, [Hazard("constant", "alibi")]), "baddbmm")
    assert Hazard("constant", "alibi") in heads.find().hazards.values()


def test_a_factor_that_occurs_twice_is_not_separable():
    a, b = Axis(2), Axis(2)
    square = product([a, b])
    unify(a, b, "add")
    with pytest.raises(NotSeparableError):
        positions(square, a)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_positions_and_keep_mask_agree(factors, data):
    """Removing a unit of any leaf removes exactly its positions."""
    axis = Axis(int(np.prod(factors)))
    parts = factorise(axis, factors, "view") if len(factors) > 1 else [axis]
    for part in parts:
        if part.size > 2 and data.draw(st.booleans()):
            cut = data.draw(st.integers(1, part.size - 1))
            partition(part, [cut, part.size - cut], "slice")
    for leaf in dict.fromkeys(leaves(axis)):
        kept = np.array(data.draw(st.lists(st.booleans(), min_size=leaf.size, max_size=leaf.size)))
        mask = np.ones(axis.size, dtype=bool)
        mask[positions(axis, leaf)[~kept].ravel()] = False
        np.testing.assert_array_equal(keep_mask(axis, {leaf: kept}), mask)
