"""What a model's source says about it: its licence and base model, its tokenizer files, the steps that made it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from secateur.plan import KIND_IN_NAME, PruningPlan

if TYPE_CHECKING:
    from secateur.checkpoint.loading import Checkpoint

LICENCE = ("license", "license_name", "license_link")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
WRITERS = ("prune", "recover", "export")  # commands whose output is a checkpoint
STEP = (
    "schema", "command", "model", "protocol", "plan", "params", "perplexity", "macs", "samples", "kinds", "widths",
    "choice", "cost", "tradeoff", "importance", "left_whole", "recovery", "tier", "export", "class", "parity",
    "parity_reason", "before",
)  # fmt: skip
# Everything but weights that belongs to a model, whoever wrote it.
BESIDE = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.spm", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja", "LICENSE*",
    "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
WRITTEN_ANEW = ("modeling_per_layer.py", "configuration_decilm.py")


def files_beside(folder: Path) -> list[Path]:
    """What goes along with a checkpoint unchanged: tokenizer, chat templates, generation settings, texts of licences.

    Code goes along if the tokenizer names some; that of the model's class is written by `save_pretrained`.
    """
    found = {file for pattern in BESIDE for file in folder.glob(pattern) if file.is_file()}
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in json.loads(settings.read_text(encoding="utf-8")):
        found |= {file for file in folder.glob("*.py") if file.name not in WRITTEN_ANEW}
    return sorted(found)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy `files_beside` of `source` into `folder`; code that is there already stays."""
    for file in files_beside(source):
        target = folder / file.relative_to(source)
        if file.suffix == ".py" and target.exists():
            continue
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def base_metadata(base: Checkpoint) -> dict[str, Any]:
    """Fields for the front matter of a model made from `base`: base model, licence, language, as far as it says them.

    The base model is a name on the hub, since the hub refuses uploads whose card names a folder there: that of a model
    in a folder is what its own card names.
    """
    front = _front_matter(base)
    fields = {name: front[name] for name in (*LICENCE, "language") if front.get(name)}
    if base.folder is None:
        link = fields.get("license_link")
        if link and not str(link).startswith(("http:", "https:")):  # a file of that repository
            fields["license_link"] = f"https://huggingface.co/{base.source}/blob/main/{link}"
        return {"base_model": base.source, **fields}
    named = front.get("base_model")
    names = named if isinstance(named, list) else [named]
    is_hub_name = all(isinstance(name, str) and HUB_NAME.fullmatch(name) for name in names)
    return ({"base_model": named} if is_hub_name else {}) | fields


def _front_matter(base: Checkpoint) -> dict[str, Any]:
    """The metadata of the model's card; empty if it has none, or none that can be read."""
    from huggingface_hub import hf_hub_download, metadata_load

    try:
        place = hf_hub_download(base.source, "README.md") if base.folder is None else base.folder / "README.md"
        return dict(metadata_load(place) or {})
    except (yaml.YAMLError, ValueError, OSError):  # the hub's errors, too
        return {}


def earlier(base: Checkpoint) -> dict[str, Any] | None:
    """The results of the step that made `base`, those before it included; None if no step of Secateur did."""
    file = base.folder / "results.json" if base.folder else None
    if file is None or not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # not ours
        return None
    if not isinstance(found, dict) or found.get("command") not in WRITERS:
        return None
    step = {name: found[name] for name in STEP if name in found}
    if "recovery" in step:
        step["recovery"] = {name: value for name, value in step["recovery"].items() if name != "log"}
    return step


def cut_from(base: Checkpoint) -> tuple[str | None, str | None]:
    """Name and hash of the model that the first cut on the way to `base` was made on, as far as they are known."""
    found = earlier(base)
    cuts = [step["model"] for step in (steps_of(found) if found else ()) if step["command"] == "prune"]
    return (cuts[0]["source"], cuts[0]["sha256"]) if cuts else (None, None)


def layers_left(base: Checkpoint) -> tuple[int, ...]:
    """Which layers of the model that `base` was cut from are left; empty if that is not known.

    It is where one cut alone was made, whose plan lies beside the checkpoint and names layers.

    Raises:
        PlanError: the file is no plan.
    """
    found = earlier(base)
    cuts = [step for step in (steps_of(found) if found else ()) if step["command"] == "prune"]
    plan = carried_plan(base)
    if plan is None or len(cuts) > 1:
        return ()
    of_layers = [kept for name, kept in plan.kept.items() if KIND_IN_NAME.sub("", name) == "layer"]
    return of_layers[0] if len(of_layers) == 1 else ()


def steps_of(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The results of every step up to this one, the first one first."""
    before = results.get("before")
    return [*(steps_of(before) if before else ()), results]


def carried_plan(base: Checkpoint) -> PruningPlan | None:
    """The plan that lies beside a checkpoint.

    Raises:
        PlanError: the file is no plan.
    """
    file = base.folder / "plan.json" if base.folder else None
    return PruningPlan.load(file) if file and file.is_file() else None
