"""Recipes: every shipped one is valid, every mistake gets a line with its place."""

import pytest
import yaml

from secateur.config import Recipe, Sweep, dump_recipe, list_recipes, load_job, load_recipe, parse_recipe, recipe_text
from secateur.errors import RecipeError


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_are_valid_and_say_how_to_run_them(name):
    loaded = load_job(name)
    assert recipe_text(name).startswith(f"# secateur run {name} ")
    recipes = [c.recipe for c in loaded.combinations] if isinstance(loaded, Sweep) else [loaded]
    assert all(parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe for recipe in recipes)


def test_the_papers_models_are_all_there():
    wanted = {"llama-7b", "vicuna-7b", "llama-2-7b", "llama-3-8b", "llama-3.1-8b"}
    llama = {f"llama-{size}b" for size in (7, 13, 30, 65)}
    names = {f"llm-pruner/{n}" for n in wanted} | {f"loraprune/{n}" for n in llama}
    names |= {f"lorashear/llama-7b-{ratio}" for ratio in (20, 50)}
    names |= {f"prunedlora/llama-3-8b-r{rank}" for rank in (128, 256, 512)}
    assert names | {"demo", "sweeps/demo", "auto/llama-7b"} == set(list_recipes())
    recipe = load_recipe("llm-pruner/llama-7b")
    assert recipe.prune.unit_sparsity == 0.25 and recipe.prune.protect_first == 4 and recipe.prune.protect_last == 2
    assert recipe.recovery.learning_rate == 1e-4 and recipe.recovery.batch_size == 64


def test_overrides():
    recipe = load_recipe("demo", ["prune.param_sparsity=0.35", "recovery=null", "evaluation.texts=[a, b]", "seed=7"])
    assert recipe.prune.param_sparsity == 0.35 and recipe.recovery is None
    assert recipe.evaluation.texts == ("a", "b") and recipe.seed == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.param_sparsity=1.0"], "prune.param_sparsity: .*less than 1"),
        (["prune.param_sparsity=-0.1"], "prune.param_sparsity: .*greater than or equal to 0"),
        (["prune.kind_ratios={kv_group: 1.5}"], "prune.kind_ratios.kv_group: .*less than 1 .got 1.5"),
        (["prune.unit_sparsity=0.2"], "one of param_sparsity and unit_sparsity, not both"),
        (["prune.criterium=l2"], "did you mean 'criterion'"),
        (["prunes.x=1"], "prunes: unknown key; did you mean 'prune'"),
        (["prune.zzz=1"], "unknown key; known: param_sparsity"),
        (["recovery.lora=1"], "recovery.lora: unknown key"),
        (["prune.criterion=taylor"], "prune.criterion: "),
        (
            ["prune.kinds=[ffn_chanel]"],
            r"prune.kinds.0: .*no kind of unit \(did you mean ffn_channel\?\); there are ffn_",
        ),
        (["nonsense"], "write key=value"),
        (["seed.x=1"], "seed is no section"),
        (["seed=[1"], "not a YAML value"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("demo", overrides)


def test_files(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: {source: x}\n")
    assert load_recipe(file) == Recipe(model={"source": "x"})
    for text, message in (("a: [", "not YAML"), ("- 1", "mapping"), ("model: {}", "model.source: Field required")):
        file.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(file)
    file.write_text("[1]")
    with pytest.raises(RecipeError, match="mapping"):
        load_recipe(file, ["a=1"])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(file)
    with pytest.raises(RecipeError, match="did you mean 'llm-pruner/llama-7b'"):
        load_recipe("llm-pruner/llama7b")
    with pytest.raises(RecipeError, match="recipes ls"):
        load_recipe("zzz")
