"""Knowledge distribution analysis of LoRAShear (Chen et al. 2023, arXiv:2310.18356, Alg. 3).

| paper | here |
| --- | --- |
| node groups, composed and basic | `Group`s of the chosen kinds, FFN channels and heads by default |
| P, the ratios each group is pruned at, alone | `ratios` |
| the proxy that chooses what goes | `scores`, or weight magnitude |
| deviation on the evaluation data | loss and perplexity beside the dense ones, `Knowledge.difference` and `ratio` |
| restore | bit for bit, after each measurement |
| the worst share gamma becomes unprunable | `Knowledge.most_sensitive(gamma)`, `secateur prune --knowledge` |

The paper names no ratios, proxy, evaluation data or gamma. Our choices: 0.25, 0.5 and 0.75 of the units (those of the
authors' HESSO-CRIC code); the sum of squared weights, which needs no data; non-overlapping windows of 128 tokens from
the beginning of a text; and a tenth of the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.data import Corpus
from secateur.discovery import discover
from secateur.errors import DataError, KnowledgeError, NonFiniteError, PlanError
from secateur.evaluation.alone import Alone
from secateur.evaluation.distribution import Knowledge, Trial
from secateur.evaluation.passes import Passes
from secateur.evaluation.perplexity import Perplexity, Window, tokens_of, windows_of
from secateur.evaluation.removing import losses_without
from secateur.groups import Group, Groups
from secateur.importance import Magnitude, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RATIOS = (0.25, 0.5, 0.75)
Losses = Mapping[tuple[str, int], float]  # (group, units removed) -> nats per token


@torch.no_grad()
def knowledge_distribution(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    *,
    groups: Groups | None = None,
    kinds: Sequence[str] = (),
    ratios: Sequence[float] = RATIOS,
    scores: Mapping[str, Tensor] | None = None,
    seq_len: int = 128,
    samples: int | None = 64,
    batch_size: int = 8,
    cached: bool = True,
    known: Losses | None = None,
    on_loss: Callable[[str, int, float], None] = lambda group, removed, loss: None,
    protocol: Mapping[str, Any] | None = None,
) -> Knowledge:
    """Cut every group alone, measure the loss on a text, and restore it.

    Of a group with u units, a ratio removes the u x ratio least important ones, rounded, at least one; units that must
    stay stay. Ratios that come to the same number are measured once. Costs a pass over the windows for each group and
    number, from the layer of the group onward where that gives the same (see `Passes`).

    Args:
        groups: of the model; discovered if not given.
        kinds: kinds of groups to cut; FFN channels and heads if empty. Of one that is named something must be prunable.
        scores: group name -> importance of each unit [units], higher = keep; squared weights (`Magnitude`) if None.
        seq_len: tokens of a window.
        samples: windows from the beginning of the text; None for all.
        batch_size: windows per forward pass.
        cached: False for whole passes everywhere.
        known: losses that were measured before, which are not measured again.
        on_loss: told every loss that is measured: group, units removed, nats per token.
        protocol: facts to record beside those known here.

    Raises:
        KnowledgeError: ratios outside (0, 1), or nothing to cut.
        DataError: the text is shorter than a window, or windows are longer than the model's positions.
        NonFiniteError: a loss is NaN or infinite.
    """
    check_ratios(ratios)
    groups = groups or discover(model)
    chosen = groups_to_cut(groups, kinds)
    batches = windows_in_batches(model, tokenizer, corpus, seq_len, samples, batch_size)
    training = model.training
    model.eval()
    try:
        alone = Alone(model, groups, list(dict.fromkeys(g.kind for g in chosen)))
        cuts, left_out = _cuts(chosen, ratios, scores or score(model, chosen, [], Magnitude()), alone)
        passes = Passes(model, groups, chosen, batches, cached=cached)
        if not math.isfinite(passes.dense):
            raise NonFiniteError(
                f"the loss on {corpus.source} is {passes.dense} before anything is cut; check the dtype"
            )
        losses = _measured(passes, alone, cuts, dict(known or {}), left_out, on_loss)
    finally:
        model.train(training)
    trials = tuple(
        Trial(
            cut.group.name, cut.group.kind, cut.group.layer, ratio, cut.group.units, len(cut.removed), losses[cut.key]
        )
        for cut in cuts
        if cut.group.name not in left_out
        for ratio in cut.ratios
    )
    if not trials:
        raise KnowledgeError(f"no group can be cut alone: {next(iter(left_out.values()))}")
    facts = {
        "kinds": list(dict.fromkeys(g.kind for g in chosen)),
        "ratios": list(ratios),
        "proxy": "l2" if scores is None else "scores that were given",
        "windows": sum(map(len, batches)),
        "batch_size": batch_size,
    }
    dense = dense_of_windows(passes, model, corpus, seq_len)
    sliced = tuple(dict.fromkeys(c.group.family for c in cuts if c.group.family not in alone.masked))
    return Knowledge(
        dense, trials, {**facts, **(protocol or {})}, passes.from_cache, passes.note, sliced, dict(left_out)
    )


@dataclass(frozen=True)
class Cut:
    """Units of one group that go together, and the ratios that come to their number."""

    group: Group
    removed: tuple[int, ...]
    ratios: tuple[float, ...]

    @property
    def key(self) -> tuple[str, int]:
        return self.group.name, len(self.removed)


def dense_of_windows(passes: Passes, model: PreTrainedModel, corpus: Corpus, seq_len: int) -> Perplexity:
    """What the whole model makes of the windows."""
    value, dtype = math.exp(min(passes.dense, 700.0)), str(model.dtype).removeprefix("torch.")
    return Perplexity(value, passes.dense, passes.tokens, seq_len, None, False, corpus.name, corpus.sha256, dtype)


def check_ratios(ratios: Sequence[float]) -> None:
    """Make sure that ratios can be cut at.

    Raises:
        KnowledgeError: there is none, one lies outside (0, 1), or they do not ascend.
    """
    if not ratios or not all(0 < r < 1 for r in ratios) or list(ratios) != sorted(set(ratios)):
        given = ", ".join(f"{r:g}" for r in ratios) or "nothing"
        raise KnowledgeError(
            f"ratios are {given}; expected shares between 0 and 1 in ascending order, as 0.25,0.5,0.75"
        )


def groups_to_cut(groups: Groups, kinds: Sequence[str]) -> tuple[Group, ...]:
    """The prunable groups of these kinds, of FFN channels and heads if none is named.

    Raises:
        KnowledgeError: there is none, or none of a kind that was named.
    """
    sets: list[tuple[str, ...]] = [(kind,) for kind in kinds]
    for wanted in sets or [groups.kinds_in_blocks()]:
        if groups.of_kinds(wanted):
            continue
        reasons = [f"{g.name}: {g.refusals[0]}" for g in groups if g.kind in wanted and not g.prunable]
        others = ", ".join(sorted({g.kind for g in groups.prunable})) or "nothing"
        why = reasons[0] if reasons else "the model has none"
        raise KnowledgeError(f"there is no {' or '.join(wanted)} to cut ({why}); this model offers {others} (--kinds)")
    return groups.of_kinds(kinds or groups.kinds_in_blocks())


def windows_in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    seq_len: int,
    samples: int | None,
    batch_size: int,
) -> list[list[Window]]:
    """The first windows of the text, some at a time.

    Raises:
        DataError: a window predicts nothing, or the text is shorter than one.
    """
    if seq_len < 2:
        raise DataError(f"windows of {seq_len} token predict nothing; expected a --seq-len of 2 or more")
    ids = tokens_of(model, tokenizer, corpus, seq_len)
    windows = windows_of(ids, seq_len, None, predict_first=False)[:samples]
    if not windows:
        raise DataError(f"{corpus.source} has {len(ids)} tokens, fewer than one window of {seq_len}")
    return [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]


def _cuts(
    chosen: Sequence[Group], ratios: Sequence[float], scores: Mapping[str, Tensor], alone: Alone
) -> tuple[list[Cut], dict[str, str]]:
    """What is to be cut, in the order of the model, and group -> why it is not.

    Raises:
        PlanError: a group has no scores or the wrong number of them.
    """
    found: list[Cut] = []
    left_out: dict[str, str] = {}
    for group in chosen:
        if group.name not in scores or scores[group.name].shape != (group.units,):
            raise PlanError(f"{group.name} needs one score for each of its {group.units} units")
        most = group.units - max(group.at_least, len(group.stays), 1)
        if most < 1 or not alone.possible(group):
            single = f"{group.units} units, of which as many must stay"
            left_out[group.name] = single if most < 1 else "zeroing is not removal here, and packed weights are not cut"
            continue
        order = torch.argsort(scores[group.name].double(), stable=True).tolist()
        going = [unit for unit in order if unit not in set(group.stays)]
        counts: dict[int, list[float]] = {}
        for ratio in ratios:
            counts.setdefault(min(most, max(1, math.floor(ratio * group.units + 0.5))), []).append(ratio)
        found += [Cut(group, tuple(sorted(going[:count])), tuple(alike)) for count, alike in counts.items()]
    return found, left_out


def _measured(
    passes: Passes,
    alone: Alone,
    cuts: Sequence[Cut],
    losses: dict[tuple[str, int], float],
    left_out: dict[str, str],
    on_loss: Callable[[str, int, float], None],
) -> dict[tuple[str, int], float]:
    """Loss without each cut, those known already included."""
    wanted = {cut.key: {cut.group.name: cut.removed} for cut in cuts if cut.key not in losses}
    for key, found in losses_without(passes, alone, wanted, "cut alone"):
        name, removed = key
        if isinstance(found, PlanError):
            left_out[name] = str(found)
        elif name not in left_out:
            losses[key] = found
            on_loss(name, removed, found)
    return losses
