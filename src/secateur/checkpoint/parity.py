"""Whether what was written is what was meant: it is loaded again, and its logits are compared."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.checkpoint.card import is_remote
from secateur.data import load_corpus
from secateur.discovery.setting import quiet_transformers
from secateur.errors import ParityError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARITY_TOLERANCE = 1e-6  # of the largest logit
PROBE_TOKENS = 128
PROBE_TEXT = "demo-eval"
SCRIPT = Path(__file__).with_name("reload_process.py")


@dataclass(frozen=True)
class Parity:
    """How a model and what was loaded from its folder compare.

    Attributes:
        max_logit_difference: largest absolute difference of logits.
        perplexity_before: of the probe's tokens, with the model in memory.
        perplexity_after: the same, with what was loaded.
        tokens: length of the probe.
        text: what the probe is: a corpus, or consecutive token ids if there is no tokenizer.
        process: `fresh` if it was loaded in a process of its own, without Secateur.
    """

    max_logit_difference: float
    perplexity_before: float
    perplexity_after: float
    tokens: int
    text: str
    process: str = "fresh"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Probed:
    """What a model computes on the probe.

    Attributes:
        ids: [1, length].
        text: what they are.
        logits: [1, length, vocab].
    """

    ids: Tensor
    text: str
    logits: Tensor


def verify_in_fresh_process(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> Parity:
    """Load `folder` in another process with nothing but transformers, and compare logits and perplexity on a probe.

    Raises:
        ParityError: it does not load, or gives other logits.
    """
    return compared(folder, probed(model, tokenizer), str(model.dtype).removeprefix("torch."), str(model.device))


def compared(folder: Path, wanted: Probed, dtype: str, device: str) -> Parity:
    """How a model and what a fresh process loads from `folder` compare.

    Args:
        dtype: to load in; `auto` for that of the configuration.

    Raises:
        ParityError: it does not load, or gives other logits.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "ids.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"ids": wanted.ids.cpu()}, given)
        load_in_fresh_process(folder, dtype, device, given, found)
        logits = load_file(found)["logits"].to(wanted.logits.device)
    if logits.dtype != wanted.logits.dtype:
        raise ParityError(f"the checkpoint just written computes {logits.dtype}, not {wanted.logits.dtype}; removed")
    difference = checked_difference(wanted.logits, logits)
    before, after = _perplexity(wanted.logits, wanted.ids), _perplexity(logits, wanted.ids)
    return Parity(difference, before, after, wanted.ids.shape[1], wanted.text)


def load_in_fresh_process(folder: Path, dtype: str, device: str, *files: Path) -> None:
    """Run `reload_process.py`; with the device `meta` and no files only names, shapes and ties are looked at.

    Raises:
        ParityError: the folder does not load.
    """
    # a class that comes with the checkpoint must load from there
    trust = "trust" if "auto_map" in json.loads((folder / "config.json").read_text()) else "plain"
    command = [sys.executable, "-P", SCRIPT, folder, dtype, device, trust, *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise ParityError(
            f"the checkpoint just written does not load in a fresh process, so it was removed: {last_words(done)}"
        )


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed: the last line of its errors, or how it ended."""
    said = done.stderr.strip().splitlines()
    return said[-1] if said else f"exit code {done.returncode}"


def verify_reload(folder: Path, model: PreTrainedModel) -> float:
    """Load `folder` with transformers' AutoModel and return the largest difference of logits from `model`.

    Raises:
        ParityError: it does not load, or the difference is more than rounding.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=is_remote(model))
        again.to(model.device).eval()
    except Exception as error:  # whatever the class raises, the user must not be left with this folder
        raise ParityError(f"the checkpoint just written does not load: {first_line(error)}") from error
    return check_same_logits(model, again)


def check_same_logits(model: PreTrainedModel, again: PreTrainedModel) -> float:
    """The largest difference of logits between a model and what was loaded from its folder.

    Raises:
        ParityError: it is more than rounding.
    """
    ids, _ = probe(model, None)
    return checked_difference(_logits(model, ids), _logits(again, ids))


def logit_difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """The largest difference of logits between a model and another form of it, in which sums run in another order."""
    ids, _ = probe(model, None)
    return float((_logits(other, ids) - _logits(model, ids)).abs().max())


def checked_difference(wanted: Tensor, logits: Tensor) -> float:
    """The largest difference of logits.

    Raises:
        ParityError: it is more than rounding.
    """
    difference = float((logits - wanted).abs().max())
    if not difference <= PARITY_TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise ParityError(f"the checkpoint just written gives other logits (difference {difference:.2g}); removed")
    return difference


def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Tensor, str]:
    """Token ids [1, length] and what they are; no longer than the model's positions."""
    length = min(PROBE_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROBE_TOKENS)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None:
        text = "\n".join(load_corpus(PROBE_TEXT, limit=20).texts)
        found = tokenizer(text, return_tensors="pt", truncation=True, max_length=length).input_ids
        if found.shape[1] > 1 and int(found.max()) < vocabulary:
            return found.to(model.device), f"the first tokens of {PROBE_TEXT}"
    return torch.arange(length, device=model.device).remainder(vocabulary)[None], "consecutive token ids"


def probed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Probed:
    """The probe and the model's logits on it."""
    ids, text = probe(model, tokenizer)
    return Probed(ids, text, _logits(model, ids))


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [1, length, vocab] in evaluation mode."""
    training = model.training
    try:
        with torch.no_grad():
            logits: Tensor = model.eval()(ids, use_cache=False).logits
    finally:
        model.train(training)
    return logits


def _perplexity(logits: Tensor, ids: Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:])
    return float(loss.exp())
