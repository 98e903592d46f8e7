# Copyright 2026 The Secateur authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a checkpoint in the nemotron-nas layout; a copy of this file lies in every such folder.

vLLM reads `config.block_configs[i].attention` and `.ffn` by attribute, which JSON cannot say: the dictionaries of
`config.json` are given attributes here. Needs only transformers:

    AutoConfig.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig


class Fields(dict[str, Any]):
    """A dictionary whose entries are attributes too; it stays one so that the configuration can be written again."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(PretrainedConfig):  # type: ignore[misc]
    """Fields of a Llama configuration, and for every layer `attention` and `ffn` with the sizes it has there."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Iterable[Mapping[str, Mapping[str, Any]]] = (), **kwargs: Any) -> None:
        self.block_configs = [
            Fields({part: Fields(fields) for part, fields in block.items()}) for block in block_configs
        ]
        super().__init__(**kwargs)
