"""Text for calibration, recovery and evaluation: known corpora by name, or local files, read as they are.

A corpus is a tuple of rows as the Hugging Face hub gives them, so that `"\\n\\n".join(rows)` is the text the papers
use: a plain text file gives one row per line. A line of white space alone is the row `""`; any other line keeps its
newline (as the hub's `wikitext` has it). Files named `ptb*` are stripped line by line, as the hub's `ptb_text_only` is.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSETS = Path(__file__).parent / "assets"
BUNDLED = {name: ASSETS / f"{name}.jsonl.xz" for name in ("demo-calibration", "demo-eval")}

# name -> hub data set, configuration, split, field
KNOWN: dict[str, tuple[str, str | None, str, str | None]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "wikitext2-train": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "validation", "sentence"),
    "c4": ("allenai/c4", "en", "validation", "text"),
    "bookcorpus": ("bookcorpus/bookcorpus", None, "train", "text"),
    "alpaca": ("yahma/alpaca-cleaned", None, "train", None),
}
HUB_TIMEOUT = 10.0  # seconds
INSTRUCTION_FIELDS = ("instruction", "output")
Row = str | Mapping[str, str]


@dataclass(frozen=True)
class Corpus:
    """Text, and where it comes from.

    Attributes:
        name: short, for tables.
        rows: plain texts, or instruction records with `instruction`, `input` and `output`.
        sha256: of the file's bytes; for hub data of the rows.
        source: as the user named it.
    """

    name: str
    rows: tuple[Row, ...]
    sha256: str
    source: str

    @property
    def is_instructions(self) -> bool:
        return bool(self.rows) and not isinstance(self.rows[0], str)

    @property
    def texts(self) -> tuple[str, ...]:
        """The rows as plain text; of a record its filled fields, one below the other."""
        return tuple(r if isinstance(r, str) else "\n".join(v for v in r.values() if v) for r in self.rows)


def load_corpus(name_or_file: str | Path, *, field: str | None = None, limit: int | None = None) -> Corpus:
    """Read a known corpus or a local `.txt`, `.jsonl` (both also `.xz`, `.gz`) or `.parquet` file.

    Args:
        field: the field of JSON rows that holds the text; `text`, or instruction fields, if not given.
        limit: only the first rows.

    Raises:
        DataError: no such corpus or file, or it is empty, damaged, binary, or lacks the field.
    """
    text, path = str(name_or_file), _file_of(name_or_file)
    if path is None:
        return _from_hub(text, field, limit)
    raw = path.read_bytes()
    suffixes = path.suffixes
    if suffixes[-1:] == [".parquet"]:
        from datasets import Dataset

        rows = _records([dict(r) for r in Dataset.from_parquet(str(path))], field, path)
    elif ".jsonl" in suffixes:
        rows = _records(_json_lines(_decode(path, raw), path), field, path)
    else:
        rows = _lines(_decode(path, raw), strip=path.name.startswith("ptb"))
    rows = rows[:limit]
    if not any(r if isinstance(r, str) else r["output"] for r in rows):
        raise DataError(f"{path} holds no text")
    name = text if text in BUNDLED else path.name.split(".")[0]
    return Corpus(name, tuple(rows), hashlib.sha256(raw).hexdigest(), text)


def file_sha256(name_or_file: str | Path) -> str | None:
    """Hash of the bytes of what `load_corpus` would read; None if that comes from the hub.

    Raises:
        DataError: no such corpus or file.
    """
    path = _file_of(name_or_file)
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _file_of(name_or_file: str | Path) -> Path | None:
    """The file that holds a text; None for a known corpus of the hub.

    Raises:
        DataError: there is neither.
    """
    text = str(name_or_file)
    path = BUNDLED.get(text, Path(text))
    if path.is_dir():
        raise DataError(f"{text} is a folder; give a file")
    if path.is_file():
        return path
    if text not in KNOWN:
        raise DataError(f"{text}: no such file, and no known corpus ({', '.join([*KNOWN, *BUNDLED])})")
    return None


def json_rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The objects of a `.jsonl` file (also `.xz`, `.gz`), and the hash of its bytes.

    Raises:
        DataError: it is empty or damaged, or a line is no object.
    """
    raw = path.read_bytes()
    return _json_lines(_decode(path, raw), path), hashlib.sha256(raw).hexdigest()


def _decode(path: Path, raw: bytes) -> str:
    """The text of a file, unpacked by its suffix."""
    try:
        if path.suffix == ".xz":
            raw = lzma.decompress(raw)
        elif path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged or not in the format its name says: {error}") from error
    if not raw.strip():
        raise DataError(f"{path} is empty")
    if b"\0" in raw[:65536]:
        raise DataError(f"{path} is a binary file, not text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _lines(text: str, *, strip: bool) -> list[Row]:
    lines = text.removesuffix("\n").split("\n")
    if strip:
        return [line.strip() for line in lines]
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object with named fields")
        rows.append(row)
    return rows


def _records(rows: list[dict[str, Any]], field: str | None, origin: object) -> list[Row]:
    """The text of every row: the named field, `text`, or instruction fields."""
    if not rows:
        raise DataError(f"{origin} is empty")
    present = list(rows[0])
    if field is None and "text" not in present and all(f in present for f in INSTRUCTION_FIELDS):
        names = ("instruction", "input", "output")
        return [{n: str(r.get(n) or "") for n in names} for r in rows]
    wanted = field or "text"
    for number, row in enumerate(rows, start=1):
        if wanted not in row:
            raise DataError(
                f"{origin}, row {number}: no field {wanted!r}; it has {', '.join(row)} (choose one with --field)"
            )
    return [str(r[wanted]) for r in rows]


def _from_hub(name: str, field: str | None, limit: int | None) -> Corpus:
    from datasets import load_dataset

    repository, configuration, split, known_field = KNOWN[name]
    try:
        reach_hub(repository)
        data = load_dataset(repository, configuration, split=f"{split}[:{limit}]" if limit else split)
    except Exception as error:  # offline, gone, or gated: the remedy is the same
        raise DataError(
            f"{name} ({repository}) cannot be loaded from the hub: {type(error).__name__}: {first_line(error)}; "
            "give a local text file instead"
        ) from error
    rows = _records([dict(r) for r in data], field or known_field, repository)
    digest = hashlib.sha256("\0".join(map(str, rows)).encode()).hexdigest()
    return Corpus(name, tuple(rows), digest, f"{repository}/{configuration or ''}/{split}")


def reach_hub(repository: str) -> None:
    """Ask the hub for a data set once: `load_dataset` would try for half a minute before it says that nobody answers.

    Raises:
        ConnectionError: nobody does. Not where offline mode is set, in which what is cached is used.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        return
    try:
        get_hf_file_metadata(hf_hub_url(repository, "README.md", repo_type="dataset"), timeout=HUB_TIMEOUT)
    except HfHubHTTPError:
        return  # an answer; what it means, `load_dataset` tells
    except Exception as error:  # of the HTTP library, which is not the same one in all versions
        raise ConnectionError(
            f"no answer from {constants.ENDPOINT} ({first_line(error)}); with HF_HUB_OFFLINE=1 a cached copy is used"
        ) from error


def calibration_tokens(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int
) -> Tensor:
    """Random crops of the corpus, as LLM-Pruner takes them from BookCorpus.

    Each crop comes from a random row that is long enough; if too few rows are, all rows are joined with blank lines
    and the crops come from that stream. No BOS token is added, so that a crop may begin anywhere.

    Returns:
        Token ids [samples, seq_len].

    Raises:
        DataError: the whole text is shorter than one window.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = corpus.texts
    order = torch.randperm(len(texts), generator=generator).tolist()
    crops: list[Tensor] = []
    for i in order[: 8 * samples]:
        ids = _encode(tokenizer, texts[i])
        if len(ids) > seq_len:
            crops.append(_crop(ids, seq_len, generator))
        if len(crops) == samples:
            return torch.stack(crops)
    stream = _encode(tokenizer, "\n\n".join(texts))
    if len(stream) < seq_len:
        raise DataError(
            f"{corpus.source} has {len(stream)} tokens, fewer than one window of {seq_len}; "
            "give more text or a smaller --seq-len"
        )
    return torch.stack([_crop(stream, seq_len, generator) for _ in range(samples)])


def _crop(ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    start = int(torch.randint(0, len(ids) - length + 1, (1,), generator=generator))
    return ids[start : start + length]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
