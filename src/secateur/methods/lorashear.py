"""LoRAShear: structured pruning by LoRA half-space projected gradients (Chen et al. 2023, arXiv:2310.18356).

| paper | here |
| --- | --- |
| G, minimally removal structures | `Group`, from the traced computation, but those that `protect` names |
| [x]_g, frozen weights of a structure; A, B, gamma | `importance.displacement` |
| saliency by prespecified proxies | `importance.displacement.saliency` of `proxies` |
| T_w, P, T_p, K | `warmup` share of the run, `periods`, their length, the budget |
| lambda_g | `_lambda`: adaptive, as in OTOv2's code (Chen et al. 2023, arXiv:2303.06862) |
| epsilon of the half-space | `epsilon` |

1. Warm up A and B.
2. At the beginning of each of P periods: score what is left, and let the least important go until the budget's share
   (p + 1) / P is reached. They are redundant from now on, and the others important.
3. After every optimizer step of the period (t of T_p done), for redundant units:
   `half-space`: x~ = x + gamma B A - lambda x / |x|; zero where <x~, x> < epsilon |x|^2 (Eq. 2); B = 0.
   `linear`: x, its bias and B times (T_p - t - 1) / (T_p - t), as in the code its authors once published.
4. At the end of the period they are zero and masked, so that they stay so. `merge`: gamma B A is merged into all other
   weights, and B restarts from zero.
5. Train on with what is left (dynamic recovery is in `recovery/rounds.py`); cut, merge, compare with the masked model.

Where the paper is silent, ours: scores are taken before the merge, while there is a displacement; lambda is at least
|x| / (T_p - t), and what is left at the end of a period is projected to zero, so that every period ends in time; the
periods share the run between `warmup` and `cooldown` equally (Algorithm 4 divides K by T_p, which must be P).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from secateur.errors import BudgetError, PlanError
from secateur.importance.displacement import GUIDED, PROXIES, Displacement, displacement, producers, saliency
from secateur.importance.lora_guided import check_adapted
from secateur.packed import refuse_packed
from secateur.plan import PruningPlan
from secateur.recovery.gradual import GradualPruning, GradualSettings, budget_of
from secateur.recovery.guided import GuidedAverage
from secateur.surgery.live import LiveModel
from secateur.surgery.shrinking import (
    adapted_weights,
    check_clearable,
    merge_and_restart,
    producer_tensors,
    scale_units,
)

LEAST, FACTOR, MOST = 1e-2, 20.0, 1e3  # OTOv2's lambda_0, c and C for AdamW


@dataclass(frozen=True)
class LoRAShearSettings(GradualSettings):
    """Settings of one run.

    Attributes:
        push: how redundant units become zero: `half-space`, the paper's, or `linear`.
        proxies: whose mean is the saliency, any of `importance.displacement.PROXIES`; all but `guided` are the paper's.
        merge: merge gamma B A into the weights that stay at the end of every period, as the paper does; without it, at
            the end of the run only.
        periods: P.
        warmup: share of the run before the first period.
        cooldown: share of the run after the last one.
        epsilon: of the half-space, in [0, 1); larger ones project sooner.
    """

    push: Literal["half-space", "linear"] = "half-space"
    proxies: tuple[str, ...] = (GUIDED,)
    merge: bool = False
    periods: int = 10
    warmup: float = 0.1
    cooldown: float = 0.5
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of("push", ("half-space", "linear"))
        if not 0 <= self.epsilon < 1:
            raise BudgetError(f"epsilon is {self.epsilon}; expected a number in [0, 1)")
        if not self.proxies or set(self.proxies) - set(PROXIES):
            raise BudgetError(f"proxies are {list(self.proxies)}; expected one or more of {', '.join(PROXIES)}")


class LoRAShear(GradualPruning):
    """Pushes redundant units of the base to zero while any transformers or TRL trainer trains its LoRA adapters.

    >>> pruning = LoRAShear(sparsity=0.2)
    >>> trainer.add_callback(pruning)
    >>> trainer.train()
    >>> small = pruning.finish().model

    Args:
        sparsity: share of all parameters of the base to remove; or give a `budget` in `settings`.
        settings: any of `LoRAShearSettings`.

    Raises:
        BudgetError: no budget, or two, or warm-up and cool-down leave no time for the periods.
    """

    name = "lorashear"
    settings: LoRAShearSettings

    def __init__(self, sparsity: float | None = None, **settings: Any) -> None:
        super().__init__(LoRAShearSettings(budget_of("LoRAShear", sparsity, settings), **settings))
        s = self.settings
        if s.warmup < 0 or s.cooldown < 0 or s.warmup + s.cooldown >= 1 or s.periods < 1:
            raise BudgetError(
                f"{s.periods} periods between a warm-up of {s.warmup} and a cool-down of {s.cooldown}: expected one "
                "period or more, and shares of the run from 0 up and below 1 together"
            )
        self.redundant: dict[str, Tensor] = {}
        self.average = GuidedAverage()
        self._state_checked = False

    def last_cut(self, steps: int) -> int:
        return self._begins(steps)[-1]

    @property
    def adapter_alone(self) -> bool:
        return not self.settings.merge

    def check(self, live: LiveModel, chosen: Any) -> None:
        """Refuse packed weights, adapters that are no plain LoRA, and units that no weight puts out."""
        refuse_packed(live.base, "pushed to zero", PlanError)
        check_adapted(live.base, chosen)
        for group in chosen:
            producers(group)
        if GUIDED in self.settings.proxies:
            self.average.prepare(live, tuple(g.name for g in chosen))

    def check_steps(self, steps: int) -> None:
        if len(set(self._begins(steps))) <= self.settings.periods:
            raise BudgetError(
                f"{self.settings.periods} periods do not fit into {steps} steps with a warm-up of "
                f"{self.settings.warmup} and a cool-down of {self.settings.cooldown}: train longer, or take fewer"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        assert self.live is not None
        if self.average.values and state.global_step < self._begins(state.max_steps)[-2]:
            self.average.update(self.live, optimizer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Steps 2 to 4."""
        assert self.live is not None
        begins, step = self._begins(state.max_steps), state.global_step
        if optimizer is not None and optimizer.state and not self._state_checked:  # there is a state after a step
            check_clearable(self.live.base, [self.live.groups.named(n) for n in self.candidates], optimizer)
            self._state_checked = True
        if begins[0] < step <= begins[-1]:
            last = next(begin for begin in begins if begin >= step)
            self._push(last - step, optimizer)
        if step not in begins:
            return
        period = begins.index(step)
        scores = self._scores() if period < self.settings.periods else {}
        if period:
            self._end_period(step, period)
        if scores:
            self._begin_period(period, scores)

    def _begins(self, steps: int) -> list[int]:
        """Steps after which the periods begin, and after which the last one has ended."""
        s = self.settings
        first, last = max(1, round(steps * s.warmup)), round(steps * (1 - s.cooldown))
        return [first + round((last - first) * p / s.periods) for p in range(s.periods + 1)]

    def _scores(self) -> dict[str, Tensor]:
        assert self.live is not None
        groups = self.live.groups
        found = {n: displacement(self.live.base, groups.named(n)) for n in self.candidates}
        return saliency(found, self.settings.proxies, self.average.values)

    def _begin_period(self, period: int, scores: Mapping[str, Tensor]) -> None:
        """Step 2."""
        assert self.live is not None
        s, now = self.settings, self.live.plan
        share = s.final * (period + 1) / s.periods
        plan = self.planned(share, scores, settle=period + 1 == s.periods)
        for name in plan.kept:
            going = set(plan.removed(name)) - set(now.removed(name) if name in now.kept else ())
            if going:
                self.redundant[name] = torch.tensor(sorted(going))

    def _push(self, steps_left: int, optimizer: Any) -> None:
        """Step 3, with so many steps of the period to come."""
        assert self.live is not None
        for name, units in self.redundant.items():
            group = self.live.groups.named(name)
            factors = torch.ones(group.units, dtype=torch.float64)
            if self.settings.push == "linear" or not steps_left:
                factors[units] = steps_left / (steps_left + 1)
            else:
                found = displacement(self.live.base, group)
                factors[units] = self._half_space(found, steps_left + 1).cpu().double()[units]
            scale_units(self.live.base, group, factors, optimizer, absorb=self.settings.push == "half-space")

    def _half_space(self, found: Displacement, steps_left: int) -> Tensor:
        """What Eq. 2 multiplies each unit by before gamma B A is added, 0 where the half-space is left; [units]."""
        norm = found.squared.sqrt()
        strength = torch.maximum(_lambda(found), norm / steps_left)
        inner = found.squared + found.along - strength * norm
        stays = inner >= self.settings.epsilon * found.squared
        return torch.where(stays & (norm > 0), 1 - strength / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)

    def _end_period(self, step: int, period: int) -> None:
        """Step 4."""
        assert self.live is not None
        gone = {name: set(units.tolist()) for name, units in self.redundant.items()}
        now, kept, units = self.live.plan, dict(self.live.plan.kept), dict(self.live.plan.units)
        for name, going in gone.items():
            count = self.live.groups.named(name).units
            left = now.kept.get(name, range(count))
            kept[name], units[name] = tuple(u for u in left if u not in going), count
        self.live.mask(PruningPlan(kept, units))
        self.redundant = {}
        if self.settings.merge:
            merge_and_restart(self.live.base)
        last = period == self.settings.periods
        self.note(step, self.settings.final if last else self.settings.final * period / self.settings.periods)

    def tensors(self) -> dict[str, Tensor]:
        """The frozen weights as they are by now, and which units are on their way."""
        found = {"redundant." + name: units for name, units in self.redundant.items()}
        found |= {"average." + name: values for name, values in self.average.values.items()}
        return found | {"base." + name: tensor.detach() for name, tensor in self._changing().items()}

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        changing = self._changing()
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "redundant":
                self.redundant[name] = tensor
            elif kind == "average":
                self.average.values[name] = tensor
            else:
                changing[name].data.copy_(tensor)

    def _changing(self) -> dict[str, Tensor]:
        """The frozen tensors that this run changes."""
        assert self.live is not None
        found = producer_tensors(self.live.base, [self.live.groups.named(name) for name in self.candidates])
        return found | (adapted_weights(self.live.base) if self.settings.merge else {})


def _lambda(found: Displacement) -> Tensor:
    """OTOv2's adaptive strength with the displacement as minus the gradient, [units].

    Where the displacement lengthens x, the least strength that does not let it is <x, gamma B A> / |x|, and that which
    just turns it around |gamma B A|^2 |x| / <x, gamma B A>.
    """
    norm, grows = found.squared.sqrt(), found.along > 0
    tiny = torch.finfo(norm.dtype).tiny
    low = found.along / norm.clamp_min(tiny)
    high = found.moved * norm / found.along.clamp_min(tiny)
    strength = (FACTOR * low).clamp(LEAST, MOST * LEAST)
    strength = torch.where(strength >= high, (low + high) / 2, strength)
    return torch.where(grows, strength, torch.full_like(norm, LEAST))
