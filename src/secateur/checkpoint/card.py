"""README.md of a checkpoint: what it is, what was done and measured and how, who may use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint import account
from secateur.checkpoint.lineage import base_metadata, steps_of
from secateur.checkpoint.quantised import quantisation
from secateur.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.checkpoint.loading import Checkpoint

LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder{flag})
tokenizer = AutoTokenizer.from_pretrained(folder{flag})
```"""
FLAG = ", trust_remote_code=True"
OWN_CODE = "The class is not part of transformers and comes with the checkpoint (`{file}.py`):"
PER_LAYER = (
    "Layers differ in width (`per_layer_config` in `config.json`), so the class comes with the checkpoint "
    "(`{file}.py`):"
)
NO_FLAG = "With `import secateur` before it, the flag is not needed and the file is not run."
PACKED = "The linear modules but the head are quantised; loading them takes the library {library}."
NO_LICENCE = "None was found beside the model that this one was made from. Its terms hold here, too."


@dataclass(frozen=True)
class Form:
    """In which form a model lies in a folder, as its card tells it.

    Attributes:
        what: class or format, and dtype.
        parameters: numbers stored, zeros of padding included.
        use: Markdown that says how to load it.
        library: the hub's name for what loads it.
        tags: for the hub, besides `secateur` and `pruned`.
        notes: what else there is to know about the form, one sentence each.
    """

    what: str
    parameters: int
    use: str
    library: str = "transformers"
    tags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def checkpoint_form(model: PreTrainedModel) -> Form:
    """The form of a checkpoint that `from_pretrained` loads."""
    use = LOADING.format(flag="")
    if remote := getattr(model.config, "auto_map", None):
        why, more = (OWN_CODE, "") if is_remote(model) else (PER_LAYER, f"\n\n{NO_FLAG}")
        file = remote["AutoModelForCausalLM"].partition(".")[0]
        use = f"{why.format(file=file)}\n\n{LOADING.format(flag=FLAG)}{more}"
    dtype = str(model.dtype).removeprefix("torch.")
    packed = quantisation(model.config)
    notes = (PACKED.format(library=packed),) if packed else ()
    return Form(f"`{type(model).__name__}`, {dtype}", model.num_parameters(), use, notes=notes)


def model_card(form: Form, results: Mapping[str, Any], plan: PruningPlan | None, base: Checkpoint | None) -> str:
    """README.md of a checkpoint.

    Args:
        results: as in `results.json`, those of the steps before included.
        plan: of the last cut.
        base: the model that the last step started from.
    """
    steps = steps_of(results)
    pruned = plan is not None or any("sparsity" in step.get("params", {}) for step in steps)
    recovered = any("recovery" in step for step in steps)
    front = _front_matter(form, base, pruned, recovered)
    name, origin = _origin(steps, base)
    done = " and ".join(word for word, is_so in (("pruned", pruned), ("recovered", recovered)) if is_so)
    note = next((step["class"]["note"] for step in reversed(steps) if "class" in step), None)
    what = f"{form.what}, {form.parameters:,} parameters. Made with Secateur{origin}."
    sections = {
        "": [what, "", *(f"- {note}" for note in filter(None, (*form.notes, note)))],
        "What was cut": account.cuts(steps, plan) if pruned else [],
        "How it was trained while it was cut": account.training(steps),
        "How it was recovered": account.recovery(steps),
        "Measured": account.figures(steps),
        "Checked": account.checks(results),
        "How to load it": [form.use],
        "Licence": [_licence(front) or NO_LICENCE] if base is not None else [],
        "Files": _files(plan is not None, [results[key] for key in ("recovery", "training") if key in results]),
    }
    text = "\n\n".join(
        "\n".join([f"## {head}\n"] * bool(head) + lines).strip() for head, lines in sections.items() if lines
    )
    title = ", ".join(filter(None, (name or "Model", done)))
    return f"---\n{_yaml(front)}\n---\n\n# {title}\n\n{text}\n"


def _front_matter(form: Form, base: Checkpoint | None, pruned: bool, recovered: bool) -> dict[str, Any]:
    """Metadata as the hub reads it. Its relations know no pruning: a model with other weights is a `finetune`."""
    carried = base_metadata(base) if base is not None else {}
    relation = "finetune" if pruned or recovered else "quantized" if "gguf" in form.tags else None
    return {
        "library_name": form.library,
        "pipeline_tag": "text-generation",
        "tags": [*(["pruned"] if pruned else []), "secateur", *form.tags],
        **carried,
        **({"base_model_relation": relation} if relation and "base_model" in carried else {}),
    }


def _yaml(front: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    return ModelCardData(**front).to_yaml(original_order=list(front))


def _origin(steps: list[Mapping[str, Any]], base: Checkpoint | None) -> tuple[str, str]:
    """A short name of the model that everything began with, and a phrase that says where it is from."""
    first = steps[0].get("model")
    if first is None and base is None:
        return "", ""
    source = str(first["source"] if first else base.source)  # type: ignore[union-attr]
    sha256 = first["sha256"] if first else base.sha256  # type: ignore[union-attr]
    short = Path(source).name
    if sha256 is None:
        return short, f" from [{source}](https://huggingface.co/{source})"
    return short, f" from the checkpoint `{short}` (sha256 `{sha256[:12]}`)"


def _licence(front: Mapping[str, Any]) -> str | None:
    """A sentence on the licence that was carried over."""
    if "license" not in front:
        return None
    named = front.get("license_name") or front["license"]
    text = ", ".join(named) if isinstance(named, list) else str(named)
    link = front.get("license_link")
    return f"{f'[{text}]({link})' if link else text}, that of the model this one was made from."


def _files(with_plan: bool, trained: list[Mapping[str, Any]]) -> list[str]:
    """What lies beside the card; `trained` tells of the training that the last step did."""
    lines = ["- `results.json`: every figure, and how it was measured"]
    lines += ["- `plan.json`: the units that were kept, and how they were chosen"] if with_plan else []
    lines += (
        ["- `adapter/`: the LoRA adapter before it was merged"]
        if any(not run.get("settings", {}).get("full_weights") for run in trained)
        else []
    )
    mixed = any("mix" in run for run in trained)
    return [*lines, "- `mix.svg`: how the sources of training data were mixed, round by round"] if mixed else lines


def is_remote(model: PreTrainedModel) -> bool:
    """Whether the class is code that came with a checkpoint, which then runs already."""
    return type(model).__module__.partition(".")[0] == "transformers_modules"
