"""The benchmark of PrunedLoRA: what a verbaliser tells, how learning rates are chosen, and what the page says."""

from __future__ import annotations

import math
from argparse import Namespace

import prunedlora
import prunedlora_page
import pytest
import torch
from families import make
from prunedlora_tasks import Verbaliser, measured

TOKENS = (5, 9)


def test_a_verbaliser_averages_over_positions_and_leaves_out_padding():
    model = make("llama").double().eval()
    ids = torch.tensor([[3, 4, 6, 0, 0], [7, 8, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = Verbaliser(model, TOKENS)(ids, mask, torch.tensor([[1], [0]]))
    first, second = (
        model(input_ids=ids[i : i + 1, :n]).logits[0, :, list(TOKENS)].mean(0) for i, n in ((0, 3), (1, 5))
    )
    torch.testing.assert_close(found.logits, torch.stack([first, second]).float(), rtol=1e-5, atol=1e-6)
    wanted = -(first.log_softmax(0)[1] + second.log_softmax(0)[0]) / 2
    assert float(found.loss) == pytest.approx(float(wanted), abs=1e-5)
    rows = [
        {"input_ids": i[m > 0].tolist(), "attention_mask": [1] * int(m.sum()), "labels": [label]}
        for i, m, label in zip(ids, mask, (1, 0), strict=True)
    ]
    right = (int(first.argmax()) == 1) + (int(second.argmax()) == 0)
    result = measured(Verbaliser(model, TOKENS), rows, True)
    assert result["accuracy"] == right / 2 and result["loss"] == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("best, tried", [(3e-2, 4), (1e-2, 3), (3e-4, 5), (3e-1, 5)])
def test_learning_rates_are_tried_until_the_best_has_neighbours(best, tried, tmp_path):
    comparison = prunedlora.Comparison.__new__(prunedlora.Comparison)
    comparison.args = Namespace(learning_rates=list(prunedlora.RATES), output=tmp_path / "out.json")
    comparison.report = {"tuning": []}
    comparison.task = Namespace(result=lambda model, part: {"loss": abs(math.log(model / best))})
    asked: list[float] = []

    def train(method: str, target: int, seed: int, rate: float):
        asked.append(rate)
        return rate, {"method": method, "target_rank": target, "learning_rate": rate}

    comparison._trained = train
    assert comparison._rate("lora", 4) == best and len(asked) == tried
    assert comparison._rate("lora", 4) == best and len(asked) == tried  # from what is known, after a kill
    assert comparison._rate("lora", 1) == best and len(asked) == 2 * tried


def test_the_page_has_means_and_spreads():
    row = {"target_rank": 4, "learning_rate": 0.01, "seconds": 2.0, "step_seconds": {"first": 0.05, "last": 0.04}}
    state = {"first": 2**20, "most": 2**20, "last": 2**19}
    rows = [
        row | {"method": "ours", "seed": seed, "loss": loss, "accuracy": 0.5, "state_bytes": state}
        for seed, loss in ((1, 1.0), (2, 2.0))
    ]
    rows.append({"method": "paper", "target_rank": 4, "learning_rate": 0.01, "seed": 1, "error": "broke"})
    data = {
        "model": {"name": "demo", "parameters": 1000},
        "protocol": {
            "task": {"name": "sst2", "majority": {"held_out": 0.6}},
            "settings": {"steps": 10, "batch_size": 2, "seq_len": 8, "initial_rank": 16},
        },
        "base": {"held_out": {"loss": 3.0, "accuracy": 0.4}},
        "rows": rows,
    }
    page = "\n".join(prunedlora_page.comparison([data]))
    assert "the larger class has 0.600" in page
    line = "| 4 | PrunedLoRA | 2 | 0.01 | 1.500 ± 0.707 | 0.500 ± 0.000 | 1.00 to 0.50 MiB | 2.0 | 50 to 40 |"
    assert line in page and "| 4 | PrunedLoRA, published criterion | 1 | 0.01 | broke in 1 |" in page
    assert prunedlora_page.comparison([]) == []
