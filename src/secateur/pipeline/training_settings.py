"""What a recipe's recovery section means to whatever trains by it: data and settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.config import Recipe, RecoverSettings
from secateur.data import Corpus, load_corpus
from secateur.recovery import Distillation, RecoverySettings
from secateur.recovery.also_trained import also_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def training_corpora(recipe: Recipe) -> list[Corpus]:
    """What a recipe trains on, read before anything is measured.

    Raises:
        DataError: it cannot be read.
    """
    assert recipe.recovery is not None
    return [load_corpus(name, field=recipe.recovery.field) for name in recipe.recovery.data]


def recovery_settings(settings: RecoverSettings, seed: int, model: PreTrainedModel) -> RecoverySettings:
    """What the recovery room needs of a recipe's recovery section to train a model.

    Of what is to train whole, those parts that hold weights: norms need not (OLMo), and results name what was trained.
    """
    chosen = settings.model_dump(exclude={"data", "field", "dense", "distill"}, exclude_none=True)
    chosen["also_train"] = tuple(part for part in settings.also_train if also_trained(model, [part]))
    distill = None if settings.distill is None else Distillation(**settings.distill.model_dump())
    return RecoverySettings(**chosen, distill=distill, seed=seed)
