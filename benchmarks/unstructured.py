"""Unstructured masks, the rivals of cuts: single weights of the linear modules go, wherever they lie.

They are no part of the library: what they leave is as large and, as dense matrices, as slow as before. `SparseLinear`
is what it takes to make use of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import BudgetError

Masks = Mapping[str, Tensor]  # path of a linear module -> True where its weight stays


def linear_modules(model: Any) -> dict[str, nn.Linear]:
    """The linear modules of the blocks by path: all but the head, which lies outside the base model."""
    inside = {id(module) for module in model.base_model.modules()}
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}


def shared_out(total: int, sizes: Tensor) -> Tensor:
    """Parts of `total` in proportion to `sizes`, each within one of its exact share, which sum to `total`."""
    ends = (sizes.cumsum(0).double() * total / int(sizes.sum())).round().long()
    return ends.diff(prepend=ends.new_zeros(1))


def largest(scores: Tensor, gone: Tensor) -> Tensor:
    """True but for the `gone[i]` least scores of each row i."""
    return scores.argsort(1).argsort(1) >= gone[:, None]


def magnitude(model: Any, zeros: int) -> dict[str, Tensor]:
    """Zero the weights of least magnitude in place, of each module the same share, `zeros` in all.

    Raises:
        BudgetError: the modules have fewer weights.
    """
    modules, masks = linear_modules(model), {}
    sizes = torch.tensor([m.weight.numel() for m in modules.values()])
    _check(zeros, sizes)
    for (path, module), gone in zip(modules.items(), shared_out(zeros, sizes), strict=True):
        weight = module.weight.data
        masks[path] = largest(weight.abs().view(1, -1), gone[None]).view_as(weight)
        weight *= masks[path]
    return masks


@torch.no_grad()
def wanda(model: Any, zeros: int, tokens: Tensor) -> dict[str, Tensor]:
    """Zero the weights of least |W_ij| * ||x_j||_2 in place, of each output the same share, `zeros` in all.

    Wanda (Sun et al. 2023, arXiv:2306.11695), Eq. 1, compared per output (3.1). The norms are over all tokens. One pass
    takes all of them at once and masks each module just before it runs, so that its inputs are of masked modules; the
    paper's code masks the modules of a block together.

    Args:
        tokens: calibration token ids [sequences, length].

    Raises:
        BudgetError: the modules have fewer weights.
    """
    modules = linear_modules(model)
    sizes = torch.cat([torch.full((m.out_features,), m.in_features) for m in modules.values()])
    _check(zeros, sizes)
    parts = shared_out(zeros, sizes).split([m.out_features for m in modules.values()])
    gone, paths = dict(zip(modules, parts, strict=True)), {m: path for path, m in modules.items()}
    masks: dict[str, Tensor] = {}

    def masked_first(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        path = paths[module]
        masks[path] = largest(wanda_scores(module.weight, args[0]), gone[path])
        module.weight *= masks[path]

    handles = [module.register_forward_pre_hook(masked_first) for module in modules.values()]
    try:
        model.base_model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return masks


def wanda_scores(weight: Tensor, inputs: Tensor) -> Tensor:
    """|W_ij| * ||x_j||_2, the norm over all tokens of `inputs` [..., in]: [out, in]."""
    return weight.abs() * inputs.flatten(0, -2).norm(dim=0)


def _check(zeros: int, sizes: Tensor) -> None:
    if zeros > (has := int(sizes.sum())):
        raise BudgetError(f"{zeros:,} weights are to be zero, but the linear modules of the blocks have {has:,}")


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """Puts the zeros of masks back after every step of the optimizer."""

    def __init__(self, modules: Mapping[str, nn.Linear], masks: Masks) -> None:
        self.pairs = [(modules[path].weight, mask) for path, mask in masks.items()]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for weight, mask in self.pairs:
            weight.data *= mask


def zeros_of(model: Any, masks: Masks) -> int:
    """How many weights are zero where the masks say so.

    Raises:
        RuntimeError: one that should be is not.
    """
    modules, count = linear_modules(model), 0
    for path, mask in masks.items():
        if modules[path].weight[~mask].any():
            raise RuntimeError(f"{path} has weights that its mask takes out")
        count += int((~mask).sum())
    return count


class SparseLinear(nn.Module):
    """A linear module that holds its weight as compressed sparse rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach().to_sparse_csr(), linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        out = (self.weight @ inputs.flatten(0, -2).T).T.unflatten(0, inputs.shape[:-1])
        return out if self.bias is None else out + self.bias


def as_csr(model: Any, paths: Sequence[str]) -> Any:
    """A copy of the model with the linear modules at `paths` as sparse ones."""
    sparse = copy.deepcopy(model)
    for path in paths:
        sparse.set_submodule(path, SparseLinear(sparse.get_submodule(path)))
    return sparse
