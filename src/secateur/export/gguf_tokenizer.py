"""The tokenizer of a GGUF file: what llama.cpp needs to split text as the checkpoint's own tokenizer does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"  # stands for a space in vocabularies made by SentencePiece
NEVER = -1e9  # score of a token that no merge makes
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+", rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*"

# The steps before byte-level merging -> the name of the same steps in llama.cpp.
PRE_TOKENIZERS = {
    ("bytes by words",): "gpt-2",
    ("digits one by one", "bytes by words"): "smollm",
    (rf"{ENDINGS}|{LETTERS}|\p{{N}}{{1,3}}|{REST}", "bytes"): "llama-bpe",
    (rf"{ENDINGS}|{LETTERS}|\p{{N}}|{REST}", "bytes"): "qwen2",
    (rf"{WORDS[0]}{ENDINGS}?|{WORDS[1]}{ENDINGS}?|\p{{N}}{{1,3}}|{REST_SLASH}", "bytes"): "gpt-4o",
    (rf"{WORDS[0]}|{WORDS[1]}|\p{{N}}|{REST_SLASH}", "bytes"): "tekken",
}
APPROXIMATE = ("gpt-4o", "tekken")  # llama.cpp's expressions know only a-z and A-Z where the originals know all letters


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF stores it.

    Attributes:
        model: `gpt2` (merges of bytes) or `llama` (merges of characters, by score).
        pre: how text is cut before merging.
        merges: pairs in their order, for `gpt2`.
        scores: higher merges first, for `llama`.
        special: `bos`, `eos`, `unk`, `pad` -> token id.
        notes: where llama.cpp may split text in another way.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    chat_template: str | None
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of its lists in the file: every text comes with 8 bytes for its length, every number takes 4."""
        texts = (*self.tokens, *self.merges)
        return sum(8 + len(text.encode()) for text in texts) + 4 * (len(self.types) + len(self.scores))

    def write(self, writer: GGUFWriter) -> None:
        """Add the metadata to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: PreTrainedTokenizerBase | None, rows: int) -> Vocabulary:
    """Read a tokenizer.

    Args:
        rows: of the embedding; tokens are made up for rows that the tokenizer does not use.

    Raises:
        CheckpointError: there is none, or it works in a way that llama.cpp does not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or backend is None:
        raise CheckpointError(
            "a GGUF file holds its tokenizer, and this checkpoint has none that is stored as tokenizer.json; put the "
            "tokenizer of the base model into its folder"
        )
    state = json.loads(backend.to_str())
    steps = _steps(state)
    kind, model = state["model"]["type"], state["model"]
    by_bytes = any(step.startswith("bytes") for step in steps)
    if kind != "BPE" or not (by_bytes or model["byte_fallback"]):
        raise CheckpointError(
            f"tokenizers of type {kind}{'' if kind != 'BPE' else ' without bytes'} were not verified in llama.cpp; "
            "run the model with transformers"
        )
    tokens, types = _tokens(backend, state, rows, by_bytes)
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    space_prefix = not by_bytes and backend.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
    notes = _notes(state, steps, by_bytes, space_prefix)
    special = {n: getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "unk", "pad")}
    if special["eos"] is None:
        notes.append("the tokenizer has no end-of-text token, and llama.cpp takes one by its number: set --ignore-eos")
    probe = tokenizer("a")["input_ids"]
    return Vocabulary(
        model="gpt2" if by_bytes else "llama",
        pre=PRE_TOKENIZERS.get(steps, "default") if by_bytes else "default",
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(" ".join(pair) for pair in merges) if by_bytes else (),
        scores=() if by_bytes else tuple(_scores(tokens, merges)),
        special={name: token for name, token in special.items() if token is not None},
        add_bos=special["bos"] is not None and probe[:1] == [special["bos"]],
        add_eos=special["eos"] is not None and probe[-1:] == [special["eos"]],
        space_prefix=space_prefix,
        chat_template=template if isinstance(template := getattr(tokenizer, "chat_template", None), str) else None,
        notes=tuple(notes),
    )


def _flat(step: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """The steps of a sequence, or the one step."""
    if step is not None:
        yield from step[name] if step["type"] == "Sequence" else [step]


def _steps(state: dict[str, Any]) -> tuple[str, ...]:
    """What is done before merging, in the words of `PRE_TOKENIZERS`."""
    found = []
    for step in _flat(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel":
            found.append("bytes by words" if step["use_regex"] else "bytes")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and "Regex" in step["pattern"]:
            found.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append("digits one by one")
        else:
            found.append(step["type"])
    return tuple(found)


def _tokens(backend: Any, state: dict[str, Any], rows: int, by_bytes: bool) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    from gguf import TokenType

    names = {number: text for text, number in backend.get_vocab(with_added_tokens=True).items()}
    if max(names) >= rows:
        raise CheckpointError(
            f"the tokenizer has tokens up to number {max(names)} and the model {rows} embeddings: use its own tokenizer"
        )
    tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [TokenType.NORMAL if i in names else TokenType.UNUSED for i in range(rows)]
    for added in state["added_tokens"]:
        number = added["id"]
        types[number] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if not by_bytes and not added["special"]:
            tokens[number] = added["content"].replace(SPACE, " ")
    if not by_bytes:
        for i, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[i] = TokenType.BYTE
        if (unknown := state["model"]["unk_token"]) is not None:
            types[tokens.index(unknown)] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in types]


def _scores(tokens: list[str], merges: list[list[str]]) -> Iterator[float]:
    """Minus the place of the first merge that makes a token: llama.cpp merges the pair with the highest score."""
    place: dict[str, int] = {}
    for i, pair in enumerate(merges):
        place.setdefault("".join(pair), i)
    for token in tokens:
        yield -float(place[token]) if token in place else 0.0 if len(token) == 1 else NEVER


def _notes(state: dict[str, Any], steps: tuple[str, ...], by_bytes: bool, space_prefix: bool) -> list[str]:
    """Where llama.cpp splits text in another way."""
    notes = []
    if by_bytes and steps not in PRE_TOKENIZERS:
        notes.append(
            f"llama.cpp has no name for the pre-tokenizer ({' + '.join(steps)}); `default` was written, so some text "
            "is split in another way"
        )
    if PRE_TOKENIZERS.get(steps) in APPROXIMATE:
        notes.append("llama.cpp splits words with accented capitals in another way than this tokenizer")
    if space_prefix and "Metaspace" in steps:
        notes.append("llama.cpp puts a space before text that begins with a space or follows a special token, too")
    if not by_bytes and "<0x00>" not in state["model"]["vocab"]:
        notes.append("the vocabulary has no tokens for bytes: llama.cpp stops at characters that are not in it")
    if any(added["lstrip"] or added["rstrip"] for added in state["added_tokens"]):
        notes.append("llama.cpp keeps the spaces around special tokens, where the tokenizer strips them")
    expected = () if by_bytes else ("Prepend", "Replace")
    found = [n["type"] for n in _flat(state["normalizer"], "normalizers") if n["type"] not in expected]
    if found:
        notes.append(f"llama.cpp does not normalise text ({', '.join(found)}) before it splits it")
    return notes
