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
from torch.nn.functional import cross_entropy

import secateur as sc
from secateur.recovery.examples import IGNORED, Example, packed_windows

VALIDATION, LEARN, SHORT = 1000, 10_000, 24  # examples for validation; to learn from, of at most so many tokens
PROMPT, WORDS = "It was", (" bad", " good")  # after the sentence, and what is to follow for a label of 0 and of 1
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Task:
    """Examples to learn, to choose settings on, and to measure on.

    Attributes:
        name: of the task.
        facts: files and their hashes, sizes and lengths.
        learn, validation, held_out: examples; no two parts share a record.
        labels: tokens of the label 0 and 1, for accuracy; None where the loss is the measure.
    """

    name: str
    facts: Mapping[str, Any]
    learn: Sequence[Example]
    validation: Sequence[Example]
    held_out: Sequence[Example]
    labels: tuple[int, int] | None = None


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
    """A sentence, "It was", and one token that says which; it alone is learned. Long sentences lose their beginning.

    The dev file is held out. Of the training file, the first part is for validation; the rest are parts of sentences,
    too, and only the short ones are learned from, which hold as many labels in fewer tokens.
    """
    files = {name: folder / "glue" / f"sst2_{name}.jsonl.gz" for name in ("train", "dev")}
    labels = _label_tokens(tokenizer)
    records = _records(files["train"])[: VALIDATION + 3 * LEARN], _records(files["dev"])
    train, dev = ([_example(record, tokenizer, seq_len, labels) for record in part] for part in records)
    learn = [example for example in train[VALIDATION:] if len(example["input_ids"]) <= SHORT][:LEARN]
    positive = [sum(record["label"] for record in part) / len(part) for part in (records[0][:VALIDATION], records[1])]
    facts = {
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files.values()},
        "majority": dict(zip(("validation", "held_out"), (max(p, 1 - p) for p in positive), strict=True)),
        "examples": {"learn": len(learn), "validation": VALIDATION, "held_out": len(dev)},
        "longest": {"learn": SHORT, "others": seq_len},
        "label_tokens": [tokenizer.convert_ids_to_tokens(token) for token in labels],
    }
    return Task("sst2", facts, learn, train[:VALIDATION], dev, labels)


TASKS: Mapping[str, Callable[[Path, Any, int], Task]] = {"alpaca": alpaca, "sst2": sst2}


@torch.no_grad()
def measured(model: Any, examples: Sequence[Example], labels: tuple[int, int] | None) -> dict[str, float]:
    """Mean loss over labelled tokens [nats], and with `labels` how often the right one of the two is the likelier."""
    model.eval()
    loss, tokens, right = 0.0, 0, 0
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    for begin in range(0, len(order), EVALUATION_BATCH):
        rows = [examples[i] for i in order[begin : begin + EVALUATION_BATCH]]
        fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        ids, mask, targets = (_padded(rows, key, fill) for key, fill in fills.items())
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        targets = targets[:, 1:]
        wanted = targets != IGNORED
        loss += float(cross_entropy(logits[wanted], targets[wanted], reduction="sum"))
        tokens += int(wanted.sum())
        if labels:
            guessed = logits[wanted][:, list(labels)].argmax(1)
            right += int((torch.tensor(labels)[guessed] == targets[wanted]).sum())
    return {"loss": loss / tokens} | ({"accuracy": right / tokens} if labels else {})


def _padded(rows: Sequence[Example], key: str, fill: int) -> torch.Tensor:
    longest = max(len(row[key]) for row in rows)
    return torch.tensor([[*row[key], *[fill] * (longest - len(row[key]))] for row in rows])


def _records(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _label_tokens(tokenizer: Any) -> tuple[int, int]:
    """The first tokens in which the two answers differ; what they share before belongs to the prompt."""
    bad, good = (tokenizer(PROMPT + word, add_special_tokens=False)["input_ids"] for word in WORDS)
    return next((b, g) for b, g in zip(bad, good, strict=False) if b != g)


def _example(record: Mapping[str, Any], tokenizer: Any, seq_len: int, labels: tuple[int, int]) -> Example:
    answer = WORDS[record["label"]]
    ids = tokenizer(record["sentence"].strip() + " " + PROMPT + answer, add_special_tokens=False)["input_ids"]
    end = len(ids) - 1 - ids[::-1].index(labels[record["label"]])
    ids = ids[max(0, end + 1 - seq_len) : end + 1]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * (len(ids) - 1) + ids[-1:]}
