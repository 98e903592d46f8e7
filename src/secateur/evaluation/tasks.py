"""Which tasks there are, and their items from the hub or local files, in the form that lm-eval's definitions expect.

A local file holds one JSON object per line (`.jsonl`, also `.gz` and `.xz`), with the fields of the data set on the
hub. Where files are known to differ from it, `FORMS` puts that right, so that the definition of a task is the same
either way.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.data import json_rows, reach_hub
from secateur.errors import DataError, EvaluationError, first_line

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
SENTENCE_END = re.compile(r"[.!?][\"')]*\s")


@dataclass(frozen=True)
class Task:
    """A task of lm-eval.

    Attributes:
        name: as lm-eval calls it.
        definition: its file below lm-eval's folder of tasks.
        split: that is evaluated.
        file: of that split, below the folder of local files, without its suffix.
        training: the same of the training split, from which few-shot examples come.
        fields: that a row must have.
        metric: the one that stands for the task. For LLM-Pruner's seven it is the one of its tables, as their dense
            LLaMA-7B figures show: acc_norm for HellaSwag, ARC-challenge and OpenBookQA, else acc.
        runs_code: whether what the model writes is executed.
    """

    name: str
    definition: str
    split: str
    file: str
    training: str
    fields: tuple[str, ...]
    metric: str
    runs_code: bool = False


def _choice(name: str, definition: str, split: str, fields: str, metric: str) -> Task:
    return Task(name, definition, split, f"zeroshot/{name}", f"zeroshot/train/{name}", tuple(fields.split()), metric)


def _glue(name: str, fields: str, metric: str) -> Task:
    definition, files = f"glue/{name}/default.yaml", (f"glue/{name}_dev", f"glue/{name}_train")
    return Task(name, definition, "validation", *files, (*fields.split(), "label"), metric)


ARC = "question choices answerKey"
SEVEN = (
    _choice("boolq", "super_glue/boolq/default.yaml", "validation", "question passage", "acc"),
    _choice("piqa", "piqa/piqa.yaml", "validation", "goal sol1 sol2 label", "acc"),
    _choice("hellaswag", "hellaswag/hellaswag.yaml", "validation", "activity_label endings label", "acc_norm"),
    _choice("winogrande", "winogrande/default.yaml", "validation", "sentence option1 option2 answer", "acc"),
    _choice("arc_easy", "arc/arc_easy.yaml", "test", ARC, "acc"),
    _choice("arc_challenge", "arc/arc_challenge.yaml", "test", ARC, "acc_norm"),
    _choice("openbookqa", "openbookqa/openbookqa.yaml", "test", "question_stem choices answerKey", "acc_norm"),
)
OTHERS = (
    Task("gsm8k", "gsm8k/gsm8k.yaml", "test", "gsm8k/test", "gsm8k/train", ("question", "answer"),
         "exact_match,flexible-extract"),
    Task("humaneval", "humaneval/humaneval.yaml", "test", "humaneval/HumanEval", "humaneval/train",
         ("prompt", "entry_point", "test"), "pass@1", runs_code=True),
    _glue("sst2", "sentence", "acc"),
    _glue("cola", "sentence", "mcc"),
    _glue("mrpc", "sentence1 sentence2", "acc"),
    _glue("rte", "sentence1 sentence2", "acc"),
)  # fmt: skip
TASKS: Mapping[str, Task] = {task.name: task for task in (*SEVEN, *OTHERS)}


def task_named(name: str) -> Task:
    """The task of a name.

    Raises:
        EvaluationError: there is none.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise EvaluationError(f"{name!r} is no task{hint}; there are {', '.join(TASKS)}")
    return TASKS[name]


@dataclass(frozen=True)
class Items:
    """The items of a task.

    Attributes:
        rows: that are evaluated.
        training: for few-shot examples, None if none are asked for.
        source: files that were read, or the data set on the hub.
        sha256: of the bytes of the file that is evaluated, or of the rows from the hub.
        training_sha256: the same of those for examples.
    """

    rows: Sequence[Row]
    training: Sequence[Row] | None
    source: str
    sha256: str
    training_sha256: str | None


def local_items(task: Task, folder: Path, *, with_training: bool) -> Items:
    """Read the files of a task.

    Raises:
        DataError: a file is missing, damaged, or lacks a field.
    """
    file = _file(task, task.file, folder, "")
    rows, sha256 = _rows(task, file)
    if not with_training:
        return Items(rows, None, str(file), sha256, None)
    shots = _file(task, task.training, folder, ", from which few-shot examples come", beside=task.file)
    training, training_sha256 = _rows(task, shots)
    if training_sha256 == sha256:
        raise DataError(
            f"{task.name}: {shots}, from which few-shot examples come, holds the items that are evaluated; put the "
            "training split there, or ask for no examples"
        )
    return Items(rows, training, f"{file}, {shots}", sha256, training_sha256)


def local_files(task: Task, folder: Path) -> list[Path]:
    """The file of a task that is evaluated, and that of its examples if there is one.

    Raises:
        DataError: the first is missing.
    """
    found = [_file(task, task.file, folder, "")]
    with suppress(DataError):
        found.append(_file(task, task.training, folder, "", beside=task.file))
    return found


def _file(task: Task, stem: str, folder: Path, what_for: str, beside: str = "") -> Path:
    """The file of a split: below the folder as it is laid out, or in a part of these folders, or right in it.

    Args:
        beside: the split that is evaluated, whose bare name is not looked for.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; --task-data takes one that holds {stem}.jsonl")
    parts = stem.split("/")
    names = ["/".join(parts[i:]) for i in range(len(parts))]
    names = [name for name in names if name != beside.rpartition("/")[2]]
    places = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    for place in places:
        if place.is_file():
            return place
    raise DataError(
        f"{task.name}: {folder} has neither {stem}.jsonl nor {names[-1]}.jsonl (or .jsonl.gz, .jsonl.xz){what_for}; "
        "put the file there, or leave out --task-data to take the items from the hub"
    )


def _rows(task: Task, file: Path) -> tuple[list[Row], str]:
    found, sha256 = json_rows(file)
    form = FORMS.get(task.name, dict)
    rows = []
    for number, row in enumerate(found, start=1):
        if missing := [name for name in task.fields if row.get(name) is None]:
            has = ", ".join(row) or "none"
            raise DataError(f"{file}, row {number}: no field {missing[0]!r}, which {task.name} needs; it has {has}")
        try:
            rows.append(form(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{file}, row {number} does not have the form of {task.name}: {error!r}") from error
    return rows, sha256


def _boolq(row: Row) -> Row:
    """The label of the hub's `super_glue`, where a file has the answer as a truth value (the original release)."""
    if "label" in row:
        return row
    return {**row, "label": (False, True).index(row["answer"])}


def _hellaswag(row: Row) -> Row:
    """`ctx_a` and `ctx_b`, where a file has only both in one: the second is what comes after the last sentence.

    lm-eval begins it with a capital letter, so it matters where it begins.
    """
    if "ctx_a" in row and "ctx_b" in row:
        return row
    context = row["ctx"]
    ends = [found.end() for found in SENTENCE_END.finditer(context)]
    whole = not ends or re.search(r"[.!?][\"')]*$", context) is not None
    cut = len(context) if whole else ends[-1]
    return {**row, "ctx_a": context[:cut].rstrip(), "ctx_b": context[cut:]}


FORMS: Mapping[str, Callable[[Row], Row]] = {"boolq": _boolq, "hellaswag": _hellaswag}


def hub_items(task: Task, settings: Mapping[str, Any]) -> Items:
    """The items of a task from the data set that lm-eval names.

    Args:
        settings: of lm-eval.

    Raises:
        DataError: it cannot be had.
    """
    from datasets import load_dataset

    repository, training = settings["dataset_path"], "train" if settings["num_fewshot"] > 0 else None
    try:
        reach_hub(repository)
        found = [
            load_dataset(repository, settings.get("dataset_name"), split=split, **settings.get("dataset_kwargs") or {})
            for split in filter(None, (task.split, training))
        ]
    except Exception as error:  # offline, gone, or gated: the remedy is the same
        raise DataError(
            f"{task.name} ({repository}) cannot be loaded from the hub: {type(error).__name__}: {first_line(error)}; "
            "give a folder with local files: --task-data FOLDER"
        ) from error
    rows, *shots = ([dict(row) for row in data] for data in found)
    hashes = [_hash_of_rows(part) for part in (rows, *shots)]
    return Items(rows, shots[0] if shots else None, repository, hashes[0], hashes[1] if shots else None)


def put_in_place(settings: dict[str, Any], task: Task, items: Items) -> None:
    """Put rows in the place of a data set that lm-eval would load; splits that they do not fill are left out.

    The definition's own function that prepares rows is applied here, once: lm-eval applies it at every look at them.
    """
    from datasets import Dataset, DatasetDict

    splits = {task.split: items.rows, **({} if items.training is None else {"train": items.training})}
    prepare_rows = settings.pop("process_docs", None) or (lambda rows: rows)

    def rows_in_memory(**_: Any) -> DatasetDict:
        return DatasetDict({name: prepare_rows(Dataset.from_list(list(rows))) for name, rows in splits.items()})

    settings["custom_dataset"] = rows_in_memory
    for kind in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if settings.get(kind) not in splits:
            settings[kind] = None


def _hash_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Hash of rows that do not come from a local file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(sorted(row.items())).encode())
    return digest.hexdigest()
