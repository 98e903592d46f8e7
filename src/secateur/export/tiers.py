"""In which forms a model can be saved, and what each costs. Shapes are enough for that: weights are not looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from secateur.benchmark.macs import count_macs
from secateur.errors import SecateurError
from secateur.export import gguf, nas_layout
from secateur.export.gguf_sizes import with_stand_ins
from secateur.export.gguf_tokenizer import vocabulary
from secateur.export.vllm import STOCK_LAYOUT, layout_for
from secateur.surgery import pad
from secateur.surgery.per_layer import is_per_layer
from secateur.surgery.shapes import build_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT_LENGTH = 128  # tokens of the forward pass whose MACs are counted
CHECKPOINTS = ("uniform", "depth", "per-layer", "padded")  # what `from_pretrained` loads
ANYWHERE = "any loader"
BUNDLED = "trust_remote_code, or import secateur"
NOT_NEEDED = "not needed: all layers have the same widths"
UNEQUAL = "layers differ in width, so more would have to go"


@dataclass(frozen=True)
class Tier:
    """One form that the model can take.

    Attributes:
        name: uniform, depth (uniform with fewer layers than before), per-layer, padded, gguf or vllm.
        parameters: zeros of padding included; tied ones counted once, unless the form stores them twice.
        bytes: of the weights; of a GGUF file, of those in the type that `export` takes if none is asked for.
        macs: multiply-accumulates of a forward pass over one prompt of `prompt_length` tokens.
        loads_with: who can load it.
        reason: why the model cannot take this form, or need not; the figures are None then.
        bytes_by_type: of a GGUF file, bytes of the weights in each type.
    """

    name: str
    parameters: int | None
    bytes: int | None
    macs: int | None
    loads_with: str
    reason: str = ""
    prompt_length: int = PROMPT_LENGTH
    bytes_by_type: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def tiers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, dense_layers: int | None = None
) -> tuple[Tier, ...]:
    """Every form the model can take at no loss, the plainest first, and why it cannot take the others.

    Args:
        model: with or without weights.
        tokenizer: that a GGUF file would hold; not looked at if not given.
        dense_layers: how many layers the model had before it was pruned.
    """
    plain = "depth" if (layers_of(model) or 0) < (dense_layers or 0) else "uniform"
    if not is_per_layer(model):
        own = _tier(plain, lambda: model, ANYWHERE)
        checkpoints = (own, _not("per-layer", BUNDLED, NOT_NEEDED), _not("padded", ANYWHERE, NOT_NEEDED))
    else:
        own, padded = _tier("per-layer", lambda: model, BUNDLED), _tier("padded", lambda: pad(model), ANYWHERE)
        nothing_to_pad = padded.parameters == own.parameters
        stock = replace(padded, name=plain) if nothing_to_pad else _not("uniform", ANYWHERE, UNEQUAL)
        checkpoints = (stock, own, padded)
    return (*checkpoints, _gguf(model, tokenizer, own), _vllm(model, own))


def layers_of(model: PreTrainedModel) -> int | None:
    """How many layers a model has, if its configuration says so."""
    return getattr(model.config.get_text_config(), "num_hidden_layers", None)


def plainest(found: tuple[Tier, ...]) -> Tier:
    """The first checkpoint that loses nothing: no parameters beyond those of the smallest."""
    possible = [tier for tier in found if tier.name in CHECKPOINTS and tier.parameters is not None]
    return min(possible, key=lambda tier: tier.parameters or 0)


def _tier(name: str, made: Callable[[], PreTrainedModel], loads_with: str) -> Tier:
    try:
        model = made()
    except SecateurError as error:
        return _not(name, loads_with, str(error))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Tier(name, model.num_parameters(), size, count_macs(model, PROMPT_LENGTH), loads_with)


def _not(name: str, loads_with: str, reason: str) -> Tier:
    return Tier(name, None, None, None, loads_with, reason)


def _gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, own: Tier) -> Tier:
    """The file for llama.cpp. What stands in for left-out sublayers is computed there, too."""
    try:
        held = gguf.contents(model)
        if tokenizer is not None:
            vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    except SecateurError as error:
        return _not("gguf", "llama.cpp", str(error))
    macs = own.macs
    if any(layer.skip for layer in held.sizes.layers):
        macs = count_macs(build_on_meta(type(model), with_stand_ins(model.config, held.sizes)), PROMPT_LENGTH)
    sizes = {dtype: held.bytes(dtype) for dtype in gguf.DTYPES}
    loads_with = f"llama.cpp ({held.layout.arch})"
    return Tier("gguf", held.parameters, sizes[gguf.DEFAULT], macs, loads_with, bytes_by_type=sizes)


def _vllm(model: PreTrainedModel, own: Tier) -> Tier:
    """What vLLM serves: the checkpoint itself, or its own layout for layers that differ."""
    try:
        layout = layout_for(model)
    except SecateurError as error:
        return _not("vllm", "vLLM", str(error))
    if layout == STOCK_LAYOUT:
        return replace(own, name="vllm", loads_with="vLLM; the same checkpoint")
    shapes = build_on_meta(type(model), model.config)
    tensors, padding = nas_layout.tensors_of(shapes)
    stored = sum(t.numel() for t in tensors.values())
    macs = own.macs
    if padding:
        macs = count_macs(build_on_meta(type(model), nas_layout.as_stored(model.config)), PROMPT_LENGTH)
    return Tier("vllm", stored, stored * model.dtype.itemsize, macs, f"vLLM ({layout})")
