"""The clock of benchmarks."""

from __future__ import annotations

import time

import torch


def now(device: torch.device) -> float:
    """The time, once the device has done what it was told [seconds]."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
