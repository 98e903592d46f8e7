"""Whether llama.cpp computes from a GGUF file what transformers computes from the model.

The model runs in float32 in both, except for what the file rounds. With an F32 file what remains is the order of sums
(2e-5 nats measured) and, in models with GELU, that llama.cpp looks it up in a table of float16 (5e-4 in 2 layers, 5e-3
in 46; the same rounding in transformers changes as much). In other files weights are rounded, and llama.cpp rounds what
they are multiplied with to the same type.

Rounding may make another token the most likely one where two are about as likely. How far the likeliest two may be
apart for that is told by `NEAR_TIE`, and where a model is more sensitive than that (rounding can send a token to
another expert), by what the same rounding of the weights does in transformers.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
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
# Most nats that the two likeliest tokens may be apart to swap, as a multiple of that mean. The largest differences
# measured are up to 13 times the measured mean (f16 5e-3, bf16 0.06, q8_0 0.3; f32 with 46 layers of GELU 5e-3), two
# tokens may move against each other, and the means allowed are more than what was measured.
NEAR_TIE = 10
TIMEOUT = 600  # seconds
NOT_VERIFIED = "the file was not verified: llama.cpp is not installed here (pip install xllamacpp)"


@dataclass(frozen=True)
class LlamaCppParity:
    """How far llama.cpp is from transformers.

    Attributes:
        max_difference: largest difference of a log-probability [nats], over the most likely tokens of each position.
        mean_difference: their mean.
        positions: how many were compared: the prompt and its continuation.
        perplexity_before: of the prompt, with transformers in float32.
        perplexity_after: the same, with llama.cpp.
        tokens: length of the prompt.
        same_greedy: whether both continue the prompt with the same most likely tokens.
        greedy_gap: how much likelier, at most, transformers finds its own most likely token than llama.cpp's [nats].
        rounding: how far the log-probabilities of transformers move if its weights are rounded like those of the file
            [nats]; looked at only if tokens differ.
        continuation: llama.cpp's.
    """

    max_difference: float
    mean_difference: float
    positions: int
    perplexity_before: float
    perplexity_after: float
    tokens: int
    same_greedy: bool
    greedy_gap: float
    rounding: float
    continuation: tuple[int, ...]

    def disagreement(self, dtype: str) -> str | None:
        """What differs by more than the rounding of a file of this type explains; None if nothing does."""
        allowed = TOLERANCE[dtype]
        if not self.mean_difference <= allowed:
            return (
                f"log-probabilities differ by {self.mean_difference:.2g} nats on average, where {dtype} explains "
                f"{allowed:g}"
            )
        if not abs(math.log(self.perplexity_after / self.perplexity_before)) <= allowed:
            return (
                f"perplexity is {self.perplexity_after:.4f} and was {self.perplexity_before:.4f}, where {dtype} "
                f"explains a factor of {math.exp(allowed):.3g}"
            )
        if self.greedy_gap > max(NEAR_TIE * allowed, 2 * self.rounding):
            return (
                f"it continues the text with another token than the most likely one, which is {self.greedy_gap:.2g} "
                f"nats likelier; {dtype} explains {max(NEAR_TIE * allowed, 2 * self.rounding):.2g}"
            )
        return None

    def agrees(self, dtype: str) -> bool:
        """Whether all differences are no more than the rounding of a file of this type."""
        return self.disagreement(dtype) is None


def available() -> bool:
    """Whether llama.cpp can be run."""
    return importlib.util.find_spec("xllamacpp") is not None


def compare(
    path: Path | str,
    model: PreTrainedModel,
    token_ids: Sequence[int],
    dtype: str = "f32",
    *,
    new_tokens: int = NEW_TOKENS,
) -> LlamaCppParity:
    """Run a GGUF file in llama.cpp, and compare it with the model it was made from.

    Args:
        token_ids: of a prompt, at least two; each position predicts a next token.
        dtype: of the file.
        new_tokens: length of the greedy continuation.

    Raises:
        CheckpointError: llama.cpp is not installed, does not load the file, or crashes.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    request = {"path": str(path), "prompt": list(token_ids), "new_tokens": new_tokens, "texts": []}
    answer = _run(request | {"top": min(TOP, vocabulary), "vocabulary": vocabulary})
    rows, count = answer["rows"], len(token_ids)
    continuation = [row[0][0] for row in rows[count - 1 : -1]]
    text = [*token_ids, *continuation]
    wanted = _log_probabilities(_in_float32(model), text)
    differences = torch.stack(
        [(wanted[i, [t for t, _ in row]] - torch.tensor([p for _, p in row])).abs() for i, row in enumerate(rows)]
    )
    likeliest = wanted[count - 1 : -1].max(-1)
    same = likeliest.indices.tolist() == continuation
    chosen = wanted[range(count - 1, len(text) - 1), continuation]
    return LlamaCppParity(
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
        positions=len(rows),
        perplexity_before=math.exp(-float(wanted[range(count - 1), text[1:count]].double().mean())),
        perplexity_after=math.exp(-sum(answer["following"]) / len(answer["following"])),
        tokens=count,
        same_greedy=same,
        greedy_gap=float((likeliest.values - chosen).max()),
        rounding=0.0 if same else _rounding(model, text, wanted, dtype),
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


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    return model if model.dtype == torch.float32 else copy.deepcopy(model).float()


def _rounding(model: PreTrainedModel, token_ids: list[int], exact: torch.Tensor, dtype: str) -> float:
    """The largest change of a likely token's log-probability if the model's matrices are rounded to a type of GGUF."""
    import gguf

    kind = gguf.GGMLQuantizationType[dtype.upper()]
    rounded = copy.deepcopy(model).float()
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dim() > 1 and parameter.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
                stored = gguf.quantize(parameter.detach().cpu().numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.dequantize(stored, kind)))
    moved = (_log_probabilities(rounded, token_ids) - exact).abs()
    likely = exact.topk(min(TOP, exact.shape[-1])).indices
    return float(moved.gather(-1, likely).max())


def _log_probabilities(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """(positions, vocabulary) in float32."""
    training = model.training
    with torch.no_grad():
        logits = model.eval()(torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]
    model.train(training)
    log_probabilities: torch.Tensor = logits.float().log_softmax(-1).cpu()
    return log_probabilities
