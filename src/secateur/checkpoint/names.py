"""Names on disk and names in memory: which stored tensor is which parameter, and under which name it is stored again.

transformers renames some weights while it loads them, and stacks the matrices of experts, which lie one by one on disk.
What it lists for a class is followed here in both directions without any data. Stacking (`MergeModulelist`, as a rule
with `Concatenate` after it) is the only conversion that is followed; a checkpoint that needs another one cannot be cut
tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import StreamingError
from secateur.groups import IndexArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Piece:
    """A stored tensor in terms of a parameter in memory.

    Attributes:
        parameter: name in the state dict.
        part: 0 for the first of the matrices that are concatenated for one expert (gate before up).
        expert: position on the first dimension of the parameter; None for a parameter that is stored as it is.
    """

    parameter: str
    part: int = 0
    expert: int | None = None

    def kept(self, positions: Mapping[int, IndexArray], rows: int) -> dict[int, IndexArray]:
        """Which positions stay on each dimension of the stored tensor, given those of the parameter.

        Args:
            rows: of the stored tensor.
        """
        if self.expert is None:
            return dict(positions)
        kept = {dim - 1: staying for dim, staying in positions.items() if dim > 0}
        if 0 in kept:  # counted over all matrices of the expert
            first = self.part * rows
            kept[0] = kept[0][(kept[0] >= first) & (kept[0] < first + rows)] - first
        return kept

    def before(self, parameter: str, positions: Mapping[int, IndexArray]) -> Piece:
        """The piece of the uncut parameter, which was called `parameter`, that this one was cut from."""
        if self.expert is None or 0 not in positions:
            return Piece(parameter, self.part, self.expert)
        return Piece(parameter, self.part, int(positions[0][self.expert]))


def pieces_on_disk(model: PreTrainedModel, names: Iterable[str]) -> dict[Piece, str]:
    """What each stored tensor is, as `from_pretrained` reads it; tensors that the model does not use are left out.

    Raises:
        StreamingError: transformers converts the weights of this class in another way than by stacking.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _split(get_model_conversion_mapping(model))
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[Piece, str] = {}
    experts: dict[tuple[str, str], int] = {}  # seen so far
    for name in sorted(names, key=dot_natural_key):  # the order in which transformers numbers them
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed not in state:
            continue
        piece = Piece(renamed)
        if pattern is not None:
            converter = next(c for c in converters if pattern in c.source_patterns)
            _check_stacking(model, converter.operations)
            number = experts.get((renamed, pattern), 0)
            experts[renamed, pattern] = number + 1
            piece = Piece(renamed, converter.source_patterns.index(pattern), number)
        if piece in found:
            raise StreamingError(f"{found[piece]} and {name} are the same parameter, {renamed}")
        found[piece] = name
    return found


def names_to_write(model: PreTrainedModel) -> dict[str, tuple[Piece, tuple[int, ...]]]:
    """Name on disk -> (what it is, its shape), as `save_pretrained` writes this model, which needs no weights.

    Raises:
        StreamingError: as for `pieces_on_disk`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, apply_converters, apply_renamings
    from transformers.core_model_loading import revert_weight_conversion as as_transformers_does

    state = _saved(model)
    conversions = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    renamings, converters = _split(c.reverse_transform() for c in reversed(conversions))
    found: dict[str, tuple[Piece, tuple[int, ...]]] = {}
    for name, tensor in state.items():
        renamed, pattern = apply_converters(name, converters)
        if pattern is None:
            found[apply_renamings(name, renamings)] = (Piece(name), tuple(tensor.shape))
            continue
        converter = deepcopy(next(c for c in converters if pattern in c.source_patterns))
        _check_stacking(model, [op.reverse_op for op in reversed(converter.operations)])
        converter.add_tensor(renamed, name, pattern, tensor)
        # first come the first matrices of all experts, then the second ones
        for i, (key, value) in enumerate(converter.convert(renamed, model=model, config=model.config).items()):
            part, expert = divmod(i, tensor.shape[0])
            matrix = value[0] if isinstance(value, list) else value
            found[apply_renamings(key, renamings)] = (Piece(name, part, expert), tuple(matrix.shape))
    saved = {name: tuple(tensor.shape) for name, tensor in as_transformers_does(model, dict(state)).items()}
    if saved != {name: shape for name, (_, shape) in found.items()}:
        raise StreamingError(f"the names under which transformers stores {type(model).__name__} could not be followed")
    return {name: found[name] for name in saved}


def _saved(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict without further names of tied tensors and without what the class does not save."""
    skipped = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in skipped}


def _split(conversions: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Renamings and converters.

    Raises:
        StreamingError: there are renamings that depend on which other names there are.
    """
    from transformers.core_model_loading import GroupWeightRename, WeightConverter

    conversions = list(conversions)
    if any(isinstance(c, GroupWeightRename) for c in conversions):
        raise StreamingError("transformers renames weights of this class depending on each other")
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    return [c for c in conversions if not isinstance(c, WeightConverter)], converters


def _check_stacking(model: PreTrainedModel, operations: list[Any]) -> None:
    """Make sure that the operations stack matrices of experts, those of each expert one after the other.

    Raises:
        StreamingError: they do something else.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stacking = [type(op) for op in operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
    if not stacking or [op.dim for op in operations] != list(range(len(operations))):
        how = ", ".join(map(str, operations))
        raise StreamingError(f"transformers converts weights of {type(model).__name__} while it loads them ({how})")
