"""Recovery: training that gives a pruned model back what the cut cost."""

from secateur.recovery.lora import RecoveryResult, RecoverySettings, recover

__all__ = ["RecoveryResult", "RecoverySettings", "recover"]
