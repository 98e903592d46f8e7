"""What a run trains on: all examples pooled, or the sources of a mix in rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.data import Corpus
from secateur.recovery.examples import Example, training_examples
from secateur.recovery.rounds import check_stages
from secateur.recovery.settings import RecoverySettings
from secateur.recovery.sources import Source, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """Corpora made ready to train on.

    Attributes:
        corpora: what they were made of.
        examples: of all corpora; none for a mix in rounds.
        sources: of a mix in rounds; none where all examples are pooled.
        steps: optimizer steps of the run.
    """

    corpora: Sequence[Corpus]
    examples: Sequence[Example]
    sources: Sequence[Source]
    steps: int


def training_data(
    corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, settings: RecoverySettings
) -> TrainingData:
    """The corpora as a run with these settings trains on them; all that can be wrong with them is told here.

    Raises:
        DataError: the corpora give no example, or too few to hold some out.
        RecipeError: there is nothing to mix, or there are fewer rounds than stages.
    """
    if settings.mix == "proportional":
        examples = training_examples(corpora, tokenizer, settings.seq_len, settings.train_on_inputs)
        return TrainingData(corpora, examples, (), settings.steps_for(len(examples)))
    sources = sources_of(corpora, tokenizer, settings.seq_len, settings.train_on_inputs)
    steps = settings.steps_for(sum(source.size for source in sources))
    check_stages(sources, settings, steps)
    return TrainingData(corpora, (), sources, steps)
