"""Sources of a mix: what each gives to train on, and the part of it that is only measured."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from secateur.data import Corpus
from secateur.errors import DataError, NonFiniteError, RecipeError
from secateur.recovery.examples import IGNORED, Example, corpus_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_SHARE = 0.05  # of a source's examples, and
HELD_OUT_MOST = 32  # no more than these, at least one; all ours


@dataclass(frozen=True)
class Source:
    """One corpus of a mix.

    Attributes:
        name: of the corpus; where two are alike, as the user named it.
        is_instructions: whether it holds instruction records.
        size: all its examples.
        train: examples to train on; none of them equals a held-out one of any source.
        held_out: examples that are only measured.
    """

    name: str
    is_instructions: bool
    size: int
    train: Sequence[Example]
    held_out: Sequence[Example]


def sources_of(
    corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on_inputs: bool
) -> list[Source]:
    """The corpora by name, each parted into training and held-out examples; the order they are given in is no matter.

    Raises:
        RecipeError: fewer than two corpora, or the same one twice.
        DataError: a corpus is too short to hold out a part of it.
    """
    if len(corpora) < 2:
        raise RecipeError("there is nothing to mix in one source: give --data (recovery.data) twice or more")
    plain = [corpus.name for corpus in corpora]
    names = plain if len(set(plain)) == len(plain) else [corpus.source for corpus in corpora]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"--data {twice[0]} is given twice (recovery.data): each source of a mix counts once")
    named = sorted(zip(names, corpora, strict=True), key=lambda pair: pair[0])
    examples = [corpus_examples(corpus, tokenizer, seq_len, train_on_inputs) for _, corpus in named]
    held_out = [_held_out(found) for found in examples]
    known = {tuple(e["input_ids"]) for found in held_out for e in found}
    return [
        _parted(name, corpus, found, measured, known)
        for (name, corpus), found, measured in zip(named, examples, held_out, strict=True)
    ]


def _held_out(examples: Sequence[Example]) -> list[Example]:
    """Examples that are spread evenly over the source, so that they are the same for every seed."""
    number = max(1, min(HELD_OUT_MOST, int(HELD_OUT_SHARE * len(examples))))
    return [examples[(2 * i + 1) * len(examples) // (2 * number)] for i in range(number)]


def _parted(
    name: str, corpus: Corpus, examples: Sequence[Example], held_out: Sequence[Example], known: Set[tuple[int, ...]]
) -> Source:
    """A source that trains on what is held out nowhere (`known`)."""
    train = [e for e in examples if tuple(e["input_ids"]) not in known]
    if not train:
        raise DataError(
            f"{corpus.source}: of {len(examples)} examples {len(held_out)} are held out to measure it, and none that "
            "differs from what is held out is left to train on; give more text or a smaller --seq-len "
            "(recovery.seq_len)"
        )
    return Source(name, corpus.is_instructions, len(examples), train, held_out)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, source: Source, batch_size: int) -> float:
    """Mean loss over the labelled tokens of a source's held-out examples [nats per token].

    Logits in float32, sum in float64; dropout off, and no random numbers used.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    total, tokens = 0.0, 0
    training = model.training
    model.eval()
    try:
        for begin in range(0, len(source.held_out), batch_size):
            rows = source.held_out[begin : begin + batch_size]
            ids, mask, labels = (
                padded([row[key] for row in rows], fill).to(model.device)
                for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED))
            )
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            targets = labels[:, 1:]
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
            )
            total += float(losses.double().sum())
            tokens += int((targets != IGNORED).sum())
    finally:
        model.train(training)
    if not math.isfinite(loss := total / max(1, tokens)):
        raise NonFiniteError(f"the loss on the held-out part of {source.name} is {loss}; lower the learning rate")
    return loss


def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """Rows of different lengths as one tensor [rows, longest], filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
