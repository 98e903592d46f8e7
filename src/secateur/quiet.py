"""What other libraries print that is no help to users."""

from __future__ import annotations

import logging
import os

# What transformers and peft import where it is installed, and which warns of kernels that are not.
TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")
# What keeps bars and advice of other libraries out of logs; they are read when those are imported. The user's own win.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


def quiet_libraries(*, in_logs: bool) -> None:
    """Keep warnings of libraries to themselves, for this process, before they are imported.

    Args:
        in_logs: what is printed is no terminal's, so that there are to be no bars in it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, value in QUIET.items() if in_logs else ():
        os.environ.setdefault(name, value)
