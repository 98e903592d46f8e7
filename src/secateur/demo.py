"""The demo: the main job on the bundled model, shown as one table and one continued sentence per model."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from secateur import checkpoint, pipeline
from secateur.config import load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARSITIES = (0.2, 0.5)
PROMPT = "The old man opened the door and"
NEW_TOKENS = 32


def run_demo(output: Path, console: Console) -> dict[str, Any]:
    """Prune and recover the bundled model at every sparsity of `SPARSITIES`; writes a run folder for each.

    Returns:
        The rows of the table that is printed, also written to `output/demo.json`.
    """
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for sparsity in SPARSITIES:
        folder = output / f"sparsity-{sparsity:.0%}".replace("%", "")
        recipe = load_recipe("demo", [f"prune.param_sparsity={sparsity}"])
        console.print(f"[bold]{sparsity:.0%} of the parameters[/bold]")
        results = pipeline.run_recipe(recipe, folder, overwrite=True)
        perplexity = next(iter(results["perplexity"].values()))
        if not rows:
            rows.append(_row("dense", str(recipe.model.source), results["params"]["dense"], perplexity["dense"]))
        row = _row(f"{sparsity:.0%} removed", str(folder / "recovered"), results["params"]["pruned"], None)
        rows.append(row | {"pruned": perplexity["pruned"], "recovered": perplexity["recovered"]})
    _show(rows, perplexity, console)
    report = {"schema": 1, "command": "demo", "rows": rows, "prompt": PROMPT, "protocol": results["protocol"]}
    pipeline.write_json(output / "demo.json", report)
    console.print(f"{time.perf_counter() - started:.0f} s; run folders in {output}")
    return report


def _row(name: str, source: str, parameters: int, dense: float | None) -> dict[str, Any]:
    """One line of the table, speed and continuation included."""
    loaded = checkpoint.load(source)
    assert loaded.tokenizer is not None
    return {
        "model": name,
        "folder": source,
        "parameters": parameters,
        "dense": dense,
        "tokens_per_s": round(tokens_per_second(loaded.model), 1),
        "continuation": continuation(loaded.model, loaded.tokenizer),
    }


def tokens_per_second(model: PreTrainedModel, repetitions: int = 5) -> float:
    """Prefill speed on one sequence of 256 tokens, the median of a few runs after a warm-up."""
    ids = torch.zeros(1, 256, dtype=torch.long, device=model.device)
    seconds = []
    with torch.no_grad():
        for _ in range(repetitions + 1):
            begin = time.perf_counter()
            model(ids, use_cache=False)
            seconds.append(time.perf_counter() - begin)
    return ids.numel() / statistics.median(seconds[1:])


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model makes of `PROMPT`: greedy, with a penalty on repetition."""
    ids = tokenizer((tokenizer.bos_token or "") + PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.generate(
        ids.to(model.device),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        repetition_penalty=1.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return " ".join(str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).split())


def _show(rows: list[dict[str, Any]], perplexity: dict[str, Any], console: Console) -> None:
    table = Table("model", "parameters", "dense", "pruned", "recovered", "tokens/s", title="perplexity and speed")
    for row in rows:
        figures = [f"{row[k]:.2f}" if row.get(k) else "" for k in ("dense", "pruned", "recovered")]
        table.add_row(row["model"], f"{row['parameters']:,}", *figures, f"{row['tokens_per_s']:,.0f}")
    console.print(table)
    console.print(
        f"Perplexity on {perplexity['tokens']:,} tokens of books by authors the model never saw, "
        f"{perplexity['seq_len']}-token windows; tokens/s of prefill, this machine."
    )
    for row in rows:
        console.print(f"\n[bold]{row['model']}[/bold]: {PROMPT} [italic]{row['continuation']}[/italic]", soft_wrap=True)
    console.print()
