"""What is said of the form that a method chose for the cut model: all that were made, and why it is this one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from secateur.methods.forms import FORMS, gain_in_words
from secateur.report.reading import Run


@dataclass(frozen=True)
class Chosen:
    """The choice of a form.

    Attributes:
        told: why it is this one, in a sentence or two.
        rows: of each form that was made its name, its perplexity on the sequences set aside, the share of the hidden
            dimension that went, and whether it was taken.
    """

    told: str
    rows: list[list[str]]


def chosen(run: Run) -> Chosen | None:
    """What the last cut says of its form; None if there was nothing to choose from."""
    choice = run.cuts[-1].choice if run.cuts else None
    if choice is None:
        return None
    forms = {form.name: form.words for form in FORMS}
    if "why" in choice:
        return Chosen(f"{forms[choice['chosen']].capitalize()}: {choice['why']}.", [])
    shares = choice.get("hidden_shares", {})
    rows = [
        [
            words,
            f"{math.exp(choice[name]):.3f}",
            f"{shares.get(name, 0):.1%}",
            "yes" if name == choice["chosen"] else "",
        ]
        for name, words in forms.items()
        if name in choice
    ]
    gain = gain_in_words(choice)
    told = (
        f"Perplexity on {choice['sequences']} calibration sequences that had no part in the cut. Plainer forms come "
        "first, and one that comes later is taken only where it is surely better."
    )
    return Chosen(f"{told} The last is {gain}." if gain else told, rows)
