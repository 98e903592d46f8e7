"""Whether what is written loads: families x tiers, each cell a measured difference or the reason it is refused.

    python benchmarks/checkpoints.py

prunes a tiny random model of each family, writes it in every form, loads each in a fresh process (or runs it in
llama.cpp) and compares it with the model in memory. Writes benchmarks/results/checkpoints.json and the table in
docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import zoo
from rich.progress import track
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur import checkpoint
from secateur.allocation import Budget, allocate
from secateur.checkpoint.parity import probe
from secateur.discovery import discover
from secateur.discovery.setting import quiet_transformers
from secateur.errors import SecateurError
from secateur.export import compare, export_gguf, export_vllm, llama_cpp
from secateur.importance import Random, score
from secateur.pipeline import PACKAGES, write_json
from secateur.surgery import expressible, pad, slice
from secateur.surgery.config_fields import NOT_ARGUMENTS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "opt", "mixtral", "qwen3_moe")
# What published checkpoints have, where the zoo's configurations bring out every kind of layer and of mask.
NO_WINDOW = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": NO_WINDOW,
    "qwen3": NO_WINDOW,
    "qwen3_moe": {**NO_WINDOW, "mlp_only_layers": [], "norm_topk_prob": True},
}
KINDS = ("ffn_channel", "kv_group", "attention_head", "expert")
SHARE = 0.34  # of the units
SEED = 0
RESULTS = Path(__file__).parent / "results" / "checkpoints.json"
PAGE = Path(__file__).parent.parent / "docs" / "checkpoints.md"
MARKS = ("<!-- matrix: benchmarks/checkpoints.py -->", "<!-- end of matrix -->")
COLUMNS = {
    "uniform": "uniform",
    "depth": "depth",
    "per_layer": "per-layer",
    "padded": "padded",
    "gguf_uniform": "gguf, uniform",
    "gguf_per_layer": "gguf, per-layer",
    "vllm_per_layer": "vLLM layout, per-layer",
}
Cell = dict[str, Any]


def dense_model(model_type: str, tokenizer: Any) -> PreTrainedModel:
    """A random float32 model with the vocabulary of the tokenizer, three layers, and no constant parameter."""
    config = zoo.tiny_config(model_type)
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_ARGUMENTS}
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": max(config.num_hidden_layers, 3)}
    config = type(config)(**{**fields, **sizes, **AS_PUBLISHED.get(model_type, {})})
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def pruned(model: PreTrainedModel, kinds: tuple[str, ...], *, uniform: bool) -> PreTrainedModel:
    """About a third of the units of these kinds removed at random; per layer, the first layer stays whole."""
    groups = discover(model)
    can = expressible(model, groups, kinds, uniform=uniform)
    chosen = replace(groups, groups=tuple(g for g in groups.of_kinds(kinds) if g.family not in can.refused))
    if not chosen:
        raise SecateurError("; ".join(dict.fromkeys(can.refused.values())) or "the model has none of these kinds")
    scores = score(model, list(chosen), [], Random(SEED))
    if kinds == ("layer",):
        scores = {name: torch.arange(len(s), 0, -1.0) for name, s in scores.items()}
    first = {} if uniform else {"protect_first": 1}
    budget = Budget(unit_sparsity=SHARE)
    limits = {"feasible": can.feasible, "ties": can.ties, "multiples": can.multiples}
    plan = allocate(chosen, scores, budget, uniform=uniform, **limits, **first)
    return slice(model, plan, groups)


def loaded(model: PreTrainedModel, tokenizer: Any) -> Cell:
    """Saved, and loaded in a fresh process with nothing but transformers."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write(model, Path(folder), tokenizer=tokenizer)
        parity = checkpoint.verify_in_fresh_process(Path(folder), model, tokenizer)
    return {"difference": parity.max_logit_difference, "of": "logits", "class": type(model).__name__}


def in_llama_cpp(model: PreTrainedModel, tokenizer: Any) -> Cell:
    """Written as float32 GGUF and run by llama.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        done = export_gguf(model, tokenizer, Path(folder) / "model.gguf", "f32")
        prompt = probe(model, tokenizer)[0][0, : done.context - llama_cpp.NEW_TOKENS - 1]
        parity = compare(done.path, model, prompt.tolist())
    same = {"same_greedy": parity.same_greedy, "arch": done.arch}
    return {"difference": parity.max_difference, "of": "log-probabilities", **same}


def for_vllm(model: PreTrainedModel, tokenizer: Any) -> Cell:
    """Written in vLLM's layout and read back."""
    with tempfile.TemporaryDirectory() as folder:
        done = export_vllm(model, Path(folder) / "out", tokenizer=tokenizer)
    return {"difference": 0.0, "of": "tensors", "layout": done.layout}


def row(model_type: str, tokenizer: Any) -> dict[str, Cell]:
    """Every cell of one family."""
    dense = dense_model(model_type, tokenizer)
    made: dict[str, PreTrainedModel | str] = {}
    for name, kinds, uniform in (("uniform", KINDS, True), ("depth", ("layer",), True), ("per_layer", KINDS, False)):
        made[name] = _attempt(lambda k=kinds, u=uniform: pruned(dense, k, uniform=u))
    made["padded"] = _attempt(lambda: pad(_model(made["per_layer"])))
    forms: dict[str, tuple[str, Callable[[PreTrainedModel, Any], Cell]]] = {
        **{name: (name, loaded) for name in ("uniform", "depth", "per_layer", "padded")},
        "gguf_uniform": ("uniform", in_llama_cpp),
        "gguf_per_layer": ("per_layer", in_llama_cpp),
        "vllm_per_layer": ("per_layer", for_vllm),
    }
    cells = {}
    for column, (name, check) in forms.items():
        found = _attempt(lambda n=name, c=check: c(_model(made[n]), tokenizer))
        cells[column] = {"refused": found} if isinstance(found, str) else found
    return cells


def _attempt(action: Callable[[], Any]) -> Any:
    """What the action gives, or the reason why it is refused."""
    try:
        return action()
    except SecateurError as error:
        return str(error)


def _model(found: PreTrainedModel | str) -> PreTrainedModel:
    if isinstance(found, str):
        raise SecateurError(found)
    return found


def table(rows: dict[str, dict[str, Cell]]) -> str:
    """The matrix in Markdown, and below it the reasons by number."""
    reasons: list[str] = []
    lines = ["| family | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for family, cells in rows.items():
        shown = []
        for column in COLUMNS:
            cell = cells[column]
            if "refused" not in cell:
                shown.append(f"{cell['difference']:.0e}" if cell["difference"] else "0")
                continue
            if cell["refused"] not in reasons:
                reasons.append(cell["refused"])
            shown.append(f"refused ({reasons.index(cell['refused']) + 1})")
        lines.append(f"| {family} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"{i}. {text.replace('*', chr(92) + '*')}" for i, text in enumerate(reasons, 1))])


def write_page(rows: dict[str, dict[str, Cell]], page: Path) -> None:
    """Put the matrix between its marks."""
    before, _, rest = page.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{MARKS[0]}\n\n{table(rows)}\n\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    tokenizer = checkpoint.load("demo").tokenizer
    with quiet_transformers():
        rows = {family: row(family, tokenizer) for family in track(args.families.split(","), "checkpoints")}
    protocol = {
        "seed": SEED,
        "share_removed": SHARE,
        "kinds": list(KINDS),
        "dtype": "float32",
        "versions": {name: version(name) for name in (*PACKAGES, "gguf", "xllamacpp")},
    }
    write_json(args.output, {"schema": 1, "protocol": protocol, "rows": rows})
    write_page(json.loads(args.output.read_text())["rows"], args.page)


if __name__ == "__main__":
    main()
