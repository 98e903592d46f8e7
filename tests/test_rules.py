"""What each operation teaches, on graphs of one or a few operations made by hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import secateur.discovery.rules  # noqa: F401  (registers the rules)
from secateur.discovery.axes import Axis, Hazard, leaves, positions
from secateur.discovery.recorder import RULES, Trace, Tracer
from secateur.discovery.setting import _PlainCalls

aten = torch.ops.aten


class Graph:
    """Tensors with fresh axes, and the trace of what is done to them."""

    def __init__(self) -> None:
        self.trace = Trace()

    def parameter(self, name: str, *shape: int) -> Tensor:
        tensor = torch.rand(shape)
        axes = [Axis(s) for s in shape]
        self.trace.set(tensor, axes)
        self.trace.parameters[name] = axes
        self.trace.set_origin(tensor, name)
        return tensor

    def data(self, *shape: int, tokens: int = 1) -> Tensor:
        """An activation whose first `tokens` dimensions are batch or sequence."""
        tensor = torch.rand(shape)
        hazard = Hazard("data", "a batch or sequence dimension")
        self.trace.set(tensor, [Axis(s, [hazard] if d < tokens else []) for d, s in enumerate(shape)])
        return tensor

    def axis(self, tensor: Tensor, dim: int) -> Axis:
        return self.trace.dims(tensor)[dim].find()

    def causes(self, tensor: Tensor, dim: int) -> set[str]:
        return {cause for leaf in leaves(self.trace.dims(tensor)[dim]) for cause in leaf.hazards}

    def run(self):
        return Tracer(self.trace)


@pytest.fixture
def graph() -> Graph:
    return Graph()


def same(graph: Graph, a: tuple[Tensor, int], b: tuple[Tensor, int]) -> bool:
    return list(leaves(graph.axis(*a))) == list(leaves(graph.axis(*b)))


# Contractions


@pytest.mark.parametrize("bias", [False, True])
def test_linear_ties_its_input_to_its_columns(graph, bias):
    x, w = graph.data(5, 4), graph.parameter("w", 3, 4)
    b = graph.parameter("b", 3) if bias else None
    with graph.run(), torch.no_grad():
        y = F.linear(x, w, b)
    assert same(graph, (x, 1), (w, 1)) and same(graph, (y, 1), (w, 0))
    assert not bias or same(graph, (b, 0), (w, 0))
    assert [(n, a.find()) for n, a in graph.trace.consumed] == [("w", graph.axis(w, 1))]
    assert graph.trace.reductions[-1].axis.find() is graph.axis(w, 1)


def test_products_of_activations_have_a_batch_and_an_inner_axis(graph):
    q, k, bias = graph.data(3, 5, 4, tokens=0), graph.data(3, 4, 6, tokens=0), graph.data(3, 5, 6, tokens=0)
    with graph.run():
        scores = torch.baddbmm(bias, q, k)
    assert same(graph, (q, 0), (k, 0)) and same(graph, (q, 2), (k, 1)) and same(graph, (bias, 0), (scores, 0))
    assert graph.trace.paired == [(graph.trace.dims(q)[0], graph.trace.dims(q)[-1])]


def test_matrix_times_vector(graph):
    w, v = graph.parameter("w", 5, 4), graph.parameter("v", 4)
    with graph.run():
        out = torch.mv(w, v)
    assert same(graph, (w, 1), (v, 0)) and same(graph, (out, 0), (w, 0))


def test_grouped_products_have_one_matrix_per_offset(graph):
    x, w = graph.data(8, 16), graph.parameter("experts", 3, 16, 8)
    offsets = torch.tensor([2, 5, 8], dtype=torch.int32)
    graph.trace.set(offsets, [Axis(3)])
    with graph.run():
        out = aten._grouped_mm(x.bfloat16(), w.bfloat16(), offsets)
    assert same(graph, (offsets, 0), (w, 0)) and same(graph, (x, 1), (w, 1)) and same(graph, (out, 1), (w, 2))


def test_fused_attention(graph):
    q, k, v = (graph.data(2, 3, 5, d, tokens=0) for d in (4, 4, 4))
    with graph.run(), torch.no_grad():
        out = F.scaled_dot_product_attention(q, k, v)
    assert same(graph, (q, 3), (k, 3)) and same(graph, (out, 3), (v, 3)) and same(graph, (q, 1), (v, 1))
    assert not same(graph, (q, 3), (v, 3))
    assert graph.trace.reductions and graph.trace.softmaxed


# Reductions


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(-1), lambda x: x.mean(-1, keepdim=True), lambda x: x.var(-1), lambda x: x.amax(-1),
        lambda x: torch.logsumexp(x, -1), lambda x: torch.linalg.vector_norm(x, dim=-1),
        lambda x: torch.var_mean(x, -1)[0], lambda x: (x > 0).any(-1), lambda x: x.prod(-1),
    ],
)  # fmt: skip
def test_reductions_are_recorded(graph, function):
    x = graph.data(5, 4)
    with graph.run():
        y = function(x)
    assert same(graph, (y, 0), (x, 0))
    assert [r.axis.find() for r in graph.trace.reductions] == [graph.axis(x, 1)]
    assert not graph.causes(x, 1)


def test_softmax_keeps_its_axis(graph):
    x = graph.data(5, 4)
    with graph.run():
        y = torch.softmax(x, -1)
    assert same(graph, (y, 1), (x, 1)) and graph.trace.reductions[0].output_dim == 1


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
def test_fused_norms(graph, norm):
    x, w = graph.data(5, 4), graph.parameter("w", 4)
    with graph.run(), torch.no_grad():
        y = norm(x, [4], w)
    assert same(graph, (y, 1), (w, 0)) and same(graph, (x, 1), (w, 0)) and graph.trace.reductions


def test_group_norm_freezes_its_channels(graph):
    x, w = graph.data(5, 4), graph.parameter("w", 4)
    with graph.run(), torch.no_grad():
        F.group_norm(x, 2, w)
    assert "literal" in graph.causes(w, 0)


@pytest.mark.parametrize(("function", "fill"), [(torch.cumsum, 0.0), (torch.cumprod, 1.0)])
def test_scans_need_neutral_values(graph, function, fill):
    x = graph.data(5, 4)
    with graph.run():
        y = function(x, -1)
    assert same(graph, (y, 1), (x, 1)) and graph.trace.reductions[0].fill == fill


# Layout and pieces


def test_view_and_permutation(graph):
    x = graph.data(5, 12)
    with graph.run():
        y = x.view(5, 3, 4).permute(1, 0, 2).transpose(0, 1)
    np.testing.assert_array_equal(positions(graph.axis(x, 1), graph.axis(y, 1)), np.arange(12).reshape(3, 4))


def test_a_repeated_dimension_is_marked(graph):
    x = graph.data(5, 3, 4)
    with graph.run():
        y = x.repeat_interleave(2, dim=1)
    outer, inner = leaves(graph.axis(y, 1))
    assert outer is graph.axis(x, 1) and "broadcast" in inner.traits


def test_chunk_cat_and_glu(graph):
    x = graph.data(5, 8)
    with graph.run():
        a, b = x.chunk(2, -1)
        back = torch.cat([b, a], -1)
        F.glu(x)
    assert same(graph, (a, 1), (b, 1)) and [*leaves(graph.axis(back, 1))] == [graph.axis(a, 1)] * 2


def test_interleaved_pieces(graph):
    x = graph.data(5, 8)
    with graph.run():
        gated = x[:, ::2] * x[:, 1::2]
    pairs = positions(graph.axis(x, 1), graph.axis(gated, 1))
    np.testing.assert_array_equal(pairs, np.arange(8).reshape(4, 2))
    assert not graph.causes(x, 1)


def test_literal_positions_are_single(graph):
    x = graph.data(5, 4)
    with graph.run():
        x.select(1, 2)
    assert [leaf.size for leaf in leaves(graph.axis(x, 1))] == [2, 1, 1]


def test_complex_pairs(graph):
    x = graph.data(5, 6)
    with graph.run():
        y = torch.view_as_real(torch.view_as_complex(x.view(5, 3, 2))).flatten(1)
    assert y.shape == x.shape
    assert next(leaves(graph.axis(x, 1))).size == 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flip(1), lambda x: x.roll(1, 1), lambda x: x.unfold(1, 2, 1), lambda x: x[:, ::3], torch.tril,
        lambda x: x.sort(-1), lambda x: torch.diag_embed(x), lambda x: F.pad(x, (-1, 0)), torch.nonzero,
        lambda x: torch.linalg.solve_triangular(x[:4].tril(), x[:4], upper=False),
    ],
)  # fmt: skip
def test_what_depends_on_the_order_stays_whole(graph, function):
    x = graph.data(5, 4)
    with graph.run():
        function(x)
    assert "literal" in graph.causes(x, 1)


def test_padding_adds_positions(graph):
    x = graph.data(5, 4)
    with graph.run():
        y = F.pad(x, (0, 3))
    assert [leaf.size for leaf in leaves(graph.axis(y, 1))] == [4, 3]


def test_diagonal_ties_two_dimensions(graph):
    x = graph.data(5, 4, 4)
    with graph.run():
        y = x.diagonal(dim1=1, dim2=2)
    assert same(graph, (x, 1), (x, 2)) and same(graph, (y, 1), (x, 1))


def test_depthwise_convolution_keeps_channels(graph):
    x, w, b = graph.data(2, 6, 9), graph.parameter("w", 6, 1, 3), graph.parameter("b", 6)
    with graph.run(), torch.no_grad():
        y = F.conv1d(x, w, b, groups=6)
    assert same(graph, (x, 1), (w, 0)) and same(graph, (y, 1), (b, 0))
    assert "convolved" in graph.axis(w, 0).traits and "literal" in graph.causes(w, 2)


def test_dense_convolution_contracts_channels(graph):
    x, w = graph.data(2, 6, 9), graph.parameter("w", 5, 6, 3)
    with graph.run(), torch.no_grad():
        y = F.conv1d(x, w)
    assert same(graph, (x, 1), (w, 1)) and same(graph, (y, 1), (w, 0)) and graph.trace.reductions


# Values that number units


def routed(graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
    scores, bank = graph.data(5, 4), graph.parameter("bank", 4, 3, 2)
    with graph.run():
        _, chosen = scores.topk(2, dim=-1)
    return scores, bank, chosen


@pytest.mark.parametrize(
    "lookup",
    [lambda bank, i: bank[i], lambda bank, i: bank[i.reshape(-1)], lambda bank, i: bank.index_select(0, i[:, 0])],
)
def test_what_top_k_chose_addresses_the_experts(graph, lookup):
    scores, bank, chosen = routed(graph)
    with graph.run():
        taken = lookup(bank, chosen)
    assert same(graph, (scores, 1), (bank, 0)) and not graph.causes(bank, 0)
    assert graph.trace.origin(taken) == "bank" and graph.trace.reductions[0].fill == float("-inf")


@pytest.mark.parametrize(
    "code",
    [
        lambda s, i: torch.zeros_like(s).scatter_(1, i, 1.0),
        lambda s, i: F.one_hot(i, 4),
        lambda s, i: torch.histc(i.float(), bins=4, min=0, max=3),
        lambda s, i: torch.bincount(i.flatten(), minlength=4),
    ],
)
def test_codes_of_a_choice_lie_along_what_was_chosen_from(graph, code):
    scores, _, chosen = routed(graph)
    with _PlainCalls(), graph.run():
        result = code(scores, chosen)
    assert same(graph, (result, result.dim() - 1), (scores, 1)) and not graph.causes(scores, 1)


def test_gather_and_the_best(graph):
    scores = graph.data(5, 4)
    with graph.run():
        best = scores.argmax(-1, keepdim=True)
        scores.gather(1, best)
        scores.max(-1)
    assert not graph.causes(scores, 1)


@pytest.mark.parametrize("use", [lambda i: i + 1, lambda i: i == 2, lambda i: i.flatten()[0].item(), lambda i: i // 2])
def test_computing_with_numbers_of_units_freezes_them(graph, use):
    scores, _, chosen = routed(graph)
    with graph.run():
        use(chosen)
    assert "literal" in graph.causes(scores, 1)


def test_values_read_as_a_list_are_literal_positions(graph):
    scores = graph.data(4, tokens=0)
    with _PlainCalls(), graph.run():
        values = (scores * 1).tolist()
    assert len(values) == 4 and [leaf.size for leaf in leaves(graph.axis(scores, 0))] == [1] * 4


def test_sorted_indices_number_the_same(graph):
    scores, bank, chosen = routed(graph)
    with graph.run():
        ordered, _ = chosen.flatten().sort()
        bank[ordered.clamp(0, 3)]
    assert same(graph, (scores, 1), (bank, 0)) and not graph.causes(bank, 0)


def test_tables_stay_whole(graph):
    table, ids = graph.parameter("table", 9, 4), torch.zeros(5, dtype=torch.long)
    graph.trace.set(ids, [Axis(5, [Hazard("data", "tokens")])])
    with graph.run(), torch.no_grad():
        F.embedding(ids, table)
        table[ids]
    assert graph.causes(table, 0) == {"table"} and not graph.causes(table, 1)


def test_writing_to_places(graph):
    x, source, ids = graph.data(6, 4), graph.data(5, 4), torch.arange(5)
    graph.trace.set(ids, [Axis(5, [Hazard("data", "tokens")])])
    with graph.run():
        x.index_add_(0, ids, source)
        x.index_put_((ids,), source)
    assert same(graph, (x, 1), (source, 1)) and not graph.causes(x, 1)


def test_a_mask_leaves_later_dimensions_alone(graph):
    x = graph.data(5, 4)
    with graph.run():
        mask = x[:, 0] > 2
        taken = x[mask]
    assert same(graph, (x, 1), (taken, 1)) and "table" in graph.causes(x, 0)


# Constants and the unknown


def test_counting_is_a_constant_once_computed_with(graph):
    x = graph.data(5, 4)
    with graph.run():
        x * torch.arange(4)
    assert graph.causes(x, 1) == {"constant"}


def test_an_identity_ties_rows_to_columns(graph):
    w = graph.parameter("w", 3, 4)
    with graph.run():
        columns = torch.eye(4) @ w.t()
    assert same(graph, (columns, 0), (w, 1)) and not graph.causes(w, 1)


def test_filled_tensors_teach_nothing(graph):
    x = graph.data(5, 4)
    with graph.run():
        y = torch.zeros(5, 4)
        y.copy_(x)
        y.masked_fill_(x > 0, 1.0)
    assert same(graph, (x, 1), (y, 1)) and not graph.causes(x, 1)


def test_an_unknown_operation_freezes_and_names_itself_and_its_module(graph):
    x = graph.data(5, 4)
    graph.trace.modules.append("model.layers.0.mlp")
    assert aten._fft_r2c not in RULES
    with graph.run():
        torch.fft.rfft(x)
    (hazard,) = [h for h in graph.axis(x, 1).hazards.values() if h.cause == "unknown"]
    assert "_fft_r2c" in hazard.text and "model.layers.0.mlp" in hazard.text


def test_the_example_in_the_documentation_runs():
    page = Path(__file__).parents[1] / "docs" / "add-an-op-rule.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 3 and aten._cdist_forward not in RULES
    try:
        exec("\n".join(blocks), {"__name__": "page"})
    finally:
        RULES.pop(aten._cdist_forward, None)
