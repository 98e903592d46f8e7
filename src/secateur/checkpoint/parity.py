"""Whether what was written is what was meant: it is loaded again, and its logits are compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secateur.checkpoint.card import is_remote
from secateur.discovery.setting import quiet_transformers
from secateur.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARITY_TOLERANCE = 1e-6


def verify_reload(folder: Path, model: PreTrainedModel) -> float:
    """Load `folder` with transformers' AutoModel and return the largest difference of logits from `model`.

    Raises:
        CheckpointError: it does not load, or the difference is more than rounding.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=is_remote(model))
        again.to(model.device).eval()
    except Exception as error:  # whatever the class raises, the user must not be left with this folder
        raise CheckpointError(f"the checkpoint just written does not load: {first_line(error)}") from error
    return check_same_logits(model, again)


def check_same_logits(model: PreTrainedModel, again: PreTrainedModel) -> float:
    """The largest difference of logits between a model and what was loaded from its folder.

    Raises:
        CheckpointError: it is more than rounding.
    """
    ids = torch.arange(32, device=model.device).remainder(model.get_input_embeddings().weight.shape[0])[None]
    training = model.training
    with torch.no_grad():
        wanted = model.eval()(ids, use_cache=False).logits
        difference = float((again(ids, use_cache=False).logits - wanted).abs().max())
    model.train(training)
    if not difference <= PARITY_TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise CheckpointError(f"the checkpoint just written gives other logits (difference {difference:.2g}); removed")
    return difference
