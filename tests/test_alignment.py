"""Counts that a class accepts but cannot run are not offered, and are refused with what the class says."""

import pytest
import torch
import zoo

from secateur.allocation import Budget, allocate
from secateur.discovery import discover
from secateur.errors import PlanError
from secateur.importance import Random, score
from secateur.plan import PruningPlan
from secateur.surgery import expressible, prove, slice
from secateur.surgery.alignment import Step, smallest_step


@pytest.fixture(scope="module")
def model():
    return zoo.tiny_model("deepseek_v2")  # reads its rotated keys as complex numbers, at a distance of rank + 4


def latent(groups):
    return next(g for g in groups if g.kind == "latent" and any("kv_a_proj" in m.parameter for m in g.members))


@pytest.mark.parametrize("uniform", [True, False])
def test_a_latent_rank_is_cut_only_to_counts_that_run(model, uniform):
    groups = discover(model)
    family = latent(groups).family
    can = expressible(model, groups, ["latent"], uniform=uniform)
    assert can.multiples[family] == 2
    plan = allocate(
        groups,
        score(model, groups.of_kinds(["latent"]), [], Random()),
        Budget(unit_sparsity=0.3),
        uniform=uniform,
        feasible=can.feasible,
        ties=can.ties,
        multiples=can.multiples,
    )
    counts = {len(units) for name, units in plan.kept.items() if groups.named(name).family == family}
    assert counts and all(count % 2 == 0 for count in counts)
    assert slice(model, plan).num_parameters() < model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_does_not_run_in_float32_is_refused_in_any_precision(model, dtype):
    groups = discover(model)
    kept = {g.name: tuple(range(27)) for g in groups if g.family == latent(groups).family}
    plan = PruningPlan(kept, dict.fromkeys(kept, 28))
    with pytest.raises(PlanError, match=r"27 units of .*latent.* stride divisible by 2.*: keep a multiple of 2"):
        slice(zoo.tiny_model("deepseek_v2").to(dtype), plan)


def test_proofs_use_counts_that_run(model):
    proof = next(p for p in prove(model, ["latent"]) if p.family == latent(discover(model)).family)
    assert proof.route == "config" and proof.kept % 2 == 0


def test_the_smallest_step_that_runs_is_found():
    def failure(share):
        return "" if (share * 24) % 4 == 0 else "too odd"

    assert smallest_step(24, failure) == Step(4, "too odd")


def test_counts_that_the_configuration_refuses_are_not_a_matter_of_alignment():
    assert smallest_step(24, lambda share: "" if (share * 24) % 8 == 0 else None) == Step()


@pytest.mark.parametrize("said", ["it never runs", None, ""])
def test_where_nothing_is_known_any_count_may_do(said):
    assert smallest_step(24, lambda share: said) == Step()
