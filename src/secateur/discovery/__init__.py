"""Discovery: which structures of a model can only be removed together, learnt from one traced forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.discovery.grouping import build_groups
from secateur.discovery.trace import run_trace
from secateur.groups import Groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["discover"]


def discover(model: PreTrainedModel) -> Groups:
    """Find the coupled structures of a causal language model.

    The model runs once on fake tensors, so it may live on the meta device; weights are neither read nor changed.
    Dimensions that cannot be removed are in the result too, with the reason in `Group.refusals`.

    Raises:
        DiscoveryError: the forward pass cannot be traced.
    """
    return build_groups(model, run_trace(model))[0]
