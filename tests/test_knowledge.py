"""Knowledge distribution: against slicing and measuring by hand, the cache against whole passes, the command line."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from families import LLAMA_LIKE, make
from test_experts import make as make_moe
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import secateur as sc
from secateur.errors import BudgetError, KnowledgeError, NonFiniteError, PlanError
from secateur.evaluation import Knowledge, Perplexity, Trial, draw, knowledge_distribution
from secateur.importance import Magnitude
from secateur.pipeline import analysing
from secateur.plan import PruningPlan


def letters(text: str, **_) -> dict[str, list[int]]:
    """A tokenizer for models of 131 tokens."""
    return {"input_ids": [3 + byte % 120 for byte in text.encode()]}


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def with_layers(family: str, layers: int = 3):
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return make(family, **{name: layers})


@pytest.fixture(scope="module")
def corpus(text_file):
    return sc.load_corpus(text_file)


@pytest.fixture(scope="module")
def short(corpus):
    """Text of few windows."""
    return replace(corpus, rows=corpus.rows[:1])


@pytest.fixture(scope="module")
def found(trained, tokenizer, corpus):
    """The model in float64 and its analysis."""
    model = copy.deepcopy(trained).double()
    before = state(model)
    knowledge = knowledge_distribution(model, tokenizer, corpus, seq_len=64, samples=None, ratios=(0.3, 0.6))
    assert unchanged(model, before)
    return model, knowledge


def test_every_deviation_is_that_of_the_sliced_model(found, tokenizer, corpus):
    model, knowledge = found
    groups = sc.discover(model)
    assert knowledge.dense == sc.perplexity(model, tokenizer, corpus, seq_len=64)
    assert [(t.group, t.ratio) for t in knowledge.trials] == [
        (g.name, ratio) for g in groups.of_kinds(["ffn_channel", "kv_group"]) for ratio in (0.3, 0.6)
    ]
    for trial in knowledge.trials:
        group = groups.named(trial.group)
        assert trial.removed == {96: {0.3: 29, 0.6: 58}, 3: {0.3: 1, 0.6: 2}}[group.units][trial.ratio]
        order = sc.score(model, [group], [], Magnitude())[group.name].argsort().tolist()
        plan = PruningPlan({group.name: tuple(sorted(order[trial.removed :]))}, {group.name: group.units})
        alone = sc.perplexity(sc.slice(model, plan, groups), tokenizer, corpus, seq_len=64)
        assert trial.loss == pytest.approx(alone.loss, rel=1e-6)
        assert knowledge.ratio(trial) == pytest.approx(alone.value / knowledge.dense.value, rel=1e-6)
        assert (trial.layer, trial.kind, trial.units) == (group.layer, group.kind, group.units)
    assert knowledge.from_cache and not knowledge.sliced and not knowledge.left_out


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-mqa", "gpt_neox", "opt", "gemma2", "mixtral", "qwen3_moe"])
def test_passes_from_the_cache_are_whole_ones(family, short):
    model = make_moe(family) if family in ("mixtral", "qwen3_moe") else with_layers(family)
    before, settings = state(model), {"seq_len": 32, "samples": 5, "batch_size": 2, "ratios": (0.5,)}
    cached = knowledge_distribution(model, letters, short, **settings)
    whole = knowledge_distribution(model, letters, short, cached=False, **settings)
    assert cached.from_cache and not whole.from_cache and unchanged(model, before)
    assert {t.layer for t in cached.trials} >= {0, 1} and cached.dense == whole.dense
    for one, other in zip(cached.trials, whole.trials, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6) and one.loss != cached.dense.loss
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_only_the_layers_from_the_group_onward_run(short):
    model = with_layers("llama", 4)
    groups, runs = sc.discover(model), [0] * 4
    for number, layer in enumerate(model.model.layers):
        count = lambda *_, number=number: runs.__setitem__(number, runs[number] + 1)  # noqa: E731
        layer.self_attn.register_forward_hook(count)
    settings = {"seq_len": 32, "samples": 4, "batch_size": 1, "kinds": ["ffn_channel"]}
    knowledge_distribution(model, letters, short, groups=groups, **settings)
    # on 4 windows: 3 ratios of each group up to the layer; twice to begin with (order, dense loss), once to go on
    measured = [3 * 4 * (layer + 1) for layer in range(4)]
    verified = [2, 2 + 1, 2 + 2, 3]  # on the first and the last window: to go on; on the first: beginning at each layer
    assert runs == [
        m + 1 + 4 + 4 * (layer < 3) + v for layer, (m, v) in enumerate(zip(measured, verified, strict=True))
    ]


def test_a_layer_that_leaves_something_behind_is_found_out(short):
    model = with_layers("llama")
    left: dict[str, torch.Tensor] = {}
    first, last = model.model.layers[0], model.model.layers[2]
    first.self_attn.register_forward_hook(lambda *call: left.update(inner=call[-1][0].clone()))
    last.mlp.register_forward_hook(lambda *call: call[-1] + left["inner"])
    groups = sc.discover(with_layers("llama"))  # without the hooks
    settings = {"seq_len": 32, "samples": 5, "batch_size": 2, "ratios": (0.5,), "groups": groups}
    knowledge = knowledge_distribution(model, letters, short, **settings)
    whole = knowledge_distribution(model, letters, short, cached=False, **settings)
    assert not knowledge.from_cache and "gives another loss" in knowledge.cache_note
    assert [t.loss for t in knowledge.trials] == [t.loss for t in whole.trials]


@pytest.mark.parametrize("kind", ["hidden", "layer", "sublayer", "query_head"])
def test_kinds_beyond_the_default(kind, short):
    model = with_layers("llama").double()
    before, groups = state(model), sc.discover(model)
    settings = {"groups": groups, "kinds": [kind], "ratios": (0.5,), "seq_len": 32, "samples": 4}
    knowledge = knowledge_distribution(model, letters, short, **settings)
    assert unchanged(model, before) and bool(knowledge.sliced) == (kind == "hidden")
    trial = knowledge.trials[0]
    order = sc.score(model, groups.of_kinds([kind]), [], Magnitude())[trial.group].argsort(stable=True).tolist()
    going = [unit for unit in order if unit not in groups.named(trial.group).stays][: trial.removed]
    plan = PruningPlan(
        {trial.group: tuple(u for u in range(trial.units) if u not in going)}, {trial.group: trial.units}
    )
    few = replace(short, rows=(short.texts[0][: 4 * 32],))
    alone = sc.perplexity(sc.slice(model, plan, groups), letters, few, seq_len=32)
    assert trial.loss == pytest.approx(alone.loss, rel=1e-6)


def test_where_zeroing_is_not_removal_a_copy_is_sliced(short):
    """The norms of OLMo 2 average over all heads, zeroed ones too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["olmo2"](**LLAMA_LIKE)).eval().double()
    knowledge = knowledge_distribution(model, letters, short, ratios=(0.4,), seq_len=32, samples=4)
    assert knowledge.sliced == ("model.layers.*.self_attn/kv_group",)
    trial = next(t for t in knowledge.trials if t.kind == "kv_group")
    order = sc.score(model, [sc.discover(model).named(trial.group)], [], Magnitude())[trial.group].argsort().tolist()
    plan = PruningPlan({trial.group: tuple(sorted(order[1:]))}, {trial.group: 3})
    few = replace(short, rows=(short.texts[0][: 4 * 32],))
    alone = sc.perplexity(sc.slice(model, plan), letters, few, seq_len=32)
    assert trial.loss == pytest.approx(alone.loss, rel=1e-6)


def test_scores_of_any_criterion_choose_what_goes(short):
    model = with_layers("llama")
    groups = sc.discover(model)
    chosen = groups.of_kinds(["ffn_channel"])
    scores = {g.name: torch.arange(g.units, 0, -1) for g in chosen}  # the last ones go first
    settings = {"kinds": ["ffn_channel"], "ratios": (0.5,), "seq_len": 32, "samples": 2}
    knowledge = knowledge_distribution(model, letters, short, scores=scores, **settings)
    plan = PruningPlan({chosen[0].name: tuple(range(22))}, {chosen[0].name: 44})
    few = replace(short, rows=(short.texts[0][: 2 * 32],))
    with sc.mask(model, plan):
        masked = sc.perplexity(model, letters, few, seq_len=32)
    assert knowledge.trials[0].loss == pytest.approx(masked.loss, rel=1e-6)
    with pytest.raises(PlanError, match="one score for each of its 44 units"):
        knowledge_distribution(model, letters, short, scores={chosen[0].name: torch.ones(3)}, **settings)


def test_ratios_that_come_to_the_same_number_are_measured_once(short):
    told = []
    model = with_layers("llama", 2)
    settings = {"kinds": ["kv_group"], "seq_len": 32, "samples": 2}
    knowledge = knowledge_distribution(model, letters, short, on_loss=lambda *fact: told.append(fact), **settings)
    assert [t.removed for t in knowledge.trials] == [1, 2, 2] * 2 and len(told) == 4
    known = {(name, removed): loss for name, removed, loss in told[1:]}
    again = []
    assert knowledge == knowledge_distribution(
        model, letters, short, known=known, on_loss=lambda *fact: again.append(fact), **settings
    )
    assert again == told[:1]


def test_a_loss_that_is_not_finite_is_told(short):
    model = with_layers("llama", 2)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="before anything is cut"):
        knowledge_distribution(model, letters, short, seq_len=32, samples=2)


def made_up(**losses: float) -> Knowledge:
    dense = Perplexity(math.exp(2.0), 2.0, 100, 32, None, False, "t", "ab", "float32")
    trials = [
        Trial(name, "ffn_channel", 0, r, 8, int(8 * r), loss * r) for name, loss in losses.items() for r in (0.5, 1)
    ]
    return Knowledge(dense, tuple(trials), {"model_sha256": "ab"})


def test_the_worst_share_of_the_groups():
    knowledge = made_up(a=4.0, b=6.0, c=5.0, d=6.0)
    assert knowledge.deviations() == {"a": 1.0, "b": 2.5, "c": 1.75, "d": 2.5}
    assert knowledge.ratio(knowledge.trials[1]) == pytest.approx(math.exp(2.0))
    assert knowledge.most_sensitive(0.1) == ("b",) and knowledge.most_sensitive(0) == ()
    assert knowledge.most_sensitive(0.5) == ("b", "d") and knowledge.most_sensitive(0.7) == ("b", "d", "c")
    with pytest.raises(KnowledgeError, match=r"\[0, 1\)"):
        knowledge.most_sensitive(1.0)


def test_json_and_back():
    knowledge = made_up(a=4.0, b=6.0)
    data = json.loads(json.dumps(knowledge.to_json()))
    assert Knowledge.from_json(data) == knowledge
    assert data["trials"][1]["loss_difference"] == 2.0 and data["deviations"] == {"a": 1.0, "b": 2.5}
    knowledge.check_checkpoint("ab")
    for broken in ({**data, "schema": 9}, {**data, "trials": [{}]}, {**data, "trials": 3}, [], {}):
        with pytest.raises(KnowledgeError):
            Knowledge.from_json(broken)


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_a_picture_is_drawn(suffix, found, tmp_path):
    _, knowledge = found
    draw(knowledge, tmp_path / f"k{suffix}", "a model", knowledge.most_sensitive())
    start = (tmp_path / f"k{suffix}").read_bytes()[:200]
    assert {
        ".svg": b"<svg" in (tmp_path / f"k{suffix}").read_bytes(),
        ".png": b"PNG" in start,
        ".pdf": b"%PDF" in start,
    }[suffix]
    assert len(list(tmp_path.iterdir())) == 1


FLAGS = ["--samples", 6, "--seq-len", 32, "--batch-size", 2]


@pytest.fixture(scope="module")
def analysed(checkpoint_folder, text_file, tmp_path_factory):
    """The file that `secateur analyze` writes."""
    from secateur.config import parse_recipe

    file = tmp_path_factory.mktemp("analysis") / "k.json"
    data = {"texts": [str(text_file)], "seq_len": [32], "batch_size": 2}
    recipe = {"model": {"source": str(checkpoint_folder)}, "prune": {"criterion": "l2"}, "evaluation": data}
    analysing.analyze(parse_recipe(recipe), samples=6, json_file=file)
    return file


def test_analyze(secateur, analysed, checkpoint_folder, text_file, tmp_path):
    picture, file = tmp_path / "k.svg", tmp_path / "k.json"
    code, out, err = secateur(
        "analyze", checkpoint_folder, "--text", text_file, *FLAGS, "--json", file, "--picture", picture
    )
    assert code == 0, err
    assert file.read_text() == analysed.read_text() and "<svg" in picture.read_text()
    results = json.loads(file.read_text())
    assert results["schema"] == 1 and results["command"] == "analyze" and len(results["model"]["sha256"]) == 64
    knowledge = Knowledge.load(file)
    assert knowledge.dense.tokens == 6 * 31 and knowledge.protocol["windows"] == 6
    assert knowledge.protocol["proxy"] == "l2" and knowledge.protocol["ratios"] == [0.25, 0.5, 0.75]
    worst = knowledge.most_sensitive()
    assert len(worst) == 1 and f"* most sensitive, the worst first: {worst[0]}" in out
    assert f"{knowledge.deviations()[worst[0]]:+.4f} *" in out
    assert sorted(f.name for f in tmp_path.iterdir()) == ["k.json", "k.svg"]


def test_a_killed_analysis_goes_on(secateur, analysed, checkpoint_folder, text_file, tmp_path, monkeypatch):
    file = tmp_path / "k.json"
    command = ["analyze", checkpoint_folder, "--text", text_file, *FLAGS, "--json", file]
    add = analysing.Measured.add

    def killed(self, *loss):
        add(self, *loss)
        if len(self.losses) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(analysing.Measured, "add", killed)
    assert secateur(*command)[0] == 130
    work = tmp_path / "k.json.work"
    assert [f.name for f in tmp_path.iterdir()] == [work.name] and len(work.read_text().splitlines()) == 8
    work.write_text(work.read_text()[:-9])  # as a kill in the middle of a line leaves it
    code, _, err = secateur(*command, "--resume", "--ratios", "0.5")
    assert code == 2 and "another model, text or setting" in err and work.exists()
    told = []
    monkeypatch.setattr(analysing.Measured, "add", lambda self, *loss: (told.append(loss), add(self, *loss)))
    assert secateur(*command, "--resume")[0] == 0
    assert file.read_text() == analysed.read_text() and [f.name for f in tmp_path.iterdir()] == [file.name]
    assert len(told) == len({(t.group, t.removed) for t in Knowledge.load(file).trials}) - 6
    told.clear()
    assert secateur(*command, "--resume")[0] == 0 and not told  # the result itself is taken as measured
    assert file.read_text() == analysed.read_text()


def test_the_most_sensitive_groups_are_left_whole(secateur, analysed, checkpoint_folder, text_file, tmp_path):
    flags = ["--sparsity", 0.2, "--calibration", text_file, "--samples", 4, "--seq-len", 32, "--per-layer"]
    knows = ["--knowledge", analysed, "--protect-share", 0.34]
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "o", "--method", "llm-pruner", *flags, *knows)
    assert code == 0, err
    worst = Knowledge.load(analysed).most_sensitive(0.34)
    plan = PruningPlan.load(tmp_path / "o" / "plan.json")
    names = {t.group for t in Knowledge.load(analysed).trials}
    assert len(worst) == 2 and set(plan.kept) == names - set(worst)
    assert plan.provenance["allocation"]["protect"] == sorted(worst)
    assert plan.provenance["knowledge"]["protected"] == list(worst) and plan.provenance["knowledge"]["share"] == 0.34
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["protocol"]["knowledge"] == plan.provenance["knowledge"]
    code, _, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "p", "--method", "llm-pruner", *flags[:-1], *knows
    )
    assert code == 2 and "per-layer" in err and not (tmp_path / "p").exists()


def test_loraprune_leaves_them_whole_too(secateur, analysed, checkpoint_folder, text_file, tmp_path):
    code, _, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "o", "--method", "loraprune", "--sparsity", 0.2, "--per-layer",
        "--data", text_file, "--steps", 3, "--batch-size", 2, "--seq-len", 32, "--knowledge", analysed,
    )  # fmt: skip
    assert code == 0, err
    (worst,) = Knowledge.load(analysed).most_sensitive()
    plan = PruningPlan.load(tmp_path / "o" / "plan.json")
    assert plan.kept and worst not in plan.kept and plan.provenance["knowledge"]["protected"] == [worst]


def test_allocation_leaves_groups_whole_with_the_blocks_around_them(trained):
    groups = sc.discover(trained)
    scores = sc.score(trained, groups.of_kinds(["ffn_channel", "layer"]), [], Magnitude())
    name = "model.layers.1.mlp/ffn_channel"
    options = {"uniform": False, "protect": [name]}
    plan = sc.allocate(groups, scores, sc.Budget(unit_sparsity=0.6), **options)
    assert name not in plan.kept and 1 in plan.kept["model.layers/layer"]
    plan = sc.allocate(groups, scores, sc.Budget(unit_sparsity=0.6), kinds=["layer"], protect=[name])
    assert 1 in plan.kept["model.layers/layer"]
    with pytest.raises(BudgetError, match="per-layer"):
        sc.allocate(groups, scores, sc.Budget(unit_sparsity=0.6), kinds=["ffn_channel"], protect=[name])


BAD = {
    "no text": (["--text", "nothing.txt"], "no such file"),
    "a ratio of one": (["--ratios", "0.5,1.0"], "expected shares between 0 and 1"),
    "no ratio": (["--ratios", "half"], "write shares with commas"),
    "unknown kind": (["--kinds", "bogus"], "'bogus' is no kind of unit"),
    "kind it lacks": (["--kinds", "ffn_channel,expert"], "there is no expert to cut"),
    "unknown criterion": (["--criterion", "l3"], "prune.criterion"),
    "long windows": (["--seq-len", "9999"], "positions"),
    "short text": (["--text", "{short}", "--seq-len", "64"], "fewer than one window"),
    "no picture": (["--picture", "{out}/k.gif"], "names no format"),
    "one file for both": (["--json", "{out}/k.svg", "--picture", "{out}/k.svg"], "one would take the place"),
    "no folder": (["--json", "{out}/missing/k.json"], "cannot be written"),
    "nothing to resume": (["--resume"], "--json FILE"),
    "calibration": (["--criterion", "taylor-1", "--calibration", "nothing.txt"], "no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_writes_nothing(secateur, checkpoint_folder, text_file, tmp_path, case):
    flags, message = BAD[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "short.txt").write_text("The old man.")
    (tmp_path / "out").mkdir()
    given = [flag.format(short=tmp_path / "in" / "short.txt", out=tmp_path / "out") for flag in flags]
    if "--text" not in given:
        given += ["--text", str(text_file)]
    if not {"--json", "--resume"} & set(given):
        given += ["--json", str(tmp_path / "out" / "k.json")]
    code, _, err = secateur("analyze", checkpoint_folder, *given)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "what", ["missing", "folder", "empty", "plan", "other model", "damaged", "share", "with a plan"]
)
def test_bad_knowledge_files(secateur, analysed, checkpoint_folder, text_file, tmp_path, what):
    place = tmp_path / "in"
    place.mkdir()
    data = json.loads(analysed.read_text())
    if what == "other model":
        data["knowledge"]["protocol"]["model_sha256"] = "ab" * 32
    if what == "damaged":
        del data["knowledge"]["trials"][0]["loss"]
    text = {"empty": "", "plan": '{"schema": 1, "groups": {}}'}.get(what, json.dumps(data))
    file = place if what == "folder" else place / "k.json"
    if what not in ("missing", "folder"):
        file.write_text(text)
    flags = ["--sparsity", 0.2, "--calibration", text_file, "--per-layer", "--knowledge", file]
    if what == "share":
        flags = [*flags[:-2], "--protect-share", 0.2]
    if what == "with a plan":
        flags += ["--plan", place / "plan.json"]
    messages = {
        "missing": "No such file",
        "folder": "Is a directory",
        "other model": "another model",
        "damaged": "'loss'",
        "share": "give knowledge",
        "with a plan": "--plan or --knowledge",
    }
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "out", *flags)
    assert code == 2 and err.count("error: ") == 1 and messages.get(what, "knowledge file") in err, err
    assert "Traceback" not in err and [f.name for f in tmp_path.iterdir()] == ["in"]
