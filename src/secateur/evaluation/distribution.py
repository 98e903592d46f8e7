"""What a knowledge distribution analysis found: how much worse the model gets without parts of each group."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import KnowledgeError
from secateur.evaluation.perplexity import Perplexity

SCHEMA = 1
WANTED = "expected the file that `secateur analyze MODEL --json FILE` writes"


@dataclass(frozen=True)
class Trial:
    """The model without some units of one group.

    Attributes:
        group: its name.
        kind: its kind.
        layer: the number of the layer it lies in, None if it spans layers.
        ratio: share of its units that were to go.
        units: how many it has.
        removed: how many went.
        loss: what is left [nats per token].
    """

    group: str
    kind: str
    layer: int | None
    ratio: float
    units: int
    removed: int
    loss: float


@dataclass(frozen=True)
class Knowledge:
    """The knowledge distribution of a model: what cutting each of its groups alone does to the loss on a text.

    Attributes:
        dense: perplexity of the whole model, with text, windows and dtype.
        trials: one for each group and ratio, in the order of the model.
        protocol: everything else the numbers depend on: hash of the checkpoint, kinds, ratios, proxy, seed.
        from_cache: whether passes began at the layer of the group; else `cache_note` says why they were whole.
        cache_note: empty if `from_cache`.
        sliced: families whose groups were cut out of a copy, since zeroing their weights is not removal.
        left_out: group -> why it was not cut.
    """

    dense: Perplexity
    trials: tuple[Trial, ...]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    from_cache: bool = True
    cache_note: str = ""
    sliced: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def difference(self, trial: Trial) -> float:
        """How much worse the model is without these units [nats per token]; negative if it is better."""
        return trial.loss - self.dense.loss

    def ratio(self, trial: Trial) -> float:
        """Perplexity without these units divided by the dense one: exp of the difference of losses."""
        return math.exp(min(self.difference(trial), 700.0))

    def deviations(self) -> dict[str, float]:
        """Group -> mean difference of losses over the ratios [nats per token], in the order of the model.

        It is the logarithm of the geometric mean of the perplexity ratios. The paper ranks by perplexity deviation and
        does not say how several ratios become one number: the mean of the logarithms is our choice, so that one ratio
        at which the model breaks does not outweigh the others.
        """
        of_group: dict[str, list[float]] = {}
        for trial in self.trials:
            of_group.setdefault(trial.group, []).append(self.difference(trial))
        return {name: sum(found) / len(found) for name, found in of_group.items()}

    def most_sensitive(self, share: float = 0.1) -> tuple[str, ...]:
        """The groups that the model can spare least: this share of all (gamma of the paper), the worst first.

        The number is rounded, but at least one for a share above 0; of equal groups those that come first in the model.
        The paper gives no gamma; that it lies at about a tenth is our choice.

        Raises:
            KnowledgeError: the share lies outside [0, 1).
        """
        if not 0 <= share < 1:
            raise KnowledgeError(f"a share of {share:g} of the groups is to be protected; expected one in [0, 1)")
        deviations = self.deviations()
        count = max(1, math.floor(share * len(deviations) + 0.5)) if share else 0
        return tuple(sorted(deviations, key=lambda name: -deviations[name])[:count])

    def check_checkpoint(self, sha256: str | None) -> None:
        """Make sure that the analysis was made of the checkpoint with this hash, if it says of which one it was made.

        Raises:
            KnowledgeError: it was made of another one.
        """
        made_for = self.protocol.get("model_sha256")
        if made_for and made_for != sha256:
            raise KnowledgeError(
                f"the knowledge distribution was made for another model: sha256 {made_for[:12]}..., here "
                f"{str(sha256)[:12]}...; run `secateur analyze` on this one"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data; every trial comes with what it means relative to the dense model."""
        rows = [
            {**asdict(t), "loss_difference": self.difference(t), "perplexity_ratio": self.ratio(t)} for t in self.trials
        ]
        return {
            "schema": SCHEMA,
            "dense": self.dense.to_json(),
            "protocol": dict(self.protocol),
            "from_cache": self.from_cache,
            "cache_note": self.cache_note,
            "sliced": list(self.sliced),
            "left_out": dict(self.left_out),
            "deviations": self.deviations(),
            "trials": rows,
        }

    @classmethod
    def from_json(cls, data: Any, origin: str = "the data") -> Knowledge:
        """The inverse of `to_json`; what follows from the losses is not read.

        Args:
            origin: what the data is, for messages.

        Raises:
            KnowledgeError: it is no knowledge distribution.
        """
        try:
            if data["schema"] != SCHEMA:
                raise KnowledgeError(f"{origin} has schema {data['schema']}; this version of Secateur reads {SCHEMA}")
            fields = Trial.__dataclass_fields__
            trials = tuple(Trial(**{name: row[name] for name in fields}) for row in data["trials"])
            if not all(math.isfinite(trial.loss) for trial in trials):
                raise ValueError("a loss is not finite")
            return cls(
                Perplexity(**data["dense"]),
                trials,
                dict(data["protocol"]),
                bool(data["from_cache"]),
                str(data["cache_note"]),
                tuple(data["sliced"]),
                dict(data["left_out"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise KnowledgeError(f"{origin} is no knowledge distribution: {what}; {WANTED}") from error

    @classmethod
    def load(cls, path: Path | str) -> Knowledge:
        """Read the file that `secateur analyze` writes.

        Raises:
            KnowledgeError: the file is missing or holds something else.
        """
        origin = f"the knowledge file {path}"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise KnowledgeError(f"cannot read {origin}: {reason}; {WANTED}") from error
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise KnowledgeError(f"{origin} is no JSON, or cut short ({error.msg}, {place}); {WANTED}") from error
        if not isinstance(data, dict) or not isinstance(data.get("knowledge"), dict):
            raise KnowledgeError(f"{origin} is no knowledge distribution: it lacks `knowledge`; {WANTED}")
        return cls.from_json(data["knowledge"], origin)
