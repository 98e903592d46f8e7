"""Gradients under mixed precision, as callbacks find them just before the optimizer's step."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch


def loss_scale(optimizer: Any) -> float:
    """Mixed precision's factor on the loss, 1 without."""
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def unscaled(optimizer: Any) -> bool:
    """Take mixed precision's factor from the gradients, where one is there; False if they overflowed: no step follows.

    After clipping the Trainer has done so; the scaler knows, and does it once.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return True
    inner = getattr(optimizer, "optimizer", optimizer)
    with suppress(RuntimeError):  # where it was called since the last update
        scaler.unscale_(inner)
    gradients = (p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None)
    return all(bool(torch.isfinite(g).all()) for g in gradients)
