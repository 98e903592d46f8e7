"""Recovery: training that gives a pruned model back what the cut cost."""

from secateur.recovery.adapters import with_adapters
from secateur.recovery.also_trained import also_trained
from secateur.recovery.lora import LOGS, RecoveryResult, recover, train
from secateur.recovery.picture import draw_mix, save_mix
from secateur.recovery.rank_picture import draw_ranks, save_ranks
from secateur.recovery.reporting import check_reporters
from secateur.recovery.resuming import last_checkpoint
from secateur.recovery.rounds import mix_record
from secateur.recovery.settings import Distillation, RecoverySettings
from secateur.recovery.training_data import TrainingData, training_data

__all__ = [
    "LOGS",
    "Distillation",
    "RecoveryResult",
    "RecoverySettings",
    "TrainingData",
    "also_trained",
    "check_reporters",
    "draw_mix",
    "draw_ranks",
    "last_checkpoint",
    "mix_record",
    "recover",
    "save_mix",
    "save_ranks",
    "train",
    "training_data",
    "with_adapters",
]
