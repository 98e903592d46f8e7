"""What a cut must respect: layers to leave whole, widths to round to, shares asked for, what the class can have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from secateur.errors import BudgetError
from secateur.groups import Kept

Feasible = Callable[[str, int], bool]


@dataclass(frozen=True)
class Limits:
    """What a cut must respect.

    Attributes:
        uniform: every layer keeps the same number of units of each kind, which ones may differ; what stock model
            classes load. Under global ranking the k-th least important units of all layers then go together.
        round_to: FFN channels and hidden dimensions that are cut keep a multiple of this.
        protect_first, protect_last: decoder layers at either end that are not cut (nor removed, nor their sublayers).
        protect: names of groups that are not cut at all (nor removed with the layer or sublayer they lie in), such as
            those of `Knowledge.most_sensitive`.
        layer_ratios: layer number -> share of the units of its groups to remove, instead of what the ranking would
            give it; overrides protection.
        kind_ratios: kind -> share of the units of its groups to remove, rounded to the nearest count possible; the
            other kinds meet the budget.
        feasible: for uniform output, (family, units kept in every layer) -> whether the model's class can express it;
            it is taken to express what it is.
        ties: for uniform output, families that the model's class can only cut by the same share.
        multiples: family -> a number that the units kept of its groups must be a multiple of, so that the class runs.
        beyond: what an earlier plan keeps; nothing else may stay.

    Raises:
        BudgetError: a number is out of range.
    """

    uniform: bool = True
    round_to: int = 1
    protect_first: int = 0
    protect_last: int = 0
    protect: Collection[str] = ()
    layer_ratios: Mapping[int, float] | None = None
    kind_ratios: Mapping[str, float] = field(default_factory=dict)
    feasible: Feasible | None = None
    ties: Sequence[Sequence[str]] = ()
    multiples: Mapping[str, int] = field(default_factory=dict)
    beyond: Kept = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise BudgetError(f"round_to is {self.round_to}; expected 1 (no rounding) or more")
        if self.protect_first < 0 or self.protect_last < 0:
            raise BudgetError("protect_first and protect_last count layers; they cannot be negative")
        for layer, share in (self.layer_ratios or {}).items():
            if not 0 <= share < 1:
                raise BudgetError(f"layer_ratios asks for a share of {share} in layer {layer}; expected [0, 1)")
        check_shares(self.kind_ratios)

    def expressible(self, family: str, count: int) -> bool:
        """Whether the model's class can be configured for so many units in every layer."""
        return not self.uniform or self.feasible is None or self.feasible(family, count)


def check_shares(kind_ratios: Mapping[str, float], kinds: Collection[str] = ()) -> None:
    """Make sure that the shares asked of kinds are fractions, and are asked of what is pruned.

    Args:
        kinds: that are pruned, if they are named.

    Raises:
        BudgetError: one lies outside [0, 1), or is asked of another kind.
    """
    if kinds and (others := [kind for kind in kind_ratios if kind not in kinds]):
        raise BudgetError(f"a share is asked of {others[0]}, which is not among the kinds to prune: add it to them")
    for kind, share in kind_ratios.items():
        if not 0 <= share < 1:
            raise BudgetError(
                f"{kind}={share:g}: the share of units to remove must lie in [0, 1); {kind}=0.25 removes a quarter"
            )
