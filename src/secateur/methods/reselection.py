"""Units chosen again, block by block: each block is scored in the model whose earlier blocks are cut and solved.

Optimal Brain Surgeon (Hassibi and Stork 1992) takes one weight, solves the others again and looks anew. Here the step
is a block: the plan says how many units of each group stay, and which these are is decided when all before it is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import groupby

from torch import Tensor

from secateur.groups import Group, Groups
from secateur.plan import PruningPlan

Scored = Callable[[Sequence[Group]], Mapping[str, Tensor]]
Held = Callable[[PruningPlan], AbstractContextManager[object]]


def reselected(plan: PruningPlan, groups: Groups, scored: Scored, held: Held) -> PruningPlan:
    """A plan of the same widths; groups that span layers keep the units that they had.

    1. Of the first block that loses units, score the groups in the model as it is.
    2. Of each group those units stay that score highest, as many as in `plan`.
    3. Cut the block, solve what reads it again for what it put out itself, and go on with the next.

    Args:
        scored: importance of the units of some groups in the model as it is [units], higher = keep.
        held: a context in which the model is cut by a plan besides what it was cut by before.
    """
    kept, new = dict(plan.kept), dict[str, tuple[int, ...]]()
    inside = sorted((g for g in groups if g.name in kept and g.layer is not None), key=lambda g: g.layer or 0)
    with ExitStack() as earlier:
        for _, block in groupby(inside, key=lambda g: g.layer):
            if new:
                earlier.enter_context(held(PruningPlan(new, {name: plan.units[name] for name in new})))
            together = list(block)
            scores = scored(together)
            new = {g.name: _best(g, scores[g.name], len(kept[g.name])) for g in together}
            kept |= new
    return PruningPlan(kept, plan.units, plan.provenance)


def _best(group: Group, scores: Tensor, number: int) -> tuple[int, ...]:
    """The units of the highest scores, of equal ones the last, ascending; those that must stay come first."""
    values = scores.double().clone()
    values[list(group.stays)] = math.inf
    return tuple(sorted(values.argsort(stable=True)[len(values) - number :].tolist()))
