"""Recovery: training that gives a pruned model back what the cut cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.first_use import on_first_use

if TYPE_CHECKING:
    from secateur.recovery.adapters import with_adapters
    from secateur.recovery.lora import LOGS, RecoveryResult, recover, train
    from secateur.recovery.picture import draw_mix, save_mix
    from secateur.recovery.rank_picture import draw_ranks, save_ranks
    from secateur.recovery.reporting import check_reporters
    from secateur.recovery.resuming import last_checkpoint
    from secateur.recovery.rounds import mix_record
    from secateur.recovery.settings import Distillation, RecoverySettings
    from secateur.recovery.training_data import TrainingData

_HOME = {
    "Distillation": "settings",
    "LOGS": "lora",
    "RecoveryResult": "lora",
    "RecoverySettings": "settings",
    "TrainingData": "training_data",
    "check_reporters": "reporting",
    "draw_mix": "picture",
    "draw_ranks": "rank_picture",
    "last_checkpoint": "resuming",
    "mix_record": "rounds",
    "recover": "lora",
    "save_mix": "picture",
    "save_ranks": "rank_picture",
    "train": "lora",
    "with_adapters": "adapters",
}

__getattr__ = on_first_use(__name__, _HOME)

__all__ = [
    "LOGS",
    "Distillation",
    "RecoveryResult",
    "RecoverySettings",
    "TrainingData",
    "check_reporters",
    "draw_mix",
    "draw_ranks",
    "last_checkpoint",
    "mix_record",
    "recover",
    "save_mix",
    "save_ranks",
    "train",
    "with_adapters",
]
