"""Train the bundled demo model: a 1.9 M-parameter Llama with grouped-query attention, on public-domain books.

    python benchmarks/train_demo_model.py --books ../shared/data/corpus/books --work /path/for/checkpoints \
        --output src/secateur/assets/demo-model --steps 6000

About an hour on two CPU cores. A killed run goes on from its last checkpoint when started again with the same
arguments. Writes the model in bf16 with its tokenizer, the training curve (`training.json`) and a model card.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

SEQ_LEN = 256  # tokens
VOCAB_SIZE = 2048
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
}


def read_books(files: list[Path]) -> Iterator[str]:
    """The `text` field of every book, one at a time."""
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def train_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens; `<s>` starts a text, `</s>` ends it and pads."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(read_books(files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=SHAPE["max_position_embeddings"],
    )


def encode_books(tokenizer: PreTrainedTokenizerFast, files: list[Path]) -> np.ndarray:
    """All books as one stream of token ids, each closed by `</s>`."""
    pieces = []
    for text in read_books(files):
        paragraphs = tokenizer.backend_tokenizer.encode_batch(text.splitlines(keepends=True))
        pieces += [np.array(p.ids, dtype=np.uint16) for p in paragraphs]
        pieces.append(np.array([tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(pieces)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Non-overlapping windows of `SEQ_LEN` tokens; the first token of each is replaced by `<s>`."""

    def __init__(self, stream: np.ndarray, bos_token_id: int) -> None:
        self.tokens = stream[: len(stream) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN)
        self.bos_token_id = bos_token_id

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[i].astype(np.int64))
        ids[0] = self.bos_token_id
        return {"input_ids": ids, "labels": ids}


def model_card(figures: dict[str, object]) -> str:
    """README.md of the bundled model."""
    return f"""---
license: cc0-1.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Secateur demo model

A Llama-type language model with grouped-query attention ({figures["parameters"]:,} parameters, bf16), small enough to
ship inside a Python package. It exists so that `secateur demo` and the tests run on a real, trained model without a
download. It writes recognisable English in the manner of old books, and knows nothing.

| | |
| --- | --- |
| shape | hidden {SHAPE["hidden_size"]}, FFN {SHAPE["intermediate_size"]}, {SHAPE["num_hidden_layers"]} layers, \
{SHAPE["num_attention_heads"]} query heads on {SHAPE["num_key_value_heads"]} key/value heads, tied embeddings |
| tokenizer | byte-level BPE, {VOCAB_SIZE} tokens, trained on the same books |
| training data | 269 books, first published by 1927, public domain in the USA (mlschmitt/classic-books-markdown) |
| training | {figures["tokens"]:,} tokens ({figures["epochs"]} epochs), AdamW, cosine schedule, \
{SEQ_LEN}-token windows |
| validation loss | {figures["valid_loss"]} nats per token on {figures["valid_tokens"]:,} tokens of 6 books by other \
authors (perplexity {figures["valid_perplexity"]}, {SEQ_LEN}-token windows, each starting with `<s>`) |
| licence of weights and tokenizer | CC0-1.0 |

The training curve is in `training.json`; `benchmarks/train_demo_model.py` in the repository makes this folder.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder with train-*.jsonl.xz and valid.jsonl.xz")
    parser.add_argument("--work", type=Path, required=True, help="folder for the token stream and checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    train_files, valid_files = sorted(args.books.glob("train-*.jsonl.xz")), [args.books / "valid.jsonl.xz"]

    if not (args.work / "train.npy").exists():
        tokenizer = train_tokenizer(train_files[:1])
        tokenizer.save_pretrained(args.work / "tokenizer")
        np.save(args.work / "valid.npy", encode_books(tokenizer, valid_files))
        np.save(args.work / "train.npy", encode_books(tokenizer, train_files))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    train = Windows(np.load(args.work / "train.npy", mmap_mode="r"), tokenizer.bos_token_id)
    valid = Windows(np.load(args.work / "valid.npy", mmap_mode="r"), tokenizer.bos_token_id)

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=str(args.work / "checkpoints"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=200,
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=True,
            use_cpu=True,
            logging_steps=50,
            save_steps=500,
            save_total_limit=2,
            seed=args.seed,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=train,
        data_collator=default_data_collator,
    )
    started = time.time()
    resume = any((args.work / "checkpoints").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume or None)
    valid_loss = trainer.evaluate(valid)["eval_loss"]

    model = trainer.model.to(torch.bfloat16)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    tokens = args.steps * args.batch_size * SEQ_LEN
    figures = {
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "epochs": round(tokens / train.tokens.size, 2),
        "valid_loss": round(valid_loss, 4),
        "valid_perplexity": round(math.exp(valid_loss), 2),
        "valid_tokens": int(valid.tokens.size),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "seconds_this_run": round(time.time() - started),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "curve": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row],
    }
    (args.output / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    (args.output / "README.md").write_text(model_card(figures))


if __name__ == "__main__":
    main()
