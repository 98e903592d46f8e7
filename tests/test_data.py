"""Every file form of the ecosystem is read as it is; everything else gets one clear line."""

import gzip
import json
import lzma
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import story

from secateur.data import calibration_tokens, load_corpus
from secateur.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def test_lines_become_rows_as_the_hub_gives_them(tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text(" \n = Title = \n \n Words . \n")
    assert load_corpus(file).rows == ("", " = Title = \n", "", " Words . \n")


@pytest.mark.parametrize("pack", [None, "xz", "gz"])
def test_packed_files(tmp_path, pack):
    text = json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"}) + "\n"
    raw = text.encode()
    raw = {"xz": lzma.compress, "gz": gzip.compress}[pack](raw) if pack else raw
    file = tmp_path / f"rows.jsonl{'.' + pack if pack else ''}"
    file.write_bytes(raw)
    corpus = load_corpus(file)
    assert corpus.rows == ("one", "two") and corpus.name == "rows" and len(corpus.sha256) == 64


def test_parquet_instructions_and_named_fields(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"body": "a b"}, {"body": "c"}]).to_parquet(tmp_path / "x.parquet")
    assert load_corpus(tmp_path / "x.parquet", field="body").rows == ("a b", "c")
    (tmp_path / "i.jsonl").write_text(json.dumps({"instruction": "Say", "input": "", "output": "hi"}) + "\n")
    corpus = load_corpus(tmp_path / "i.jsonl")
    assert corpus.is_instructions and corpus.rows[0]["output"] == "hi" and corpus.texts == ("Say\nhi",)


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty"),
        ("b.txt", b"ab\0cd", "binary"),
        ("c.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("d.txt.xz", lzma.compress(b"word " * 9999)[:40], "damaged"),
        ("e.jsonl", b'{"text": "x"}\nnope\n', "line 2: not JSON"),
        ("f.jsonl", b'{"story": "x"}\n', "no field 'text'; it has story"),
        ("g.jsonl", b"[1]\n", "line 1: expected an object"),
        ("h.jsonl", b'{"text": ""}\n', "no text"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as error:
        load_corpus(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


def test_missing_files_folders_and_hub_names(tmp_path):
    with pytest.raises(DataError, match="no such file, and no known corpus"):
        load_corpus(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="folder"):
        load_corpus(tmp_path)
    with pytest.raises(DataError, match="give a local text file"):
        load_corpus("wikitext2")


def test_bundled_texts():
    for name in ("demo-calibration", "demo-eval"):
        corpus = load_corpus(name)
        assert corpus.name == name and sum(len(t) for t in corpus.texts) > 100_000


def test_calibration_crops_are_seeded_windows_of_rows(tokenizer, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": story(s)}) + "\n" for s in range(8)))
    corpus = load_corpus(file)
    a, b = (calibration_tokens(corpus, tokenizer, 5, 16, seed) for seed in (1, 2))
    assert a.shape == (5, 16) and not torch.equal(a, b)
    assert torch.equal(a, calibration_tokens(corpus, tokenizer, 5, 16, 1))
    streams = [tokenizer(t)["input_ids"] for t in corpus.texts]
    for crop in a.tolist():
        assert any(crop == s[i : i + 16] for s in streams for i in range(len(s)))


def test_short_rows_are_joined_and_too_little_text_is_refused(tokenizer, tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("\n".join(["The old man."] * 30))
    assert calibration_tokens(load_corpus(file), tokenizer, 3, 64, 0).shape == (3, 64)
    with pytest.raises(DataError, match="fewer than one window of 4096"):
        calibration_tokens(load_corpus(file), tokenizer, 3, 4096, 0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="evaluation data not present")
def test_papers_texts_are_read_as_they_are():
    wiki = load_corpus(SHARED / "wikitext2" / "test.raw.txt.xz")
    assert len(wiki.rows) == 4358 and wiki.rows[1] == " = Robert Boulter = \n" and wiki.rows[0] == ""
    ptb = load_corpus(SHARED / "ptb" / "ptb.valid.txt.xz")
    assert len(ptb.rows) == 3370 and not ptb.rows[0].endswith((" ", "\n"))
    assert load_corpus(SHARED / "alpaca" / "alpaca_14k.jsonl.gz").is_instructions


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, answers):
    """`load_dataset` would go on for 24 s."""
    import datasets
    from huggingface_hub import constants

    asked = []

    def load_dataset(*arguments, **_):
        asked.append(arguments)
        raise RuntimeError("dataset scripts are no longer supported\nand more lines")

    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # which answers 501 to everything
        endpoint = f"http://127.0.0.1:{server.server_port}"
        if answers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        begin = time.perf_counter()
        words = "RuntimeError: dataset scripts are no longer supported;" if answers else f"no answer from {endpoint}"
        with pytest.raises(DataError, match=words):
            load_corpus("bookcorpus")
        assert time.perf_counter() - begin < 5 and bool(asked) == answers
        if answers:
            server.shutdown()
