"""What several test files share: a small Llama with a tokenizer, on disk, made once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur import cli


@pytest.fixture(scope="session", autouse=True)
def nothing_known_from_earlier_runs(tmp_path_factory):
    """What was found out about model classes is kept for this run of the tests only."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def warm_process():
    """Runs `reload_process.py` in forks of a process that has imported what it imports (see `warm_process.py`)."""
    command = [sys.executable, "-P", Path(__file__).with_name("warm_process.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def run(command: list[str], **how: bool) -> subprocess.CompletedProcess[str]:
            _, flag, script, *arguments = command
            if flag != "-P" or Path(script).name != "reload_process.py" or "trust" in arguments:
                return subprocess.run(command, **how)
            with tempfile.TemporaryDirectory() as folder:
                streams = [str(Path(folder) / name) for name in ("out", "err")]
                process.stdin.write(json.dumps({"command": [script, *arguments], "streams": streams}) + "\n")
                process.stdin.flush()
                code = int(process.stdout.readline())
                out, err = (Path(name).read_text(encoding="utf-8") for name in streams)
            return subprocess.CompletedProcess(command, code, out, err)

        yield run
        process.stdin.close()


@pytest.fixture(autouse=True)
def quick_reloads(request, monkeypatch, warm_process):
    """Most tests need no new interpreter for every checkpoint that they write."""
    if request.node.get_closest_marker("fresh_process") is None:
        calls = SimpleNamespace(run=warm_process, CompletedProcess=subprocess.CompletedProcess)
        monkeypatch.setattr("secateur.checkpoint.parity.subprocess", calls)


WORDS = "the old man opened a door and saw his small garden under rain while birds sang of summer".split()  # noqa: SIM905


def story(seed: int, sentences: int = 40) -> str:
    """Text with some structure to learn: sentences over a small vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(len(WORDS), generator=generator)[:7].tolist() for _ in range(sentences)]
    return " ".join(" ".join(WORDS[i] for i in sorted(words)).capitalize() + "." for words in order)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([story(s) for s in range(4)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def trained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with grouped-query attention, trained for a few seconds on `story`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer(" ".join(story(s) for s in range(12)))["input_ids"])
    windows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        batch = windows[torch.randint(len(windows), (16,), generator=torch.Generator().manual_seed(step))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint_folder(trained, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A test model\n")
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("\n".join(story(s) for s in range(20, 32)) + "\n")
    return file


@pytest.fixture
def secateur(monkeypatch, capfd):
    """The command line: arguments -> exit code, standard output and standard error."""
    monkeypatch.setattr(cli.out, "width", 160)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capfd.readouterr())

    return run
