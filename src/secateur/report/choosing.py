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
        head: of the rows.
        rows: of each form that was made its name, its perplexity on the sequences set aside, the share of the hidden
            dimension that went if some forms are without a part of it, and whether it was taken.
    """

    told: str
    head: list[str]
    rows: list[list[str]]


def chosen(run: Run) -> Chosen | None:
    """What the last cut says of its form; None if there was nothing to choose from."""
    choice = run.cuts[-1].choice if run.cuts else None
    if choice is None:
        return None
    forms = {form.name: form.words for form in FORMS}
    if "why" in choice:
        return Chosen(f"{forms[choice['chosen']].capitalize()}: {choice['why']}.", [], [])
    shares = choice.get("hidden_shares", {})
    head = ["form", "perplexity", *(["hidden dimension removed"] if shares else []), "taken"]
    rows = []
    for name, words in ((name, words) for name, words in forms.items() if name in choice):
        hidden = [f"{shares[name]:.1%}" if name in shares else ""] if shares else []
        rows.append([words, f"{math.exp(choice[name]):.3f}", *hidden, "yes" if name == choice["chosen"] else ""])
    gain = gain_in_words(choice)
    told = (
        f"Perplexity on {choice['sequences']} calibration sequences that had no part in the cut. Plainer forms come "
        "first, and one that comes later is taken only where it is surely better."
    )
    return Chosen(f"{told} That of what was taken is {gain}." if gain else told, head, rows)
