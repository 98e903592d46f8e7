"""What a report reads of a results file: the keys of `results.json` and of --json files, checked, all else ignored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Command = Literal["prune", "recover", "tune", "run", "eval", "bench", "analyze", "export"]


class Facts(BaseModel):
    """A part of a results file. Numbers are finite; keys that are not named here are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Source(Facts):
    """The model that a step began with."""

    source: str
    sha256: str | None = None
    architecture: str | None = None


class Text(Facts):
    """Perplexities of one text, by stage; `value` where there is one model only (`secateur eval`)."""

    text: str
    text_sha256: str
    tokens: int
    seq_len: int
    stride: int | None = None
    bos: bool = False
    dtype: str | None = None
    dense: float | None = None
    adapted: float | None = None
    pruned: float | None = None
    quantised: float | None = None
    recovered: float | None = None
    tuned: float | None = None
    value: float | None = None

    def at(self, stage: str) -> float | None:
        """The perplexity of a stage, None if it was not measured."""
        found: float | None = getattr(self, stage, None)
        return found


class Width(Facts):
    """How many units of a group stay; of layers, `which`."""

    group: str
    kind: str
    layer: int | None
    units: int
    kept: int
    which: str | None = None


class Importance(Facts):
    """How the scores of a group's units were spread in the uncut model."""

    group: str
    kind: str
    layer: int | None
    mean: float
    least: float
    q1: float
    median: float
    q3: float
    most: float


class Share(Facts):
    """What went of a kind."""

    asked: float | None
    units: int
    removed: int
    share: float
    parameters: int


class Cost(Facts):
    """What a budget counted that was not of parameters: of a pass over `batch` sequences of `length` tokens."""

    what: Literal["macs", "memory", "latency"]
    batch: int
    length: int
    sparsity: float
    dense: float
    pruned: float


class Samples(Facts):
    """What each stage makes of the prompts."""

    prompts: tuple[str, ...]
    new_tokens: int
    decoding: str
    continuations: dict[str, tuple[str, ...]]


class Hashed(Facts):
    """A text that something was trained or scored on."""

    source: str
    sha256: str | None = None
    samples: int | None = None
    seq_len: int | None = None


class Training(Facts):
    """A training: its settings, data, log, and what changed on the way."""

    settings: dict[str, Any] = {}
    data: tuple[Hashed, ...] = ()
    log: tuple[dict[str, Any], ...] = ()
    mix: dict[str, Any] | None = None
    sparsity: tuple[dict[str, float], ...] = ()
    ranks: tuple[dict[str, Any], ...] = ()

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, loss in nats per token), as logged."""
        return [(int(row["step"]), float(row["loss"])) for row in self.log if "loss" in row and "step" in row]


class Spread(Facts):
    """Repeated timings [seconds]."""

    median: float
    q1: float
    q3: float


class Measurement(Facts):
    """One model's cost, as `benchmark.Measurement`."""

    parameters: int
    weight_bytes: int
    prefill_macs: int
    prefill_s: Spread
    prefill_tokens_per_s: float
    decode_s: Spread
    decode_tokens_per_s: float
    peak_memory_bytes: int | None = None


class Benchmark(Facts):
    """The cost of a model and of the one it is compared with."""

    model: Measurement
    against: Measurement | None = None
    ratios: dict[str, float] | None = None
    protocol: dict[str, Any] = {}


class Protocol(Facts):
    """What figures depend on."""

    seed: int | None = None
    dtype: str | None = None
    device: str | None = None
    quantised: str | None = None
    versions: dict[str, str] = {}
    method: str | None = None
    settings: dict[str, Any] = {}
    calibration: Hashed | None = None
    tasks: dict[str, Any] | None = None
    knowledge: dict[str, Any] | None = None


class Results(Facts):
    """A results file."""

    schema_: Literal[1] = Field(alias="schema")
    command: Command
    model: Source
    method: str | None = None
    protocol: Protocol = Protocol()
    params: dict[str, float] = {}
    perplexity: dict[str, Text] = {}
    macs: dict[str, int] = {}
    tasks: dict[str, Any] = {}
    tasks_average: dict[str, Any] = {}
    benchmark: Benchmark | None = None
    samples: Samples | None = None
    kinds: dict[str, Share] = {}
    choice: dict[str, Any] | None = None
    cost: Cost | None = None
    tradeoff: tuple[tuple[float, float], ...] = ()
    widths: tuple[Width, ...] = ()
    importance: tuple[Importance, ...] = ()
    left_whole: dict[str, str] = {}
    training: Training | None = None
    recovery: Training | None = None
    ranks: dict[str, int] = {}
    knowledge: dict[str, Any] | None = None
    most_sensitive: tuple[str, ...] = ()
    masked_minus_cut: float | None = None
    parity: dict[str, Any] | None = None
    parity_reason: str | None = None
    tier: dict[str, Any] | None = None
    timing: dict[str, float] = {}
    memory: dict[str, int | None] = {}
    recipe: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    before: Results | None = None
