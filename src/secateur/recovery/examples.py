"""Training examples: instruction records with the prompt masked, or plain text packed into windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from secateur.data import Corpus
from secateur.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, list[int]]
IGNORED = -100  # label of tokens that carry no loss

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def training_examples(
    corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on_inputs: bool
) -> list[Example]:
    """`input_ids`, `attention_mask` and `labels` of every example of every corpus, at most `seq_len` tokens long.

    Raises:
        DataError: a corpus gives no example.
    """
    return [e for corpus in corpora for e in corpus_examples(corpus, tokenizer, seq_len, train_on_inputs)]


def corpus_examples(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on_inputs: bool
) -> list[Example]:
    """The examples of one corpus, in its order.

    Raises:
        DataError: it gives none.
    """
    if corpus.is_instructions:
        records = [r for r in corpus.rows if not isinstance(r, str)]
        made = [e for r in records if (e := instruction_example(r, tokenizer, seq_len, train_on_inputs))]
    else:
        made = packed_windows(corpus, tokenizer, seq_len)
    if not made:
        raise DataError(f"{corpus.source} gives no training example of {seq_len} tokens; give more text")
    return made


def instruction_example(
    record: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on_inputs: bool
) -> Example | None:
    """One record in the Alpaca prompt, closed by EOS; None if truncation leaves no answer token to learn."""
    prompt = (WITH_INPUT if record["input"] else WITHOUT_INPUT).format(**record)
    head = tokenizer(prompt, verbose=False)["input_ids"]
    if head and head[-1] == tokenizer.eos_token_id:
        head = head[:-1]
    answer = tokenizer(record["output"], add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*head, *answer, tokenizer.eos_token_id][:seq_len]
    labels = ids if train_on_inputs else [IGNORED] * min(len(head), len(ids)) + ids[len(head) :]
    if all(label == IGNORED for label in labels):
        return None
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(labels)}


def packed_windows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> list[Example]:
    """The corpus as one stream, cut into windows that do not overlap; the last partial one is dropped."""
    stream = tokenizer("\n\n".join(corpus.texts), add_special_tokens=False, verbose=False)["input_ids"]
    windows = [stream[i : i + seq_len] for i in range(0, len(stream) - seq_len + 1, seq_len)]
    return [{"input_ids": w, "attention_mask": [1] * seq_len, "labels": list(w)} for w in windows]
