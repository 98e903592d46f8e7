"""What a recipe's recovery section means to whatever trains by it: data and settings."""

from __future__ import annotations

from secateur.config import Recipe, RecoverSettings
from secateur.data import Corpus, load_corpus
from secateur.recovery import Distillation, RecoverySettings


def training_corpora(recipe: Recipe) -> list[Corpus]:
    """What a recipe trains on, read before anything is measured.

    Raises:
        DataError: it cannot be read.
    """
    assert recipe.recovery is not None
    return [load_corpus(name, field=recipe.recovery.field) for name in recipe.recovery.data]


def recovery_settings(settings: RecoverSettings, seed: int) -> RecoverySettings:
    """What the recovery room needs of a recipe's recovery section."""
    chosen = settings.model_dump(exclude={"data", "field", "dense", "distill"}, exclude_none=True)
    distill = None if settings.distill is None else Distillation(**settings.distill.model_dump())
    return RecoverySettings(**chosen, distill=distill, seed=seed)
