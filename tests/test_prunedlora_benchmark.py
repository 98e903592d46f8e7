"""The benchmark of PrunedLoRA: what a verbaliser tells, how learning rates are chosen, and what the page says."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import prunedlora
import prunedlora_page
import pytest
import torch
from families import make
from peft import LoraConfig, get_peft_model
from prunedlora_rows import FORMS, settings_of
from prunedlora_tasks import Verbaliser, measured

from secateur.methods.prunedlora import PAPER
from secateur.surgery.component_pruning import Pruner

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


def choosing(loss: Callable[[float], float], output: Path, rates: Sequence[float] = prunedlora.RATES):
    """A comparison whose trainings end at the loss of their learning rate, or break at NaN; and the rates it tries."""
    comparison = prunedlora.Comparison.__new__(prunedlora.Comparison)
    comparison.args = Namespace(
        learning_rates=list(rates), paper_rates=prunedlora.PAPER_RATES, output=output, refine=False
    )
    comparison.report = {"tuning": []}
    comparison.task = Namespace(result=lambda model, part: {"loss": loss(model)}, tokens=None)
    asked: list[float] = []

    def train(method: str, target: int, seed: int, rate: float):
        asked.append(rate)
        key = {"method": method, "target_rank": target, "learning_rate": rate}
        return (None, key | {"error": "broke"}) if math.isnan(loss(rate)) else (rate, key)

    comparison._trained = train
    return comparison, asked


@pytest.mark.parametrize("best, tried", [(3e-2, 4), (1e-2, 3), (3e-4, 5), (3e-1, 5)])
def test_learning_rates_are_tried_until_the_best_has_neighbours(best, tried, tmp_path):
    comparison, asked = choosing(lambda rate: abs(math.log(rate / best)), tmp_path / "out.json")
    assert comparison._rate("lora", 4) == best and len(asked) == tried
    assert comparison._rate("lora", 4) == best and len(asked) == tried  # from what is known, after a kill
    assert comparison._rate("lora", 1) == best and len(asked) == 2 * tried


@pytest.mark.parametrize("largest", [3e-4, 1e-3, 0.0])
def test_where_all_break_smaller_rates_are_tried_until_one_does_not(largest, tmp_path):
    comparison, asked = choosing(lambda rate: 1 / rate if rate <= largest else math.nan, tmp_path / "out.json")
    assert comparison._rate("lora", 4) == max(largest, 3e-4) and len(asked) == 5


def test_infinite_losses_are_no_better_than_broken_ones(tmp_path):
    comparison, _ = choosing(lambda rate: 1.0 if rate == 3e-4 else math.inf, tmp_path / "out.json")
    assert comparison._rate("lora", 4) == 3e-4


def test_of_the_papers_forms_the_whole_grid_is_tried_and_smaller_rates(tmp_path):
    comparison, asked = choosing(lambda rate: {1e-4: 1.0, 1e-2: 2.0}.get(rate, 3.0), tmp_path / "out.json")
    assert comparison._rate("paper-form", 4) == 1e-4
    assert sorted(asked) == sorted({*prunedlora.PAPER_RATES, *prunedlora.RATES})
    assert comparison._rate("lora", 4) == 1e-2


def test_of_classes_the_whole_grid_is_tried(tmp_path):
    comparison, asked = choosing(lambda rate: {3e-4: 1.0, 1e-2: 2.0}.get(rate, 3.0), tmp_path / "out.json")
    comparison.task.tokens = (1, 2)
    assert comparison._rate("lora", 4) == 3e-4 and sorted(asked) == sorted(prunedlora.RATES)
    right = {3e-4: 0.5, 1e-2: 0.6}
    comparison.task.result = lambda rate, part: {"loss": right.get(rate, 0.9), "accuracy": right.get(rate, 0.4)}
    assert comparison._rate("lora", 1) == 1e-2


@pytest.mark.parametrize(
    "best, found, between", [(1.6e-2, 1.7e-2, [5.5e-3, 1.7e-2]), (1e-2, 1e-2, [5.5e-3, 1.7e-2]), (1.0, 0.3, [1.7e-1])]
)
def test_rates_between_those_of_the_grid(best, found, between, tmp_path):
    comparison, asked = choosing(lambda rate: abs(math.log(rate / best)), tmp_path / "out.json")
    comparison._rate("lora", 4)
    comparison.args.refine, before = True, len(asked)
    assert comparison._rate("lora", 4) == found and asked[before:] == between
    assert comparison._rate("lora", 4) == found and len(asked) == before + len(between)


def test_rows_of_another_rate_are_forgotten(tmp_path):
    comparison, _ = choosing(lambda rate: rate, tmp_path / "out.json")
    comparison.args.methods, comparison.args.target_ranks = ["lora-initial", "after-ours", "ours"], [4]
    rows = [
        {"method": method, "target_rank": rank, "learning_rate": rate}
        for method, rank in (("ours", 4), ("after-ours", 4), ("ours", 1))
        for rate in (0.1, 0.2)
    ]
    comparison.report["rows"] = rows
    comparison._forget_other_rates({(4, "ours"): 0.1, (64, "lora-initial"): 0.2})
    assert comparison.report["rows"] == [rows[i] for i in (0, 3, 4, 5)]


def test_one_learning_rate_is_no_choice(tmp_path):
    comparison, asked = choosing(lambda rate: rate, tmp_path / "out.json", [1e-2])
    assert comparison._rate("lora", 4) == 1e-2 and not asked


@pytest.mark.parametrize("target, share", [(16, 0.24), (4, 0.30), (1, 0.32)])
def test_the_papers_pace_takes_the_share_of_the_run_that_is_told(target, share):
    model = get_peft_model(make("llama"), LoraConfig(r=64, target_modules="all-linear"))
    pruner = Pruner(model, PAPER, keep="scale")
    settings = settings_of("paper-form", target, Namespace(every=5))
    settings.check_reach(pruner.initial, 100)
    last = next(step for step in range(1, 101) if max(gone(settings, pruner, step)) == 64 - target)
    assert last == 100 * share and gone(settings, pruner, 1) == {2}
    assert f"{100 * share:.0f}" in prunedlora_page.HEAD and settings.keep == "scale" and settings.criterion == PAPER


def gone(settings, pruner: Pruner, step: int) -> set[int]:
    """Components that have left each module after a step."""
    return set(settings.wanted(pruner, step, 100).values())


def test_the_page_has_means_and_spreads():
    row = {"target_rank": 4, "learning_rate": 0.01, "seconds": 2.0, "step_seconds": {"first": 0.05, "last": 0.04}}
    state = {"first": 2**20, "most": 2**20, "last": 2**19}
    rows = [
        row | {"method": "ours", "seed": seed, "loss": loss, "accuracy": 0.5, "state_bytes": state}
        for seed, loss in ((1, 1.0), (2, 2.0))
    ]
    rows.append({"method": "paper-form", "target_rank": 4, "learning_rate": 0.01, "seed": 1, "error": "broke"})
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
    assert line in page and "| 4 | PrunedLoRA, paper form | 1 | 0.01 | broke in 1 |" in page
    assert prunedlora_page.comparison([]) == []


def test_the_options_have_means_and_spreads_too():
    assert set(prunedlora_page.OPTIONS) <= {*FORMS, "ours-global"}
    key = {"target_rank": 4, "learning_rate": 0.01}
    rows = [key | {"method": "ours", "seed": seed, "loss": loss} for seed, loss in ((1, 1.0), (2, 2.0))]
    rows += [
        key | {"method": "newton", "seed": 1, "error": "broke"},
        key | {"method": "newton", "seed": 2, "loss": 9.0},
    ]
    data = {
        "model": {"name": "demo"},
        "protocol": {"task": {"name": "alpaca"}, "settings": {"initial_rank": 16}},
        "rows": rows,
    }
    page = prunedlora_page.options([data])
    assert "over 2 seeds" in page[2] and "| as it is | 1.500 ± 0.707 |" in page
    assert "| a tenth of the Newton term (none) | broke |" in page and not any("magnitude" in line for line in page)
    assert prunedlora_page.options([]) == []
