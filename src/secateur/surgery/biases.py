"""Biases for linear modules that have none, where the class of the model has fields for them.

FLAP (An et al. 2023, arXiv:2312.11983) gives LLaMA a bias after each matrix that it prunes. Its class builds some of
these by a field of the configuration, and then any loader does. Such a field may give biases to more modules than are
wanted; these stay zero, and count as parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from secateur.errors import PlanError
from secateur.groups import Group
from secateur.packed import refuse_packed
from secateur.surgery.shapes import Shapes, built_shapes, shapes_of
from secateur.surgery.slicing import load_tensors
from secateur.surgery.trial import LogitCheck

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def readers_of(groups: Iterable[Group]) -> frozenset[str]:
    """Paths of the modules whose weights read units of these groups."""
    members = (m for g in groups for m in g.members if m.role == "consumer")
    return frozenset(path for path, _, leaf in (m.parameter.rpartition(".") for m in members) if leaf == "weight")


def with_biases(model: PreTrainedModel, readers: Collection[str]) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A model that computes the same and has biases of zero, and the fields of its configuration that gave them.

    Args:
        readers: paths of the modules that are to have biases; as many get them as the class has fields for.

    Returns:
        `model` itself and no fields where that is none. Otherwise all weights are copies.

    Raises:
        PlanError: the class computes something else with these biases, or weights are packed.
    """
    refuse_packed(model, "given biases", PlanError)
    wanted, config = {f"{path}.bias" for path in readers}, model.config
    fields: list[str] = []
    before = shapes_of(model)
    shapes = dict(before)
    for name in _switched_off(config):
        edited = _switched_on(config, name)
        added = _added(type(model), edited, shapes)
        if wanted & added.keys():
            config, fields, shapes = edited, [*fields, name], {**shapes, **added}
    if not fields:
        return model, ()
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    names = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
    tensors = {name: state[name] for name in first.values()}
    tied = {name: listed for name, listed in names.items() if name != listed}
    tensors |= {n: torch.zeros(shape, dtype=model.dtype) for n, shape in shapes.items() if n not in before}
    biased, check = load_tensors(model, type(model), config, tensors, tied), LogitCheck(model, {})
    if not check.same(biased):
        why = check.failure or f"logits differ by {check.difference:.2g}"
        raise PlanError(f"{type(model).__name__} computes something else with {' and '.join(fields)}: {why}")
    return biased, tuple(fields)


def share_with_biases(sparsity: float, dense: PreTrainedModel, biased: PreTrainedModel) -> float:
    """The share of `biased` that is to go, so that what stays is `1 - sparsity` of the parameters of `dense`."""
    whole: int = dense.num_parameters()
    return 1 - (1 - sparsity) * whole / float(biased.num_parameters())


def _switched_off(config: PreTrainedConfig) -> list[str]:
    """The fields whose names speak of a bias, and that are False."""
    return [name for name, value in vars(config.get_text_config()).items() if "bias" in name and value is False]


def _switched_on(config: PreTrainedConfig, field: str) -> PreTrainedConfig:
    edited = copy.deepcopy(config)
    setattr(edited.get_text_config(), field, True)
    return edited


def _added(model_class: type[PreTrainedModel], config: PreTrainedConfig, before: Shapes) -> Shapes:
    """What a configuration adds to these shapes; nothing if it changes any of them or adds more than biases."""
    with suppress(Exception):  # classes raise what they like
        now = built_shapes(model_class, config)
        added = {name: shape for name, shape in now.items() if name not in before}
        if all(now.get(name) == shape for name, shape in before.items()) and all(n.endswith("bias") for n in added):
            return added
    return {}
