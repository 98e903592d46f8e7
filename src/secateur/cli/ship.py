"""The verb that gives a checkpoint the form another program wants: export."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.cli.common import Device, Dtype, Model, Output, Overwrite, Trust, out, print_parity, recipe_of

FORMS = ("uniform", "per-layer", "padded", "gguf", "vllm")


def export(
    model: Model,
    output: Output,
    to: Annotated[
        str, typer.Option(help="gguf (llama.cpp), vllm, padded or uniform (any loader), or back to per-layer.")
    ],
    gguf_type: Annotated[str, typer.Option(help="Type of a GGUF file: f32, f16, bf16 or q8_0.")] = "f16",
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint in another form, and check that it computes the same."""
    from secateur import pipeline
    from secateur.errors import CheckpointError

    if to not in FORMS:
        raise CheckpointError(f"--to {to}: no such form; use {', '.join(FORMS)}")
    settings = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    recipe = recipe_of(model, {"model": settings})
    results = pipeline.export(recipe, output, to, dtype=gguf_type, overwrite=overwrite)  # type: ignore[arg-type]
    _print(results)
    out.print(f"written to {output}")


def _print(results: dict[str, Any]) -> None:
    params, facts = results["params"], results["export"]
    out.print(f"{params['source']:,} -> {params['exported']:,} parameters")
    if "max_logit_difference_to_source" in facts:
        out.print(f"logits differ by {facts['max_logit_difference_to_source']:.1e} from those of the source")
    for note in facts.get("notes", []):
        out.print(f"note: {note}", soft_wrap=True)
    parity = results["parity"]
    if parity is None:
        out.print(f"not checked by running it: {results['parity_reason']}", soft_wrap=True)
    elif "mean_difference" in parity:
        _print_llama_cpp(parity)
    else:
        print_parity(parity)


def _print_llama_cpp(parity: dict[str, Any]) -> None:
    """Two lines on what llama.cpp computed."""
    out.print(
        f"run by llama.cpp: log-probabilities differ by {parity['max_difference']:.1e} at most and "
        f"{parity['mean_difference']:.1e} on average ({parity['positions']} positions), perplexity "
        f"{parity['perplexity_before']:.4f} before (float32) and {parity['perplexity_after']:.4f} after "
        f"({parity['tokens']} tokens: {parity['text']})",
        soft_wrap=True,
    )
    near = f"other greedy tokens where the likeliest are {parity['greedy_gap']:.1e} nats apart, within the rounding"
    out.print("the same greedy tokens" if parity["same_greedy"] else near, soft_wrap=True)
