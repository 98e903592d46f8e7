"""Recovery: training that gives a pruned model back what the cut cost."""

from secateur.recovery.lora import RecoveryResult, RecoverySettings, last_checkpoint, recover, train, with_adapters

__all__ = ["RecoveryResult", "RecoverySettings", "last_checkpoint", "recover", "train", "with_adapters"]
