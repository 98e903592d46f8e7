"""The mix of recovery data: who gets how much, what is drawn, what is only measured, and what survives a kill."""

import copy
import json
import math
import shutil
import weakref
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import story
from families import make
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

import secateur as sc
from secateur.data import Corpus, load_corpus
from secateur.errors import CheckpointError, DataError, NonFiniteError, RecipeError
from secateur.recovery import RecoverySettings, recover, save_mix, train, with_adapters
from secateur.recovery.mixing import counts, degradation, drawn, rounds_by_stage, shares, stalled
from secateur.recovery.rounds import Rounds
from secateur.recovery.sources import Source, held_out_loss, sources_of

QUICK = RecoverySettings(
    steps=12, round_steps=3, batch_size=4, micro_batch_size=2, seq_len=16, learning_rate=5e-3, dropout=0.1,
    save_every=4, mix="dynamic", warmup_steps=1,
)  # fmt: skip


def numbers(seed: int) -> str:
    """Text of another character than `story`, which its model never saw."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(str(int(n)) for n in torch.randint(100, 999, (200,), generator=generator))


@pytest.fixture(scope="module")
def corpora():
    texts = {"stories": tuple(story(s) for s in range(8)), "numbers": tuple(numbers(s) for s in range(4))}
    return [Corpus(name, rows, "", f"{name}.txt") for name, rows in texts.items()]


@pytest.fixture(scope="module")
def instructions():
    rows = [{"instruction": "open the door", "input": "", "output": story(s, 2)} for s in range(40)]
    return Corpus("orders", tuple(rows), "", "orders.jsonl")


@pytest.fixture(scope="module")
def damaged(trained):
    """The trained model with half of its FFN channels zeroed."""
    model = copy.deepcopy(trained)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    return model


def test_degradation_is_relative_to_dense_and_never_negative():
    assert degradation(3.0, 2.0) == 0.5 and degradation(1.0, 2.0) == 0.0


def test_shares_by_hand():
    assert shares([0.3, 0.1], [100, 300], 0.2) == pytest.approx([0.8 * 0.75 + 0.2 * 0.25, 0.8 * 0.25 + 0.2 * 0.75])
    assert shares([0.0, 0.0], [100, 300], 0.2) == [0.25, 0.75]
    assert shares([0.0, 0.5], [1, 1], 0.0) == [0.0, 1.0] and shares([0.0, 0.5], [1, 3], 1.0) == [0.25, 0.75]
    assert counts([0.5, 0.3, 0.2], 7) == [4, 2, 1] and counts([1 / 3] * 3, 4) == [2, 1, 1]


SOURCES = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 10**6)), min_size=2, max_size=7)


@given(SOURCES, st.floats(0, 1), st.integers(0, 5000))
def test_shares_in_general(sources, balance, total):
    worse, sizes = zip(*sources, strict=True)
    found = shares(worse, sizes, balance)
    assert math.isclose(sum(found), 1, rel_tol=1e-9)
    assert all(p >= balance * n / sum(sizes) - 1e-12 for p, n in zip(found, sizes, strict=True))
    numbers = counts(found, total)
    assert sum(numbers) == total and all(abs(n - p * total) < 1 + 1e-6 for n, p in zip(numbers, found, strict=True))


@given(SOURCES, st.floats(0, 1), st.floats(0.01, 5))
def test_a_source_that_gets_worse_never_gets_less(sources, balance, more):
    worse, sizes = zip(*sources, strict=True)
    if sum(worse) > 0:
        assert shares([worse[0] + more, *worse[1:]], sizes, balance)[0] >= shares(worse, sizes, balance)[0] - 1e-12


@given(st.integers(1, 40), st.lists(st.integers(0, 50), max_size=6), st.integers(0, 99))
def test_drawing_is_exact_and_without_replacement(size, rounds, seed):
    found, before = [], 0
    for number in rounds:
        new = drawn(size, before, number, (seed, 0))
        assert len(new) == number
        found, before = found + new, before + number
    assert found == drawn(size, 0, sum(rounds), (seed, 0))  # in how many rounds makes no difference
    for begin in range(0, len(found), size):
        one_pass = found[begin : begin + size]
        assert len(set(one_pass)) == len(one_pass) and set(one_pass) <= set(range(size))


def test_a_stage_ends_when_the_worst_source_no_longer_improves():
    assert not stalled([0.5, 0.4, 0.3], 2) and not stalled([0.5, 0.5], 2)
    assert stalled([0.5, 0.499, 0.496], 2) and stalled([0.5, 0.4, 0.41, 0.42], 2)
    assert not stalled([0.5, 0.499, 0.49], 2)  # 1 % of the best value, over two rounds
    assert not stalled([0.5] * 9, 0)
    assert rounds_by_stage(10, [300, 100]) == [8, 2] and rounds_by_stage(2, [10**6, 1]) == [1, 1]
    assert rounds_by_stage(7, [5]) == [7] and sum(rounds_by_stage(10, [1, 1, 1])) == 10


def test_what_is_held_out_is_never_trained_on(corpora, tokenizer):
    again = replace(corpora[0], name="again", rows=corpora[0].rows * 3)
    for source in sources_of([*corpora, again], tokenizer, 16, False):
        assert len(source.held_out) == max(1, min(32, source.size // 20)) <= source.size - len(source.train)
        held_out = {tuple(e["input_ids"]) for e in source.held_out}
        assert source.train and not any(tuple(e["input_ids"]) in held_out for e in source.train)
    alike = [Corpus("alike", ("0" * 99,), "", "alike.txt"), Corpus("other", ("0" * 99,), "", "other.txt")]
    with pytest.raises(DataError, match=r"alike\.txt: of \d+ examples 1 are held out"):
        sources_of(alike, tokenizer, 9, False)


def test_held_out_losses_are_means_over_tokens_padded_or_not(trained, tokenizer, instructions):
    source = sources_of([instructions, replace(instructions, name="b")], tokenizer, 240, False)[1]
    source = replace(source, held_out=source.train[:5])
    state = torch.get_rng_state()
    found = held_out_loss(trained.train(), source, 3)
    assert trained.training and torch.equal(state, torch.get_rng_state())
    trained.eval()
    sums = []
    for example in source.held_out:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        with torch.no_grad():
            sums.append((float(trained(input_ids=ids, labels=labels).loss), int((labels[:, 1:] != -100).sum())))
    assert found == pytest.approx(sum(loss * n for loss, n in sums) / sum(n for _, n in sums), rel=1e-5)
    broken = copy.deepcopy(trained)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="held-out part of orders"):
        held_out_loss(broken, source, 3)


def test_the_worse_source_gets_more(damaged, trained, tokenizer, corpora, tmp_path, capfd):
    result = recover(damaged, tokenizer, corpora, QUICK, tmp_path, dense=lambda: trained)
    rounds, end = result.mix["rounds"], result.mix["end"]
    assert [row["step"] for row in rounds] == [0, 3, 6, 9] and end["step"] == 12 and end["ended"] == "all steps done"
    assert not any("mix" in entry for entry in result.log) and any("loss" in entry for entry in result.log)
    first = rounds[0]["sources"]
    worse = max(first, key=lambda name: first[name]["degradation"])
    sizes = {s.name: len(s.train) for s in sources_of(corpora, tokenizer, 16, False)}
    assert first[worse]["share"] > sizes[worse] / sum(sizes.values())
    for row in rounds:
        figures = row["sources"]
        total = sum(f["degradation"] for f in figures.values())
        for name, f in figures.items():
            assert f["degradation"] == pytest.approx(max(0, f["loss"] / f["dense_loss"] - 1))
            own = f["degradation"] / total if total else sizes[name] / sum(sizes.values())
            assert f["share"] == pytest.approx(0.5 * own + 0.5 * sizes[name] / sum(sizes.values()))
        assert sum(f["examples"] for f in figures.values()) == 3 * 4
    assert end["sources"][worse]["degradation"] < first[worse]["degradation"]
    lines = [line for line in capfd.readouterr().err.splitlines() if ": mix, round " in line]
    assert len(lines) == 4 and lines[0].startswith("- step 0 of 12: mix, round 1 of 4 (text): numbers ")


class Watch(TrainerCallback):
    """What the Trainer did, seen from outside."""

    def __init__(self, stop_at=None):
        self.rates, self.optimizers, self.stop_at = [], set(), stop_at

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.optimizers.add(id(optimizer))

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


def trained_with(model, tokenizer, corpora, settings, output, *, watch=None, resume=False, dense=None):
    """Weights of the adapters after training, and the log."""
    adapted = with_adapters(copy.deepcopy(model), settings)
    log, _ = train(adapted, tokenizer, corpora, settings, output, callbacks=[watch or Watch()], resume=resume,
                   dense=lambda: dense)  # fmt: skip
    return {n: p for n, p in adapted.named_parameters() if p.requires_grad}, log


def test_steps_and_learning_rates_are_those_of_static_recovery(damaged, trained, tokenizer, corpora, tmp_path):
    seen = []
    for mix in ("proportional", "uniform", "dynamic"):
        epochs = replace(QUICK, steps=None, epochs=0.35, mix=mix, round_steps=5, patience=0)
        watch = Watch()
        _, log = trained_with(damaged, tokenizer, corpora, epochs, tmp_path / mix, watch=watch, dense=trained)
        assert len(watch.optimizers) == 1
        assert ("mix" in log[0]) == (mix != "proportional")
        seen.append(watch.rates)
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) % 5 and max(seen[0]) == QUICK.learning_rate


@pytest.mark.parametrize("stop_at", [2, 5, 8, 9, 12])  # before a checkpoint, in a round, where one ends, in the end
def test_a_killed_run_goes_on_to_the_same_bits(damaged, trained, tokenizer, corpora, tmp_path, stop_at):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = replace(QUICK, save_every=3 if stop_at == 9 else 2)
    try:
        whole, log = trained_with(damaged, tokenizer, corpora, settings, tmp_path / "a", dense=trained)
        with pytest.raises(KeyboardInterrupt):
            trained_with(damaged, tokenizer, corpora, settings, tmp_path / "b", watch=Watch(stop_at), dense=trained)
        dense = trained if stop_at == 2 else None  # measured once; a run that goes on needs it no more
        again, resumed = trained_with(
            damaged, tokenizer, corpora[::-1], settings, tmp_path / "b", resume=True, dense=dense
        )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(again[name], factor) for name, factor in whole.items())
    assert [e for e in resumed if "mix" in e] == [e for e in log if "mix" in e]
    with pytest.raises(CheckpointError, match="another mix, other sources or other rounds"):
        trained_with(damaged, tokenizer, corpora, replace(settings, round_steps=5), tmp_path / "b", resume=True)
    with pytest.raises(CheckpointError, match="another mix, other sources or other rounds"):
        pooled = replace(settings, mix="proportional")
        trained_with(damaged, tokenizer, corpora, pooled, tmp_path / "b", resume=True)
    with pytest.raises(CheckpointError, match="another mix, other sources or other rounds"):
        renamed = [corpora[0], replace(corpora[1], name="others")]
        trained_with(damaged, tokenizer, renamed, settings, tmp_path / "b", resume=True)


def test_a_run_killed_after_its_early_end_goes_on_to_the_same_bits(damaged, trained, tokenizer, corpora, tmp_path):
    settings = replace(QUICK, steps=30, round_steps=2, save_every=2, learning_rate=1e-9)
    whole, log = trained_with(damaged, tokenizer, corpora, settings, tmp_path / "a", dense=trained)
    end = [e["mix"] for e in log if "mix" in e][-1]
    assert end["ended"] == "converged" and end["step"] == 4  # two rounds without improvement
    assert [f.name for f in (tmp_path / "a" / "checkpoints").iterdir()] == ["checkpoint-2"]
    again, _ = trained_with(damaged, tokenizer, corpora, settings, tmp_path / "a", resume=True)
    assert all(torch.equal(again[name], factor) for name, factor in whole.items())


def test_the_dense_model_is_loaded_once_and_gone_when_training_begins(damaged, trained, tokenizer, corpora, tmp_path):
    loaded, alive = [], []

    def load():
        model = copy.deepcopy(trained)
        loaded.append(weakref.ref(model))
        return model

    settings = replace(QUICK, steps=2, round_steps=1, eval_every=1)
    recover(damaged, tokenizer, corpora, settings, tmp_path, dense=load,
            evaluate=lambda model: alive.append(loaded[0]() is not None) or {})  # fmt: skip
    assert len(loaded) == 1 and alive == [False, False]


def fake_source(name, size, is_instructions=False):
    examples = [{"input_ids": [i], "attention_mask": [1], "labels": [i]} for i in range(size)]
    return Source(name, is_instructions, size + 1, examples, examples[:1])


def run_rounds(settings, steps, sources, losses):
    """Rows of a run without a model: `losses(row number)` gives what is measured."""
    rounds = Rounds(sources, settings, steps, 2)
    rounds.dense = {source.name: 1.0 for source in sources}
    calls = iter(range(99))
    rounds._losses = lambda model: losses(next(calls))
    state, control = SimpleNamespace(global_step=0, log_history=[]), SimpleNamespace(should_training_stop=False)
    rounds.on_train_begin(None, state, control)
    while state.global_step < steps and not control.should_training_stop:
        state.global_step += 1
        rounds.on_step_end(None, state, control)
    return [entry["mix"] for entry in state.log_history]


def test_text_comes_before_instructions_and_leaves_them_what_it_does_not_use():
    sources = [fake_source("orders", 100, True), fake_source("a", 200), fake_source("b", 100)]
    settings = RecoverySettings(mix="dynamic", round_steps=4)
    better = run_rounds(settings, 40, sources, lambda n: {"orders": 2 - n / 50, "a": 2 - n / 20, "b": 1.5})
    assert [row["stage"] for row in better] == ["text"] * 8 + ["instructions"] * 2 + [None]
    assert better[0]["sources"]["orders"]["examples"] == 0 and better[9]["sources"]["orders"]["examples"] == 8
    stuck = run_rounds(settings, 40, sources, lambda n: {"orders": 2 - n / 50, "a": 1.5, "b": 1.5})
    assert [row["stage"] for row in stuck] == ["text"] * 2 + ["instructions"] * 8 + [None]
    assert stuck[-1]["ended"] == "all steps done"
    both = run_rounds(settings, 40, sources, lambda n: dict.fromkeys(("orders", "a", "b"), 1.5))
    assert [row["stage"] for row in both] == ["text"] * 2 + ["instructions"] * 2 + [None]
    assert both[-1]["ended"] == "converged" and both[-1]["step"] == 16
    with pytest.raises(RecipeError, match="one round of 1 steps: give more --steps"):
        Rounds(sources, settings, 1, 2)


def test_text_and_instructions_part_only_when_no_more_units_go():
    def source(name, is_instructions, examples):
        return Source(name, is_instructions, examples + 1, [{}] * examples, [{}])

    both = [source("a", False, 60), source("i", True, 20)]
    settings = RecoverySettings(mix="dynamic", round_steps=10)
    found = Rounds(both, settings, 100, 2, pruned_at=35).stages
    assert [(stage.name, stage.rounds) for stage in found] == [("all", 4), ("text", 5), ("instructions", 1)]
    assert [s.name for s in found[0].sources] == ["a", "i"]
    late = Rounds(both, settings, 100, 2, pruned_at=100).stages  # each stage keeps a round
    assert [(stage.name, stage.rounds) for stage in late] == [("all", 8), ("text", 1), ("instructions", 1)]
    text = Rounds([both[0], source("b", False, 5)], settings, 100, 2, pruned_at=35).stages
    assert [stage.name for stage in text] == ["text"]


def test_the_methods_say_when_the_last_units_go():
    assert sc.LoRAPrune(0.2, cooldown=0.3).last_cut(100) == 70
    assert sc.LoRAShear(0.2, cooldown=0.3).last_cut(100) == 70


def test_a_uniform_mix_takes_the_same_from_each_and_needs_no_dense_model(damaged, tokenizer, corpora, instructions,
                                                                         tmp_path):  # fmt: skip
    settings = replace(QUICK, mix="uniform", steps=4, seq_len=240, round_steps=2, batch_size=5)
    result = recover(damaged, tokenizer, [*corpora, instructions], settings, tmp_path)
    assert [row["stage"] for row in result.mix["rounds"]] == ["all", "all"]
    for row in result.mix["rounds"]:
        assert [f["examples"] for f in row["sources"].values()] == [3, 3, 2]  # 2 steps of 4, made of pairs
        assert all("degradation" not in f and f["loss"] > 0 for f in row["sources"].values())
    save_mix(result.mix, tmp_path / "mix.svg")
    assert "</svg>" in (tmp_path / "mix.svg").read_text()


def test_the_picture_shows_every_source_and_is_the_same_each_time(tmp_path):
    sources = [fake_source("orders", 100, True), fake_source("a", 200), fake_source("b", 100)]
    settings = RecoverySettings(mix="dynamic", round_steps=4)
    rows = run_rounds(settings, 38, sources, lambda n: {"orders": 2 - n / 50, "a": 2 - n / 20, "b": 1.5})
    mix = {"kind": "dynamic", "rounds": rows[:-1], "end": rows[-1]}
    above, below = sc.draw_mix(mix).axes
    assert [line.get_label() for line in below.get_lines()[:3]] == ["orders", "a", "b"]
    assert list(below.get_lines()[1].get_xdata()) == [*range(0, 38, 4), 38]
    assert below.get_lines()[1].get_ydata()[0] == pytest.approx(100)
    assert [text.get_text() for text in above.texts] == ["text", "instructions"] and "[%]" in below.get_ylabel()
    for name in ("a.svg", "b.svg"):
        save_mix(mix, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert all(a["step"] < b["step"] for a, b in pairwise(rows))


def test_nothing_to_mix_and_no_dense_model(damaged, tokenizer, corpora, tmp_path):
    with pytest.raises(RecipeError, match="nothing to mix in one source"):
        recover(damaged, tokenizer, corpora[:1], QUICK, tmp_path)
    with pytest.raises(RecipeError, match=r"stories\.txt is given twice"):
        recover(damaged, tokenizer, [corpora[0], corpora[0]], QUICK, tmp_path)
    with pytest.raises(RecipeError, match="name it with --dense"):
        recover(damaged, tokenizer, corpora, QUICK, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two texts and instructions, as the command line takes them."""
    place = tmp_path_factory.mktemp("mix")
    (place / "stories.txt").write_text("\n".join(story(s) for s in range(8)))
    (place / "numbers.txt").write_text("\n".join(numbers(s) for s in range(4)))
    rows = [{"instruction": "open", "input": "", "output": story(s, 1)} for s in range(40)]
    (place / "orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [place / name for name in ("stories.txt", "numbers.txt", "orders.jsonl")]


@pytest.fixture(scope="module")
def pruned(checkpoint_folder, tmp_path_factory):
    """A cut checkpoint that tells what it was cut from, and a copy of that."""
    place = tmp_path_factory.mktemp("lineage")
    shutil.copytree(checkpoint_folder, place / "dense")
    loaded = sc.load(place / "dense")
    groups = sc.discover(loaded.model).only(["ffn_channel"])
    scores = sc.score(loaded.model, groups, [torch.arange(40)[None]], sc.Magnitude(2))
    plan = sc.allocate(groups, scores, sc.Budget(param_sparsity=0.2))
    sc.save(sc.slice(loaded.model, plan), place / "small", tokenizer=loaded.tokenizer, plan=plan)
    results = {"command": "prune", "model": {"source": str(place / "dense"), "sha256": loaded.sha256}}
    (place / "small" / "results.json").write_text(json.dumps(results))
    return place


FAST = ["--steps", 6, "--batch-size", 4, "--micro-batch-size", 2, "--seq-len", 160, "--round-steps", 2]


def data(files):
    return [option for file in files for option in ("--data", file)]


def test_recover_finds_the_dense_model_by_itself(secateur, pruned, files, tmp_path):
    code, _, err = secateur("recover", pruned / "small", "-o", tmp_path / "o", "--mix", "dynamic", *data(files), *FAST)
    assert code == 0, err
    told = json.loads((tmp_path / "o" / "results.json").read_text())["recovery"]
    assert told["dense"] == {"source": str(pruned / "dense"), "sha256": sc.load(pruned / "dense").sha256}
    assert told["mix"]["rounds"][0]["stage"] == "text" and told["mix"]["kind"] == "dynamic"
    assert set(told["mix"]["rounds"][0]["sources"]) == {"stories", "numbers", "orders"}
    assert [entry["sha256"] for entry in told["data"]] == [load_corpus(file).sha256 for file in files]
    assert "</svg>" in (tmp_path / "o" / "mix.svg").read_text() and err.count("mix, round") == 3
    assert "was a dynamic mix" in (tmp_path / "o" / "README.md").read_text() and not (tmp_path / "o.work").exists()
    named = ["--mix", "dynamic", "--dense", pruned / "dense", *data(files[:2]), *FAST]
    code, _, err = secateur("recover", tmp_path / "o", "-o", tmp_path / "again", *named)
    assert code == 0, err
    assert sc.checkpoint.cut_from(sc.load(tmp_path / "again")) == (told["dense"]["source"], told["dense"]["sha256"])


def test_prune_and_recover_and_loraprune_take_a_mix(secateur, checkpoint_folder, files, tmp_path):
    common = ["--mix", "dynamic", *data(files[:2]), "--sparsity", 0.2]
    code, _, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "o", "--method", "llm-pruner",
        *common, "--criterion", "l2", "--calibration", files[0],
        "--recover-steps", 2,
    )  # fmt: skip
    assert code == 0, err
    assert len(json.loads((tmp_path / "o" / "results.json").read_text())["recovery"]["mix"]["rounds"]) == 2
    assert (tmp_path / "o" / "mix.svg").is_file()
    code, _, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "l", *common, "--method", "loraprune", "--steps", 8,
        "--batch-size", 4, "--seq-len", 32,
    )  # fmt: skip
    assert code == 0, err
    mix = json.loads((tmp_path / "l" / "results.json").read_text())["training"]["mix"]
    assert all(f["degradation"] == 0 for f in mix["rounds"][0]["sources"].values())  # nothing is cut yet
    assert mix["end"]["ended"] == "all steps done" and (tmp_path / "l" / "mix.svg").is_file()


BAD = {
    "unknown mix": (["--mix", "best"], "recovery.mix: Input should be 'proportional', 'uniform' or 'dynamic'"),
    "no use": (["--mix", "uniform", "--balance", "0.3"], "a uniform mix has no use for balance"),
    "no use either": (["--round-steps", "5"], "a proportional mix has no use for round_steps"),
    "no such dense": (["--mix", "dynamic", "--dense", "./nowhere"], "./nowhere does not exist"),
    "other vocabulary": (["--mix", "dynamic", "--dense", "{other}"], "has another vocabulary (64 tokens) than"),
    "other tokenizer": (["--mix", "dynamic", "--dense", "{renamed}"], "has another vocabulary than"),
    "out of range": (["--mix", "dynamic", "--balance", "1.5"], "less than or equal to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_words(secateur, pruned, files, tmp_path, case):
    place = tmp_path / "in"
    make("llama", vocab_size=64).save_pretrained(place / "other")
    shutil.copytree(pruned / "dense", place / "renamed")
    tokens = (place / "renamed" / "tokenizer.json").read_text()
    (place / "renamed" / "tokenizer.json").write_text(tokens.replace('"<s>"', '"<S>"'))
    flags, message = BAD[case]
    flags = [flag.format(other=place / "other", renamed=place / "renamed") for flag in flags]
    code, _, err = secateur("recover", pruned / "small", "-o", tmp_path / "o", *data(files[:2]), *FAST[:-2], *flags)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err and [f.name for f in tmp_path.iterdir()] == ["in"]


def test_a_dense_model_that_is_not_known_or_not_the_same(secateur, pruned, files, checkpoint_folder, tmp_path):
    dynamic = ["-o", tmp_path / "o", "--mix", "dynamic", *data(files[:2]), *FAST]
    code, _, err = secateur("recover", checkpoint_folder, *dynamic)
    assert code == 2 and "results.json names none; name the dense model with --dense MODEL" in err
    small = tmp_path / "small"
    shutil.copytree(pruned / "small", small)
    told = json.loads((small / "results.json").read_text())
    for model, message in (
        ({"source": str(pruned / "dense"), "sha256": "ab" * 32}, "which has changed since (sha256 "),
        ({"source": "/gone", "sha256": None}, "says that it was cut from /gone: /gone does not exist"),
    ):
        (small / "results.json").write_text(json.dumps(told | {"model": model}))
        code, _, err = secateur("recover", small, *dynamic)
        assert code == 2 and message in err and "--dense MODEL" in err, err
    code, _, err = secateur("recover", pruned / "small", *dynamic[:4], "--data", files[0])
    assert code == 2 and "a dynamic mix needs two sources or more" in err
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "o", "--sparsity", 0.2, "--mix", "uniform")
    assert code == 2 and "auto without --recover-steps has no use for --mix" in err
    assert [f.name for f in tmp_path.iterdir()] == ["small"]


def test_recover_the_bundled_model(secateur, tmp_path):
    code, _, err = secateur(
        "recover", "demo", "-o", tmp_path / "o", "--mix", "dynamic", "--dense", "demo", "--data", "demo-calibration",
        "--data", "demo-eval", "--steps", 4, "--batch-size", 2, "--seq-len", 64, "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    mix = json.loads((tmp_path / "o" / "results.json").read_text())["recovery"]["mix"]
    assert all(f["degradation"] == 0 for f in mix["rounds"][0]["sources"].values())  # it is the dense model itself
    assert mix["end"]["ended"] in ("converged", "all steps done")
