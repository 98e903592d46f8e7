"""Shapes of state dicts: what a class builds from a configuration, and what a cut needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from secateur.discovery.setting import quiet_transformers
from secateur.groups import Groups, Kept
from secateur.surgery.state import new_name, renumbering, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """An instance without weights.

    Raises:
        Exception: whatever the class raises for sizes it does not accept.
    """
    with quiet_transformers(), torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config))


def built_shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shapes that a class builds; initialising what has no data would take as long as building it.

    Raises:
        Exception: whatever the class raises for sizes it does not accept.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return shapes_of(build_on_meta(model_class, config))


def build_random(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 instance with random weights, the same ones every time; the caller's random numbers stay as they are.

    Raises:
        Exception: whatever the class raises for sizes it does not accept.
    """
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class._from_config(config, dtype=torch.float32)


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shape of every entry of the state dict."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def expected_shapes(groups: Groups, kept: Kept) -> dict[str, tuple[int, ...]]:
    """Shape of every entry of the cut model's state dict, tied names included."""
    moved = renumbering(groups, kept)
    left = {new_name(n, moved): s for n, s in groups.remaining_shapes(kept).items()}
    tied = {name: left[of] for name, of in tied_names(groups, kept).items()}
    return left | tied
