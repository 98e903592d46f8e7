"""A model from which units go while it trains: masked at once, removed for good when asked, put together at the end.

Everything that has to be known about the architecture is found on models without weights or on a narrow twin, so that
the model in training may be large, adapted or quantised: its groups, which of them its class can be configured for,
whether masked inputs amount to removal, and which attributes of its modules follow a cut in place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.discovery import discover
from secateur.discovery.reference import plain_logits
from secateur.discovery.stand_ins import known_packed
from secateur.discovery.trace import probe_ids
from secateur.errors import PlanError
from secateur.groups import Group, Groups
from secateur.packed import dense_weight, packed_weights
from secateur.plan import PruningPlan
from secateur.readers import base_of, input_dim
from secateur.surgery.adapters import PREFIX, is_adapted, unsupported
from secateur.surgery.compaction import attributes_to_follow, check_state, compact
from secateur.surgery.expressible import Expressible, expressible
from secateur.surgery.input_masks import InputMasks, not_maskable
from secateur.surgery.per_layer import is_per_layer, skeleton
from secateur.surgery.shapes import build_on_meta
from secateur.surgery.slicing import load_tensors
from secateur.surgery.state import tied_names
from secateur.surgery.trial import TOLERANCE
from secateur.surgery.unloaded import Twin, sample_cut, twin_of, unloaded_cut

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel


class LiveModel:
    """A model in training and what has gone from it so far.

    Attributes:
        model: the model as it is trained.
        base: the same without the `PeftModel` around it; its linear modules may hold LoRA adapters.
        groups: of the uncut base.
        built: the groups of the base as its modules are built now.
        masked: what is masked in addition, a plan for `built`.
        removed: what is gone for good, a plan for `groups`.

    Raises:
        PlanError: the adapters are of a kind that is not cut with its model.
        DiscoveryError: weights are packed in a way that is not known.
    """

    def __init__(self, model: Any) -> None:
        if is_adapted(model) and (reason := unsupported(model)):
            raise PlanError(reason)
        known_packed(model)
        self.model = model
        self.base: PreTrainedModel = model.get_base_model() if is_adapted(model) else model
        self.blank = blank(self.base)
        _check_layout(self.base, self.blank)
        self.groups = discover(self.blank)
        _check_mergeable(self.base, self.groups)
        self.built = self.groups
        self.masked = PruningPlan({}, {})
        self.removed = PruningPlan({}, {})
        self._masks = InputMasks(self.base, self.built)

    @cached_property
    def twin(self) -> Twin:
        """A narrow model of the same class, to try cuts on."""
        with _own_chance():
            if not is_per_layer(self.blank):
                return twin_of(self.blank, self.groups)
            uniform = skeleton(self.blank)
            return twin_of(uniform, discover(uniform))

    def possible(self, kinds: Sequence[str], *, uniform: bool) -> Expressible:
        """What can be masked while it trains and cut in the end."""
        with _own_chance():
            can = expressible(self.blank, self.groups, kinds, uniform=uniform)
            return replace(can, refused=not_maskable(self.twin.reference, kinds) | dict(can.refused))

    @property
    def plan(self) -> PruningPlan:
        """Everything that has gone, as a plan for the uncut model."""
        return self.removed.compose(self.masked)

    def mask(self, plan: PruningPlan) -> None:
        """Let just the units be left that `plan`, one for the uncut model, keeps.

        Raises:
            PlanError: it keeps one that was removed for good.
        """
        self.masked = plan.following(self.removed)
        self._masks.set(self.masked.kept)

    def compact(self, optimizer: Optimizer | None = None) -> None:
        """Remove what is masked from the modules, the adapters and the optimizer's state.

        Raises:
            PlanError: the modules, a packed weight or the optimizer's state cannot be cut in place.
        """
        if not self.masked.kept:
            return
        kept = self.masked.kept
        slots = self._slots(tuple(sorted({self.built.named(n).family for n in kept})))
        before = self.logits()
        self._masks.remove()
        compact(self.base, self.built, kept, slots, optimizer)
        self.removed, self.built = self.plan, self.built.after(kept)
        self.masked = PruningPlan({}, {})
        self._masks = InputMasks(self.base, self.built)
        self._compare(before, self.logits(), f"{type(self.base).__name__} cut in place")

    def check_cut(self, plan: PruningPlan) -> PreTrainedModel:
        """Make sure that a class expresses a cut: the cut model without weights.

        Raises:
            PlanError: none does.
        """
        return unloaded_cut(self.blank, self.groups, plan.kept, self.twin).model if plan.kept else self.blank

    def check_compaction(self, groups: Sequence[Group]) -> None:
        """Make sure that the modules of these groups can be cut in place.

        Raises:
            PlanError: they read their sizes from the configuration.
        """
        self._slots(tuple(sorted({g.family for g in groups})))

    def check_state(self, names: Sequence[str], optimizer: Optimizer) -> None:
        """Make sure that what an optimizer keeps can be cut with these groups, once it has made a step.

        Raises:
            PlanError: it cannot.
        """
        kept = {name: range(self.built.named(name).units - 1) for name in names}
        check_state(self.base, self.built, kept, optimizer)

    def restore(self, removed: PruningPlan, plan: PruningPlan) -> None:
        """Bring an uncut model to where another run was: what it had removed for good, and its `plan`."""
        if removed.kept and not self.removed.kept:
            self.mask(removed)
            self.compact()
        self.mask(plan)

    def logits(self) -> Tensor:
        """Logits of the model as it is now, on a few tokens."""
        return plain_logits(self.base, probe_ids(self.base))

    def assembled(self) -> tuple[PreTrainedModel, float]:
        """The cut model, adapters merged, of a class that loads it; and the largest difference of its logits.

        Raises:
            PlanError: no class expresses the cut, or its logits are not those of the masked model.
        """
        kept = self.plan.kept
        target = unloaded_cut(self.blank, self.groups, kept, self.twin)
        if target.scalings:
            raise PlanError(f"{type(self.base).__name__} computes scales from sizes that were cut: cut it untrained")
        tensors = dict(self._merged())
        model_class, config = type(target.model), target.model.config
        small = load_tensors(self.base, model_class, config, tensors, tied_names(self.groups, {})).eval()
        return small, self._compare(self.logits(), plain_logits(small, probe_ids(small)), model_class.__name__)

    def adapter(self) -> dict[str, Tensor]:
        """The active adapter alone, cut, as PEFT names its tensors; it fits the cut base without the merge."""
        from peft import get_peft_model_state_dict

        positions = self.built.kept_positions(self.masked.kept)
        found: dict[str, Tensor] = {}
        for name, tensor in get_peft_model_state_dict(self.model).items():
            path, marked, factor = name.removeprefix(PREFIX).partition(".lora_")
            if not marked:  # of the base, which peft saves along with some adapters
                for dim, keep in positions.get(path.replace(".base_layer.", "."), {}).items():
                    tensor = tensor.index_select(dim, torch.from_numpy(keep).to(tensor.device))
                found[name] = tensor.detach().cpu().contiguous()
                continue
            columns = input_dim(base_of(self.base.get_submodule(path)))
            for dim, keep in positions.get(f"{path}.weight", {}).items():
                if (dim == columns) == factor.startswith("A"):
                    along = 1 if dim == columns else 0
                    tensor = tensor.index_select(along, torch.from_numpy(keep).to(tensor.device))
            found[name] = tensor.detach().cpu().contiguous()
        return found

    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        """Name -> tensor of the base with adapters merged and masked units gone, one at a time."""
        positions = self.built.kept_positions(self.masked.kept)
        for name in self.groups.shapes:
            path, _, leaf = name.rpartition(".")
            module = self.base.get_submodule(path)
            is_matrix = leaf == "weight" and input_dim(base_of(module)) is not None
            tensor = merged(module, self.base.dtype) if is_matrix else getattr(base_of(module), leaf).detach()
            for dim, keep in positions.get(name, {}).items():
                tensor = tensor.index_select(dim, torch.from_numpy(keep).to(tensor.device))
            yield name, tensor

    def _slots(self, families: tuple[str, ...]) -> frozenset[tuple[str, str]]:
        reference = self.twin.reference
        with _own_chance():
            return attributes_to_follow(reference, sample_cut(reference.groups, set(families)))

    def _compare(self, wanted: Tensor, found: Tensor, what: str) -> float:
        """The largest difference; PlanError if it is beyond rounding."""
        wanted, found = wanted.float(), found.float()
        difference = float((found - wanted).abs().max())
        rounding = (
            torch.bfloat16 if packed_weights(self.base) else self.base.dtype
        )  # packed matrices multiply in few bits
        if not float((found - wanted).norm() / wanted.norm()) <= TOLERANCE[rounding]:
            raise PlanError(f"{what} does not compute what the masked model does: logits differ by {difference:.2g}")
        return difference


def merged(module: Any, unpacked: torch.dtype) -> Tensor:
    """The weight of a linear module with its adapters, if it has any, merged; as its base stores it.

    Args:
        unpacked: dtype in which a packed weight is returned.
    """
    weight = dense_weight(base_of(module))
    final = unpacked if packed_weights(base_of(module)) else weight.dtype
    if base_of(module) is module:
        return weight.to(final)
    total = weight.float() if weight.dtype != torch.float64 else weight.clone()
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            total = total + module.get_delta_weight(adapter).to(total)
    return total.to(final)


def _own_chance() -> AbstractContextManager[None]:
    """Random numbers for trials that leave those of the training as they are: it must not depend on what is cached."""
    return torch.random.fork_rng(devices=[])


def _check_layout(base: PreTrainedModel, uncut: PreTrainedModel) -> None:
    """Make sure that linear modules lie as those of the class do, which not all are that a library has packed."""
    for path, module in uncut.named_modules():
        dim = input_dim(module)
        if dim is not None and dim != input_dim(base_of(base.get_submodule(path))):
            raise PlanError(
                f"{path} is packed with rows and columns exchanged, so it cannot be pruned while it trains: load the "
                "float checkpoint"
            )


def _check_mergeable(base: PreTrainedModel, groups: Groups) -> None:
    """Make sure that all adapters are products B A on weights of their own."""
    for path, module in base.named_modules():
        layer: Any = module
        if not hasattr(module, "get_delta_weight"):
            continue
        wrong = (
            "lies on an embedding" if getattr(layer, "lora_embedding_A", None)
            else "has a bias of its own (lora_bias)" if any(getattr(layer, "lora_bias", {}).values())
            else "lies on a weight that is tied to the embedding" if f"{path}.weight" in groups.tied
            else None
        )  # fmt: skip
        if wrong:
            raise PlanError(f"the adapter of {path} {wrong}, which is not merged into a cut model: leave it out")


def blank(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the meta device, and not quantised."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return build_on_meta(type(model), config)
