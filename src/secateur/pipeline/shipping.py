"""From a checkpoint to the form that another program wants."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur import checkpoint as checkpoints
from secateur.checkpoint import Checkpoint, Form, checkpoint_form, output_folder
from secateur.checkpoint.parity import probe
from secateur.config import Recipe
from secateur.errors import ParityError, PlanError
from secateur.export import compare, export_gguf, export_vllm, llama_cpp, vllm_form
from secateur.export.vllm import READ_BACK, STOCK_LAYOUT
from secateur.pipeline.results import Results, class_note, header, load_model, peak_memory
from secateur.surgery import pad, unpad
from secateur.surgery.per_layer import is_per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Target = Literal["uniform", "per-layer", "padded", "gguf", "vllm"]
GGUF_FILE = "model.gguf"
GGUF_USE = """```
llama-cli -m {file} -p "..."
```"""


def export(recipe: Recipe, output: Path, to: Target, *, dtype: str = "f16", overwrite: bool = False) -> Results:
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
        plan = checkpoints.carried_plan(source)
        results = header("export", source, recipe)
        results["params"] = {"source": source.model.num_parameters()}
        if to == "gguf":
            form, more = _gguf(source, folder, dtype)
        elif to == "vllm":
            form, more = _vllm(source, folder, output)
        else:
            made = _narrowed(source) if to == "per-layer" else _widened(source, to)
            form, more = _checkpoint(source, made, folder, to)
        results |= more
        results["memory"] = peak_memory()
        checkpoints.write_about(form, folder, plan=plan, results=results, base=source)
    return results


def _widened(source: Checkpoint, to: Target) -> PreTrainedModel:
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


def _checkpoint(source: Checkpoint, made: PreTrainedModel, folder: Path, to: Target) -> tuple[Form, Results]:
    """Write what was made: its form, what it costs and how it compares."""
    params = {"source": source.model.num_parameters(), "exported": made.num_parameters()}
    zeros = params["exported"] - params["source"]
    notes = [f"{-zeros:,} parameters of zeros left out"] if zeros < 0 else []
    notes += [f"{zeros:,} parameters are zeros that make all layers equally wide"] if zeros > 0 else []
    notes += [note] if (note := class_note(source.model, made)) else []
    difference = checkpoints.logit_difference(source.model, made)
    facts = {"to": to, "class": type(made).__name__, "zeros": zeros, "max_logit_difference_to_source": difference}
    checkpoints.write(made, folder, tokenizer=source.tokenizer, base=source)
    parity = checkpoints.verify_in_fresh_process(folder, made, source.tokenizer)
    form = replace(checkpoint_form(made), notes=tuple(notes))
    return form, {"params": params, "export": facts | {"notes": notes}, "parity": parity.to_json()}


def _gguf(source: Checkpoint, folder: Path, dtype: str) -> tuple[Form, Results]:
    """A GGUF file, compared with llama.cpp if that is installed."""
    done = export_gguf(source.model, source.tokenizer, folder / GGUF_FILE, dtype)
    what = f"GGUF file for llama.cpp, architecture `{done.arch}`, {dtype}"
    form = Form(what, done.parameters, GGUF_USE.format(file=GGUF_FILE), "llama.cpp", ("gguf",), done.notes)
    facts = {"to": "gguf", "arch": done.arch, "dtype": dtype, "bytes": done.bytes, "notes": list(done.notes)}
    params = {"source": source.model.num_parameters(), "exported": done.parameters}
    if not llama_cpp.available():
        unchecked = {"parity": None, "parity_reason": llama_cpp.NOT_VERIFIED}
        return form, {"params": params, "export": facts, **unchecked}
    ids, text = probe(source.model, source.tokenizer)
    prompt = ids[0, : max(1, done.context - llama_cpp.NEW_TOKENS - 1)].tolist()
    parity = compare(done.path, source.model, prompt, dtype)
    if disagreement := parity.disagreement(dtype):
        raise ParityError(
            f"llama.cpp computes something else from the file just written, so it was removed: {disagreement}"
        )
    compared: dict[str, Any] = {k: v for k, v in asdict(parity).items() if k != "continuation"}
    compared |= {"text": text, "process": "llama.cpp", "xllamacpp": version("xllamacpp")}
    return form, {"params": params, "export": facts, "parity": compared}


def _vllm(source: Checkpoint, folder: Path, output: Path) -> tuple[Form, Results]:
    """A checkpoint in the layout of vLLM, which cannot be run here: the tensors are read back and compared."""
    inside = folder / "checkpoint"
    done = export_vllm(source.model, inside, tokenizer=source.tokenizer)
    for file in inside.iterdir():
        shutil.move(str(file), folder / file.name)
    inside.rmdir()
    notes = [note.replace(str(inside), str(output)) for note in done.notes]
    facts = {"to": "vllm", "layout": done.layout, "padding": done.padded_parameters, "notes": notes}
    params = {"source": source.model.num_parameters(), "exported": done.parameters}
    form = vllm_form(source.model, done)
    if done.layout != STOCK_LAYOUT:
        return form, {"params": params, "export": facts, "parity": None, "parity_reason": READ_BACK}
    parity = checkpoints.verify_in_fresh_process(folder, source.model, source.tokenizer)
    return form, {"params": params, "export": facts, "parity": parity.to_json()}
