"""How many multiply-accumulates a forward pass takes, counted without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from secateur.discovery.setting import visible_implementations

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _grouped_flops(rows: Sequence[int], weights: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of [tokens, in] by [experts, in, out], each token with the weights of one expert."""
    return 2 * rows[0] * rows[1] * weights[-1]


# products that PyTorch's counter does not know
GROUPED_PRODUCT = {torch.ops.aten._grouped_mm: _grouped_flops} if hasattr(torch.ops.aten, "_grouped_mm") else {}


def count_macs(model: PreTrainedModel, prompt_length: int) -> int:
    """Multiply-accumulates of one forward pass over one prompt, logits of all positions included.

    Counted on tensors without data, so it takes no time to speak of and works on the meta device. What counts are
    matrix products (half of the FLOPs that PyTorch's counter reports for them); attention counts as the full square
    of the prompt, whether or not a kernel skips the masked half. Norms and activations do not count.
    """
    with shapes_only(model) as run, FlopCounterMode(display=False, custom_mapping=GROUPED_PRODUCT) as counter:
        run(1, prompt_length, use_cache=False)
    return int(counter.get_total_flops()) // 2


@contextmanager
def shapes_only(model: PreTrainedModel) -> Iterator[Callable[..., Any]]:
    """Give a function (sequences, length, **options) that runs the model on tensors without data."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with (
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
        visible_implementations(model),  # the products of grouped experts do not exist for every width
        sdpa_kernel(SDPBackend.MATH),  # the counter does not know the fused attention of the CPU
    ):
        # only shapes matter; bfloat16 is what the grouped products of experts exist in
        dtypes = {name: torch.bfloat16 if t.is_floating_point() else t.dtype for name, t in tensors.items()}
        fake = {name: torch.empty(t.shape, dtype=dtypes[name]) for name, t in tensors.items()}

        def run(sequences: int, length: int, **options: Any) -> Any:
            ids = torch.zeros(sequences, length, dtype=torch.long)
            return torch.func.functional_call(model, fake, (ids,), options)

        yield run
