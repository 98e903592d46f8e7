"""The tensors of a GGUF file: parameters of transformers renamed, split, joined and reordered for an architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from secateur.errors import CheckpointError
from secateur.export.gguf_layouts import Family, Layout, architecture
from secateur.export.gguf_sizes import ZERO_FFN, Layer, Sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDING = 1e-9
Key = tuple[str, int | None, str]  # name of a `gguf.MODEL_TENSOR`, layer, "weight" or "bias"


@dataclass(frozen=True)
class Piece:
    """One tensor of the file: parts joined along the rows, then changed in value or order, all when it is written.

    The parts are views of the model's parameters, so that making the pieces takes no memory.
    """

    parts: tuple[torch.Tensor, ...]
    changes: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the joined parts."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def values(self) -> torch.Tensor:
        """The tensor in float32 on the CPU."""
        whole = torch.cat([part.detach().to("cpu", torch.float32) for part in self.parts])
        for change in self.changes:
            whole = change(whole)
        return whole


Found = dict[Key, Piece]


def read_tensors(model: PreTrainedModel, sizes: Sizes, family: Family) -> Found:
    """Every parameter under its role; fused ones split into q, k, v, gate and up; zeros for what layers leave out.

    Raises:
        CheckpointError: llama.cpp has no place for a parameter, or it is quantised.
    """
    import gguf

    names = gguf.get_tensor_name_map(architecture(family.layouts[0]), len(sizes.layers))
    found: Found = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise CheckpointError(f"{name} is quantised; export the float checkpoint, to q8_0 if it should be small")
        base, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            base, suffix = name, "weight"
        role = names.get_type(base.replace("gate_up_proj", "up_proj"))
        if role is None:
            raise CheckpointError(
                f"llama.cpp's {family.layouts[0]} has no place for {name} of this model; run it with transformers"
            )
        number = next((int(part) for part in base.split(".") if part.isdigit()), None)
        for part, tensor in _split(role.name, parameter, sizes.layers[number or 0], sizes.head_dim, family):
            found[part, number, suffix] = Piece((tensor,))
    for number, layer in enumerate(sizes.layers):
        _fill(found, number, layer, sizes)
    return found


def biases(found: Found) -> frozenset[str]:
    """Roles of the tensors that have a bias, other than norms."""
    return frozenset(role for role, _, suffix in found if suffix == "bias" and not role.endswith("_NORM"))


def arrange(found: Found, sizes: Sizes, family: Family, layout: Layout) -> dict[str, Piece]:
    """Tensors by their names in the file, as the architecture wants them."""
    import gguf

    adapted = _adapt(found, sizes, family, layout)
    if sizes.rope_factors is not None:
        adapted["ROPE_FREQS", None, "weight"] = Piece((sizes.rope_factors,))
    if layout.own_output and sizes.tied:
        adapted["OUTPUT", None, "weight"] = adapted["TOKEN_EMBD", None, "weight"]
    return {
        gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[role]].format(bid=number) + "." + suffix: piece
        for (role, number, suffix), piece in _fuse(adapted, layout).items()
    }


def _split(
    role: str, tensor: torch.Tensor, layer: Layer, head_dim: int, family: Family
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a fused one holds, or itself."""
    if role == "ATTN_QKV":
        if family.qkv_by_head:
            by_head = tensor.unflatten(0, (layer.heads, 3, head_dim))
            parts = tuple(by_head[:, i].flatten(0, 1) for i in range(3))
        else:
            parts = tensor.split([n * head_dim for n in (layer.heads, layer.kv_heads, layer.kv_heads)])
        yield from zip(("ATTN_Q", "ATTN_K", "ATTN_V"), parts, strict=True)
    elif role == "FFN_UP" and tensor.shape[0] == 2 * layer.ffn:
        yield from zip(("FFN_GATE", "FFN_UP"), tensor.chunk(2), strict=True)
    elif role == "FFN_UP_EXP":
        yield from zip(("FFN_GATE_EXP", "FFN_UP_EXP"), tensor.chunk(2, dim=1), strict=True)
    else:
        yield role, tensor


def _fill(found: Found, number: int, layer: Layer, sizes: Sizes) -> None:
    """Zeros for what a layer leaves out: llama.cpp cannot leave it out everywhere, and is silently wrong in places."""
    width, head = sizes.hidden, sizes.head_dim
    shapes: dict[str, tuple[int, int]] = {}
    if "attention" in layer.skip:
        shapes |= {"ATTN_Q": (head, width), "ATTN_K": (head, width), "ATTN_V": (head, width), "ATTN_OUT": (width, head)}
        if any(role == "ATTN_Q_NORM" for role, _, _ in found):
            found |= {(role, number, "weight"): Piece((torch.ones(head),)) for role in ("ATTN_Q_NORM", "ATTN_K_NORM")}
    if "mlp" in layer.skip:
        shapes |= {"FFN_GATE": (ZERO_FFN, width), "FFN_UP": (ZERO_FFN, width), "FFN_DOWN": (width, ZERO_FFN)}
    for role, shape in shapes.items():
        found[role, number, "weight"] = Piece((torch.zeros(()).expand(shape),))


def _adapt(found: Found, sizes: Sizes, family: Family, layout: Layout) -> Found:
    """Give norms their offset, queries their scale and rotary rows their order."""
    scale = sizes.score_scale / layout.score_scale(sizes)
    adapted: Found = {}
    for key, piece in found.items():
        role, _, suffix = key
        changes: list[Callable[[torch.Tensor], torch.Tensor]] = []
        if family.norm_offset and role.endswith("_NORM") and suffix == "weight":
            changes.append(lambda t: t + family.norm_offset)
        if role == "ATTN_Q" and abs(scale - 1) > ROUNDING:
            changes.append(lambda t: t * scale)
        if role in ("ATTN_Q", "ATTN_K") and layout.interleaved_rope:
            changes.append(lambda t: interleave(t, sizes.head_dim))
        adapted[key] = replace(piece, changes=tuple(changes))
    return adapted


def interleave(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of each head from (0 .. d/2, d/2 .. d) to pairs (0, d/2, 1, d/2 + 1, ...)."""
    halves: torch.Tensor = tensor.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _fuse(found: Found, layout: Layout) -> Found:
    """Join what the architecture keeps in one tensor."""
    firsts = {parts[0]: (fused, parts) for fused, parts in layout.fused.items()}
    rest = {part for _, parts in firsts.values() for part in parts[1:]}
    joined: Found = {}
    for (role, number, suffix), piece in found.items():
        if role in firsts:
            fused, parts = firsts[role]
            members = (found[part, number, suffix].parts[0] for part in parts)
            joined[fused, number, suffix] = Piece(tuple(members))
        elif role not in rest:
            joined[role, number, suffix] = piece
    return joined
