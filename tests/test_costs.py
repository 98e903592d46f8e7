"""Budgets of multiply-accumulates, memory and latency: what tables say against models that are really cut."""

import json

import numpy as np
import pytest
import torch
from families import make

from secateur.allocation import Budget, allocate
from secateur.allocation.costs import table
from secateur.allocation.families import select_families
from secateur.allocation.limits import Limits
from secateur.benchmark import costs, count_macs
from secateur.benchmark.costs import Workload
from secateur.discovery import discover
from secateur.errors import BudgetError
from secateur.surgery import slice

KINDS = ["ffn_channel", "kv_group"]


@pytest.fixture(scope="module")
def llama():
    model = make("llama")
    return model, discover(model)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("what", ["macs", "memory"])
def test_the_budget_is_met_by_the_model_that_is_cut(llama, what, uniform):
    model, groups = llama
    scores = {g.name: torch.rand(g.units, generator=torch.Generator().manual_seed(0)) for g in groups.of_kinds(KINDS)}
    workload = Workload(what, batch=2, length=24)
    cost = workload.without(model, groups)
    plan = allocate(groups, scores, Budget(cost_sparsity=0.2), ranking="global", uniform=uniform, cost=cost)
    dense, small = workload.of(model, slice(model, plan, groups, reloadable=False))
    told = plan.provenance["allocation"]["cost"]
    assert told["whole"] == dense and told["left"] == pytest.approx(small, rel=1e-6)  # both are linear in widths
    assert 1 - small / dense == pytest.approx(0.2, abs=0.03)  # the widths of this model are few


def test_macs_and_memory_are_those_that_are_counted_by_hand(llama):
    model, _ = llama
    c = model.config
    assert Workload("macs", batch=3, length=10).of(model) == [3 * count_macs(model, 10)]
    cache = c.num_hidden_layers * 2 * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * 2 * 10
    assert Workload("memory", batch=2, length=10).of(model) == [4 * (model.num_parameters() + cache)]
    with pytest.raises(BudgetError, match="give a shorter one"):
        Workload("latency", length=10**6).of(model)


class Timed(torch.nn.Module):
    """Takes so many seconds a pass of a clock that other work can slow down."""

    device, config = torch.device("cpu"), None

    def __init__(self, seconds, clock):
        super().__init__()
        self.seconds, self.clock = seconds, clock

    def forward(self, input_ids, use_cache):
        self.clock["now"] += self.seconds * self.clock["load"]


def test_other_work_that_comes_later_makes_no_cut_slower(monkeypatch):
    clock = {"now": 0.0, "load": 1.0}
    whole = Timed(4.0, clock)
    monkeypatch.setattr(costs, "now", lambda device: clock["now"])
    monkeypatch.setattr(costs, "_without", lambda model, groups, cut: Timed(3.0, clock))
    cost = Workload("latency").without(whole, None)
    assert cost([{}]) == [4.0]
    clock["load"] = 2.0
    assert cost([{}, {"a": (1,)}]) == [4.0, 3.0]
    assert Workload("latency").of(whole, Timed(3.0, clock)) == [8.0, 6.0]


def test_a_table_is_what_the_model_costs_without_what_goes(llama):
    """Against a cost with a known shape for each kind, in one family for all layers and in one for each."""
    _, groups = llama

    def cost(cuts):
        gone = [{k: sum(len(u) for n, u in cut.items() if groups.named(n).kind == k) for k in KINDS} for cut in cuts]
        return [100.0 - 0.25 * g["ffn_channel"] - 3.0 * g["kv_group"] for g in gone]

    for uniform in (True, False):
        families = select_families(groups, None, KINDS, Limits(uniform=uniform))
        found = table(families, cost)
        for number, family in enumerate(families):
            price = {"ffn_channel": 0.25, "kv_group": 3.0}[family.kinds[0]] * len(family.groups)
            start = np.array([f.units for f in families])
            assert found.drops(start, number, family.counts) == pytest.approx(price)
        assert found.at(np.array([f.units for f in families])) == 100.0


def test_a_slower_smaller_model_is_noise():
    groups = discover(make("llama"))
    families = select_families(groups, None, ["ffn_channel"], Limits())
    answers = iter([10.0, 9.0, 9.5, 6.0, 5.0])
    found = table(families, lambda cuts: [next(answers) for _ in cuts])
    assert (found.drops(np.array([families[0].units]), 0, families[0].counts) >= 0).all()


def test_a_budget_and_its_cost_come_together():
    groups = discover(make("llama"))
    scores = {g.name: torch.rand(g.units) for g in groups.of_kinds(KINDS)}
    for budget, cost in ((Budget(cost_sparsity=0.2), None), (Budget(0.2), lambda cuts: [1.0] * len(cuts))):
        with pytest.raises(BudgetError, match="cost that it is a fraction of"):
            allocate(groups, scores, budget, cost=cost)


def test_from_the_command_line(secateur, checkpoint_folder, text_file, tmp_path):
    given = ["--calibration", text_file, "--samples", 8, "--seq-len", 32, "--compensate", "none"]
    code, out, err = secateur(
        "prune",
        checkpoint_folder,
        "-o",
        tmp_path / "o",
        "--sparsity",
        0.2,
        "--of",
        "macs",
        "--workload",
        "2x16",
        *given,
    )
    assert code == 0, err
    cost = json.loads((tmp_path / "o" / "results.json").read_text())["cost"]
    assert (cost["what"], cost["batch"], cost["length"]) == ("macs", 2, 16)
    assert 1 - cost["pruned"] / cost["dense"] == pytest.approx(0.2, abs=0.02)
    assert "multiply-accumulates of 2 x 16 tokens" in out
    for flags, words in (
        (["--of", "watts"], "expected one of params, macs, memory, latency"),
        (["--of", "macs", "--workload", "2"], "sequences x tokens"),
        (["--workload", "2x16"], "a workload is what mac_sparsity"),
        (["--of", "latency", "--method", "llm-pruner"], "llm-pruner takes param_sparsity"),
    ):
        code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "p", "--sparsity", 0.2, *flags, *given)
        assert code == 2 and words in err and not (tmp_path / "p").exists()
