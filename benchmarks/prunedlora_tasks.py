"""The tasks of `benchmarks/prunedlora.py`: Alpaca as text, measured by its loss, and SST-2, measured by accuracy."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

import secateur as sc
from secateur.recovery.examples import IGNORED, Example, packed_windows

VALIDATION, LEARN, SHORT = 1000, 10_000, 24  # examples for validation; to learn from, of at most so many tokens
WORDS = (" bad", " good")  # for a label of 0 and of 1
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Task:
    """Examples to learn, to choose settings on, and to measure on.

    Attributes:
        name: of the task.
        facts: files and their hashes, sizes and lengths.
        learn, validation, held_out: examples; no two parts share a record.
        tokens: one for each of two classes, whose accuracy is measured; None where the loss of text is.
    """

    name: str
    facts: Mapping[str, Any]
    learn: Sequence[Example]
    validation: Sequence[Example]
    held_out: Sequence[Example]
    tokens: tuple[int, int] | None = None

    def model(self, language_model: Any) -> Any:
        """What is trained and measured."""
        return Verbaliser(language_model, self.tokens) if self.tokens else language_model

    def result(self, model: Any, part: str) -> dict[str, float]:
        """Loss, and accuracy where there is one, on a part of the task."""
        return measured(model, getattr(self, part), self.tokens is not None)


def alpaca(folder: Path, tokenizer: Any, seq_len: int) -> Task:
    """Records as text, instruction, input and output below each other, packed into windows; every token is learned.

    The last 400 records of the file are held out, the 400 before them are for validation; of each up to 150 windows.
    """
    corpus = sc.load_corpus(folder / "alpaca" / "alpaca_14k.jsonl.gz")
    parts = {"learn": corpus.rows[:5000], "validation": corpus.rows[-800:-400], "held_out": corpus.rows[-400:]}
    made = {name: packed_windows(replace(corpus, rows=rows), tokenizer, seq_len) for name, rows in parts.items()}
    made |= {name: made[name][:150] for name in ("validation", "held_out")}
    facts = {"files": {"alpaca_14k.jsonl.gz": corpus.sha256}, "windows": {name: len(w) for name, w in made.items()}}
    return Task("alpaca", facts, **made)


def sst2(folder: Path, tokenizer: Any, seq_len: int) -> Task:
    """Sentences, and which of two words a `Verbaliser` tells.

    The dev file is held out. Of the training file, the first part is for validation; most of it are parts of sentences,
    and only short ones are learned from, which hold as many labels in fewer tokens.
    """
    files = {name: folder / "glue" / f"sst2_{name}.jsonl.gz" for name in ("train", "dev")}
    tokens = _label_tokens(tokenizer)
    records = _records(files["train"])[: VALIDATION + 3 * LEARN], _records(files["dev"])
    train, dev = ([_example(record, tokenizer, seq_len) for record in part] for part in records)
    learn = [example for example in train[VALIDATION:] if len(example["input_ids"]) <= SHORT][:LEARN]
    positive = [sum(record["label"] for record in part) / len(part) for part in (records[0][:VALIDATION], records[1])]
    facts = {
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files.values()},
        "majority": dict(zip(("validation", "held_out"), (max(p, 1 - p) for p in positive), strict=True)),
        "examples": {"learn": len(learn), "validation": VALIDATION, "held_out": len(dev)},
        "longest": {"learn": SHORT, "others": seq_len},
        "tokens": [tokenizer.convert_ids_to_tokens(token) for token in tokens],
    }
    return Task("sst2", facts, learn, train[:VALIDATION], dev, tokens)


TASKS: Mapping[str, Callable[[Path, Any, int], Task]] = {"alpaca": alpaca, "sst2": sst2}


class Verbaliser(nn.Module):
    """A language model that tells a class: by its logits for one token of each, averaged over positions.

    It has no parameters of its own. Small models learn much faster from the average than from the last position.
    """

    def __init__(self, language_model: Any, tokens: tuple[int, int]) -> None:
        super().__init__()
        self.language_model = language_model
        self.tokens = list(tokens)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """`labels` [examples, 1]."""
        found = self.language_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        mask = attention_mask[..., None]
        logits = (found[..., self.tokens].float() * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(None if labels is None else cross_entropy(logits, labels[:, 0]), logits)


@torch.no_grad()
def measured(model: Any, examples: Sequence[Example], classes: bool) -> dict[str, float]:
    """Mean loss over labels [nats], and for classes the share that is told rightly."""
    model.eval()
    loss, count, right = 0.0, 0, 0
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    for begin in range(0, len(order), EVALUATION_BATCH):
        rows = [examples[i] for i in order[begin : begin + EVALUATION_BATCH]]
        fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        ids, mask, targets = (_padded(rows, key, fill) for key, fill in fills.items())
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        logits, targets = (
            (logits, targets[:, 0]) if classes else (logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        )
        loss += float(cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED))
        count += int((targets != IGNORED).sum())
        right += int((logits.argmax(-1) == targets).sum())
    return {"loss": loss / count} | ({"accuracy": right / count} if classes else {})


def _padded(rows: Sequence[Example], key: str, fill: int) -> Tensor:
    longest = max(len(row[key]) for row in rows)
    return torch.tensor([[*row[key], *[fill] * (longest - len(row[key]))] for row in rows])


def _records(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _label_tokens(tokenizer: Any) -> tuple[int, int]:
    """The first tokens in which the two words differ."""
    bad, good = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS)
    return next((b, g) for b, g in zip(bad, good, strict=False) if b != g)


def _example(record: Mapping[str, Any], tokenizer: Any, seq_len: int) -> Example:
    ids = tokenizer(record["sentence"].strip(), add_special_tokens=False)["input_ids"][:seq_len]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [record["label"]]}
