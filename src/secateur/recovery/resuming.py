"""The training checkpoint that an interrupted run left, and whether what trains now is what trained then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from secateur.errors import CheckpointError
from secateur.recovery.callbacks import WHOLE

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def last_checkpoint(output: Path) -> str | None:
    """The newest training checkpoint of a run that was written to its end, None if there is none."""
    found = [file.parent for file in (output / "checkpoints").glob(f"checkpoint-*/{WHOLE}")]
    return str(max(found, key=lambda folder: int(folder.name.rpartition("-")[2]))) if found else None


def check_trains_the_same(checkpoint: str, model: PeftModel | PreTrainedModel) -> None:
    """Make sure that a training checkpoint holds what is trained in `model`, in the same sizes.

    Raises:
        CheckpointError: it does not, since the run that left it had other adapters, or trained other weights.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    file = Path(checkpoint) / SAFETENSORS_WEIGHTS_NAME
    adapted = isinstance(model, PeftModel)
    if adapted and file.is_file():
        state: dict[str, Any] = get_peft_model_state_dict(model)
        with safe_open(file, "pt") as kept:
            names = kept.keys()
            then = {name: tuple(kept.get_slice(name).get_shape()) for name in names}
        if then == {name: tuple(tensor.shape) for name, tensor in state.items()}:
            return
    elif not adapted and not file.is_file():
        return
    raise CheckpointError(
        f"{checkpoint} is of a run that trained other adapters or other weights (rank, targets, --also-train, "
        "--full-weights): give the settings that it had, or leave out --resume to begin anew"
    )
