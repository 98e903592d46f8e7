"""From a checkpoint to the form that another program wants."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur import checkpoint as checkpoints
from secateur.checkpoint import Checkpoint, output_folder
from secateur.checkpoint.parity import probe
from secateur.config import Recipe
from secateur.errors import ParityError, PlanError
from secateur.export import compare, export_gguf, export_vllm, llama_cpp
from secateur.pipeline.results import Results, class_note, header, load_model, peak_memory, write_json
from secateur.surgery import pad, unpad
from secateur.surgery.per_layer import is_per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Form = Literal["uniform", "per-layer", "padded", "gguf", "vllm"]
GGUF_FILE = "model.gguf"
READ_BACK = "vLLM cannot be run here; every tensor was read back and is the model's"
GGUF_CARD = """---
pipeline_tag: text-generation
tags: [pruned, secateur, gguf]
base_model: {base}
---

# {name}, {parameters:,} parameters, {dtype}

For llama.cpp, architecture `{arch}`: `llama-cli -m {file} -p "..."`. {checked}: `results.json`.
"""


def export(recipe: Recipe, output: Path, to: Form, *, dtype: str = "f16", overwrite: bool = False) -> Results:
    """Write the recipe's model in another form into the folder `output`, and check what was written.

    Args:
        to: `uniform` (a stock class, if all layers have the same widths after all), `per-layer` (without the units of
            single layers that are all zeros, such as those of a padded model), `padded` (a stock class, zeros in place
            of missing units), `gguf` (for llama.cpp), or `vllm`.
        dtype: of a GGUF file: f32, f16, bf16 or q8_0.

    Raises:
        SecateurError: the model cannot take this form, or what was written is not what was meant. Nothing is left.
    """
    with output_folder(output, overwrite=overwrite) as folder:
        source = load_model(recipe, to_change=True)
        results = header("export", source, recipe)
        results["params"] = {"source": source.model.num_parameters()}
        if to == "gguf":
            results |= _gguf(source, folder, dtype)
        elif to == "vllm":
            results |= _vllm(source, folder, output)
        else:
            made = _narrowed(source) if to == "per-layer" else _widened(source, to)
            _checkpoint(source, made, folder, to, results)
        plan = Path(source.source) / "plan.json"
        if plan.is_file():
            shutil.copy(plan, folder / "plan.json")
        results["memory"] = peak_memory()
        write_json(folder / "results.json", results)
    return results


def _widened(source: Checkpoint, to: Form) -> PreTrainedModel:
    """The model in a stock class, filled up with zeros where its layers differ.

    Raises:
        PlanError: it is in one already, or `to` is uniform and its layers differ.
    """
    small = source.model
    if not is_per_layer(small):
        raise PlanError(
            f"{source.source} is {type(small).__name__}, a stock class already: there is nothing to convert"
        )
    padded = pad(small)
    zeros = padded.num_parameters() - small.num_parameters()
    if to == "uniform" and zeros:
        raise PlanError(
            f"the layers of {source.source} differ in width, and equal ones would lose more of it: use --to padded "
            f"(exact, {zeros:,} parameters of zeros), or prune again with --tier uniform"
        )
    return padded


def _narrowed(source: Checkpoint) -> PreTrainedModel:
    """The model without the units of single layers that are all zeros.

    Raises:
        PlanError: it has that form already, or nothing to leave out.
    """
    if is_per_layer(source.model):
        raise PlanError(f"{source.source} is {type(source.model).__name__} already: there is nothing to convert")
    try:
        return unpad(source.model)
    except PlanError as error:
        raise PlanError(
            f"{source.source} would gain nothing from --to per-layer: {error}. Its layers have the same widths, and any"
            " loader knows its class; for other widths in other layers prune with --per-layer"
        ) from error


def _checkpoint(source: Checkpoint, made: PreTrainedModel, folder: Path, to: Form, results: Results) -> None:
    """Write what was made; what it costs and how it compares are added to the results."""
    results["params"]["exported"] = made.num_parameters()
    zeros = made.num_parameters() - source.model.num_parameters()
    notes = [f"{-zeros:,} parameters of zeros left out"] if zeros < 0 else []
    notes += [note] if (note := class_note(source.model, made)) else []
    difference = checkpoints.logit_difference(source.model, made)
    facts = {"to": to, "class": type(made).__name__, "zeros": zeros, "max_logit_difference_to_source": difference}
    results["export"] = facts | {"notes": notes}
    checkpoints.write(made, folder, tokenizer=source.tokenizer, results=results, base=source)
    results["parity"] = checkpoints.verify_in_fresh_process(folder, made, source.tokenizer).to_json()


def _gguf(source: Checkpoint, folder: Path, dtype: str) -> Results:
    """A GGUF file, compared with llama.cpp if that is installed."""
    done = export_gguf(source.model, source.tokenizer, folder / GGUF_FILE, dtype)
    checked = "How it was checked" if llama_cpp.available() else "Not verified; why"
    card = GGUF_CARD.format(
        base=source.source, name=type(source.model).__name__, parameters=done.parameters, dtype=dtype, arch=done.arch,
        file=GGUF_FILE, checked=checked,
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
    facts = {"to": "gguf", "arch": done.arch, "dtype": dtype, "bytes": done.bytes, "notes": list(done.notes)}
    params = {"source": source.model.num_parameters(), "exported": done.parameters}
    if not llama_cpp.available():
        return {"params": params, "export": facts, "parity": None, "parity_reason": llama_cpp.NOT_VERIFIED}
    ids, text = probe(source.model, source.tokenizer)
    prompt = ids[0, : max(1, done.context - llama_cpp.NEW_TOKENS - 1)].tolist()
    parity = compare(done.path, source.model, prompt, dtype)
    if disagreement := parity.disagreement(dtype):
        raise ParityError(
            f"llama.cpp computes something else from the file just written, so it was removed: {disagreement}"
        )
    compared: dict[str, Any] = {k: v for k, v in asdict(parity).items() if k != "continuation"}
    return {"params": params, "export": facts, "parity": compared | {"text": text, "process": "llama.cpp"}}


def _vllm(source: Checkpoint, folder: Path, output: Path) -> Results:
    """A checkpoint in the layout of vLLM, which cannot be run here: the tensors are read back and compared."""
    inside = folder / "checkpoint"
    done = export_vllm(source.model, inside, tokenizer=source.tokenizer)
    for file in inside.iterdir():
        shutil.move(str(file), folder / file.name)
    inside.rmdir()
    notes = [note.replace(str(inside), str(output)) for note in done.notes]
    facts = {"to": "vllm", "layout": done.layout, "padding": done.padded_parameters, "notes": notes}
    params = {"source": source.model.num_parameters(), "exported": done.parameters}
    if done.layout != "transformers":
        return {"params": params, "export": facts, "parity": None, "parity_reason": READ_BACK}
    parity = checkpoints.verify_in_fresh_process(folder, source.model, source.tokenizer)
    return {"params": params, "export": facts, "parity": parity.to_json()}
