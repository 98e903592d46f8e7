"""Recovery: training that gives a pruned model back what the cut cost."""

from secateur.recovery.lora import RecoveryResult, RecoverySettings, last_checkpoint, recover, train, with_adapters
from secateur.recovery.picture import draw_mix, save_mix
from secateur.recovery.rounds import mix_record

__all__ = [
    "RecoveryResult",
    "RecoverySettings",
    "draw_mix",
    "last_checkpoint",
    "mix_record",
    "recover",
    "save_mix",
    "train",
    "with_adapters",
]
