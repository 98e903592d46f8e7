"""The sections of a recipe: their settings, defaults, and what goes with what."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from secateur.errors import EvaluationError
from secateur.groups import OFFERED_KINDS

# Beginnings that every evaluated stage of a run continues, for readers of its report.
PROMPTS = ("The old man opened the door and", "In the morning she went to", "Water is made of")


def _known_kind(name: str) -> str:
    if name not in OFFERED_KINDS:
        near = difflib.get_close_matches(name, OFFERED_KINDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{name!r} is no kind of unit{hint}; there are {', '.join(OFFERED_KINDS)}")
    return name


Kind = Annotated[str, AfterValidator(_known_kind)]


def _known_task(name: str) -> str:
    from secateur.evaluation.tasks import task_named

    try:
        return task_named(name).name
    except EvaluationError as error:
        raise ValueError(str(error)) from error


TaskName = Annotated[str, AfterValidator(_known_task)]


class Section(BaseModel):
    """A frozen part of a recipe that knows all its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """Which checkpoint, and how to load it."""

    source: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    trust_remote_code: bool = False
    quantize: Literal["8bit", "4bit", "int8"] | None = None


class MethodSettings(Section):
    """Which method, and what only methods know that prune while they train (on the data of `recovery`).

    What is not given is as the method itself has it. `method: lorashear` is short for `method: {name: lorashear}`.
    """

    name: Literal["auto", "llm-pruner", "loraprune", "lorashear"] = "auto"
    variant: Literal["lora", "grad", "magnitude"] | None = None
    normalise: bool | None = None
    ema: float | None = Field(None, ge=0, lt=1)
    frequency: int | None = Field(None, ge=1)
    initial: float | None = Field(None, ge=0, lt=1)
    warmup: float | None = Field(None, ge=0, lt=1)
    cooldown: float | None = Field(None, ge=0, lt=1)
    compact_every: int | None = Field(None, ge=1)
    push: Literal["half-space", "linear"] | None = None
    proxies: tuple[Literal["magnitude", "cosine", "first", "second", "guided"], ...] | None = Field(None, min_length=1)
    merge: bool | None = None
    periods: int | None = Field(None, ge=1)
    epsilon: float | None = Field(None, ge=0, lt=1)

    @property
    def trains(self) -> bool:
        """Whether the method prunes while it trains."""
        return self.name in METHOD_OPTIONS

    @property
    def given(self) -> dict[str, Any]:
        """The options that are given."""
        return self.model_dump(exclude={"name"}, exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _options_of_the_method(self) -> MethodSettings:
        known = METHOD_OPTIONS.get(self.name, ())
        for name in self.given:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has no options here"
                raise ValueError(f"{self.name} has no use for {name}: {has}")
        return self


AUTO = "auto"  # ours, the default
METHOD_OPTIONS: Mapping[str, Sequence[str]] = {
    "loraprune": ("variant", "normalise", "ema", "frequency", "initial", "warmup", "cooldown", "compact_every"),
    "lorashear": ("push", "proxies", "merge", "periods", "warmup", "cooldown", "epsilon"),
}


COSTS: Mapping[str, Literal["macs", "memory", "latency"]] = {
    "mac_sparsity": "macs", "memory_sparsity": "memory", "latency_sparsity": "latency",
}  # fmt: skip
BUDGETS = ("param_sparsity", "unit_sparsity", *COSTS)
# by what it is a share of
BUDGET_OF: Mapping[str, str] = {"params": "param_sparsity"} | {str(what): name for name, what in COSTS.items()}


class CalibrationSettings(Section):
    """Text the scores are measured on; LLM-Pruner takes 10 crops of 64 tokens of BookCorpus."""

    source: str = "bookcorpus"
    field: str | None = None
    samples: int = Field(10, ge=1)
    seq_len: int = Field(64, ge=2)


class WorkloadSettings(Section):
    """The forward pass whose multiply-accumulates, memory or latency a budget counts."""

    batch: int = Field(1, ge=1)
    length: int = Field(128, ge=1)


class PruneSettings(Section):
    """What to remove, and how to choose it.

    A budget is a share of the parameters, of units, or of what a `workload` costs. Of the groups in `knowledge`, a file
    that `secateur analyze` wrote, the worst `protect_share` is left whole. With `compensate`, matrices that read what
    goes make up for it on the calibration text (`secateur.compensation`). With `reselect`, units are chosen again block
    by block, in the model as it is cut and compensated before each. Where the model recovers after the cut, `adapt` is
    the share of these steps that train it before.
    """

    param_sparsity: float | None = Field(None, ge=0, lt=1)
    unit_sparsity: float | None = Field(None, ge=0, lt=1)
    mac_sparsity: float | None = Field(None, ge=0, lt=1)
    memory_sparsity: float | None = Field(None, ge=0, lt=1)
    latency_sparsity: float | None = Field(None, ge=0, lt=1)
    workload: WorkloadSettings = WorkloadSettings()
    mode: Literal["block-wise", "channel-wise", "layer-wise"] = "block-wise"
    kinds: tuple[Kind, ...] = ()
    kind_ratios: dict[Kind, Annotated[float, Field(ge=0, lt=1)]] = {}
    criterion: Literal[
        "random", "l1", "l2", "taylor-vector", "taylor-1", "taylor-2", "taylor-mixed", "gate", "gate-1", "gate-mixed",
        "measured",
    ] = "taylor-1"  # fmt: skip
    reduction: Literal["sum", "mean", "max", "prod", "first"] = "sum"
    ranking: Literal["local", "global", "search"] = "local"
    iterations: int = Field(1, ge=1)
    reselect: bool = False
    gradient_checkpointing: bool = False
    adapt: float = Field(0.0, ge=0, lt=1)
    calibration: CalibrationSettings = CalibrationSettings()
    uniform: bool | None = None
    tier: Literal["auto", "uniform", "depth", "per-layer", "padded"] = "auto"
    round_to: int = Field(1, ge=1)
    protect_first: int = Field(0, ge=0)
    protect_last: int = Field(0, ge=0)
    knowledge: str | None = None
    protect_share: float | None = Field(None, ge=0, lt=1)
    layer_ratios: dict[int, float] | None = None
    layer_choice: Literal["importance", "first"] = "importance"
    quantize_output: Literal["8bit", "4bit"] | None = None
    compensate: Literal["none", "ridge", "bias"] = "none"
    compensate_target: Literal["current", "halfway", "dense"] = "current"

    @property
    def form(self) -> bool | None:
        """Whether every layer gets the same widths, by the tier if one is asked for; None if nothing is said."""
        return self.uniform if self.tier == "auto" else self.tier in ("uniform", "depth")

    @property
    def same_widths(self) -> bool:
        """`form`, of methods that do not choose themselves."""
        return self.form is not False

    @property
    def share_to_protect(self) -> float:
        """Of the groups in the knowledge file; a tenth if nothing else is said."""
        return 0.1 if self.protect_share is None else self.protect_share

    @property
    def budgets(self) -> dict[str, float]:
        """Setting -> share to remove, of those that are given."""
        given = {name: getattr(self, name) for name in BUDGETS}
        return {name: share for name, share in given.items() if share is not None}

    @property
    def counted(self) -> Literal["macs", "memory", "latency"] | None:
        """What of the workload the budget counts, if it does."""
        return next((COSTS[name] for name in self.budgets if name in COSTS), None)

    @model_validator(mode="after")
    def _one_budget(self) -> PruneSettings:
        if len(self.budgets) > 1:
            raise ValueError(f"give one of {' and '.join(self.budgets)}, not both")
        if self.counted is None and self.workload != WorkloadSettings():
            raise ValueError(f"a workload is what {', '.join(COSTS)} are shares of: give one of them, too")
        return self

    @model_validator(mode="after")
    def _gates_as_a_whole(self) -> PruneSettings:
        if self.criterion.startswith(("gate", "measured")) and self.reduction != "sum":
            raise ValueError(f"{self.criterion} scores units as a whole: leave out the reduction {self.reduction}")
        return self

    @model_validator(mode="after")
    def _target_of_something(self) -> PruneSettings:
        if self.compensate_target != "current" and self.compensate != "ridge":
            raise ValueError("compensate_target is what matrices are solved for: give compensate: ridge, too")
        return self

    @model_validator(mode="after")
    def _share_of_something(self) -> PruneSettings:
        if self.protect_share is not None and self.knowledge is None:
            raise ValueError("protect_share is a share of the groups in a knowledge file: give knowledge, too")
        return self


def with_defaults_of_auto(prune: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a section `prune` with what `auto` takes where they say nothing.

    What a cut of whole layers or of the hidden dimension has no use for stays as LLM-Pruner has it.
    """
    blocks = prune.get("mode", "block-wise") == "block-wise"
    searches = blocks and prune.get("ranking", "search") == "search"
    criterion = "measured" if searches else "taylor-2"
    defaults: dict[str, Any] = {"criterion": criterion} if "reduction" not in prune else {}
    if blocks:
        defaults |= {"ranking": "search", "compensate": "ridge"}
    found = {**defaults, **prune}
    if found.get("compensate") == "ridge":
        found.setdefault("compensate_target", "halfway")
    calibration = prune.get("calibration", {})
    if isinstance(calibration, Mapping):
        found["calibration"] = {"source": "c4", "samples": 128, "seq_len": 128, **calibration}
    return found


def recovery_of_auto(recovery: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a section `recovery` with what `auto` takes where they say nothing."""
    return dict(recovery) if recovery.get("full_weights") else {"also_train": ["norms", "embeddings"], **recovery}


class ComponentSettings(Section):
    """Which components of an adapter go, and how the others change; see `importance.components.ComponentCriterion`."""

    kind: Literal["fisher", "activation", "magnitude", "taylor", "sensitivity"] = "fisher"
    ema: float = Field(0.9, ge=0, lt=1)
    damping: float = Field(1e-2, ge=0)
    relative: bool = True
    newton: float = Field(0.0, ge=0, le=1)
    factors: Literal["cheaper", "both", "b", "a"] = "cheaper"
    joint: bool = True
    balance: bool = True
    recover: bool = True


class TuneSettings(Section):
    """PrunedLoRA: an adapter of the rank and on the data of `recovery`, pruned to `target_rank` while it trains."""

    target_rank: int = Field(ge=1)
    every: int = Field(10, ge=1)
    components: int | None = Field(None, ge=1)
    scope: Literal["adapter", "global"] = "adapter"
    floor: int = Field(1, ge=1)
    warmup: float = Field(0.1, ge=0, lt=1)
    cooldown: float = Field(0.7, ge=0, lt=1)
    keep: Literal["alpha", "scale"] = "alpha"
    criterion: ComponentSettings = ComponentSettings()


class EvaluationSettings(Section):
    """Texts to measure perplexity on, in windows of 128 as the papers do or 2048 as later work; tasks of lm-eval.

    The items of tasks come from the folder `task_data`, or from the hub; `limit` takes the first ones of each. `shots`
    examples stand in front of an item, as many as the task's definition says if not given. Where texts are
    measured, the model also continues the `prompts`, greedily.
    """

    texts: tuple[str, ...] = ()
    prompts: tuple[str, ...] = PROMPTS
    field: str | None = None
    seq_len: tuple[int, ...] = (128,)
    stride: int | None = Field(None, ge=1)
    bos: bool = False
    batch_size: int = Field(8, ge=1)
    tasks: tuple[TaskName, ...] = ()
    task_data: str | None = None
    limit: int | None = Field(None, ge=1)
    shots: int | None = Field(None, ge=0)
    allow_code_execution: bool = False

    @model_validator(mode="after")
    def _for_tasks(self) -> EvaluationSettings:
        given = [name for name in ("task_data", "limit", "shots") if getattr(self, name) is not None]
        if given and not self.tasks:
            raise ValueError(f"{given[0]} is for tasks, and none are named (tasks, --tasks)")
        return self
