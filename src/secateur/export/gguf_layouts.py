"""Which of llama.cpp's architectures can hold a model: one `Layout` for each, one `Family` for each class of models.

llama.cpp computes what is written in its C++ for each architecture, so this table is inherent. It lists only what was
run in llama.cpp and gave the log-probabilities of transformers; everything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from secateur.errors import CheckpointError
from secateur.export.gguf_sizes import Sizes, base_type

if TYPE_CHECKING:
    from gguf import MODEL_ARCH

ATTENTION_BIAS = frozenset({"ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_OUT"})
FFN_BIAS = frozenset({"FFN_GATE", "FFN_UP", "FFN_DOWN"})
QKV = {"ATTN_QKV": ("ATTN_Q", "ATTN_K", "ATTN_V")}


@dataclass(frozen=True)
class Layout:
    """What one architecture of llama.cpp expects.

    Attributes:
        arch: `general.architecture`.
        interleaved_rope: rotary pairs are neighbours (0, 1), not halves (0, d/2), so rows of q and k are reordered.
        per_layer: head counts and FFN widths may differ by layer.
        full_width: the heads' widths must add up to the hidden size.
        fused: tensor -> the tensors that it joins along their rows.
        rope_factors: it reads one factor per rotary frequency.
        partial_rotary: only some of a head's channels may rotate.
        own_output: the output matrix is written even if it is the embedding.
        window_period: every layer but the last of this many has a sliding window; 0 if it knows no windows.
        activations: names that transformers gives to the FFN's function.
        biases: tensors that may have one, besides norms.
        scale_by_hidden: at this number of layers, scores are scaled by (hidden size / heads) ** -0.5 and not by the
            width of a head.
        settings: fields of the configuration, if it has them, and the values that mean what is built in.
    """

    arch: str
    interleaved_rope: bool = False
    per_layer: bool = False
    full_width: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rope_factors: bool = False
    partial_rotary: bool = False
    own_output: bool = False
    window_period: int = 0
    activations: tuple[str, ...] = ("silu",)
    biases: frozenset[str] = frozenset()
    scale_by_hidden: int = 0
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def score_scale(self, sizes: Sizes) -> float:
        """What llama.cpp multiplies the products of queries and keys with."""
        by_hidden = len(sizes.layers) == self.scale_by_hidden
        return math.sqrt(1 / (sizes.hidden // sizes.layers[0].heads if by_hidden else sizes.head_dim))

    def windows(self, sizes: Sizes) -> tuple[bool, ...]:
        """Which layers have a sliding window."""
        period = self.window_period
        return tuple(period > 0 and i % period < period - 1 for i in range(len(sizes.layers)))


@dataclass(frozen=True)
class Family:
    """How transformers stores one class of models.

    Attributes:
        layouts: the first that can hold a model is taken; the first one's name map also reads the parameter names.
        qkv_by_head: rows of the fused projection are (head, q/k/v, channel), not (q/k/v, head, channel).
        norm_offset: norms multiply by weight + this.
    """

    layouts: tuple[str, ...]
    qkv_by_head: bool = False
    norm_offset: float = 0.0


LAYOUTS = {
    layout.arch: layout
    for layout in (
        Layout("llama", interleaved_rope=True, rope_factors=True, biases=ATTENTION_BIAS | FFN_BIAS),
        Layout("deci", interleaved_rope=True, rope_factors=True, per_layer=True, biases=ATTENTION_BIAS | FFN_BIAS),
        Layout("openelm", per_layer=True, fused=QKV),
        Layout("qwen2", full_width=True, biases=ATTENTION_BIAS - {"ATTN_OUT"}),
        Layout("qwen3"),
        Layout("qwen3moe", settings={"norm_topk_prob": (True,)}),
        Layout(
            "gemma2", window_period=2, activations=("gelu_pytorch_tanh",), scale_by_hidden=46,
            settings={"use_bidirectional_attention": (None, False)},
        ),
        Layout("phi3", full_width=True, fused={**QKV, "FFN_UP": ("FFN_GATE", "FFN_UP")}, partial_rotary=True),
        Layout(
            "gptneox", full_width=True, fused=QKV, partial_rotary=True, own_output=True, activations=("gelu",),
            biases=ATTENTION_BIAS | FFN_BIAS, settings={"attention_bias": (True,)},
        ),
    )
}  # fmt: skip

FAMILIES = {
    "llama": Family(("llama", "deci")),
    "mistral": Family(("llama", "deci")),
    "mixtral": Family(("llama",)),
    "qwen2": Family(("qwen2", "llama", "deci")),
    "qwen3": Family(("qwen3", "openelm")),
    "qwen3_moe": Family(("qwen3moe",)),
    "gemma2": Family(("gemma2",), norm_offset=1.0),
    "phi3": Family(("phi3", "llama", "deci")),
    "gpt_neox": Family(("gptneox",), qkv_by_head=True),
}


def architecture(name: str) -> MODEL_ARCH:
    """The gguf package's number of an architecture."""
    import gguf

    return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def family_of(config: Any) -> Family:
    """The family of a model.

    Raises:
        CheckpointError: it has none.
    """
    family = FAMILIES.get(base_type(config))
    if family is None:
        raise CheckpointError(
            f"models of type {base_type(config)} have no verified home in llama.cpp (those that do: "
            f"{', '.join(FAMILIES)}); run this one with transformers"
        )
    return family


def choose(family: Family, config: Any, sizes: Sizes, biases: frozenset[str]) -> Layout:
    """The first layout of the family that can hold a model.

    Args:
        biases: tensors that have one, as `gguf.MODEL_TENSOR` names them.

    Raises:
        CheckpointError: none can; says what stands in the way of each, and what to do instead.
    """
    refusals = []
    for name in family.layouts:
        reason = _refusal(LAYOUTS[name], config, sizes, biases)
        if reason is None:
            return LAYOUTS[name]
        refusals.append(f"{name}: {reason}")
    remedy = "run it with transformers"
    if any(_refusal(LAYOUTS[name], config, sizes.padded, biases) is None for name in family.layouts):
        remedy = "export it with --to padded, which makes all layers equally wide, and export the result with --to gguf"
    raise CheckpointError(f"llama.cpp has no home for this model ({'; '.join(refusals)}); {remedy}")


def _refusal(layout: Layout, config: Any, sizes: Sizes, biases: frozenset[str]) -> str | None:
    """Why an architecture cannot hold a model."""
    import gguf

    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    wrong = [n for n, fine in layout.settings.items() if getattr(config, n, fine[0]) not in fine]
    checks = {
        "layers must be equally wide": not sizes.uniform and not layout.per_layer,
        "the output matrix must be the embedding": not sizes.tied
        and gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[architecture(layout.arch)],
        "rotary frequencies cannot be scaled": sizes.rope_factors is not None and not layout.rope_factors,
        "all channels of a head must rotate": sizes.rotary != sizes.head_dim and not layout.partial_rotary,
        "the heads must be as wide as the residual stream": layout.full_width
        and any(layer.heads * sizes.head_dim != sizes.hidden for layer in sizes.layers),
        f"the activation must be {' or '.join(layout.activations)}, not {activation}": activation
        not in layout.activations,
        f"no biases on {', '.join(sorted(biases - layout.biases)).lower()}": bool(biases - layout.biases),
        f"{', '.join(f'{n} must be {layout.settings[n][0]}' for n in wrong)}": bool(wrong),
    }
    return next((reason for reason, broken in checks.items() if broken), None)
