"""Accuracy on tasks, measured by lm-eval (EleutherAI's harness) with its own definitions. The only file that knows it.

A task is lm-eval's YAML; from local files, nothing but where its items come from is replaced. HumanEval's two functions
are replaced as well, since lm-eval's load a metric from the hub and run programs without a limit on the network.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import EvaluationError, first_line
from secateur.evaluation import code_execution
from secateur.evaluation.scores import TaskScore, figures
from secateur.evaluation.tasks import Task, hub_items, local_items, put_in_place, task_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAPS = 200  # for standard errors of metrics that are no mean
FEW_SHOT_SEED = 1234  # lm-eval's own
NEW_TOKENS = 256  # that lm-eval lets a model write where a task does not say
NOT_INSTALLED = "tasks are measured by lm-eval, which is not installed: pip install 'secateur[eval]'"
OnAnswer = Callable[[str, Any], None]


@dataclass(frozen=True)
class Prepared:
    """A task whose items are there.

    Attributes:
        task: which.
        settings: lm-eval's definition, with the items in their place.
        data: where they are from.
        notes: what else differs from lm-eval's definition.
    """

    task: Task
    settings: dict[str, Any]
    data: dict[str, Any]
    notes: dict[str, Any]


def prepare(
    names: Sequence[str],
    folder: Path | None = None,
    *,
    shots: int | None = None,
    allow_code_execution: bool = False,
) -> list[Prepared]:
    """Get the items of tasks, before a model is loaded for them.

    Args:
        names: of `TASKS`.
        folder: with local files; from the hub if not given.
        shots: examples in front of each item; as lm-eval's definition has it if not given.
        allow_code_execution: HumanEval runs what the model writes, and needs to be allowed to.

    Raises:
        EvaluationError: a task is not known, lm-eval is not installed, or code may not be run.
        DataError: items cannot be read.
    """
    tasks = [task_named(name) for name in dict.fromkeys(names)]
    for task in tasks:
        if task.runs_code and not allow_code_execution:
            raise EvaluationError(
                f"{task.name} runs programs that the model writes; allow that with --allow-code-execution "
                "(evaluation.allow_code_execution: true), best on a machine where they can do no harm"
            )
    return [_prepared(task, folder, shots) for task in tasks]


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Sequence[Prepared],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    answers: Mapping[str, Any] | None = None,
    on_answer: OnAnswer | None = None,
    on_task: Callable[[str], None] | None = None,
) -> Iterator[TaskScore]:
    """Measure tasks with lm-eval, one after the other.

    Args:
        prepared: from `prepare`.
        limit: only the first items of each task.
        batch_size: requests per forward pass; changes results by rounding only.
        answers: what this model answered before, by `on_answer`'s keys; not asked again.
        on_answer: called with a key and an answer as soon as there is one.
        on_task: called with the name of a task before it begins.

    Raises:
        EvaluationError: an answer of a task is longer than the model's positions.
    """
    with _quiet():
        lm = _language_model(model, tokenizer, batch_size, dict(answers or {}), on_answer)
    for item in prepared:
        if on_task is not None:
            on_task(item.task.name)
        with _quiet():
            score = _score(lm, item, limit)
        yield score


def setting(tokenizer: PreTrainedTokenizerBase, limit: int | None, batch_size: int) -> dict[str, Any]:
    """What the figures of all tasks depend on beside model and items."""
    begins = tokenizer.encode("a")[:1]
    return {
        "limit": limit,
        "batch_size": batch_size,
        "bos": bool(begins) and begins[0] == tokenizer.bos_token_id,
        "few_shot_seed": FEW_SHOT_SEED,
        "bootstraps": BOOTSTRAPS,
    }


def _prepared(task: Task, folder: Path | None, shots: int | None) -> Prepared:
    settings = _definition(task)
    fixed = settings.get("num_fewshot")
    settings["num_fewshot"] = fixed or 0 if shots is None or fixed == 0 else shots
    settings["metadata"] = dict(settings.get("metadata") or {})
    notes: dict[str, Any] = {}
    if task.runs_code:
        notes["code_execution"] = code_execution.protection()
    with_training = settings["num_fewshot"] > 0
    items = hub_items(task, settings) if folder is None else local_items(task, folder, with_training=with_training)
    put_in_place(settings, task, items)
    data = {"source": items.source, "sha256": items.sha256}
    if items.training_sha256 is not None:
        data["training_sha256"] = items.training_sha256
    return Prepared(task, settings, data, notes)


def _definition(task: Task) -> dict[str, Any]:
    """lm-eval's settings of a task, its functions included.

    Raises:
        EvaluationError: there is no lm-eval, or it has no such file.
    """
    try:
        import lm_eval.tasks
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise EvaluationError(f"{NOT_INSTALLED} ({first_line(error)})") from error
    file = Path(lm_eval.tasks.__file__).parent / task.definition
    if not file.is_file():
        raise EvaluationError(f"lm-eval {lm_eval.__version__} has no {task.definition}; take one of 0.4.12 to 0.4.x")
    settings: dict[str, Any] = copy.deepcopy(load_yaml(file, resolve_func=not task.runs_code))
    settings.pop("tag", None)
    if task.runs_code:
        settings["metric_list"][0]["metric"] = code_execution.pass_at_1
        settings["filter_list"][0]["filter"][0]["filter_fn"] = code_execution.completions
    return settings


def _language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    answers: dict[str, Any],
    on_answer: OnAnswer | None,
) -> Any:
    """lm-eval's form of a model, which asks it only what has no answer yet.

    Where a token runs across the end of a prompt, and nothing would be left of an answer, lm-eval gives up: here the
    answer is encoded by itself then.
    """
    from lm_eval.api.model import hash_args
    from lm_eval.models.huggingface import HFLM

    class Hook:
        """What HFLM tells each answer as soon as it has it."""

        def add_partial(self, kind: str, request: Sequence[Any], answer: Any) -> None:
            key = hash_args(kind, request)
            if key not in answers and on_answer is not None:
                on_answer(key, answer)
            answers[key] = answer

    class Remembering(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self._ask("loglikelihood", super().loglikelihood, requests)
            return [tuple(answers[hash_args("loglikelihood", r.args)]) for r in requests]  # type: ignore[misc]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            self._ask("generate_until", super().generate_until, requests)
            return [answers[hash_args("generate_until", r.args)] for r in requests]

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            before, answer = super()._encode_pair(context, continuation)
            return before, answer or self.tok_encode(continuation, add_special_tokens=False)

        def _ask(self, kind: str, ask: Callable[..., Any], requests: list[Any]) -> None:
            new = {key: r for r in requests if (key := hash_args(kind, r.args)) not in answers}
            if new:
                ask(list(new.values()), disable_tqdm=not sys.stderr.isatty())

    lm = Remembering(model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    lm.set_cache_hook(Hook())
    return lm


def _score(lm: Any, item: Prepared, limit: int | None) -> TaskScore:
    """One task."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    began = time.perf_counter()
    name, notes = item.task.name, dict(item.notes)
    settings = copy.deepcopy(item.settings)
    if settings["output_type"] == "generate_until":
        asked = settings["generation_kwargs"].get("max_gen_toks", NEW_TOKENS)
        room = min(asked, lm.max_length // 2)
        settings["generation_kwargs"]["max_gen_toks"] = room
        if room < asked:
            notes["new_tokens"] = f"{room} instead of {asked}, half of the model's {lm.max_length} positions"
    task = ConfigurableTask(config=settings)
    task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    try:
        found = evaluate(
            lm,
            {"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            confirm_run_unsafe_code=item.task.runs_code,
        )
    except AssertionError as error:
        raise EvaluationError(
            f"{name}: lm-eval cannot ask this model, as where an answer is longer than its {lm.max_length} positions"
        ) from error
    samples = found["samples"][name]
    once = [s for s in samples if s["filter"] == samples[0]["filter"]]
    if apart := sum(_encoded_apart(lm, s, settings) for s in once):
        notes["answers_encoded_apart"] = f"of {apart} items: a token runs across the end of the prompt"
    metrics, errors = figures(found["results"][name])
    return TaskScore(
        task=name,
        metrics=metrics,
        errors=errors,
        items=len(once),
        of=len(task.eval_docs),
        truncated=sum(_truncated(lm, s, settings) for s in once),
        shots=settings["num_fewshot"],
        version=str(settings["metadata"].get("version")),
        split=item.task.split,
        data=item.data,
        seconds=round(time.perf_counter() - began, 1),
        notes=notes,
        samples=samples,
    )


def _truncated(lm: Any, sample: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a prompt of an item did not fit."""
    if settings["output_type"] == "generate_until":
        room = lm.max_length - settings["generation_kwargs"]["max_gen_toks"]
        return any(len(lm.tok_encode(context)) > room for context, _ in sample["arguments"])
    return any(len(lm.tok_encode(context + answer)) > lm.max_length + 1 for context, answer in sample["arguments"])


def _encoded_apart(lm: Any, sample: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether an answer of an item was encoded by itself."""
    if settings["output_type"] == "generate_until":
        return False
    return any(len(lm.tok_encode(c + answer)) <= len(lm.tok_encode(c.rstrip())) for c, answer in sample["arguments"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without advice in the log, lines on standard output, and other processes for a bootstrap."""
    logger, before = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
