"""Distillation from the dense model: the divergence, the Trainer's loss, the cache on disk, and all weights."""

import copy
import json
import math
import shutil
import weakref
from dataclasses import asdict, replace

import pytest
import torch
from conftest import story
from families import make
from torch.nn import functional as F

import secateur as sc
from secateur.config import parse_recipe
from secateur.data import Corpus
from secateur.errors import CheckpointError, NonFiniteError, RecipeError
from secateur.recovery import Distillation, RecoverySettings, lora, recover, teacher_cache
from secateur.recovery.distilling import matched_layers, teacher_of
from secateur.recovery.divergence import divergence, hidden_error, soft_targets
from secateur.recovery.teacher import OnlineTeacher, labelled
from secateur.recovery.training_data import training_data

QUICK = RecoverySettings(
    steps=6, batch_size=4, micro_batch_size=2, seq_len=32, learning_rate=5e-3, dropout=0.0, save_every=2, warmup_steps=1
)
CACHED = {"weight": 0.7, "temperature": 2.0, "top_k": 8}


@pytest.fixture(scope="module")
def damaged(trained):
    """The trained model with half of its FFN channels zeroed."""
    model = copy.deepcopy(trained)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    return model


@pytest.fixture(scope="module")
def corpora():
    """Plain text, and instructions, whose examples are of different lengths and have labels on their answers alone."""
    rows = [{"instruction": "open", "input": "", "output": story(s, 1 + s % 3)} for s in range(24)]
    return [
        Corpus("stories", tuple(story(s) for s in range(6)), "", "stories.txt"),
        Corpus("orders", tuple(rows), "", "orders.jsonl"),
    ]


def logits(seed=0, tokens=5, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(tokens, vocabulary, generator=generator)


def coarse_kl(student, teacher, temperature, top_k):
    """The divergence of distributions over k tokens and one for all others, from probabilities in float64."""
    p, q = ((z.double() / temperature).softmax(-1) for z in (teacher, student))
    chosen = p.topk(top_k).indices
    p, q = [torch.cat([d.gather(-1, chosen), 1 - d.gather(-1, chosen).sum(-1, keepdim=True)], -1) for d in (p, q)]
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_divergence_is_that_of_torch(temperature):
    student, teacher = logits(1), logits(2)
    found = divergence(student, soft_targets(teacher, temperature), temperature)
    p, q = (F.log_softmax(z.double() / temperature, -1) for z in (teacher, student))
    torch.testing.assert_close(found.double(), F.kl_div(q, p, reduction="none", log_target=True).sum(-1),
                               rtol=1e-5, atol=1e-6)  # fmt: skip
    for k in (0, 11, 50):
        assert torch.equal(found, divergence(student, soft_targets(teacher, temperature, k), temperature))
    for k in (1, 4, 10):
        some = divergence(student, soft_targets(teacher, temperature, k), temperature)
        torch.testing.assert_close(some.double(), coarse_kl(student, teacher, temperature, k), rtol=1e-4, atol=1e-6)
        assert (some <= found + 1e-6).all()  # fewer outcomes tell less apart


@pytest.mark.parametrize("top_k", [0, 4])
def test_gradients_are_those_of_the_formula(top_k):
    student, teacher = logits(1).requires_grad_(), logits(2)
    divergence(student, soft_targets(teacher, 2.0, top_k), 2.0).sum().backward()
    if not top_k:
        wanted = ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 2
    else:
        again = student.detach().double().requires_grad_()
        coarse_kl(again, teacher, 2.0, top_k).sum().backward()
        wanted = again.grad.float()
    torch.testing.assert_close(student.grad, wanted.detach(), rtol=1e-4, atol=1e-6)


def test_tokens_that_are_ruled_out_do_no_harm():
    student, teacher = logits(1), logits(2)
    student[:, 3] = teacher[:, 3] = -torch.inf
    student = student.requires_grad_()
    for k in (0, 4, 10):
        found = divergence(student, soft_targets(teacher, 1.0, k), 1.0)
        assert found.isfinite().all()
        found.sum().backward()
    assert student.grad.isfinite().all()


def test_hidden_error_is_relative_to_each_token():
    teacher = torch.tensor([[[3.0, 4.0], [300.0, 400.0], [1.0, 1.0]]])
    student = teacher + torch.tensor([[[1.0, 0.0], [0.0, 100.0], [9.0, 9.0]]])
    tokens = torch.tensor([[True, True, False]])
    torch.testing.assert_close(hidden_error([student], [teacher], tokens), torch.tensor([1 / 25, 1 / 25]))
    both = hidden_error([student, teacher], [teacher, teacher], tokens)
    torch.testing.assert_close(both, torch.tensor([1 / 50, 1 / 50]))


def test_layers_are_matched_by_what_the_next_one_that_is_left_read():
    assert matched_layers(3, 3, ()) == [1, 2, 3] and matched_layers(3, 5, (0, 1, 4)) == [1, 4, 5]
    for kept in ((), (0, 1), (1, 0, 2), (0, 1, 5)):
        with pytest.raises(RecipeError, match="the model has 3 layers and the teacher 5"):
            matched_layers(3, 5, kept)


def weights(result):
    return result.model.state_dict()


def same(one, other, **tolerance):
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(other)[name], tensor, **tolerance)


def kl_of(result):
    return [row["kl"] for row in result.log if "kl" in row]


def test_the_loss_is_the_same_however_a_step_is_split(damaged, trained, tokenizer, corpora, tmp_path):
    settings = replace(QUICK, steps=2, seq_len=160, distill=Distillation(weight=0.6, temperature=2.0, hidden=0.2))
    dense = lambda: trained  # noqa: E731
    split = [recover(damaged, tokenizer, corpora[1:], replace(settings, micro_batch_size=size),
                     tmp_path / str(size), dense=dense) for size in (1, 4)]  # fmt: skip
    same(*split, rtol=1e-3, atol=1e-5)
    assert split[0].log[0]["loss"] == pytest.approx(split[1].log[0]["loss"], rel=1e-5)
    data = training_data(corpora[1:], tokenizer, settings).examples
    first = {k: v for k, v in split[1].log[0].items() if k in ("loss", "kl", "hidden")}
    assert first["kl"] > 0 and 0 < first["hidden"] < 1 and len({len(e["labels"]) for e in data}) > 1
    text = (first["loss"] - 0.6 * 4 * first["kl"] - 0.2 * first["hidden"]) / 0.4
    plain = recover(damaged, tokenizer, corpora[1:], replace(settings, steps=1, distill=None), tmp_path / "p")
    assert text == pytest.approx(plain.log[0]["loss"], rel=1e-3)


def test_distilling_brings_the_model_nearer_to_the_dense_one(damaged, trained, tokenizer, corpora, tmp_path):
    before = {n: t.clone() for n, t in damaged.state_dict().items()}
    settings = replace(QUICK, distill=Distillation(weight=1.0))
    result = recover(damaged, tokenizer, corpora[:1], settings, tmp_path, dense=lambda: trained)
    assert kl_of(result)[-1] < kl_of(result)[0] and not trained.training
    assert all(torch.equal(t, before[n]) for n, t in damaged.state_dict().items())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_a_model_learns_nothing_from_itself(trained, tokenizer, corpora, tmp_path, half, monkeypatch):
    if half:  # what an accelerator does
        made = lora._arguments
        monkeypatch.setattr(lora, "_arguments", lambda *given: replace(made(*given), bf16=True))
    settings = replace(QUICK, steps=2, distill=Distillation(weight=1.0, hidden=1.0))
    result = recover(trained, tokenizer, corpora[:1], settings, tmp_path, dense=lambda: trained)
    logged = next(row for row in result.log if "kl" in row)
    assert logged["kl"] == logged["hidden"] == 0.0 and logged["loss"] == 0.0 and logged["grad_norm"] < 1e-5


def test_what_is_said_of_a_token_is_in_its_place(trained, tokenizer, corpora):
    rows = training_data(corpora[1:], tokenizer, replace(QUICK, seq_len=200)).examples[:3]
    batch = {name: teacher_cache.padded([row[name] for row in rows], fill)
             for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))}  # fmt: skip
    lesson = OnlineTeacher(trained, Distillation(temperature=2.0), False, [1, 3])(batch)
    assert lesson.targets.log_probs.shape[0] == sum(sum(n != -100 for n in row["labels"][1:]) for row in rows)
    assert [state.shape[:2] for state in lesson.states] == [batch["labels"].shape] * 2
    place = 0
    for row in rows:
        alone = trained(torch.tensor([row["input_ids"]])).logits[0]
        for at, label in enumerate(row["labels"][1:]):
            if label != -100:
                wanted = F.log_softmax(alone[at] / 2, -1)
                torch.testing.assert_close(lesson.targets.log_probs[place], wanted, rtol=1e-4, atol=1e-4)
                place += 1
    assert int(labelled(batch["labels"]).sum()) == place


def test_cached_equals_online_on_a_dynamic_mix_of_examples_that_are_padded(
    damaged, trained, tokenizer, corpora, tmp_path, capfd
):
    settings = replace(QUICK, steps=2, seq_len=160, mix="dynamic", round_steps=1, eval_every=1)
    cache = str(tmp_path / "cache")
    models, alive = [], []

    def load():
        model = copy.deepcopy(trained)
        models.append(weakref.ref(model))
        return model

    online, cached, again = (
        recover(damaged, tokenizer, corpora, replace(settings, distill=Distillation(**CACHED, cache=place)),
                tmp_path / name, dense=load, evaluate=lambda _: alive.append(models[-1]() is not None) or {})
        for name, place in (("online", None), ("cached", cache), ("again", cache))
    )  # fmt: skip
    assert alive == [True, True, False, False, False, False] and len(models) == 3
    same(online, cached, rtol=1e-3, atol=1e-5)
    assert kl_of(online) == pytest.approx(kl_of(cached), rel=1e-4) and kl_of(cached) == kl_of(again)
    told = [line for line in capfd.readouterr().err.splitlines() if "teacher cache /" in line]
    assert len(told) == 2 and f"tokens of {8 * (4 + 2) + 4} bytes" in told[0] and told[1].endswith(" 0 to write")


class Killed(OnlineTeacher):
    """A teacher that counts its passes, and is killed in one of them."""

    passes, last = 0, math.inf

    def __call__(self, batch):
        type(self).passes += 1
        if self.passes > self.last:
            raise KeyboardInterrupt
        return super().__call__(batch)


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr("secateur.recovery.distilling.OnlineTeacher", Killed)
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 10_000)
    Killed.passes, Killed.last = 0, math.inf
    return Killed


def filled(trained, tokenizer, corpora, cache, **changed):
    settings = replace(QUICK, distill=Distillation(**(CACHED | changed), cache=str(cache)))
    data = training_data(corpora[:1], tokenizer, settings)
    return teacher_of(trained, trained, data, settings.distill, lora._arguments(settings, 1, cache, torch.float32))


def test_filling_goes_on_after_a_kill_and_mends_what_is_damaged(trained, tokenizer, corpora, tmp_path, counted):
    filled(trained, tokenizer, corpora, tmp_path / "whole")
    passes, shards = counted.passes, sorted((tmp_path / "whole").glob("*.safetensors"))
    assert len(shards) > 3
    counted.passes, counted.last = 0, passes // 2
    with pytest.raises(KeyboardInterrupt):
        filled(trained, tokenizer, corpora, tmp_path / "part")
    done = len(list((tmp_path / "part").glob("*.safetensors")))
    assert 0 < done < len(shards)
    counted.passes, counted.last = 0, math.inf
    filled(trained, tokenizer, corpora, tmp_path / "part")
    assert counted.passes < passes
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "part" / shard.name).read_bytes()
    broken = tmp_path / "part" / shards[1].name
    broken.write_bytes(broken.read_bytes()[:-50])
    counted.passes = 0
    filled(trained, tokenizer, corpora, tmp_path / "part")
    assert 0 < counted.passes < passes / 2 and broken.read_bytes() == shards[1].read_bytes()
    counted.passes = 0
    filled(trained, tokenizer, corpora, tmp_path / "part")
    assert counted.passes == 0


def test_a_cache_of_something_else_is_refused(trained, damaged, tokenizer, corpora, tmp_path, monkeypatch):
    filled(trained, tokenizer, corpora, tmp_path / "c")
    with pytest.raises(CheckpointError, match="made with another teacher: remove it to have it made anew"):
        filled(damaged, tokenizer, corpora, tmp_path / "c")
    with pytest.raises(CheckpointError, match="another top_k, another temperature"):
        filled(trained, tokenizer, corpora, tmp_path / "c", top_k=9, temperature=1.0)
    with pytest.raises(CheckpointError, match="another examples"):
        filled(trained, tokenizer, [replace(corpora[0], rows=corpora[0].rows[:3])], tmp_path / "c")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="mine is no teacher cache"):
        filled(trained, tokenizer, corpora, tmp_path / "mine")
    (tmp_path / "c" / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        filled(trained, tokenizer, corpora, tmp_path / "c")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, and 0\.00 GB are free"):
        filled(trained, tokenizer, corpora, tmp_path / "new")
    assert not (tmp_path / "new").exists()


WAYS = {
    "online": {"distill": Distillation(hidden=0.1), "dropout": 0.1},
    "cached": {"distill": Distillation(**CACHED, cache="cache"), "mix": "dynamic", "round_steps": 2, "dropout": 0.1},
    "all weights": {"distill": Distillation(), "full_weights": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_goes_on_to_the_same_bits(damaged, trained, tokenizer, corpora, tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    settings = replace(QUICK, steps=4, eval_every=1, **WAYS[way])
    texts = [corpora[0], replace(corpora[0], name="others", rows=tuple(story(s) for s in range(50, 53)))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calls = []

    def die(model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {}

    def run(name, evaluate, resume=False):
        return recover(damaged, tokenizer, texts, settings, tmp_path / name, dense=lambda: trained,
                       evaluate=evaluate, resume=resume)  # fmt: skip

    try:
        whole = run("whole", lambda model: {})
        with pytest.raises(KeyboardInterrupt):
            run("part", die)
        resumed = run("part", lambda model: {}, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(whole).items())
    assert (whole.adapter is None) == settings.full_weights


def test_all_weights_are_trained(damaged, tokenizer, corpora, tmp_path):
    before = {n: t.clone() for n, t in damaged.state_dict().items()}
    settings = replace(QUICK, steps=3, full_weights=True, learning_rate=1e-3)
    result = recover(damaged, tokenizer, corpora[:1], settings, tmp_path)
    assert result.adapter is None and type(result.model) is type(damaged)
    assert not any(torch.equal(t, before[n]) for n, t in weights(result).items())
    assert all(torch.equal(t, before[n]) for n, t in damaged.state_dict().items())
    assert not (tmp_path / "adapter").exists()


def test_models_that_do_not_compare_are_refused(damaged, tokenizer, corpora, tmp_path):
    hidden = replace(QUICK, distill=Distillation(hidden=0.1))
    wider = make("llama", vocab_size=len(tokenizer), hidden_size=60)
    deeper = make("llama", vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=4)
    other = make("llama", vocab_size=64)
    for settings, dense, message in (
        (hidden, None, "distillation learns from the dense model: name it with --distill"),
        (hidden, other, "the teacher has another vocabulary"),
        (hidden, wider, "60 dimensions in the teacher and 48 in the model"),
        (hidden, deeper, "the model has 3 layers and the teacher 4"),
    ):
        with pytest.raises(RecipeError, match=message):
            load = None if dense is None else lambda dense=dense: dense
            recover(damaged, tokenizer, corpora[:1], settings, tmp_path, dense=load)
    assert not list(tmp_path.iterdir())
    broken = copy.deepcopy(damaged)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="logits of the dense model are NaN"):
        recover(damaged, tokenizer, corpora[:1], replace(QUICK, distill=Distillation()), tmp_path, dense=lambda: broken)
    for wrong in ({"weight": 0}, {"weight": 1.1}, {"temperature": 0}, {"top_k": -1}, {"cache": "c"},
                  {"cache": "c", "top_k": 4, "hidden": 1.0}):  # fmt: skip
        with pytest.raises(RecipeError, match=r"distillation: weight|a teacher cache"):
            Distillation(**wrong)


def test_settings_in_a_recipe():
    def recovery(section, **more):
        return parse_recipe({"model": {"source": "demo"}, "recovery": section, **more}).recovery

    assert recovery({"distill": True}).distill == recovery({"distill": {}}).distill
    assert recovery({"distill": False}).distill is None
    assert recovery({"distill": {"weight": 1}, "dense": "big"}).dense == "big"
    defaults = asdict(Distillation())
    assert recovery({"distill": True}).distill.model_dump() == {k: v for k, v in defaults.items() if k != "layers"}
    for section, more, message in (
        ({"dense": "big"}, {}, "a proportional mix has no use for dense"),
        ({"distill": {"cache": "c"}}, {}, "give top_k"),
        ({"distill": {"cache": "c", "top_k": 4, "hidden": 1}}, {}, "holds no hidden states"),
        ({"distill": {"wieght": 1}}, {}, "did you mean 'weight'"),
        ({"full_weights": True, "rank": 4}, {}, "rank is for adapters"),
        ({"distill": True}, {"method": "loraprune"}, "distill is for recovery after the cut, and loraprune trains"),
        ({"full_weights": True}, {"tune": {"target_rank": 2}}, "full_weights is for recovery after the cut, and tune"),
    ):
        with pytest.raises(RecipeError, match=message):
            recovery(section, **more)


FAST = ["--steps", 2, "--batch-size", 2, "--micro-batch-size", 2, "--seq-len", 32]


def test_hidden_states_where_a_layer_went(secateur, trained, tokenizer, checkpoint_folder, text_file, tmp_path):
    small = copy.deepcopy(trained)
    del small.model.layers[1]
    small.config.num_hidden_layers, small.model.layers[1].self_attn.layer_idx = 2, 1
    plan = sc.PruningPlan({"layer": (0, 2)}, {"layer": 3})
    sc.save(small, tmp_path / "s", tokenizer=tokenizer, plan=plan)
    results = {"command": "prune", "model": {"source": str(checkpoint_folder), "sha256": None}}
    (tmp_path / "s" / "results.json").write_text(json.dumps(results))
    code, _, err = secateur(
        "recover", tmp_path / "s", "-o", tmp_path / "r", "--data", text_file, *FAST, "--distill", "dense",
        "--distill-hidden", 0.1, "--distill-top-k", 8, "--full-weights",
    )  # fmt: skip
    assert code == 0, err
    run = json.loads((tmp_path / "r" / "results.json").read_text())["recovery"]
    settings, logged = run["settings"], next(row for row in run["log"] if "hidden" in row)
    assert settings["distill"]["layers"] == [0, 2] and settings["full_weights"] and logged["hidden"] > 0
    card = (tmp_path / "r" / "README.md").read_text()
    assert "All weights: 2 steps" in card and not (tmp_path / "r" / "adapter").exists()
    assert "`adapter/`" not in card and "8 likeliest tokens" in card and "hidden states with weight 0.1" in card
    results = {"command": "prune", "model": results["model"], "before": results}  # of an earlier cut nothing is known
    (tmp_path / "s" / "results.json").write_text(json.dumps(results))
    code, _, err = secateur("recover", tmp_path / "s", "-o", tmp_path / "n", "--data", text_file, *FAST, "--distill",
                            "dense", "--distill-hidden", 0.1)  # fmt: skip
    assert code == 2 and "the model has 2 layers and the teacher 3" in err


def test_recover_from_a_teacher_that_is_named(secateur, checkpoint_folder, text_file, tmp_path):
    command = ["recover", checkpoint_folder, "-o", tmp_path / "r", "--data", text_file, *FAST]
    cache = ["--distill-cache", tmp_path / "cache", "--distill-top-k", 4]
    code, _, err = secateur(*command, "--distill", checkpoint_folder, *cache, "--distill-weight", 1)
    assert code == 0, err
    assert "- teacher cache " in err and (tmp_path / "cache" / "index.json").is_file()
    assert "- step 1 of 2: loss -0.0000" in err or "- step 1 of 2: loss 0.0000" in err  # from itself
    renamed = tmp_path / "renamed"
    shutil.copytree(checkpoint_folder, renamed)
    words = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (renamed / "tokenizer.json").write_text(json.dumps(words))
    for flags, message in (
        (["--distill", renamed], "has another vocabulary than"),
        (["--teacher", tmp_path / "nowhere"], "nowhere does not exist"),
        (["--distill", "dense"], "distillation learns from the model that"),
        (["--distill-weight", 1, "--distill-top-k", 3], "--distill-weight, --distill-top-k: name what to learn from"),
        (["--distill", "x", "--dense", "y"], "the dense model is one"),
        (["--distill", "dense", "--distill-cache", "c"], "give top_k"),
        (["--distill", "dense", "--distill-weight", 0], "recovery.distill.weight: Input should be greater than 0"),
        (["--full-weights", "--rank", 4], "rank is for adapters"),
    ):
        code, _, err = secateur(*command[:3], tmp_path / "no", *command[4:], *flags)
        assert code == 2 and message in err, err
        assert not list(tmp_path.glob("no*")) and not list(tmp_path.glob(".no*")), list(tmp_path.iterdir())
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "no", "--sparsity", 0.2, "--distill")
    assert code == 2 and "without --recover-steps has no use for --distill" in err
