"""A few items of every task, as files of our own and as lm-eval's data sets have them."""

from __future__ import annotations

import json
import random

from conftest import WORDS

LETTERS = "ABCD"


def words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choices(WORDS, k=count))


def items(task: str, count: int = 6, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """The same items twice: in a local file, and on the hub."""
    chance = random.Random(f"{task}{seed}")
    local, hub = [], []
    for number in range(count):
        for rows, row in zip((local, hub), _item(task, number, chance), strict=True):
            rows.append(row)
    return local, hub


def _item(task: str, number: int, chance: random.Random) -> tuple[dict, dict]:
    some = lambda n: words(chance, n)  # noqa: E731
    if task == "boolq":
        row = {"question": some(5), "passage": some(20)}
        return {**row, "answer": bool(number % 2)}, {**row, "label": number % 2}
    if task == "hellaswag":
        row = {"activity_label": some(2), "endings": [some(3 + i) for i in range(4)], "label": number % 4}
        first, second = some(6).capitalize() + ".", some(3) if number % 2 else ""
        whole = f"{first} {second}".strip()
        return {**row, "ctx": whole}, {**row, "ctx_a": first, "ctx_b": second}
    if task == "gsm8k":
        row = {"question": f"{some(6)} {number}?", "answer": f"{some(4)}\n#### {number}"}
    elif task == "humaneval":
        name = f"f{number}"
        row = {
            "prompt": f'def {name}(x):\n    """{some(4)}"""\n', "entry_point": name,
            "canonical_solution": f"    return x + {number}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + number}\n",
        }  # fmt: skip
    elif task == "piqa":
        row = {"goal": some(5), "sol1": some(4), "sol2": some(7), "label": number % 2}
    elif task == "winogrande":
        row = {
            "sentence": f"{some(4)} _ {some(3)}",
            "option1": some(1),
            "option2": some(2),
            "answer": str(1 + number % 2),
        }
    elif task in ("arc_easy", "arc_challenge", "openbookqa"):
        choices = {"text": [some(2 + i) for i in range(4)], "label": list(LETTERS)}
        row = {"question_stem" if task == "openbookqa" else "question": some(6), "choices": choices,
               "answerKey": LETTERS[number % 4]}  # fmt: skip
    elif task in ("sst2", "cola"):
        row = {"sentence": some(6), "label": number % 2}
    else:
        row = {"sentence1": some(6), "sentence2": some(5), "label": number % 2}
    return row, row


def write(file, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
