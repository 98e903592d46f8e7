"""LoRA recovery: what is learnt, what is masked, what survives a kill."""

import copy
import json

import pytest
import torch
import zoo
from conftest import story
from families import make
from peft import PeftModel

from secateur.data import load_corpus
from secateur.errors import DataError, NonFiniteError, RecipeError
from secateur.evaluation import perplexity
from secateur.recovery import RecoverySettings, recover, with_adapters
from secateur.recovery.examples import IGNORED, instruction_example, training_examples

QUICK = RecoverySettings(
    steps=8, batch_size=4, micro_batch_size=2, seq_len=32, learning_rate=5e-3, dropout=0.0, save_every=4
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "t.jsonl"
    file.write_text("".join(json.dumps({"text": story(s)}) + "\n" for s in range(6)))
    return load_corpus(file)


@pytest.fixture(scope="module")
def damaged(trained):
    """The trained model with a third of its FFN channels zeroed."""
    model = copy.deepcopy(trained)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, ::3] = 0
    return model


def test_recovery_lowers_perplexity_and_leaves_the_model_alone(damaged, tokenizer, corpus, text_file, tmp_path):
    text = load_corpus(text_file)
    before = {n: t.clone() for n, t in damaged.state_dict().items()}
    result = recover(
        damaged, tokenizer, [corpus], QUICK, tmp_path,
        evaluate=lambda m: {"stories": perplexity(m, tokenizer, text, seq_len=32).value},
    )  # fmt: skip
    assert all(torch.equal(t, before[n]) for n, t in damaged.state_dict().items())
    values = [perplexity(m, tokenizer, text, seq_len=32).value for m in (damaged, result.model)]
    assert values[1] < values[0]
    assert any("loss" in row for row in result.log)
    assert type(result.model) is type(damaged) and result.model.num_parameters() == damaged.num_parameters()
    merged = PeftModel.from_pretrained(copy.deepcopy(damaged), result.adapter).merge_and_unload()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(merged(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_killed_run_resumes_to_the_same_weights(damaged, tokenizer, corpus, tmp_path):
    whole = recover(damaged, tokenizer, [corpus], QUICK, tmp_path / "whole")
    calls = []

    def die(model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {}

    interrupted = RecoverySettings(**{**vars(QUICK), "eval_every": 2})
    with pytest.raises(KeyboardInterrupt):
        recover(damaged, tokenizer, [corpus], interrupted, tmp_path / "part", evaluate=die)
    assert (tmp_path / "part" / "checkpoints" / "checkpoint-4").is_dir()
    resumed = recover(damaged, tokenizer, [corpus], QUICK, tmp_path / "part", resume=True)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_run_that_had_ended_takes_no_further_step(damaged, tokenizer, corpus, tmp_path):
    """As after a kill between the last step and the end: the Trainer itself would take another one."""
    ended = recover(damaged, tokenizer, [corpus], QUICK, tmp_path)
    again = recover(damaged, tokenizer, [corpus], QUICK, tmp_path, resume=True)
    assert again.log[-1]["step"] == ended.log[-1]["step"] == QUICK.steps
    for name, tensor in ended.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor, rtol=0, atol=0)


def test_measured_texts_are_in_the_log(damaged, tokenizer, corpus, tmp_path):
    settings = RecoverySettings(**{**vars(QUICK), "steps": 2, "eval_every": 1})
    result = recover(damaged, tokenizer, [corpus], settings, tmp_path, evaluate=lambda m: {"x": 1.0})
    assert [row["step"] for row in result.log if "perplexity" in row] == [1, 2]


def test_prompts_are_masked_unless_asked(tokenizer):
    record = {"instruction": "open the door", "input": "", "output": "the old man"}
    example = instruction_example(record, tokenizer, 512, train_on_inputs=False)
    answer = [*tokenizer("the old man")["input_ids"], tokenizer.eos_token_id]
    assert example["labels"][-len(answer) :] == answer == example["input_ids"][-len(answer) :]
    assert set(example["labels"][: -len(answer)]) == {IGNORED}
    assert "### Instruction:\nopen the door" in tokenizer.decode(example["input_ids"])
    assert instruction_example(record, tokenizer, 512, train_on_inputs=True)["labels"] == example["input_ids"]
    assert instruction_example(record, tokenizer, 8, train_on_inputs=False) is None


def test_instructions_train(damaged, tokenizer, tmp_path):
    file = tmp_path / "i.jsonl"
    record = {"instruction": "open the door", "input": "now", "output": "the old man saw rain"}
    file.write_text((json.dumps(record) + "\n") * 8)
    settings = RecoverySettings(steps=1, batch_size=4, micro_batch_size=4, seq_len=240)
    result = recover(damaged, tokenizer, [load_corpus(file)], settings, tmp_path / "out")
    assert result.adapter.is_dir()


def test_conv1d_models_and_untied_heads(tokenizer, corpus, tmp_path):
    for family in ("gpt2", "qwen2"):
        model = make(family, vocab_size=len(tokenizer))
        settings = RecoverySettings(**{**vars(QUICK), "steps": 1, "gradient_checkpointing": True})
        assert (
            recover(model, tokenizer, [corpus], settings, tmp_path / family).model.num_parameters()
            == model.num_parameters()
        )


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "qwen3_moe", "falcon", "zamba2"])
def test_adapters_go_where_merging_them_changes_nothing(model_type, tmp_path):
    """Not on weights that the module around them reads (Mamba, Jamba), nor on shared ones (Zamba); but on dense layers
    that peft takes for experts (Qwen3-MoE), and on linear modules with a forward pass of their own (Falcon)."""
    model = zoo.tiny_model(model_type)
    adapted = with_adapters(copy.deepcopy(model), RecoverySettings(rank=2)).eval()
    factors = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for factor in factors.values():
            factor.normal_(std=0.5)
    ids = torch.arange(3, 19).view(2, 8)
    wanted = adapted(ids, use_cache=False).logits
    assert (wanted - model(ids, use_cache=False).logits).abs().max() > 0.1
    if model_type == "qwen3_moe":
        adapted_layers = {".".join(n.split(".")[4:7]) for n in factors if ".layers.0.mlp." in n}
        assert adapted_layers == {"0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj"}
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    for found in (loaded, adapted.merge_and_unload()):
        # factors of this size amplify the rounding of float32; a wrong merge is off by 0.5 and more
        torch.testing.assert_close(found(ids, use_cache=False).logits, wanted, rtol=0, atol=5e-3)


def test_targets_that_cannot_be_adapted_are_refused():
    with pytest.raises(RecipeError, match=r"layers\.\d+\.mamba\.dt_proj cannot carry an adapter"):
        with_adapters(zoo.tiny_model("jamba"), RecoverySettings(targets=["q_proj", "dt_proj"]))
    with pytest.raises(RecipeError, match="--targets nowhere: peft refuses: Target modules"):
        with_adapters(make("llama"), RecoverySettings(targets=["nowhere"]))


def test_too_little_text_and_broken_losses(damaged, tokenizer, corpus, tmp_path):
    tiny = type(corpus)("tiny", ("word",), "", "tiny.txt")
    with pytest.raises(DataError, match="no training example"):
        training_examples([tiny], tokenizer, 64, False)
    broken = copy.deepcopy(damaged)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="step 1"):
        recover(broken, tokenizer, [corpus], RecoverySettings(**{**vars(QUICK), "steps": 2}), tmp_path)
