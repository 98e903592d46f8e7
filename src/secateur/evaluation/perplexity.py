"""Perplexity as the papers on pruning measure it."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from secateur.data import Corpus
from secateur.errors import DataError, NonFiniteError
from secateur.importance.streaming import broken_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOW_PROGRESS_FROM = 50_000_000_000  # parameters x tokens; below that it takes seconds


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and everything it depends on.

    Attributes:
        value: exp of `loss`.
        loss: mean negative log-likelihood of the counted tokens [nats per token].
        tokens: how many tokens were predicted and counted.
        seq_len: window length in tokens, BOS included.
        stride: tokens a window moves by; None for windows that do not overlap.
        bos: whether every window begins with BOS.
        text: name of the corpus.
        text_sha256: hash of its file.
        dtype: of the model.
    """

    value: float
    loss: float
    tokens: int
    seq_len: int
    stride: int | None
    bos: bool
    text: str
    text_sha256: str
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    *,
    seq_len: int = 2048,
    stride: int | None = None,
    bos: bool = False,
    batch_size: int = 8,
) -> Perplexity:
    """Token perplexity of `corpus`, as GPTQ, SparseGPT, LLM-Pruner and their followers measure it.

    Rows are joined by blank lines and tokenised once, without special tokens; windows of `seq_len` tokens do not
    overlap, the last partial one is dropped, and the first token of each is not predicted. LLM-Pruner uses 128, most
    others 2048: figures of different lengths do not compare.

    Args:
        stride: windows overlap and move by this many tokens; only tokens no earlier window predicted are counted, and
            the text is used to its end (as in the transformers documentation).
        bos: put the BOS token in front of each window, within its length.
        batch_size: windows per forward pass; changes the result only by rounding.

    Raises:
        DataError: the text is shorter than a window, the model's positions too few, or there is no BOS token.
        NonFiniteError: the loss is NaN or infinite.
    """
    ids = tokens_of(model, tokenizer, corpus, seq_len)
    prefix = _prefix(tokenizer, bos)
    windows = windows_of(ids, seq_len - len(prefix), stride, predict_first=bos)
    if not windows:
        raise DataError(f"{corpus.source} has {len(ids)} tokens, fewer than one window of {seq_len}")
    total, count = 0.0, 0
    training = model.training
    model.eval()
    try:
        batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
        for batch in _progress(batches, model, len(ids)):
            losses, counted = batch_loss(model, batch, prefix)
            total, count = total + losses, count + counted
    finally:
        model.train(training)
    loss = total / count
    if not math.isfinite(loss):
        cause = broken_parameter(model) or "the weights are finite, so the dtype is too narrow for this model"
        raise NonFiniteError(f"the loss on {corpus.source} is {loss}: {cause}")
    dtype = str(model.dtype).removeprefix("torch.")
    return Perplexity(math.exp(min(loss, 700.0)), loss, count, seq_len, stride, bos, corpus.name, corpus.sha256, dtype)


Window = tuple[Tensor, int]  # token ids, how many of the last ones are counted


def windows_of(ids: Tensor, length: int, stride: int | None, *, predict_first: bool) -> list[Window]:
    """Cut the stream; without a BOS in front, the first token of a window has nothing to be predicted from."""
    first = 0 if predict_first else 1
    if stride is None:
        return [(ids[s : s + length], length - first) for s in range(0, len(ids) - length + 1, length)]
    windows: list[Window] = []
    reached = first
    for start in range(0, len(ids), stride):
        window = ids[start : start + length]
        end = start + len(window)
        counted = min(end - reached, len(window) - first)
        if counted > 0:
            windows.append((window, counted))
        reached = end
        if end == len(ids):
            break
    return windows if len(ids) >= length else []


def batch_loss(model: PreTrainedModel, batch: list[Window], prefix: Tensor) -> tuple[float, int]:
    """Summed loss of the counted tokens of some windows, in float32 logits and a float64 sum."""
    total, count = 0.0, 0
    by_length: dict[int, list[Window]] = {}
    for window in batch:
        by_length.setdefault(len(window[0]), []).append(window)
    for same in by_length.values():
        inputs = torch.stack([torch.cat([prefix, ids]) for ids, _ in same]).to(model.device)
        logits = model(inputs, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs[:, 1:], reduction="none")
        for row, (_, counted) in zip(losses, same, strict=True):
            total += float(row[-counted:].double().sum())
            count += counted
    return total, count


def tokens_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, seq_len: int) -> Tensor:
    """The whole text as one stream of token ids, rows joined by blank lines.

    Raises:
        DataError: windows of `seq_len` tokens exceed the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise DataError(
            f"windows of {seq_len} tokens exceed the model's {positions} positions; choose a smaller seq_len"
        )
    encoded = tokenizer("\n\n".join(corpus.texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(encoded, dtype=torch.long)


def _prefix(tokenizer: PreTrainedTokenizerBase, bos: bool) -> Tensor:
    if not bos:
        return torch.empty(0, dtype=torch.long)
    if tokenizer.bos_token_id is None:
        raise DataError("the tokenizer has no BOS token; leave bos off")
    return torch.tensor([tokenizer.bos_token_id])


def _progress(batches: list[list[Window]], model: PreTrainedModel, tokens: int) -> Any:
    """A bar for work that takes more than a few seconds."""
    quick = model.num_parameters() * tokens < SHOW_PROGRESS_FROM
    return track(batches, "perplexity", console=Console(file=sys.stderr), disable=quick, transient=True)
