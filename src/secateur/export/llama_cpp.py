"""Whether llama.cpp computes from a GGUF file what transformers computes from the model.

The model runs in float32 in both, except for what the file rounds. With an F32 file what remains is the order of sums
(2e-5 nats measured) and, in models with GELU, that llama.cpp looks it up in a table of float16 (5e-4 in 2 layers, 5e-3
in 46; the same rounding in transformers changes as much). In other files weights are rounded, and llama.cpp rounds what
they are multiplied with to the same type.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROCESS = Path(__file__).with_name("llama_cpp_process.py")
TOP = 512  # log-probabilities compared at each position
NEW_TOKENS = 16
# Mean difference of log-probabilities [nats] that the type of a file explains. Measured on the bundled model: f32 3e-6,
# f16 5e-4, bf16 4e-3, q8_0 0.02; up to 8e-4 in f32 with 46 layers of GELU. The largest difference says less: rounding
# can send a token to another expert. Check a layout with f32, which leaves no room for errors.
TOLERANCE = {"f32": 1e-3, "f16": 0.01, "bf16": 0.05, "q8_0": 0.25}
TIMEOUT = 600  # seconds
NOT_VERIFIED = "the file was not verified: llama.cpp is not installed here (pip install xllamacpp)"


@dataclass(frozen=True)
class LlamaCppParity:
    """How far llama.cpp is from transformers.

    Attributes:
        max_difference: largest difference of a log-probability [nats], over the most likely tokens of each position.
        mean_difference: their mean.
        positions: how many were compared: the prompt and its continuation.
        same_greedy: whether both continue the prompt with the same most likely tokens.
        continuation: llama.cpp's.
    """

    max_difference: float
    mean_difference: float
    positions: int
    same_greedy: bool
    continuation: tuple[int, ...]

    def agrees(self, dtype: str) -> bool:
        """Whether the mean difference is no more than the rounding of a file of this type."""
        return self.mean_difference <= TOLERANCE[dtype]


def available() -> bool:
    """Whether llama.cpp can be run."""
    return importlib.util.find_spec("xllamacpp") is not None


def compare(
    path: Path | str, model: PreTrainedModel, token_ids: Sequence[int], *, new_tokens: int = NEW_TOKENS
) -> LlamaCppParity:
    """Run a GGUF file in llama.cpp, and compare it with the model it was made from.

    Args:
        token_ids: of a prompt; each position predicts a next token.
        new_tokens: length of the greedy continuation.

    Raises:
        CheckpointError: llama.cpp is not installed, does not load the file, or crashes.
    """
    top = min(TOP, model.get_input_embeddings().weight.shape[0])
    request = {"path": str(path), "prompt": list(token_ids), "new_tokens": new_tokens, "top": top, "texts": []}
    rows = _run(request)["rows"]
    continuation = [row[0][0] for row in rows[len(token_ids) - 1 : -1]]
    wanted = _log_probabilities(model, [*token_ids, *continuation])
    differences = torch.stack(
        [(wanted[i, [t for t, _ in row]] - torch.tensor([p for _, p in row])).abs() for i, row in enumerate(rows)]
    )
    greedy = wanted[len(token_ids) - 1 : -1].argmax(-1).tolist()
    return LlamaCppParity(
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
        positions=len(rows),
        same_greedy=greedy == continuation,
        continuation=tuple(continuation),
    )


def tokenize(path: Path | str, texts: Sequence[str]) -> list[list[int]]:
    """Token ids that llama.cpp makes of texts with the tokenizer in a GGUF file.

    Raises:
        CheckpointError: llama.cpp is not installed, does not load the file, or crashes.
    """
    request = {"path": str(path), "prompt": [], "new_tokens": 0, "top": 0, "texts": list(texts)}
    tokens: list[list[int]] = _run(request)["tokens"]
    return tokens


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Ask a fresh process, so that a crash of llama.cpp is an error message and not ours."""
    if not available():
        raise CheckpointError(NOT_VERIFIED)
    command = [sys.executable, "-P", str(PROCESS)]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"llama.cpp did not answer within {TIMEOUT} s for {request['path']}") from error
    if done.returncode != 0:
        raise CheckpointError(f"llama.cpp cannot run {request['path']}: {_reason(done)}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line of llama.cpp's output that says what went wrong."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    return (telling or lines or [f"it ended with code {done.returncode}"])[0]


def _log_probabilities(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """(positions, vocabulary) in float32, whatever the model's dtype."""
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    training = exact.training
    with torch.no_grad():
        logits = exact.eval()(torch.tensor([token_ids], device=exact.device), use_cache=False).logits[0]
    exact.train(training)
    log_probabilities: torch.Tensor = logits.float().log_softmax(-1).cpu()
    return log_probabilities
