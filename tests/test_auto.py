"""Our own method: what it measures, what it chooses between, and that it is what a plain `prune` does."""

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
import zoo

from secateur.allocation import Budget
from secateur.allocation.orders import cheapest_orders
from secateur.config import dump_recipe, parse_recipe
from secateur.cutting import PruneResult
from secateur.data import calibration_tokens, load_corpus
from secateur.discovery import discover
from secateur.errors import BudgetError, PlanError, RecipeError
from secateur.evaluation import perplexity
from secateur.evaluation.cut_losses import CutLosses, losses_of_rows
from secateur.importance import CRITERIA, Taylor, score
from secateur.methods import auto, auto_steps, forms
from secateur.methods.auto import Auto, run
from secateur.methods.llm_pruner import LLMPruner
from secateur.methods.llm_pruner import run as llm_pruner
from secateur.plan import PruningPlan
from secateur.surgery import mask


@pytest.fixture(scope="module")
def tokens(tokenizer, text_file):
    return calibration_tokens(load_corpus(text_file), tokenizer, 32, 32, 0)


def test_losses_are_those_of_the_masked_model_and_measured_once(trained, tokens):
    groups = discover(trained)
    chosen = groups.only(["ffn_channel", "kv_group"])
    measure = CutLosses(trained, groups, chosen, [tokens])
    cuts = [{}, {chosen[0].name: (0,)}, {g.name: (0, 1) for g in chosen if g.kind == "ffn_channel"}]
    found = measure(cuts)
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    for cut, loss in zip(cuts, found, strict=True):
        kept = {n: tuple(u for u in range(groups.named(n).units) if u not in units) for n, units in cut.items()}
        with mask(trained, PruningPlan(kept, {n: groups.named(n).units for n in kept}), groups):
            assert loss == pytest.approx(float(losses_of_rows(trained, tokens).mean()), rel=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
    measure._measured = None  # nothing is left to measure
    assert measure(cuts) == found


@pytest.mark.parametrize("settings", [{}, {"iterations": 2, "uniform": False}, {"uniform": True, "compensation": None}])
def test_the_budget_is_met_and_it_is_better_than_first_order_taylor(trained, tokens, tokenizer, text_file, settings):
    result = run(trained, [tokens], Auto(Budget(0.3), **settings))
    channel = 3 * 3 * 48  # one FFN channel in each of three layers
    assert abs(result.model.num_parameters() - 0.7 * trained.num_parameters()) <= channel
    assert bool(result.choice) == (settings.get("uniform") is not False)
    text = load_corpus(text_file)
    other = llm_pruner(trained, [tokens], LLMPruner(Budget(0.3), Taylor(order=1))).model
    ours, theirs = (perplexity(m, tokenizer, text, seq_len=32).value for m in (result.model, other))
    assert ours < theirs


@pytest.mark.parametrize("gain, spread, chosen", [(0.5, 0.1, "per_layer"), (0.01, 0.0, "hidden"), (0.5, 3.0, "hidden")])
def test_what_is_less_plain_must_be_surely_better(gain, spread, chosen):
    noise = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64) * spread
    least = torch.full((8,), 4.0, dtype=torch.float64)
    choice = forms.Choice()
    assert choice.takes(forms.UNIFORM, forms.Trial(0.0, least + 1))
    assert choice.takes(forms.HIDDEN, forms.Trial(0.25, least))
    assert choice.takes(forms.PER_LAYER, forms.Trial(0.0, least - gain + noise)) == (chosen == "per_layer")
    told = choice.told()
    assert told["chosen"] == chosen and told["sequences"] == 8 and told["hidden_shares"] == {"hidden": 0.25}
    least_plain = chosen == "per_layer"
    assert told["over"] == "uniform" and told["gain"] == pytest.approx(1 + gain * least_plain)
    assert told["standard_error"] == pytest.approx(spread / 7**0.5 * least_plain)
    assert (told["uniform"], told["hidden"]) == (5.0, 4.0)


def test_between_hidden_sizes_of_one_form_the_loss_alone_decides():
    least = torch.full((8,), 4.0, dtype=torch.float64)
    choice = forms.Choice()
    assert choice.takes(forms.UNIFORM, forms.Trial(0.0, least))
    assert not choice.takes(forms.HIDDEN, forms.Trial(0.1, least - 0.01))  # no less plain than it must be
    assert choice.takes(forms.HIDDEN, forms.Trial(0.2, least - 0.1))
    finer = forms.Trial(0.3, least - 0.101)
    assert choice.takes(forms.HIDDEN, finer) and choice.tried[forms.HIDDEN] is finer
    worse = forms.Trial(0.4, least + 1)
    assert not choice.takes(forms.HIDDEN, worse) and choice.tried[forms.HIDDEN] is finer
    told = choice.told()
    assert told["hidden"] == pytest.approx(3.899) and told["hidden_shares"] == {"hidden": 0.3}
    assert (told["chosen"], told["over"]) == ("hidden", "uniform") and told["gain"] == pytest.approx(0.101)
    assert not choice.takes(forms.PER_LAYER, forms.Trial(0.0, least - 0.115))  # too little better than what was taken
    assert choice.told()["gain"] == pytest.approx(0.101) and choice.told()["over"] == "uniform"
    choice = forms.Choice()
    assert choice.takes(forms.UNIFORM, forms.Trial(0.0, least))
    assert not choice.takes(forms.HIDDEN, forms.Trial(0.1, least + torch.tensor([1.0, -1.2] * 4)))  # not surely better
    assert not choice.takes(forms.HIDDEN, forms.Trial(0.2, least - 0.05))  # surely, but not the best hidden size
    told = choice.told()
    assert told["hidden_shares"] == {"hidden": 0.1} and (told["chosen"], told["over"]) == ("uniform", "hidden")
    assert told["gain"] == pytest.approx(-0.1)  # the plainest, though the other has the lower loss
    assert forms.gain_in_words(told).startswith("10.5% higher than with the same widths in every layer and a smaller")
    assert choice.takes(forms.PER_LAYER, forms.Trial(0.0, least - 0.2)) and choice.told()["over"] == "uniform"


@pytest.mark.parametrize(
    "units, sparsity, left", [(4096, 0.5, [3584, 3072, 2560, 2048]), (48, 0.3, [45, 41, 38, 34]), (64, 0.02, [])]
)
def test_hidden_sizes_to_try_are_whole_slices(units, sparsity, left):
    shares = forms.hidden_shares(units, sparsity)
    assert [units * (1 - share) for share in shares] == pytest.approx(left)


def test_the_forms_are_what_they_say_and_the_best_is_taken(trained, tokens, monkeypatch):
    groups, made = discover(trained), {}
    whole = auto_steps.Steps.form

    def kept(self, form, share):
        made.setdefault(form.name, {})[share] = whole(self, form, share)
        return made[form.name][share]

    monkeypatch.setattr(auto_steps.Steps, "form", kept)
    result = run(trained, [tokens], Auto(Budget(0.2)))
    assert list(made) == ["uniform", "hidden", "per_layer", "hidden_per_layer"]
    (hidden,) = groups.of_kinds(["hidden"])
    for name, found in made.items():
        losses = {}
        for share, cut in found.items():
            widths = {len(units) for g, units in cut.plan.kept.items() if g.endswith("ffn_channel")}
            assert (len(widths) == 1) == ("per_layer" not in name)
            assert len(cut.plan.kept.get(hidden.name, range(hidden.units))) == round(hidden.units * (1 - share))
            assert abs(1 - cut.model.num_parameters() / trained.num_parameters() - 0.2) < 0.01
            losses[share] = float(losses_of_rows(cut.model, tokens[forms.ASIDE - 1 :: forms.ASIDE]).mean())
        assert result.choice[name] == pytest.approx(min(losses.values()))
        if "hidden" in name:
            taken = min(losses, key=lambda share: losses[share])
            assert result.choice["hidden_shares"][name] == pytest.approx(taken, abs=1e-6) and 0 < taken < 0.2
    share = result.choice["hidden_shares"].get(result.choice["chosen"], 0.0)
    assert any(result.plan == cut.plan and abs(s - share) < 1e-6 for s, cut in made[result.choice["chosen"]].items())
    asked = run(trained, [tokens], Auto(Budget(0.2), kinds=("ffn_channel",), uniform=True, compensation=None))
    assert not asked.choice  # what was said leaves one form


def test_larger_shares_of_the_hidden_dimension_are_tried_as_long_as_the_loss_falls(trained, tokens, monkeypatch):
    made, answers = [], iter([4.0, 3.0, 3.5, 9.0, 9.0])

    def form(self, form, share):
        made.append((form.name, share))
        plan = PruningPlan({}, {}, {"allocation": {"shares": {"hidden": {"share": share}}}})
        return PruneResult(trained, plan, discover(trained), {})

    monkeypatch.setattr(auto_steps.Steps, "form", form)
    monkeypatch.setattr(auto, "losses_aside", lambda *given: torch.full((8,), next(answers), dtype=torch.float64))
    run(trained, [tokens], Auto(Budget(0.5), uniform=True))
    assert made == [("uniform", 0.0), *(("hidden", share) for share in (6 / 48, 12 / 48))]
    made.clear()
    answers = iter([4.0, 3.0, 2.0, 1.0, 0.5])
    result = run(trained, [tokens], Auto(Budget(0.5), uniform=True))
    assert made[-1] == ("hidden", 24 / 48) and result.choice["hidden_shares"] == {"hidden": 24 / 48}


def test_where_there_is_no_choice_it_says_why(trained, tokens):
    few = run(trained, [tokens[:8]], Auto(Budget(0.2), compensation=None))
    assert few.choice["chosen"] == "uniform" and "8 calibration sequences" in few.choice["why"]
    spared = run(trained, [tokens], Auto(Budget(0.2), compensation=None, protect_first=1))
    assert spared.choice["chosen"] == "per_layer" and "some layers" in spared.choice["why"]
    assert not any(name.startswith("model.layers.0.") for name in spared.plan.kept)


def test_each_group_takes_the_criterion_whose_cuts_cost_least(trained, tokens):
    """The order that a leave-one-out of shares finds, group by group, by brute force."""
    groups = discover(trained).only(["ffn_channel", "kv_group"])
    found = {name: score(trained, groups, [tokens], CRITERIA[name]) for name in ("taylor-2", "random")}
    measure = CutLosses(trained, discover(trained), groups, [tokens])

    def cost(by, some):
        cuts = []
        for share in (0.2, 0.4, 0.6):
            gone = {}
            for group in some:
                order = found[by[group.name]][group.name].argsort(stable=True).tolist()
                if many := round(share * (group.units - 1)):
                    gone[group.name] = tuple(sorted(order[:many]))
            cuts.append(gone)
        return sum(measure(cuts))

    alone = {g.name: min(found, key=lambda name, g=g: cost({g.name: name}, [g])) for g in groups}
    choices = [alone, *(dict.fromkeys(alone, name) for name in found)]
    by = cheapest_orders(groups, found, 0.4, measure)
    assert by == min(choices, key=lambda choice: cost(choice, groups)) and "taylor-2" in by.values()
    assert set(cheapest_orders(groups, dict.fromkeys("ab", found["random"]), 0.4, measure).values()) == {"a"}


def test_what_is_best_alone_gives_way_to_what_is_best_together(trained):
    """Each group alone is cheaper by `a`, all of them by `b`."""
    groups = discover(trained).only(["ffn_channel"])
    falling = {g.name: torch.arange(g.units, 0, -1.0) for g in groups}
    scores = {"a": {g.name: torch.arange(float(g.units)) for g in groups}, "b": falling}

    def measure(cuts):
        return [sum(0 in units for units in cut.values()) * (-1 if len(cut) == 1 else 1) for cut in cuts]

    assert set(cheapest_orders(groups, scores, 0.4, measure).values()) == {"b"}
    alone = cheapest_orders(groups, scores, 0.4, lambda cuts: [-sum(0 in u for u in cut.values()) for cut in cuts])
    assert set(alone.values()) == {"a"}


def test_scores_are_of_the_criterion_that_was_measured_to_cost_less(trained, tokens):
    both = {name: CRITERIA[name] for name in auto.TRIED}
    settings = Auto(Budget(0.3), criteria=both, uniform=True, compensation=None)
    result = run(trained, [tokens], settings)
    assert set(result.criteria) == {g.name for g in result.groups} and set(result.criteria.values()) <= set(auto.TRIED)
    alone = {name: replace(settings, criteria={name: CRITERIA[name]}) for name in auto.TRIED}
    alone = {name: run(trained, [tokens], one) for name, one in alone.items()}
    for group, name in result.criteria.items():
        assert torch.equal(result.scores[group], alone[name].scores[group])
    with pytest.raises(PlanError, match="name one criterion"):
        replace(settings, ranking="local")


def test_a_criterion_that_cannot_score_these_groups_is_left_out(trained, tokens, monkeypatch):
    def refusing(model, groups, batches, criterion, reduction):
        if criterion == CRITERIA["gate"]:
            raise PlanError("nothing reads them")
        return score(model, groups, batches, criterion, reduction)

    monkeypatch.setattr(auto_steps, "score", refusing)
    both = {name: CRITERIA[name] for name in auto.TRIED}
    result = run(trained, [tokens], Auto(Budget(0.2), criteria=both, uniform=True, compensation=None))
    assert set(result.criteria.values()) == {"taylor-2"}
    with pytest.raises(PlanError, match="nothing reads them"):
        run(trained, [tokens], Auto(Budget(0.2), uniform=True, criteria={"gate": CRITERIA["gate"]}))


@pytest.mark.parametrize("iterations", [1, 2])
def test_what_no_linear_module_reads_is_cut_without_compensation(iterations):
    """Stacked experts."""
    model = zoo.tiny_model("mixtral")
    rows = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(0))
    result = run(model, [rows], Auto(Budget(0.1), kinds=("expert_channel",), iterations=iterations))
    assert not result.compensated and result.model.num_parameters() < model.num_parameters()
    assert "no linear module reads what goes" in result.fallback


def test_where_the_dense_model_is_no_target_matrices_make_up_for_their_own_results(monkeypatch, trained, tokens):
    def cut(model, plan, batches, how, *rest):
        if how is not None and how.target != "current":
            raise PlanError("its results there are no target")
        return whole(model, plan, batches, how, *rest)

    whole = auto_steps.cut
    monkeypatch.setattr(auto_steps, "cut", cut)
    result = run(trained, [tokens], Auto(Budget(0.2), uniform=True, kinds=("ffn_channel",)))
    assert {c.target for c in result.compensated} == {"current"} and "no target" in result.fallback


def test_a_plain_prune_is_ours_and_every_part_can_be_switched_off(secateur, checkpoint_folder, text_file, tmp_path):
    common = ["--sparsity", "0.3", "--calibration", text_file, "--samples", "16", "--seq-len", "32"]
    code, printed, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "a", *common)
    assert code == 0, err
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert set(results["criteria"].values()) <= set(auto.TRIED) and "as cuts were measured to cost" in printed
    assert (
        results["choice"]["sequences"] == 4
        and "hidden" in results["choice"]
        and results["compensation"]
        and "calibration sequences set" in printed
    )
    off = ["--uniform", "--ranking", "local", "--compensate", "none", "--criterion", "taylor-1"]
    code, printed, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "b", *common, *off)
    assert code == 0, err
    code, printed, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "c", *common, "--method", "llm-pruner"
    )  # fmt: skip
    assert code == 0, err
    plans = [PruningPlan.load(tmp_path / name / "plan.json").kept for name in "bc"]
    assert plans[0] == plans[1]
    assert not {"choice", "criteria"} & json.loads((tmp_path / "b" / "results.json").read_text()).keys()


def test_a_smaller_hidden_size_is_found_and_told(secateur, checkpoint_folder, text_file, tmp_path):
    common = ["--calibration", text_file, "--samples", "16", "--seq-len", "32"]
    code, printed, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "a", "--sparsity", "0.9", *common)
    assert code == 0, err
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    hidden, choice = results["kinds"]["hidden"], results["choice"]
    assert hidden["asked"] is None and hidden["share"] == pytest.approx(
        choice["hidden_shares"][choice["chosen"]], abs=1e-6
    )
    assert results["parity"]["max_logit_difference"] < 1e-4 and "and a smaller hidden size" in printed
    assert len(results["tradeoff"]) > 5 and results["tradeoff"] == sorted(results["tradeoff"])
    perplexity = f"{math.exp(choice[choice['chosen']]):.2f} on the sequences set aside"
    assert f"and a smaller hidden size, {hidden['share']:.1%} of it gone: perplexity {perplexity}" in err
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["hidden_size"] == hidden["units"] - hidden["removed"]


@pytest.mark.parametrize("kind", ["mamba", "gpt2", "phi3"])
def test_what_no_widths_reach_is_met_by_the_hidden_dimension_and_all_else_alike(kind):
    """Nothing else can be cut; heads go with it, and are coarse; the budget is extreme."""
    budget, room = {"mamba": (0.3, 0.01), "gpt2": (0.4, 0.07), "phi3": (0.99, 0.001)}[kind]
    model = zoo.tiny_model(kind)
    rows = torch.randint(3, 60, (16, 24), generator=torch.Generator().manual_seed(0))
    result = run(model, [rows], Auto(Budget(budget), compensation=None))
    assert result.choice["chosen"] == "hidden" and "no other form is possible" in result.choice["why"]
    assert abs(1 - result.model.num_parameters() / model.num_parameters() - budget) < room
    assert result.plan.provenance["allocation"]["shares"]["hidden"]["asked"] is None


def test_hidden_sizes_are_tried_once_and_told_as_they_are(monkeypatch):
    """Rounded to 16 of 144 dimensions, three of the four shares are one and the same size, or the whole."""
    model = zoo.tiny_model("phi3")
    rows = torch.randint(3, 60, (16, 24), generator=torch.Generator().manual_seed(0))
    made, whole = [], auto_steps.Steps.form

    def kept(self, form, share):
        result = whole(self, form, share)
        made.append((form, result.model.config.hidden_size))
        return result

    monkeypatch.setattr(auto_steps.Steps, "form", kept)
    result = run(model, [rows], Auto(Budget(0.2), compensation=None, uniform=True, round_to=16))
    sizes = [size for form, size in made if form.hidden]
    assert sizes and len(set(sizes)) == len(sizes) and all(size < 144 and size % 16 == 0 for size in sizes)
    assert round(144 * (1 - result.choice["hidden_shares"]["hidden"])) in sizes
    assert not result.plan.provenance["allocation"]["kind_ratios"]


def test_what_was_cut_by_layer_can_be_cut_again(trained, tokens):
    once = run(trained, [tokens], Auto(Budget(0.2), compensation=None, uniform=False, kinds=("ffn_channel",))).model
    twice = run(once, [tokens], Auto(Budget(0.3), compensation=None))
    assert "per_layer" in twice.choice["chosen"]
    assert abs(1 - twice.model.num_parameters() / once.num_parameters() - 0.3) < 0.01


def test_where_the_hidden_dimension_cannot_be_cut_no_sequences_are_set_aside():
    rows = torch.randint(3, 60, (16, 24), generator=torch.Generator().manual_seed(0))
    assert run(zoo.tiny_model("xglm"), [rows], Auto(Budget(0.1), compensation=None, uniform=False)).choice == {}


def test_a_hidden_size_whose_widths_fall_short_of_the_budget_is_not_compared(trained, tokens):
    plan = PruningPlan({}, {}, {"allocation": {"sparsity": 0.37, "shares": {"hidden": {"asked": 0.2}}}})
    with pytest.raises(BudgetError, match=r"come to a sparsity of 0\.3700 only"):
        auto_steps._record_tried(plan, Budget(0.4))
    auto_steps._record_tried(plan, Budget(0.3745))
    assert plan.provenance["allocation"] == {"sparsity": 0.37, "shares": {"hidden": {"asked": None}}, "kind_ratios": {}}


def test_where_hidden_states_are_compared_the_hidden_size_stays(secateur, checkpoint_folder, text_file, tmp_path):
    calibration = {"source": str(text_file), "samples": 16, "seq_len": 32}
    recovery = {"steps": 2, "data": [str(text_file)], "distill": {"hidden": 0.1}, "seq_len": 32}
    prune = {"param_sparsity": 0.3, "adapt": 0, "calibration": calibration}
    recipe = {"model": {"source": str(checkpoint_folder)}, "prune": prune, "recovery": recovery}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = secateur("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert code == 0, err
    choice = json.loads((tmp_path / "out" / "results.json").read_text())["choice"]
    assert "uniform" in choice and "hidden" not in choice


def test_a_recipe_holds_what_it_depends_on():
    recipe = parse_recipe({"model": {"source": "demo"}, "prune": {"param_sparsity": 0.2}})
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe and recipe.method.name == "auto"
    prune = recipe.prune
    assert (prune.criterion, prune.ranking, prune.compensate, prune.compensate_target) == (
        "measured", "search", "ridge", "halfway",
    )  # fmt: skip
    assert prune.form is None and prune.calibration.samples == 128 and prune.adapt == 0
    paper = parse_recipe({"model": {"source": "demo"}, "method": "llm-pruner", "prune": {"param_sparsity": 0.2}}).prune
    assert (paper.criterion, paper.ranking, paper.compensate) == ("taylor-1", "local", "none")
    given = parse_recipe({"model": {"source": "demo"}, "prune": {"compensate": "none", "ranking": "global"}}).prune
    assert (given.compensate, given.compensate_target, given.ranking) == ("none", "current", "global")
    assert given.criterion == "taylor-2"  # a ranking by scores measures nothing
    layers = parse_recipe({"model": {"source": "demo"}, "prune": {"mode": "layer-wise", "unit_sparsity": 0.3}})
    assert not layers.searches and layers.prune.ranking == "local"


def test_a_search_is_for_no_other_method():
    with pytest.raises(RecipeError, match="the ranking search is of the method auto"):
        parse_recipe({"model": {"source": "demo"}, "method": "llm-pruner", "prune": {"ranking": "search"}})
    for more in ({"method": "llm-pruner"}, {"prune": {"ranking": "global", "criterion": "measured"}}):
        with pytest.raises(RecipeError, match="the criterion measured is of the method auto"):
            parse_recipe({"model": {"source": "demo"}, "prune": {"criterion": "measured"}} | more)
    with pytest.raises(RecipeError, match="leave out the reduction mean"):
        parse_recipe({"model": {"source": "demo"}, "prune": {"criterion": "measured", "reduction": "mean"}})


def test_a_form_that_the_class_cannot_have_is_left_out(trained, tokens, monkeypatch):
    whole = auto_steps.Steps.form

    def only(self, form, share):
        if form.uniform or form.hidden:
            raise PlanError("no field says so; take another class")
        return whole(self, form, share)

    monkeypatch.setattr(auto_steps.Steps, "form", only)
    result = run(trained, [tokens], Auto(Budget(0.2), compensation=None))
    assert result.choice == {"chosen": "per_layer", "why": "no other form is possible: no field says so"}
    with pytest.raises(PlanError, match="no field says so"):
        run(trained, [tokens], Auto(Budget(0.2), uniform=True))


def test_a_budget_that_no_form_reaches_is_refused_by_the_one_that_goes_furthest(trained, tokens):
    with pytest.raises(BudgetError, match="cutting kv_group, ffn_channel, hidden"):
        run(trained, [tokens], Auto(Budget(0.9999)))


@pytest.mark.parametrize(
    "more",
    [
        {"kinds": ("ffn_channel",)},
        {"kind_ratios": {"kv_group": 0.5}},
        {"iterations": 2},
        {"hidden": False},
        {"ranking": "local", "criteria": {"gate": CRITERIA["gate"]}},
        {"budget": Budget(unit_sparsity=0.2)},
    ],
)
def test_the_hidden_dimension_is_tried_only_where_nothing_else_is_said(more):
    assert Auto(Budget(0.2)).tries_hidden and not replace(Auto(Budget(0.2)), **more).tries_hidden


def test_one_criterion_is_not_measured_against_itself(trained, tokens, monkeypatch):
    monkeypatch.setattr(auto_steps, "cheapest_orders", lambda *given: pytest.fail("there is nothing to choose"))
    one = {"gate": CRITERIA["gate"]}
    result = run(trained, [tokens], Auto(Budget(0.2), one, kinds=("ffn_channel",), uniform=True, compensation=None))
    assert set(result.criteria.values()) == {"gate"}


def test_a_form_whose_loss_is_not_finite_is_left_out(trained, tokens, monkeypatch):
    whole = forms.losses_of_rows
    answers = [torch.full((8,), float("nan"), dtype=torch.float64)]
    monkeypatch.setattr(forms, "losses_of_rows", lambda *given: answers.pop() if answers else whole(*given))
    result = run(trained, [tokens], Auto(Budget(0.2), compensation=None))
    assert "uniform" not in result.choice and {"hidden", "per_layer"} <= set(result.choice)
