"""The section of a recipe on recovery, and on what else trains: its settings, defaults, and what goes with what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from secateur.config.sections import Section


class DistillSettings(Section):
    """Learning from the dense model beside the text; see `recovery.settings.Distillation`.

    `distill: true` takes all defaults.
    """

    weight: float = Field(0.9, gt=0, le=1)
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    hidden: float = Field(0.0, ge=0)
    cache: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _all_defaults(cls, data: Any) -> Any:
        return {} if data is True else data

    @model_validator(mode="after")
    def _what_a_cache_holds(self) -> DistillSettings:
        if self.cache is not None and self.hidden:
            raise ValueError("a teacher cache holds no hidden states: leave out hidden (--distill-hidden) or the cache")
        if self.cache is not None and not self.top_k:
            raise ValueError("a teacher cache of whole distributions would be huge: give top_k (--distill-top-k 64)")
        return self


class RecoverSettings(Section):
    """Recovery with LoRA, or of all weights (`full_weights`), from the text or from the dense model, too (`distill`).

    Defaults are LLM-Pruner's published recipe (LLaMA-7B on alpaca-cleaned). `dense` names the model that a dynamic mix
    compares with and that is distilled, if it is not the one that the checkpoint says it was cut from.
    """

    data: tuple[str, ...] = ("alpaca",)
    field: str | None = None
    mix: Literal["proportional", "uniform", "dynamic"] = "proportional"
    dense: str | None = None
    round_steps: int | None = Field(None, ge=1)
    balance: float = Field(0.5, ge=0, le=1)
    patience: int = Field(2, ge=0)
    rank: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[str, ...] | None = None
    also_train: tuple[Literal["norms", "embeddings"], ...] = ()
    learning_rate: float = Field(1e-4, gt=0)
    epochs: float = Field(2.0, gt=0)
    steps: int | None = Field(None, ge=1)
    batch_size: int = Field(64, ge=1)
    micro_batch_size: int = Field(4, ge=1)
    seq_len: int = Field(256, ge=2)
    warmup_steps: int = Field(100, ge=0)
    train_on_inputs: bool = False
    eval_every: int | None = Field(None, ge=1)
    save_every: int = Field(200, ge=1)
    gradient_checkpointing: bool = False
    full_weights: bool = False
    distill: DistillSettings | None = None
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    @property
    def wants_dense(self) -> bool:
        """Whether the dense model has a use."""
        return self.mix == "dynamic" or self.distill is not None

    @model_validator(mode="before")
    @classmethod
    def _no_distillation(cls, data: Any) -> Any:
        return data | {"distill": None} if isinstance(data, dict) and data.get("distill") is False else data

    @model_validator(mode="after")
    def _adapters_or_not(self) -> RecoverSettings:
        for name in ("rank", "alpha", "dropout", "targets", "also_train") if self.full_weights else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for adapters, and full_weights trains none: leave out one of the two")
        return self

    @model_validator(mode="after")
    def _fits_the_mix(self) -> RecoverSettings:
        if self.mix != "proportional" and len(self.data) < 2:
            raise ValueError(f"a {self.mix} mix needs two sources or more in data (--data a --data b)")
        without_use = {"proportional": ("dense", "balance", "patience", "round_steps"),
                       "uniform": ("dense", "balance", "patience"), "dynamic": ()}  # fmt: skip
        for name in without_use[self.mix]:
            if name == "dense" and self.wants_dense:
                continue
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"a {self.mix} mix has no use for {name}: leave it out, or choose another --mix")
        return self
