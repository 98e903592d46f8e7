"""Norms and embeddings that train whole beside the adapters: which, in which precision, and what becomes of them."""

import copy
import json

import pytest
import torch
import zoo
from conftest import story
from families import make
from peft import PeftModel
from safetensors.torch import load_file

from secateur.config import RecoverSettings, parse_recipe
from secateur.data import load_corpus
from secateur.errors import CheckpointError, RecipeError
from secateur.pipeline.training_settings import recovery_settings
from secateur.recovery import RecoverySettings, recover, with_adapters
from secateur.recovery.also_trained import also_trained, in_float32

BOTH = ("norms", "embeddings")
QUICK = RecoverySettings(
    steps=8,
    batch_size=4,
    micro_batch_size=2,
    seq_len=32,
    learning_rate=5e-3,
    dropout=0.0,
    save_every=4,
    also_train=BOTH,
)
IDS = torch.arange(3, 19).view(2, 8)


def same_weight(model):
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return getattr(ends[0], "weight", None) is ends[1].weight


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "t.jsonl"
    file.write_text("".join(json.dumps({"text": story(s)}) + "\n" for s in range(6)))
    return load_corpus(file)


def test_what_trains_is_what_is_named():
    model = make("llama")
    layers = [f"model.layers.{i}.{n}" for i in range(len(model.model.layers))
              for n in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    assert also_trained(model, ("norms",)) == [*layers, "model.norm"]
    assert set(also_trained(model, ("embeddings",))) == {"model.embed_tokens", "lm_head"}
    for parts, words in ((("norms",), ["norm"]), (("embeddings",), ["embed_tokens", "lm_head"]), ((), [])):
        adapted = with_adapters(copy.deepcopy(model), RecoverySettings(rank=2, also_train=parts))
        trains = [n for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n]
        assert bool(trains) == bool(parts) and all(any(word in n for word in words) for n in trains)


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")  # GPT-2's embeddings: peft loads them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "gpt2",
        "opt",
        "gemma3_text",
        "zamba2",
        "zaya",
        "qwen3_moe",
        "mamba2",
        "inkling_text",
        "ctrl",
        "roberta",
    ],
)
def test_merging_changes_nothing_and_peft_loads_the_same(model_type, dtype, tmp_path):
    """Norms with two outputs (Zaya), gated ones (Mamba), shared ones (Zamba, which stay), a norm within the embeddings
    (Inkling), tied heads with a bias (CTRL) that another module may hold, too (RoBERTa). What is tied stays tied, and
    the precision is the model's afterwards."""
    model = zoo.tiny_model(model_type).to(dtype)
    tied = same_weight(model)
    adapted = with_adapters(copy.deepcopy(model), RecoverySettings(rank=2, dropout=0.0, also_train=BOTH)).eval()
    with in_float32(adapted):
        copies = {n: p for n, p in adapted.named_parameters() if "modules_to_save" in n}
        assert copies and all(p.dtype == torch.float32 and p.requires_grad for p in copies.values())
        before = adapted(IDS, use_cache=False).logits
        assert before.dtype == model(IDS, use_cache=False).logits.dtype
        if dtype == torch.float32:
            torch.testing.assert_close(before, model(IDS, use_cache=False).logits, rtol=0, atol=0)
        before.float().logsumexp(-1).sum().backward()
        assert all(p.grad is not None for p in copies.values())
        with torch.no_grad():
            for copied in copies.values():
                copied += 0.1 * copied.std().nan_to_num(1.0) * torch.randn_like(copied)
    with torch.no_grad():
        wanted = adapted(IDS, use_cache=False).logits
        assert (wanted - before).abs().max() > 1e-2
        adapted.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
        torch.testing.assert_close(loaded(IDS, use_cache=False).logits, wanted, rtol=0, atol=0)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(IDS, use_cache=False).logits, wanted, rtol=0, atol=0)
    assert {p.dtype for p in merged.parameters()} == {p.dtype for p in model.parameters()}
    assert same_weight(merged) == tied
    assert set(merged.state_dict()) == set(model.state_dict())
    assert merged.config.tie_word_embeddings == model.config.tie_word_embeddings if tied else True


def test_what_trains_whole_takes_a_tenth_of_the_rate(trained, tokenizer, corpus, tmp_path):
    """Adam's first step is as long as the rate, whatever the gradient."""
    settings = RecoverySettings(**{**vars(QUICK), "steps": 1, "warmup_steps": 0})
    found = recover(trained, tokenizer, [corpus], settings, tmp_path)
    moved = (found.model.model.norm.weight - trained.model.norm.weight).detach().abs()
    assert float(moved.max()) == pytest.approx(0.1 * settings.learning_rate, rel=1e-3)  # and nothing decays
    factors = load_file(found.adapter / "adapter_model.safetensors")
    assert max(float(f.abs().max()) for n, f in factors.items() if "lora_B" in n) == pytest.approx(
        settings.learning_rate
    )


def test_small_steps_are_not_lost_in_half_precision(trained, tokenizer, corpus, tmp_path):
    """A step of 1e-4 on a norm's weight near 1 is below what bfloat16 can tell; fifty of them are not."""
    model = copy.deepcopy(trained).to(torch.bfloat16)
    settings = RecoverySettings(
        steps=50, batch_size=2, micro_batch_size=2, seq_len=16, learning_rate=2e-3, dropout=0.0, also_train=("norms",)
    )
    found = recover(model, tokenizer, [corpus], settings, tmp_path).model
    weights = [m.model.norm.weight for m in (model, found)]
    assert weights[1].dtype == torch.bfloat16 and not torch.equal(*weights)


def test_a_killed_run_resumes_to_the_same_weights(trained, tokenizer, corpus, tmp_path):
    whole = recover(trained, tokenizer, [corpus], QUICK, tmp_path / "whole")
    changed = [n for n, t in trained.state_dict().items() if not torch.equal(t, whole.model.state_dict()[n])]
    assert any("norm" in n for n in changed) and any("embed" in n for n in changed)
    calls = []

    def die(model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        recover(trained, tokenizer, [corpus], RecoverySettings(**{**vars(QUICK), "eval_every": 2}), tmp_path / "part",
                evaluate=die)  # fmt: skip
    resumed = recover(trained, tokenizer, [corpus], QUICK, tmp_path / "part", resume=True)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", [{"rank": 4}, {"also_train": ("norms",)}, {"full_weights": True, "also_train": ()}])
def test_a_run_that_trained_something_else_is_not_gone_on_with(trained, tokenizer, corpus, tmp_path, other):
    recover(trained, tokenizer, [corpus], QUICK, tmp_path)
    with pytest.raises(CheckpointError, match="trained other adapters or other weights"):
        recover(trained, tokenizer, [corpus], RecoverySettings(**{**vars(QUICK), **other}), tmp_path, resume=True)
    assert (tmp_path / "checkpoints").is_dir()  # the run to go on with is left


def test_embeddings_that_cannot_train_are_refused():
    model = make("llama")
    model.get_input_embeddings = unknown
    with pytest.raises(
        RecipeError, match="LlamaForCausalLM does not tell which its embeddings are: leave embeddings out"
    ):
        with_adapters(model, RecoverySettings(also_train=BOTH))
    with pytest.raises(
        RecipeError, match=r"peft takes git\.encoder.layer.0.attention.output for a module of the same name"
    ):
        with_adapters(zoo.tiny_model("git"), RecoverySettings(also_train=("embeddings",)))


def unknown():
    raise NotImplementedError


@pytest.mark.parametrize(("model_type", "trained"), [("olmo", ("embeddings",)), ("llama", BOTH)])
def test_what_holds_no_weights_is_not_said_to_train(model_type, trained):
    """The norms of OLMo have none."""
    settings = recovery_settings(RecoverSettings(data=["x"], also_train=BOTH), 0, zoo.tiny_model(model_type))
    assert settings.also_train == trained


def test_recipes():
    def recipe(recovery, **more):
        return parse_recipe({"model": {"source": "m"}, "prune": {"param_sparsity": 0.2},
                             "recovery": {"data": ["x"], **recovery}, **more}).recovery  # fmt: skip

    assert recipe({}).also_train == BOTH
    assert recipe({"also_train": ["norms"]}).also_train == ("norms",) and recipe({"also_train": []}).also_train == ()
    assert recipe({"full_weights": True}).also_train == recipe({}, method="llm-pruner").also_train == ()
    for section, more, message in (
        ({"also_train": ["norm"]}, {}, "recovery.also_train.0: Input should be 'norms' or 'embeddings'"),
        ({"also_train": ["norms"], "full_weights": True}, {}, "also_train is for adapters"),
        ({"also_train": ["norms"]}, {"method": "loraprune"}, "also_train is for recovery after the cut, and loraprune"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe(section, **more)


def test_the_commands(secateur, checkpoint_folder, text_file, tmp_path):
    fast = ["--data", text_file, "--steps", 2, "--batch-size", 2, "--micro-batch-size", 2, "--seq-len", 32]
    code, _, err = secateur(
        "recover", checkpoint_folder, "-o", tmp_path / "r", *fast, "--also-train", "norms,embeddings"
    )
    assert code == 0, err
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["recovery"]["settings"]["also_train"] == ["norms", "embeddings"]
    assert "norms and embeddings whole at a tenth of the rate" in (tmp_path / "r" / "README.md").read_text()
    names = {
        name for name in load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors") if "lora_" not in name
    }
    assert any("embed_tokens" in name for name in names) and any("norm" in name for name in names)
    code, _, err = secateur("recover", checkpoint_folder, "-o", tmp_path / "p", *fast)
    assert code == 0, err
    assert json.loads((tmp_path / "p" / "results.json").read_text())["recovery"]["settings"]["also_train"] == []
    cut = ["prune", checkpoint_folder, "--sparsity", 0.3, "--calibration", text_file, "--samples", 8, "--seq-len", 32,
           "--uniform", "--recover-steps", 2, "--data", text_file, "--adapt", 0]  # fmt: skip
    for flags, wanted in (([], ["norms", "embeddings"]), (["--also-train", "none"], [])):
        code, _, err = secateur(*cut, *flags, "-o", tmp_path / f"cut{len(wanted)}")
        assert code == 0, err
        results = json.loads((tmp_path / f"cut{len(wanted)}" / "results.json").read_text())
        assert results["recovery"]["settings"]["also_train"] == wanted
    code, _, err = secateur(*cut[:4], "-o", tmp_path / "no", "--also-train", "norms")
    assert code == 2 and "without --recover-steps has no use for --also-train" in err
    code, _, err = secateur(*cut, "-o", tmp_path / "no", "--also-train", "heads")
    assert code == 2 and "recovery.also_train" in err and not (tmp_path / "no").exists()
