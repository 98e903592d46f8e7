"""In which forms a model can be saved, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from secateur.benchmark.macs import count_macs
from secateur.errors import SecateurError
from secateur.surgery import pad
from secateur.surgery.per_layer import is_per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_LENGTH = 128  # tokens of the forward pass whose MACs are counted
ANYWHERE = "any loader"
BUNDLED = "trust_remote_code, or import secateur"


@dataclass(frozen=True)
class Tier:
    """One form that the model can take.

    Attributes:
        name: uniform, per-layer or padded.
        parameters: zeros of padding included; tied ones counted once.
        bytes: of the weights.
        macs: multiply-accumulates of a forward pass over one prompt of `prompt_length` tokens.
        loads_with: who can load it.
        reason: why the model cannot take this form; the figures are None then.
    """

    name: str
    parameters: int | None
    bytes: int | None
    macs: int | None
    loads_with: str
    reason: str = ""
    prompt_length: int = PROMPT_LENGTH

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def tiers(model: PreTrainedModel) -> tuple[Tier, ...]:
    """Every form the model can take at no loss, the plainest first, and why it cannot take the others."""
    if not is_per_layer(model):
        return (_tier("uniform", lambda: model, ANYWHERE),)
    return (
        Tier("uniform", None, None, None, ANYWHERE, "layers differ in width, so more would have to go"),
        _tier("per-layer", lambda: model, BUNDLED),
        _tier("padded", lambda: pad(model), ANYWHERE),
    )


def plainest(found: tuple[Tier, ...]) -> Tier:
    """The first form that loses nothing: no parameters beyond those of the smallest."""
    possible = [tier for tier in found if tier.parameters is not None]
    return min(possible, key=lambda tier: tier.parameters or 0)


def _tier(name: str, made: Callable[[], PreTrainedModel], loads_with: str) -> Tier:
    try:
        model = made()
    except SecateurError as error:
        return Tier(name, None, None, None, loads_with, str(error))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Tier(name, model.num_parameters(), size, count_macs(model, PROMPT_LENGTH), loads_with)
