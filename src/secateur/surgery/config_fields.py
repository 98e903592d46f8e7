"""Configurations as data: the numbers in them, the lists with one entry per layer, and changed copies.

Fields of a configuration inside another one are named by their path, such as `text_config.hidden_size`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur.discovery.setting import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NOT_ARGUMENTS = ("architectures", "transformers_version", "model_type")


def values_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Every field by its path."""
    return dict(_walk(config, config.to_dict(), ""))


def _walk(config: PreTrainedConfig, data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    from transformers import PreTrainedConfig as AnyConfig

    for name, value in data.items():
        inner = vars(config).get(name)
        if isinstance(inner, AnyConfig) and isinstance(value, dict):
            yield from _walk(inner, value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def numbers(config: PreTrainedConfig) -> dict[str, int]:
    """The integer fields, token ids apart."""
    return {k: v for k, v in values_of(config).items() if type(v) is int and not k.endswith("_token_id")}


def unset_numbers(config: PreTrainedConfig, prefix: str = "") -> list[str]:
    """Fields that hold None but may hold an integer, which the class then derives from other fields."""
    from transformers import PreTrainedConfig as AnyConfig

    declared = {f.name for f in dataclasses.fields(config) if "int" in str(f.type)}  # type: ignore[arg-type]
    found = [prefix + k for k, v in vars(config).items() if v is None and k in declared and not k.endswith("_token_id")]
    for name, inner in vars(config).items():
        if isinstance(inner, AnyConfig):
            found += unset_numbers(inner, f"{prefix}{name}.")
    return found


def per_layer_lists(config: PreTrainedConfig, layers: int) -> dict[str, Sequence[Any]]:
    """Lists with one entry for each of so many layers."""
    return {k: v for k, v in values_of(config).items() if isinstance(v, list | tuple) and len(v) == layers}


def index_lists(config: PreTrainedConfig, layers: int) -> list[str]:
    """Lists that may hold numbers of layers."""
    return [
        k
        for k, v in values_of(config).items()
        if isinstance(v, list | tuple) and len(v) > 0 and all(type(i) is int and 0 <= i < layers for i in v)
    ]


def kept_entries(values: Sequence[Any], layers: Sequence[int]) -> list[Any]:
    """A per-layer list without the entries of removed layers."""
    return [values[i] for i in layers]


def kept_indices(values: Sequence[int], layers: Sequence[int]) -> list[int]:
    """Numbers of layers after those that are not in `layers` went."""
    return [layers.index(i) for i in values if i in layers]


def rebuilt(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A new configuration with these fields changed, validated by its class.

    Raises:
        Exception: whatever the class raises for values it does not accept.
    """
    data = config.to_dict()
    for name in NOT_ARGUMENTS:
        data.pop(name, None)
    for path, value in changes.items():
        *outer, name = path.split(".")
        place, owner = data, config
        for part in outer:
            place, owner = place[part], getattr(owner, part)
        place[type(owner).attribute_map.get(name, name)] = value
    with quiet_transformers():
        new = type(config)(**data)
    new.dtype = config.dtype
    return new
