"""Tokenizers in GGUF files: llama.cpp splits text as the checkpoint's own tokenizer does, or a note says where not."""

import json
from pathlib import Path

import gguf
import pytest
from conftest import story
from families import make
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from secateur import checkpoint
from secateur.errors import CheckpointError
from secateur.export import export_gguf, llama_cpp
from secateur.export.gguf_tokenizer import APPROXIMATE, PRE_TOKENIZERS

SHARED = Path(__file__).parents[2] / "shared" / "data" / "models"
TEXTS = [
    'Once upon a time, there was a girl. She said: "I don\'t have 1234567 apples!"\n\n  She   ran — naïve 日本 🙂.\n',
    "  two  spaces\t\ttab",
    "x=1;y=22;\n\n\nz /path/to//x\n",
    "I'M HERE it'S 10,000.50 $ HelloWorld iPhone",
    "def f(x):\n    return x  # ok\n\n",
    "१२३ ٣٤ x² trailing   ",
    "日本語テキスト Привет мир",
    "</s> one <s>two</s>",
]
SPACES = normalizers.Replace(" ", "▁")
runs_llama_cpp = pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")


def differing(tokenizer, file, texts):
    """Texts that llama.cpp splits in another way."""
    found = llama_cpp.tokenize(file, texts)
    return [text for text, tokens in zip(texts, found, strict=True) if tokens != tokenizer(text)["input_ids"]]


def written(tokenizer, folder, rows=None):
    model = make("llama", vocab_size=rows or len(tokenizer))
    return export_gguf(model, tokenizer, folder / "model.gguf", overwrite=True)


def by_bytes(steps):
    """A tokenizer that merges bytes after these steps."""
    made = {
        "bytes by words": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "digits one by one": pre_tokenizers.Digits(individual_digits=True),
    }
    parts = [made.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([story(0), *TEXTS * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def by_characters(normalizer=None, pre_tokenizer=None, with_bytes=True):
    """A tokenizer as SentencePiece makes them: merges of characters, with tokens for single bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = SPACES, pre_tokenizers.Metaspace()
    trained.train_from_iterator([story(0), *TEXTS[1:5]], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    pieces = sorted(state["vocab"], key=state["vocab"].get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256) if with_bytes), *pieces]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[tuple(pair) for pair in state["merges"]],
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    bpe = Tokenizer(model)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if normalizer is not None:
        bpe.normalizer = normalizer
    if pre_tokenizer is not None:
        bpe.pre_tokenizer = pre_tokenizer
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@runs_llama_cpp
def test_the_bundled_model(tmp_path):
    demo = checkpoint.load("demo")
    done = export_gguf(demo.model, demo.tokenizer, tmp_path / "demo.gguf")
    assert not done.notes and not differing(demo.tokenizer, done.path, TEXTS)


@runs_llama_cpp
@pytest.mark.parametrize(("name", "has_bytes"), [("stories260K", True), ("tinystories-656k", False)])
def test_models_with_tokenizers_of_sentencepiece(name, has_bytes, tmp_path):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not here")
    found = checkpoint.load(SHARED / name)
    done = export_gguf(found.model, found.tokenizer, tmp_path / "model.gguf", "f32")
    ids = found.tokenizer("Once upon a time there was a little girl")["input_ids"]
    parity = llama_cpp.compare(done.path, found.model, ids)
    assert parity.max_difference < 5e-5 and parity.same_greedy
    texts = ["Once upon a time, there was a girl. She said", "Lily ran  home", story(1)]
    assert has_bytes == ("no tokens for bytes" not in " ".join(done.notes))
    assert not differing(found.tokenizer, done.path, texts + TEXTS * has_bytes)


@runs_llama_cpp
@pytest.mark.parametrize("steps", PRE_TOKENIZERS, ids=PRE_TOKENIZERS.values())
def test_pre_tokenizers(steps, tmp_path):
    tokenizer = by_bytes(steps)
    done = written(tokenizer, tmp_path)
    assert bool(done.notes) == (PRE_TOKENIZERS[steps] in APPROXIMATE)
    assert not differing(tokenizer, done.path, TEXTS)


@runs_llama_cpp
@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), SPACES]), None),
        (SPACES, None),
        (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
    ],
    ids=["llama", "gemma", "metaspace", "metaspace-never"],
)
def test_merges_of_characters(normalizer, pre_tokenizer, tmp_path):
    tokenizer = by_characters(normalizer, pre_tokenizer)
    done = written(tokenizer, tmp_path, rows=len(tokenizer) + 3)
    exact = not any("puts a space before" in note for note in done.notes)
    assert exact == (pre_tokenizer is None or pre_tokenizer.prepend_scheme == "never")
    plain = [text for text in TEXTS if not text.startswith((" ", "<"))]
    assert not differing(tokenizer, done.path, TEXTS if exact else [*plain, "</s>one"])


def test_rows_and_types(tokenizer, tmp_path):
    tokenizer = by_characters(SPACES)
    tokenizer.add_tokens([AddedToken("▁▁▁", special=False)])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    done = written(tokenizer, tmp_path, rows=len(tokenizer) + 2)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(done.path).fields.items()}
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    named = dict(zip(tokens, kinds, strict=True))
    last = len(tokenizer)
    assert tokens[last:] == [f"[PAD{last}]", f"[PAD{last + 1}]"] and kinds[last:] == [gguf.TokenType.UNUSED] * 2
    assert named["<unk>"] == gguf.TokenType.UNKNOWN and named["</s>"] == gguf.TokenType.CONTROL
    assert named["<0x41>"] == gguf.TokenType.BYTE and named["   "] == gguf.TokenType.USER_DEFINED
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"] == 2 and not fields["tokenizer.ggml.add_bos_token"]


def test_notes_where_llama_cpp_differs(tmp_path):
    tokenizer = by_bytes(("bytes by words",))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), backend.pre_tokenizer])
    backend.normalizer = normalizers.NFC()
    notes = written(tokenizer, tmp_path).notes
    assert "no name for the pre-tokenizer (Punctuation + bytes by words); `default` was written" in notes[0]
    assert "does not normalise text (NFC)" in notes[1]
    assert "no tokens for bytes" in written(by_characters(SPACES, with_bytes=False), tmp_path).notes[0]
    tokenizer = by_bytes(("bytes by words",))
    tokenizer.eos_token = None
    assert "no end-of-text token" in written(tokenizer, tmp_path).notes[0]


def test_tokenizers_that_llama_cpp_does_not_have(tmp_path):
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(CheckpointError, match=r"tokenizers of type Unigram were not verified in llama.cpp"):
        written(PreTrainedTokenizerFast(tokenizer_object=unigram), tmp_path, rows=131)
    plain = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(CheckpointError, match="of type BPE without bytes were not verified"):
        written(PreTrainedTokenizerFast(tokenizer_object=plain), tmp_path, rows=131)
