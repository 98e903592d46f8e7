"""Sweeps in recipe files: all combinations, and every mistake with its place."""

import pytest

from secateur.config import Sweep, load_job, load_recipe
from secateur.errors import RecipeError

BASE = "model: {source: demo}\nprune: {param_sparsity: 0.1}\nrecovery: {data: [demo-calibration], steps: 5}\n"


@pytest.fixture
def sweep(tmp_path):
    """Text of the section -> a recipe file with it."""

    def write(section):
        file = tmp_path / "s.yaml"
        file.write_text(BASE + f"sweep: {section}\n")
        return file

    return write


def test_all_combinations_of_methods_sparsities_and_seeds(sweep):
    file = sweep("{method: [llm-pruner, {name: lorashear, periods: 4}], sparsity: [0.2, 0.5], seed: [1, 2]}")
    found = load_job(file)
    assert isinstance(found, Sweep) and len(found.combinations) == 8
    first, last = found.combinations[0], found.combinations[-1]
    assert first.label == "method=llm-pruner, sparsity=0.2, seed=1"
    assert last.label == "method=lorashear periods:4, sparsity=0.5, seed=2"
    assert last.recipe.method.periods == 4 and last.recipe.prune.param_sparsity == 0.5 and last.recipe.seed == 2
    assert first.recipe.recovery.steps == last.recipe.recovery.steps == 5


def test_any_key_can_be_varied_and_overridden(sweep):
    file = sweep("{method.warmup: [0.1, 0.2], method: [{name: lorashear}, {name: loraprune}]}")
    warmups = [(c.recipe.method.name, c.recipe.method.warmup) for c in load_job(file).combinations]
    assert warmups == [("lorashear", 0.1), ("loraprune", 0.1), ("lorashear", 0.2), ("loraprune", 0.2)]
    file = sweep("{prune.kind_ratios.kv_group: [0.2, 0.3], recovery: [null, {steps: 3}]}")
    assert [c.recipe.recovers for c in load_job(file).combinations] == [False, True, False, True]
    more = load_job(file, ["sweep.prune.kind_ratios.kv_group=[0.1]", "prune.param_sparsity=0.4"]).combinations
    assert {(c.recipe.prune.kind_ratios["kv_group"], c.recipe.prune.param_sparsity) for c in more} == {(0.1, 0.4)}
    assert len(load_job("demo", ["sweep.seed=[1, 2, 3]"]).combinations) == 3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("[1]", "sweep: nothing to vary; write lists"),
        ("{}", "nothing to vary"),
        ("{prune.criterium: [l1]}", "sweep.prune.criterium: unknown key; did you mean 'criterion'"),
        ("{seeds: [1]}", "sweep.seeds: unknown key; did you mean 'seed'"),
        ("{seed: 1}", r"sweep.seed: a list of values was expected \(got 1\)"),
        ("{seed: []}", "sweep.seed: a list"),
        ("{seed: [1, 1]}", "seed=1 and seed=1 are one and the same"),
        ("{sparsity: [0.1], prune.param_sparsity: [0.2]}", "given twice"),
        ("{seed.x: [1]}", "seed"),
        ("{sparsity: [0.2, 1.5], seed: [1, 2]}", r"less than 1 .got 1.5. .in sparsity=1.5, seed=1 and 1"),
        ("{method: [llm-pruner, {name: lorashear, ema: 0.5}]}", r"no use for ema.*\(in method=lorashear ema:0.5\)"),
        ("{method: [lora], seed: [1, 2]}", "method.name: .*'llm-pruner'.*in method=lora, seed=1 and 1 more"),
    ],
)  # fmt: skip
def test_mistakes_are_named(sweep, section, message):
    with pytest.raises(RecipeError, match=message):
        load_job(sweep(section))


def test_where_one_recipe_is_needed_a_sweep_is_refused(sweep):
    file = sweep("{seed: [1, 2], sparsity: [0.3]}")
    with pytest.raises(RecipeError, match="a sweep of 2 recipes, and one is needed"):
        load_recipe(file)
    for override in ("seed=3", "sparsity=0.2", "prune.param_sparsity=0.2"):
        with pytest.raises(RecipeError, match=rf"the sweep sets {override.partition('=')[0]}; write sweep\."):
            load_job(file, [override])
