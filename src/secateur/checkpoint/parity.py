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


def verify_in_fresh_process(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> Parity:
    """Load `folder` in another process with nothing but transformers, and compare logits and perplexity on a probe.

    Raises:
        ParityError: it does not load, or gives other logits.
    """
    ids, text = probe(model, tokenizer)
    wanted = _logits(model, ids)
    # a class that comes with the checkpoint must load from there
    trust = "trust" if "auto_map" in json.loads((folder / "config.json").read_text()) else "plain"
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "ids.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"ids": ids.cpu()}, given)
        facts = (str(model.dtype).removeprefix("torch."), str(model.device), trust)
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), str(folder), str(given), str(found), *facts],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise ParityError(
                f"the checkpoint just written does not load in a fresh process, so it was removed: "
                f"{said[-1] if said else f'exit code {done.returncode}'}"
            )
        logits = load_file(found)["logits"].to(wanted.device)
    difference = _checked_difference(wanted, logits)
    return Parity(difference, _perplexity(wanted, ids), _perplexity(logits, ids), ids.shape[1], text)


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
    return _checked_difference(_logits(model, ids), _logits(again, ids))


def logit_difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """The largest difference of logits between a model and another form of it, in which sums run in another order."""
    ids, _ = probe(model, None)
    return float((_logits(other, ids) - _logits(model, ids)).abs().max())


def _checked_difference(wanted: Tensor, logits: Tensor) -> float:
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
