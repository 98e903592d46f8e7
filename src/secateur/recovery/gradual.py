"""What methods have in common that prune while a trainer trains: a callback that masks more and more, and then cuts.

A method decides when units go and which are worth most; here is how they go: the budget met in parameters or units,
masks that are never lifted, a state in the Trainer's checkpoints to go on from, the cut and merged model at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.allocation import Budget, allocate
from secateur.errors import BudgetError, CheckpointError, PlanError
from secateur.groups import Group
from secateur.importance.summary import summary
from secateur.packed import ready_to_train
from secateur.plan import PruningPlan
from secateur.surgery import select
from secateur.surgery.live import LiveModel


@dataclass(frozen=True)
class GradualSettings:
    """What every such method is told.

    Attributes:
        budget: what must be removed in the end.
        kinds: what to prune; FFN channels and heads if empty.
        ranking: `local` removes the same share everywhere, `global` the least important per parameter.
        uniform: the same widths in every layer, so that stock classes load the result.
        round_to: make channel counts multiples of this.
        width_multiple: make the widths of all matrices that are cut multiples of this, those of heads among them.
        protect_first, protect_last: layers at the start and at the end to leave whole.
        protect: names of groups to leave whole, such as those a knowledge distribution finds most sensitive.
    """

    budget: Budget
    kinds: tuple[str, ...] = ()
    ranking: Literal["local", "global"] = "local"
    uniform: bool = True
    round_to: int = 1
    width_multiple: int = 1
    protect_first: int = 0
    protect_last: int = 0
    protect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.one_of("ranking", ("local", "global"))

    def one_of(self, name: str, choices: Sequence[str]) -> None:
        """Make sure that a setting is one of its choices.

        Raises:
            BudgetError: it is not.
        """
        if (value := getattr(self, name)) not in choices:
            raise BudgetError(f"{name} is {value!r}; expected one of {', '.join(choices)}")

    @property
    def final(self) -> float:
        """The share to be gone at the end, of parameters or of units."""
        share = self.budget.param_sparsity if self.budget.unit_sparsity is None else self.budget.unit_sparsity
        assert share is not None
        return share


@dataclass(frozen=True)
class GradualResult:
    """What a run leaves.

    Attributes:
        model: cut, with the adapters merged.
        plan: units kept.
        difference: largest difference of its logits from those of the masked model.
        shares: what went of each kind.
        left_whole: family -> why it was not pruned.
        importance: how the scores of each group were spread when the first units went.
        groups: those that could lose units.
    """

    model: PreTrainedModel
    plan: PruningPlan
    difference: float
    shares: Mapping[str, Any]
    left_whole: Mapping[str, str]
    importance: Sequence[Mapping[str, Any]]
    groups: Sequence[Group]


def budget_of(name: str, sparsity: float | None, settings: dict[str, Any]) -> Budget:
    """The budget among a method's arguments, of which it is taken out.

    Raises:
        BudgetError: there is none, or there are two.
    """
    if (sparsity is None) == ("budget" not in settings):
        raise BudgetError(f"say how much to remove, once: {name}(sparsity=0.5) or {name}(budget=Budget(...))")
    given: Budget | None = settings.pop("budget", None)
    return given or Budget(sparsity)


class GradualPruning(TrainerCallback):  # type: ignore[misc]
    """Prunes the base of a `PeftModel` while any transformers or TRL trainer trains its LoRA adapters.

    Attributes:
        name: of the method.
        history_of: what trackers call the figures in the history.
        settings: of the run.
        live: the model in training; None before `prepare`.
        history: step, share asked for and sparsity reached, whenever units went.
        left_whole: family -> why it is not pruned.
        shares: what has gone of each kind.
        importance: how the scores of each group were spread when the first units went.
        candidates: names of the groups that are pruned.
        accept: told before training of a cut model, without weights, of the final size; raises what it has against it.
    """

    name: ClassVar[str]
    history_of: ClassVar[str] = "pruning"
    settings: GradualSettings

    def __init__(self, settings: GradualSettings) -> None:
        self.settings = settings
        self.live: LiveModel | None = None
        self.history: list[dict[str, float]] = []
        self.left_whole: dict[str, str] = {}
        self.shares: dict[str, Any] = {}
        self.importance: list[dict[str, Any]] = []
        self.candidates: tuple[str, ...] = ()
        self.accept: Callable[[PreTrainedModel], None] = lambda model: None

    def prepare(self, model: Any, checkpoint: Path | str | None = None) -> None:
        """Find out what can be pruned, and bring a model to where the run was that left `checkpoint`.

        The Trainer's start does this by itself. Call it before the Trainer is made to resume a run with compaction,
        whose checkpoint holds factors of fewer rows and columns than a fresh model.

        Raises:
            PlanError: nothing can be pruned, or nothing of a kind asked for by name, or the method cannot prune it.
            BudgetError: the budget is out of reach, or other settings contradict it.
        """
        live, s = LiveModel(model), self.settings
        kinds = s.kinds or live.groups.kinds_in_blocks()
        can = live.possible(kinds, uniform=s.uniform).in_multiples(live.groups.of_kinds(kinds), s.width_multiple)
        chosen, refused = select(live.blank, live.groups, kinds, can, named=s.kinds, uniform=s.uniform)
        self.check(live, chosen)
        self.live, self.left_whole, self.can = live, refused, can
        self.candidates = tuple(g.name for g in chosen)
        self._try(live)
        if checkpoint is not None:
            self._load(Path(checkpoint) / self._file)

    def _try(self, live: LiveModel) -> None:
        """Make a cut of the final size on paper: what is wrong with the budget is told before training, not after."""
        self.accept(live.check_cut(self.planned(self.settings.final, zeros(live, self.candidates), settle=True)))
        self.shares, self.importance = {}, []

    def check_steps(self, steps: int) -> None:
        """Make sure that the schedule fits into a run of so many steps.

        Raises:
            BudgetError: it does not.
        """

    def last_cut(self, steps: int) -> int:
        """The step after which no more units go, of a run of so many steps."""
        raise NotImplementedError

    def check(self, live: LiveModel, chosen: Any) -> None:
        """Refuse models that the method cannot prune; `chosen` are the groups.

        Raises:
            PlanError: says why.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What the method must remember besides the masks, for checkpoints."""
        return {}

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        for what in ("fsdp", "deepspeed"):
            if getattr(args, what, None):
                raise PlanError(f"{what} keeps parts of the model elsewhere, where units cannot be cut: switch it off")
        if args.load_best_model_at_end:
            raise PlanError(
                "load_best_model_at_end would put adapters of another sparsity into the pruned model: leave it out"
            )
        self.check_steps(state.max_steps)
        if self.live is None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.prepare(model, checkpoint if state.global_step else None)
        elif self.live.model is not model:
            kind = type(self).__name__
            raise PlanError(f"this {kind} was prepared for another model; make a new one for this training")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        ready_to_train(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and self.live is not None and state.is_world_process_zero:
            plans = {"removed": self.live.removed.to_json(), "plan": self.live.plan.to_json()}
            facts = {**plans, "history": json.dumps([self.history, self.shares])}
            facts["importance"] = json.dumps(self.importance)
            save_file({n: t.contiguous() for n, t in self.tensors().items()}, folder / self._file, facts)

    def finish(self) -> GradualResult:
        """The cut and merged model.

        Raises:
            PlanError: the run has not reached its sparsity, or the cut model is not the masked one.
        """
        if self.live is None or not self.history:
            raise PlanError("nothing has been pruned yet: train with this callback first")
        if (reached := self.history[-1]["share"]) < (final := self.settings.final):
            raise PlanError(f"training ended at a share of {reached:.4g}, before the {final:g} asked for: let it go on")
        model, difference = self.live.assembled()
        plan = self.live.plan
        names = [g.name for g in self.live.groups if g.name in plan.kept]  # in one order, also after a kill
        kept, units = {n: plan.kept[n] for n in names}, {n: plan.units[n] for n in names}
        facts = asdict(self.settings) | {"budget": self.settings.budget.as_dict(), "sparsity": self.sparsity}
        cut = PruningPlan(kept, units, {self.name: facts})
        return GradualResult(model, cut, difference, self.shares, self.left_whole, self.importance, self._groups)

    @property
    def adapter_alone(self) -> bool:
        """Whether what the run learnt lies in the adapter alone, and none of it in the weights that stay."""
        return True

    def save_adapter(self, folder: Path) -> None:
        """Write the cut adapter alone as a PEFT folder; it belongs to the base cut by the same plan, nothing merged.

        Raises:
            PlanError: a part of what was learnt has been merged into the base.
        """
        assert self.live is not None
        if not self.adapter_alone:
            raise PlanError(
                f"{self.name} merged adapters into the weights that stay (merge=true), so the last one alone is of no "
                "use: take the whole model"
            )
        tensors = self.live.adapter()
        folder.mkdir(parents=True)
        (name,) = self.live.model.active_adapters
        self.live.model.peft_config[name].save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    @property
    def _groups(self) -> list[Group]:
        assert self.live is not None
        return [self.live.groups.named(name) for name in self.candidates]

    @property
    def sparsity(self) -> float:
        """Share of the base's parameters that are masked or removed."""
        assert self.live is not None
        return self._sparsity(self.live.plan)

    def planned(self, share: float, scores: Mapping[str, Tensor], *, settle: bool) -> PruningPlan:
        """What has gone already and more, until this share of the uncut model has.

        Args:
            share: of parameters or of units, as the budget counts.
            scores: importance of each unit of the uncut model, higher = keep; of those that are gone, anything finite.
            settle: as for `allocate`.
        """
        assert self.live is not None
        s = self.settings
        if not self.sparsity:
            self.importance = summary(self._groups, scores)
        plan = allocate(
            self.live.groups,
            scores,
            Budget(share) if s.budget.unit_sparsity is None else Budget(unit_sparsity=share),
            ranking=s.ranking,
            uniform=s.uniform,
            round_to=s.round_to,
            protect_first=s.protect_first,
            protect_last=s.protect_last,
            protect=s.protect,
            feasible=self.can.feasible,
            ties=self.can.ties,
            multiples=self.can.multiples,
            beyond=self.live.plan,
            settle=settle,
        )
        self.shares = plan.provenance["allocation"]["shares"]
        return PruningPlan(plan.kept, plan.units)

    def note(self, step: int, share: float) -> None:
        """Write down what has gone by now."""
        self.history.append({"step": step, "share": share, "sparsity": self.sparsity})

    def _sparsity(self, plan: PruningPlan) -> float:
        assert self.live is not None
        groups = self.live.groups
        return 1 - groups.remaining_parameters(plan.kept) / groups.total_parameters

    @property
    def _file(self) -> str:
        """Beside the Trainer's own files in a checkpoint."""
        return f"{self.name}.safetensors"

    def _load(self, file: Path) -> None:
        assert self.live is not None
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, so this run of {type(self).__name__} cannot go on; if its checkpoint lies "
                "elsewhere, call prepare(model, checkpoint) before the Trainer is made"
            )
        with safe_open(file, "pt") as stored:
            facts = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        self.history, self.shares = json.loads(facts["history"])
        self.importance = json.loads(facts.get("importance", "[]"))
        self.live.restore(PruningPlan.from_json(facts["removed"]), PruningPlan.from_json(facts["plan"]))
        self.remember(tensors)


def zeros(live: LiveModel, names: tuple[str, ...]) -> dict[str, Tensor]:
    """A score of 0 for every unit of these groups."""
    return {name: torch.zeros(live.groups.named(name).units) for name in names}
