"""The comparison of a proof in float32: what is proven in double precision must hold as most models are run.

Both sides are rounded to float32 and run there: the cut model, and the original under restricted reductions. Where the
original takes another path in float32 than when it was traced, its logits in double precision are what is compared
with. A difference above the limit is rounding only if the original itself, in float32, is as far from its own logits in
double precision.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from secateur.discovery.reference import Reference, plain_logits
from secateur.errors import DiscoveryError, first_line
from secateur.groups import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIMIT = 1e-5  # of the largest logit
ROUNDING = 4.0  # times what the original itself loses in float32


@dataclass(frozen=True)
class SingleDifference:
    """How far a cut model is from the original in float32.

    Attributes:
        largest: largest difference of logits, as a share of the largest logit; None if the cut model does not run.
        failure: why it does not hold there, or empty.
    """

    largest: float | None
    failure: str = ""


class SinglePrecision:
    """The original of the comparisons, in float32 (made and traced when first needed).

    Attributes:
        double: the model in float64 that proofs run on.
    """

    def __init__(self, double: Reference) -> None:
        self.double = double

    @cached_property
    def reference(self) -> Reference | None:
        try:
            return Reference(copy.deepcopy(self.double.model).float())
        except DiscoveryError:
            return None

    def difference(self, small: PreTrainedModel, kept: Kept) -> SingleDifference:
        """Compare a cut model, which is rounded in place."""
        original = self._original(kept)
        ids, wanted = original or self.double.without(kept)
        try:
            found = plain_logits(small.float(), ids)
        except Exception as error:  # sizes that only the forward pass refuses, each class in its own way
            return SingleDifference(None, f"the cut model does not run in float32: {first_line(error)}")
        off = _share(found, wanted)
        if off <= LIMIT or (original and off <= ROUNDING * self._rounding(kept, *original)):
            return SingleDifference(off)
        return SingleDifference(off, f"in float32 the logits differ by {off:.1e} of the largest, which is no rounding")

    def _original(self, kept: Kept) -> tuple[Tensor, Tensor] | None:
        """The ids and logits of the original in float32; None if it took another path than when it was traced."""
        if (reference := self.reference) is None:
            return None
        try:
            return reference.without(kept)
        except DiscoveryError:
            return None

    def _rounding(self, kept: Kept, ids: Tensor, logits: Tensor) -> float:
        """What the original itself loses in float32, infinite if it takes another path in double precision."""
        try:
            return _share(logits, self.double.logits(ids, kept))
        except DiscoveryError:
            return math.inf


def _share(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest logit, infinite where it is no number."""
    off = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    return off if math.isfinite(off) else math.inf
