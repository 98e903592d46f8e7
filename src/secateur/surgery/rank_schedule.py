"""When components leave an adapter, and how many: K1 and K2 of PrunedLoRA (arXiv:2510.00192), or a cubic curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from secateur.errors import BudgetError
from secateur.importance.components import ComponentCriterion
from secateur.schedules import cubic
from secateur.surgery.component_pruning import Keep, Pruner

DEFAULT = ComponentCriterion()
Scope = Literal["adapter", "global"]


@dataclass(frozen=True)
class PrunedLoRASettings:
    """Settings of one run.

    Attributes:
        target_rank: of every module in the end, or of the average module.
        every: optimizer steps between two removals (K1).
        components: to remove from each module, or from the average module, each time (K2); if not given, the rank
            falls on a cubic curve.
        scope: `adapter` gives every module the same rank; `global` removes what costs least, wherever it is.
        floor: least rank of a module with a global budget.
        warmup, cooldown: shares of the run before and after the cubic curve.
        keep: what of a module stays when its rank falls: `scale`, or `alpha`, so that its scale alpha / r grows and its
            factors shrink; it computes the same, and what is left learns faster.
        adapter: name of the adapter to prune; the active one if not given.
        criterion: which components go, and how the others change.
    """

    target_rank: int
    every: int = 10
    components: int | None = None
    scope: Scope = "adapter"
    floor: int = 1
    warmup: float = 0.1
    cooldown: float = 0.7
    keep: Keep = "alpha"
    adapter: str | None = None
    criterion: ComponentCriterion = DEFAULT

    def __post_init__(self) -> None:
        if self.target_rank < 1 or self.every < 1 or not 1 <= self.floor <= self.target_rank:
            raise BudgetError(
                f"target rank {self.target_rank}, every {self.every}, floor {self.floor}: expected at least 1 each, "
                "and a floor not above the target"
            )
        if self.components is not None and self.components < 1:
            raise BudgetError(f"components={self.components}: at least 1 must go each time; leave it out for a curve")
        cubic(0, 1, 0.0, warmup=self.warmup, cooldown=self.cooldown)  # checks the shares

    def due(self, step: int, steps: int) -> bool:
        """Whether components may go at this step; on the curve at any after its end, should a removal have failed."""
        return step % self.every == 0 or (self.components is None and step >= steps * (1 - self.cooldown))

    def wanted(self, pruner: Pruner, step: int, steps: int) -> dict[str, int]:
        """How many components to remove from each module, for the schedule to be met after `step` of `steps`."""
        if self.components is None:
            share = 2 * cubic(step, steps, 0.5, warmup=self.warmup, cooldown=self.cooldown)
            return self.excess(pruner, part(share))
        each = self.components * (step // self.every)
        return self.excess(pruner, lambda excess, width: min(each * width, excess))

    def excess(self, pruner: Pruner, gone: Callable[[int, int], int]) -> dict[str, int]:
        """How many components to remove from each module.

        Args:
            gone: how many must be gone by now, from how many must go in the end and the number of modules they are of.
        """
        now, first = pruner.ranks, pruner.initial
        if self.scope == "global":
            total = sum(first.values())
            left = total - gone(max(0, total - self._total(now)), len(now))
            return pruner.cheapest(sum(now.values()) - left, self.floor)
        left_of = {name: rank - gone(max(0, rank - self.target_rank), 1) for name, rank in first.items()}
        return {name: rank - left_of[name] for name, rank in now.items() if rank > left_of[name]}

    def reached(self, ranks: Mapping[str, int]) -> bool:
        """Whether the target is."""
        if self.scope == "global":
            return sum(ranks.values()) <= self._total(ranks)
        return max(ranks.values()) <= self.target_rank

    def check_larger(self, ranks: Mapping[str, int]) -> None:
        """Make sure that there is something to remove.

        Raises:
            BudgetError: the adapter has the target rank already.
        """
        if self.reached(ranks):
            have = f"no module of more than rank {max(ranks.values())}"
            if self.scope == "global":
                have = f"an average rank of {sum(ranks.values()) / len(ranks):g}"
            raise BudgetError(
                f"the adapter has {have}, and {self.target_rank} is to be left, so that nothing would be removed: ask "
                "for a lower target rank, or start from a larger rank"
            )

    def check_reach(self, ranks: Mapping[str, int], steps: int) -> None:
        """Make sure that K1 and K2 lead to the target.

        Raises:
            BudgetError: they do not.
        """
        if self.components is None:
            return
        initial = max(ranks.values()) if self.scope == "adapter" else sum(ranks.values()) / len(ranks)
        if (end := initial - self.components * (steps // self.every)) > self.target_rank:
            raise BudgetError(
                f"{self.components} components every {self.every} steps bring rank {initial:g} to {end:g} in {steps} "
                f"steps, not to {self.target_rank}: train longer, remove more each time, or leave out components, for "
                "a curve that gets there"
            )

    def _total(self, ranks: Mapping[str, int]) -> int:
        """Components in the end, with a global budget."""
        return self.target_rank * len(ranks)


def part(share: float) -> Callable[[int, int], int]:
    """This share of what must go, whatever the number of modules."""
    return lambda excess, width: round(share * excess)


def record(step: int, ranks: Mapping[str, int], cost: float = 0.0) -> dict[str, Any]:
    """One row of a history: the ranks after a removal, and what it costs by the criterion's own estimate.

    Where they differ, all ranks are told, in the order of the modules.
    """
    sizes = ranks.values()
    mean = sum(sizes) / len(sizes)
    row = {"step": step, "mean": mean, "least": min(sizes), "most": max(sizes), "cost": cost}
    return row | ({"ranks": list(sizes)} if row["least"] < row["most"] else {})
