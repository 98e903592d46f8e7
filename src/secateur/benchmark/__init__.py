"""What a model costs to run: parameters, multiply-accumulates, weight memory, latency and speed, next to a second one.

Measuring two models in one process, turn by turn, is what makes their ratio mean something: the machine, its load and
the versions are the same for both.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from secateur.benchmark.clock import now
from secateur.benchmark.macs import count_macs
from secateur.errors import DataError, first_line
from secateur.packed import refuse_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Benchmark", "Measurement", "Spread", "bench", "count_macs"]

SHOW_PROGRESS_FROM = 3.0  # seconds of expected work
PACKAGES = ("secateur", "torch", "transformers")


@dataclass(frozen=True)
class Spread:
    """Repeated timings of one thing [seconds].

    Attributes:
        median: of the repetitions.
        q1: first quartile.
        q3: third quartile; q3 - q1 is the interquartile range.
    """

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        q1, median, q3 = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
        return cls(median, q1, q3)


@dataclass(frozen=True)
class Measurement:
    """One model's figures.

    Attributes:
        parameters: all parameters, tied ones once.
        non_embedding_parameters: without embedding tables (and a head tied to one).
        weight_bytes: memory of parameters and buffers.
        prefill_macs: multiply-accumulates of one prompt of the protocol's length; see `count_macs`.
        macs_per_token: the same per prompt token.
        prefill_s: time of one forward pass over the batch of prompts, logits of all positions included.
        prefill_tokens_per_s: prompt tokens of the batch by the median of that time.
        decode_s: time from one generated token to the next, mean over a generation; with KV cache if `kv_cache`.
        decode_tokens_per_s: sequences of the batch by the median of that time.
        peak_memory_bytes: weights, and the most that a repetition needed on top; None on a CPU.
        dtype: of the weights.
        kv_cache: whether generation kept a cache; not for classes that transformers cannot make one for, which read
            the whole text again for every token.
    """

    parameters: int
    non_embedding_parameters: int
    weight_bytes: int
    prefill_macs: int
    macs_per_token: float
    prefill_s: Spread
    prefill_tokens_per_s: float
    decode_s: Spread
    decode_tokens_per_s: float
    peak_memory_bytes: int | None
    dtype: str
    kv_cache: bool = True


@dataclass(frozen=True)
class Benchmark:
    """The figures of a model, of the one it is compared with, and how they came about.

    Attributes:
        model: the model's figures.
        against: the other model's.
        ratios: model / against for every figure; for times the median of the ratios of paired repetitions.
        protocol: prompt length, new tokens, batch size, repetitions, device, threads, versions.
    """

    model: Measurement
    against: Measurement | None
    ratios: dict[str, float] | None
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    model: PreTrainedModel,
    *,
    against: PreTrainedModel | None = None,
    prompt_length: int = 128,
    new_tokens: int = 32,
    batch_size: int = 1,
    repetitions: int = 7,
    warmup: int = 2,
    seed: int = 0,
) -> Benchmark:
    """Measure a model, and another one in turn with it.

    Prompts are random tokens, the same for both models; decoding is greedy and runs to `new_tokens` whatever comes.
    Accelerators are waited for before each reading of the clock.

    Args:
        against: the model to compare with, as a rule the dense one, on the same device.
        prompt_length: tokens per prompt.
        new_tokens: tokens to generate, at least 2.
        batch_size: sequences at a time.
        repetitions: timed runs; medians and quartiles are over these.
        warmup: runs that are not counted.
        seed: of the prompts.

    Raises:
        DataError: a length or number is too small, prompt and new tokens exceed a model's positions, a model cannot
            generate, the models are on different devices, or weights are quantised.
    """
    models = [model] if against is None else [model, against]
    _check(models, prompt_length, new_tokens, batch_size, repetitions, warmup)
    vocabulary = min(m.config.get_text_config().vocab_size for m in models)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(vocabulary, (batch_size, prompt_length), generator=generator).to(model.device)
    with _evaluating(models):
        times = _timed(models, prompts, new_tokens, repetitions, warmup)
    found = [_measurement(m, prompts, t) for m, t in zip(models, times, strict=True)]
    protocol = {
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repetitions": repetitions,
        "warmup": warmup,
        "seed": seed,
        "device": _device_name(model.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
    if against is None:
        return Benchmark(found[0], None, None, protocol)
    return Benchmark(found[0], found[1], _ratios(found[0], found[1], times), protocol)


@dataclass
class _Times:
    """What was read off one model.

    Attributes:
        prefill: seconds of each repetition.
        decode: seconds per token of each repetition.
        extra_memory: the most that any repetition took on top of what was there before [bytes]; None on a CPU.
        kv_cache: whether generations kept a cache.
    """

    prefill: list[float]
    decode: list[float]
    extra_memory: int | None = None
    kv_cache: bool = True


def _check(
    models: Sequence[PreTrainedModel],
    prompt_length: int,
    new_tokens: int,
    batch_size: int,
    repetitions: int,
    warmup: int,
) -> None:
    if min(prompt_length, batch_size, repetitions) < 1 or new_tokens < 2 or warmup < 0:
        raise DataError(
            f"cannot measure prompts of {prompt_length} tokens and {new_tokens} new ones in batches of {batch_size}, "
            f"{repetitions} times after {warmup} runs to warm up: at least 1, 2, 1, 1 and 0 are needed"
        )
    for model in models:
        refuse_packed(model, "counted: the memory they take is not what their tensors say", DataError)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and prompt_length + new_tokens > positions:
            raise DataError(
                f"a prompt of {prompt_length} tokens and {new_tokens} new ones exceed the model's {positions} positions"
            )
    if len({model.device for model in models}) > 1:
        raise DataError(f"the models are on {' and '.join(str(m.device) for m in models)}; load both on one device")


def _timed(
    models: Sequence[PreTrainedModel], prompts: Tensor, new_tokens: int, repetitions: int, warmup: int
) -> list[_Times]:
    """Run the models in turn; the one that begins changes, so that neither always has the warmer machine."""
    times = [_Times([], []) for _ in models]
    begun = time.perf_counter()
    for _ in range(warmup):
        for model in models:
            _run_once(model, prompts, new_tokens, _Times([], []))
    expected = (time.perf_counter() - begun) / max(warmup, 1) * repetitions
    for repetition in track(
        range(repetitions), "benchmark", console=Console(stderr=True), disable=expected < SHOW_PROGRESS_FROM
    ):
        turn = list(zip(models, times, strict=True))
        for model, seen in turn if repetition % 2 == 0 else reversed(turn):
            _run_once(model, prompts, new_tokens, seen)
    return times


def _run_once(model: PreTrainedModel, prompts: Tensor, new_tokens: int, seen: _Times) -> None:
    """Time one prefill and one generation, and note them in `seen`."""
    device = prompts.device
    memory = torch.get_device_module(device)
    has_peak = hasattr(memory, "reset_peak_memory_stats")
    before = memory.memory_allocated(device) if has_peak else 0
    if has_peak:
        memory.reset_peak_memory_stats(device)
    begun = now(device)
    model(prompts, use_cache=True)
    seen.prefill.append(now(device) - begun)
    clock = _generate(model, prompts, new_tokens, seen)
    seen.decode.append((clock.stamps[-1] - clock.stamps[0]) / (len(clock.stamps) - 1))
    if has_peak:
        seen.extra_memory = max(seen.extra_memory or 0, memory.max_memory_allocated(device) - before)


def _generate(model: PreTrainedModel, prompts: Tensor, new_tokens: int, seen: _Times) -> _TokenClock:
    """When each token of a greedy generation was there; whether it kept a cache is noted in `seen`."""
    for use_cache in (True, False):
        clock, seen.kv_cache = _TokenClock(), use_cache
        try:
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                num_beams=1,
                use_cache=use_cache,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
            return clock
        except (AttributeError, TypeError, ValueError) as error:  # what transformers needs of a class, some lack
            reason = first_line(error)
    raise DataError(f"{type(model).__name__} cannot generate, so its speed cannot be measured: {reason}")


class _TokenClock(StoppingCriteria):  # type: ignore[misc]
    """Never stops a generation; notes when each token was there."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.stamps.append(now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _measurement(model: PreTrainedModel, prompts: Tensor, times: _Times) -> Measurement:
    sequences, length = prompts.shape
    macs = count_macs(model, length)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    prefill, decode = Spread.of(times.prefill), Spread.of(times.decode)
    return Measurement(
        parameters=model.num_parameters(),
        non_embedding_parameters=model.num_parameters(exclude_embeddings=True),
        weight_bytes=weights,
        prefill_macs=macs,
        macs_per_token=macs / length,
        prefill_s=prefill,
        prefill_tokens_per_s=sequences * length / prefill.median,
        decode_s=decode,
        decode_tokens_per_s=sequences / decode.median,
        peak_memory_bytes=None if times.extra_memory is None else weights + times.extra_memory,
        dtype=str(model.dtype).removeprefix("torch."),
        kv_cache=times.kv_cache,
    )


def _ratios(model: Measurement, against: Measurement, times: Sequence[_Times]) -> dict[str, float]:
    """model / against. The two timings of a repetition lie side by side, so load that drifts cancels in their ratio."""
    found: dict[str, float] = {}
    for figure, value in asdict(model).items():
        other = getattr(against, figure)
        if isinstance(value, int | float) and not isinstance(value, bool) and other:
            found[figure] = value / other
    pairs = {"prefill": [t.prefill for t in times], "decode": [t.decode for t in times]}
    for name, (mine, theirs) in pairs.items():
        found[f"{name}_s"] = float(np.median(np.array(mine) / np.array(theirs)))
        found[f"{name}_tokens_per_s"] = 1 / found[f"{name}_s"]
    return found


@contextmanager
def _evaluating(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Evaluation mode without gradients; the models' own mode afterwards."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.processor() or platform.machine()
    name = getattr(torch.get_device_module(device), "get_device_name", lambda _: device.type)
    return str(name(device))
