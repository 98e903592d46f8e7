"""Perplexity against slow loops that share no code with it."""

import copy
import math

import pytest
import torch

from secateur.data import load_corpus
from secateur.errors import DataError, NonFiniteError
from secateur.evaluation import perplexity


@pytest.fixture(scope="module")
def corpus(text_file):
    return load_corpus(text_file)


def token_loss(model, context, target):
    with torch.no_grad():
        return -float(torch.log_softmax(model(torch.tensor([context])).logits[0, -1].float(), -1)[target])


def stream(tokenizer, corpus):
    return tokenizer("\n\n".join(corpus.texts))["input_ids"]


def test_windows_do_not_overlap_and_the_rest_is_dropped(trained, tokenizer, corpus):
    rows = (tokenizer.decode(stream(tokenizer, corpus)[:100]),)
    short = type(corpus)(corpus.name, rows, corpus.sha256, corpus.source)
    ids = tokenizer(rows[0])["input_ids"]
    losses = []
    for start in range(0, len(ids) - 16 + 1, 16):
        window = ids[start : start + 16]
        losses += [token_loss(trained, window[:i], window[i]) for i in range(1, 16)]
    result = perplexity(trained, tokenizer, short, seq_len=16)
    assert result.tokens == len(losses)
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    with_bos = perplexity(trained, tokenizer, short, seq_len=16, bos=True)
    losses = []
    for start in range(0, len(ids) - 15 + 1, 15):
        window = [tokenizer.bos_token_id, *ids[start : start + 15]]
        losses += [token_loss(trained, window[:i], window[i]) for i in range(1, 16)]
    assert with_bos.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert with_bos.tokens == len(losses)


def test_stride_counts_every_token_once_with_the_longest_context(trained, tokenizer, corpus):
    rows = (tokenizer.decode(stream(tokenizer, corpus)[:75]),)
    short = type(corpus)(corpus.name, rows, corpus.sha256, corpus.source)
    ids = tokenizer(rows[0])["input_ids"]
    losses, reached = [], 1
    for start in range(0, len(ids), 6):
        end = min(start + 16, len(ids))
        losses += [token_loss(trained, ids[start:i], ids[i]) for i in range(max(reached, start + 1), end)]
        reached = end
        if end == len(ids):
            break
    result = perplexity(trained, tokenizer, short, seq_len=16, stride=6)
    assert result.tokens == len(losses) == len(ids) - 1
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_batch_size_and_dtype_are_rounding(trained, tokenizer, corpus):
    one, eight = (perplexity(trained, tokenizer, corpus, seq_len=32, batch_size=b) for b in (1, 8))
    assert one.value == pytest.approx(eight.value, rel=1e-6) and one.tokens == eight.tokens
    half = perplexity(copy.deepcopy(trained).bfloat16(), tokenizer, corpus, seq_len=32)
    assert half.value == pytest.approx(one.value, rel=2e-2) and half.dtype == "bfloat16"


def test_protocol_and_mode(trained, tokenizer, corpus):
    trained.train()
    result = perplexity(trained, tokenizer, corpus, seq_len=32)
    assert trained.training
    trained.eval()
    assert set(result.to_json()) >= {"value", "seq_len", "tokens", "stride", "bos", "text_sha256", "dtype"}


def test_refusals(trained, tokenizer, corpus):
    with pytest.raises(DataError, match="exceed the model's 256 positions"):
        perplexity(trained, tokenizer, corpus, seq_len=512)
    tiny = type(corpus)("tiny", ("word",), "", "tiny.txt")
    with pytest.raises(DataError, match="fewer than one window"):
        perplexity(trained, tokenizer, tiny, seq_len=64)
    with pytest.raises(DataError, match="fewer than one window"):
        perplexity(trained, tokenizer, tiny, seq_len=64, stride=8)
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    with pytest.raises(DataError, match="no BOS"):
        perplexity(trained, bare, corpus, seq_len=32, bos=True)
    broken = copy.deepcopy(trained)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="loss"):
        perplexity(broken, tokenizer, corpus, seq_len=32)
