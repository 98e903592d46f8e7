"""README.md of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOADING = """{why} (`{file}.py`):

```python
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
```"""
OWN_CODE = "The class is not part of transformers and comes with the checkpoint"
PER_LAYER = "Layers differ in width (`per_layer_config` in `config.json`), so the class comes with the checkpoint"
NO_FLAG = "With `import secateur` before it, the flag is not needed and the file is not run."


def model_card(model: PreTrainedModel, results: Mapping[str, Any], base: tuple[str, Path] | None) -> str:
    """README.md of a checkpoint: what was done, what was measured and how; the base model's licence carried over.

    Args:
        base: what the base model was called, and its folder.
    """
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [pruned, secateur]"]
    if base is not None:
        name, folder = base
        front.append(f"base_model: {name}")
        if licence := _licence(folder / "README.md"):
            front.append(f"license: {licence}")
    lines = [*front, "---", "", f"# {type(model).__name__}, {model.num_parameters():,} parameters", ""]
    params = results.get("params", {})
    if "dense" in params:
        lines += [f"Pruned with Secateur: {params['sparsity']:.2%} of {params['dense']:,} parameters removed.", ""]
    lines += [f"`{k}` = {v}  " for k, v in results.get("protocol", {}).get("settings", {}).items()]
    for name, p in results.get("perplexity", {}).items():
        figures = ", ".join(f"{s} {p[s]:.3f}" for s in ("dense", "pruned", "recovered") if s in p)
        lines += ["", f"Perplexity on {name}: {figures} ({p['tokens']:,} tokens, windows of {p['seq_len']})."]
    if remote := getattr(model.config, "auto_map", None):
        why, more = (OWN_CODE, []) if is_remote(model) else (PER_LAYER, ["", NO_FLAG])
        lines += ["", LOADING.format(why=why, file=remote["AutoModelForCausalLM"].partition(".")[0]), *more]
    lines += ["", "How everything was measured: `results.json`. Which units were kept: `plan.json`.", ""]
    return "\n".join(lines)


def _licence(readme: Path) -> str | None:
    """The `license` line in the front matter of a checkpoint folder's README."""
    if not readme.is_file():
        return None
    head = readme.read_text(encoding="utf-8", errors="replace").split("---")
    lines = head[1].splitlines() if len(head) > 2 else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("license:")), None)


def is_remote(model: PreTrainedModel) -> bool:
    """Whether the class is code that came with a checkpoint, which then runs already."""
    return type(model).__module__.partition(".")[0] == "transformers_modules"
