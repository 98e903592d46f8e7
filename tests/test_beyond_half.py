"""The benchmark beyond half: masks have the zeros asked for and keep them, and what the page says."""

from __future__ import annotations

import copy
from pathlib import Path

import beyond_half_page
import pytest
import torch
from conftest import story
from families import make
from unstructured import (
    KeepZeros,
    SparseLinear,
    as_csr,
    largest,
    linear_modules,
    magnitude,
    shared_out,
    wanda,
    wanda_scores,
    zeros_of,
)

from secateur.data import Corpus
from secateur.errors import BudgetError
from secateur.recovery import RecoverySettings, train

TOKENS = torch.arange(3, 27).view(2, 12)


def test_parts_are_in_proportion_and_sum_to_the_total():
    sizes = torch.tensor([7, 100, 33, 1])
    for total in (0, 1, 70, 141):
        parts = shared_out(total, sizes)
        assert int(parts.sum()) == total and (parts - total * sizes / 141).abs().max() < 1


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("method", [magnitude, lambda model, zeros: wanda(model, zeros, TOKENS)])
def test_masks_zero_as_many_weights_as_asked(method, name):
    model = make(name)
    modules = linear_modules(model)
    weights = sum(m.weight.numel() for m in modules.values())
    head = model.get_output_embeddings().weight.clone()
    masks = method(model, weights * 7 // 10)
    assert zeros_of(model, masks) == weights * 7 // 10 and torch.equal(model.get_output_embeddings().weight, head)
    for path, module in modules.items():
        assert abs(float((module.weight == 0).float().mean()) - 0.7) < 0.01, path
    with pytest.raises(BudgetError, match="linear modules of the blocks have"):
        method(model, weights + 1)


def test_scores_of_wanda_are_weight_times_norm_of_the_input():
    weight, inputs = torch.randn(3, 4), torch.randn(2, 5, 4)
    found = wanda_scores(weight, inputs)
    for i in range(3):
        for j in range(4):
            norm = sum(float(inputs[s, t, j]) ** 2 for s in range(2) for t in range(5)) ** 0.5
            assert float(found[i, j]) == pytest.approx(abs(float(weight[i, j])) * norm, rel=1e-5)
    assert torch.equal(
        largest(torch.tensor([[3.0, 1, 2], [1, 2, 3]]), torch.tensor([1, 2])),
        torch.tensor([[True, False, True], [False, False, True]]),
    )


def test_wanda_scores_each_module_on_inputs_of_masked_ones():
    model = make("llama").eval()
    dense = copy.deepcopy(model)
    modules = linear_modules(model)
    masks = wanda(model, sum(m.weight.numel() for m in modules.values()) // 2, TOKENS)
    seen = {}
    for path, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
    with torch.no_grad():
        model(TOKENS)
    for path, mask in masks.items():
        scores = wanda_scores(dense.get_submodule(path).weight.detach(), seen[path])
        gone = (~mask).sum(1)
        assert int(gone.max() - gone.min()) <= 1
        assert all(row[kept].min() >= row[~kept].max() for row, kept in zip(scores, mask, strict=True)), path


def test_zeros_stay_when_all_weights_are_trained(tokenizer, tmp_path: Path):
    model = make("llama", vocab_size=len(tokenizer)).float()
    masks = magnitude(model, 5000)
    before = copy.deepcopy(model.state_dict())
    settings = RecoverySettings(steps=3, batch_size=2, micro_batch_size=2, seq_len=16, learning_rate=1e-2)
    text = Corpus("story", (story(1),), "", "story")
    train(model, tokenizer, [text], settings, tmp_path / "run", callbacks=[KeepZeros(linear_modules(model), masks)])
    assert zeros_of(model, masks) == 5000
    for path, mask in masks.items():
        now = linear_modules(model)[path].weight
        assert not torch.equal(now[mask], before[f"{path}.weight"][mask])
    with torch.no_grad():
        now[~mask] = 1.0
    with pytest.raises(RuntimeError, match=path):
        zeros_of(model, masks)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@torch.no_grad()
def test_sparse_modules_compute_the_same():
    model = make("llama").eval()
    sparse = as_csr(model, list(magnitude(model, 5000)))
    assert sum(isinstance(m, SparseLinear) for m in sparse.modules()) == len(linear_modules(model))
    torch.testing.assert_close(sparse(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    linear = torch.nn.Linear(4, 3)
    inputs = torch.randn(2, 5, 4)
    torch.testing.assert_close(SparseLinear(linear)(inputs), linear(inputs))


def row(method: str, sparsity: float, time: float, recovered: float, seed: int = 1) -> dict:
    times = {"matrices": time} if method in beyond_half_page.CUTS else {"matrices": 1.0, "csr": time}
    return {
        "method": method, "sparsity": sparsity, "seed": seed, "reached": sparsity, "perplexity": 2 * recovered,
        "recovered": recovered, "relative_time": min(times.values()), "relative_times": times,
    }  # fmt: skip


def test_the_page_sets_the_best_mask_that_is_as_fast_beside_each_cut():
    rows = [
        row("auto", 0.5, 0.6, 50), row("auto", 0.5, 0.62, 52, seed=2), row("auto", 0.7, 0.3, 70),
        row("wanda", 0.5, 2.0, 40), row("wanda", 0.7, 0.5, 60), row("magnitude", 0.7, 0.55, 58),
        {"method": "wanda", "sparsity": 0.9, "seed": 1, "failed": "too few"},
    ]  # fmt: skip
    data = {
        "model": {"name": "small", "parameters": 1000, "in_linear_modules": 700},
        "dense": {"value": 30.0, "tokens": 99, "text": "t", "seq_len": 8, "ms": 5.0},
        "protocol": {"steps": 3, "batch_size": 2, "seq_len": 8, "examples": 9, "learning_rate": 0.1, "samples": 4,
                     "repetitions": 3, "threads": 1, "data": {"file": "f", "characters": 100}},
        "rows": rows,
    }  # fmt: skip
    page = beyond_half_page.beyond_half([data])
    assert "| 50% | 50.00% | ours | 2 | 102.00 ± 2.83 | 51.00 ± 1.41 | 0.61 ± 0.01 |" in page
    assert "| 50% | 50.00% | Wanda mask | 1 | 80.00 | 40.00 | 1.00 (2.00) |" in page
    assert "| 90% | out of reach | Wanda mask | | | | |" in page and "- Wanda mask, from 90%: too few." in page
    assert "| ours, 50% | 0.61 | 102.00 ± 2.83 | 51.00 ± 1.41 | magnitude mask, 70% | 0.55 | 116.00 | 58.00 |" in page
    assert "| ours, 70% | 0.30 | 140.00 | 70.00 | none of those measured is as fast | | | |" in page
    assert beyond_half_page.beyond_half([]) == []
