"""The uncut model that a dynamic mix compares with and that is distilled: the one named, or what a checkpoint says it
was cut from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur import checkpoint as checkpoints
from secateur.checkpoint import Checkpoint
from secateur.config import Recipe
from secateur.errors import CheckpointError
from secateur.pipeline.results import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME_IT = "name the dense model with --dense MODEL, or --distill MODEL (recovery.dense)"


@dataclass
class Dense:
    """A dense model that is there, but not loaded yet.

    Attributes:
        source: folder or hub name.
        sha256: of the checkpoint; where the model was named, known after loading only; None for a hub name.
    """

    source: str
    sha256: str | None
    _recipe: Recipe
    _cut: Checkpoint

    def load(self) -> PreTrainedModel:
        """The model.

        Raises:
            CheckpointError: it cannot be loaded, is not the one that was cut, or has another tokenizer.
        """
        found = load_model(self._recipe, self.source)
        if self.sha256 is not None and self.sha256 != found.sha256:
            raise CheckpointError(
                f"{self._cut.source} was cut from {self.source}, which has changed since (sha256 "
                f"{str(found.sha256)[:12]} instead of {self.sha256[:12]}); {NAME_IT}"
            )
        self.sha256 = found.sha256
        ours, theirs = self._cut.tokenizer, found.tokenizer
        if ours is not None and theirs is not None and ours.get_vocab() != theirs.get_vocab():
            raise CheckpointError(f"the dense model {self.source} has another vocabulary than {self._cut.source}")
        return found.model

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": self.sha256}


def dense_of(recipe: Recipe, source: Checkpoint) -> Dense | None:
    """The dense model of a recipe that has a use for it; None for others. Nothing but its configuration is read.

    Raises:
        CheckpointError: none is named or known, its configuration cannot be read, or its vocabulary is another.
    """
    assert recipe.recovery is not None
    if not recipe.recovery.wants_dense:
        return None
    mixes = recipe.recovery.distill is None
    use = "a dynamic mix compares with" if mixes else "distillation learns from"
    named, sha256 = recipe.recovery.dense, None
    if named is None:
        named, sha256 = checkpoints.cut_from(source)
        if named is None:
            raise CheckpointError(
                f"{use} the model that {source.source} was cut from, and its results.json names none; {NAME_IT}"
            )
    try:
        skeleton = checkpoints.load_skeleton(named, trust_remote_code=recipe.model.trust_remote_code)
    except CheckpointError as error:
        told = "" if recipe.recovery.dense else f"{source.source} says that it was cut from {named}: "
        raise CheckpointError(f"{told}{error}; {NAME_IT}") from error
    sizes = [m.get_input_embeddings().weight.shape[0] for m in (skeleton, source.model)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the dense model {named} has another vocabulary ({sizes[0]:,} tokens) than {source.source} "
            f"({sizes[1]:,}): their {'losses' if mixes else 'outputs'} do not compare; {NAME_IT}"
        )
    return Dense(named, sha256, recipe, source)
