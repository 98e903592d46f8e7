"""Sections of a model card: what was cut and how, how it was recovered, what was measured, how it was checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.plan import PruningPlan

Step = Mapping[str, Any]
STAGES = ("dense", "adapted", "pruned", "quantised", "recovered", "tuned")  # of perplexities, in their order
# Entries of a plan's provenance that are told in words, or say nothing about the choice.
TOLD = ("allocation", "model_sha256", "seed", "dtype", "device", "versions", "settings", "calibration", "method")
CHOSEN_BY = ("budget", "kinds", "ranking")  # entries of an allocation, where there are no settings
WITHOUT_EFFECT = {"iterations": 1, "round_to": 1, "tier": "auto", "layer_choice": "importance"}
# What a perplexity depends on: figures are set side by side only where all of it is the same.
PROTOCOL = ("text", "text_sha256", "tokens", "seq_len", "stride", "bos", "dtype")
ZEROS = "Zeros in place of missing units, which make all layers equally wide, count as parameters here."
NOT_AGAIN = "These are figures of the checkpoint that was exported. They were not measured again on this form of it."


def cuts(steps: Sequence[Step], plan: PruningPlan | None) -> list[str]:
    """Paragraphs on what was cut and how; the plan is that of the last cut."""
    pruned = [step for step in steps if "sparsity" in step.get("params", {})]
    lines: list[str] = []
    for number, step in enumerate(pruned):
        params = step["params"]
        share = f"{params['sparsity']:.2%} of {params['dense']:,} parameters"
        lines += [f"{'Then ' if number else ''}{share} were removed; {params['pruned']:,} are left.", ""]
        if step.get("tier", {}).get("chosen") == "padded":
            lines += [ZEROS, ""]
        if step is not pruned[-1]:
            lines += [*_choice(step), ""]
    if plan is not None and plan.kept:
        lines += ["| groups | how many | units before | units kept |", "| --- | --- | --- | --- |", *_kept(plan), ""]
    if pruned and "command" in pruned[-1]:
        return [*lines, *_choice(pruned[-1])]
    return [*lines, *(_choice({"protocol": plan.provenance}) if plan is not None else ())]


def _kept(plan: PruningPlan) -> Iterator[str]:
    """One row of a table for every family of groups."""
    families: dict[str, list[str]] = {}
    for name in plan.kept:
        families.setdefault(re.sub(r"\.\d+(?=[./]|$)", ".*", name), []).append(name)
    for family, names in families.items():
        before, kept = _span(plan.units[n] for n in names), _span(len(plan.kept[n]) for n in names)
        yield f"| `{family}` | {len(names)} | {before} | {kept} |"


def _span(counts: Iterable[int]) -> str:
    found = sorted(counts)
    return f"{found[0]:,}" if found[0] == found[-1] else f"{found[0]:,} to {found[-1]:,}"


def _choice(step: Step) -> Iterator[str]:
    """How the units were chosen: by this step, or by what made the plan that it replayed."""
    replayed = "plan" in step
    source = step["plan"]["provenance"] if replayed else step.get("protocol", {})
    allocation = {name: source.get("allocation", {}).get(name) for name in CHOSEN_BY}
    told = ", ".join(_settings(source.get("settings") or allocation))
    more = ", ".join(_settings({name: value for name, value in source.items() if name not in TOLD}))
    if not told and not more:
        if replayed:
            yield "The units are those of a plan that was given, which does not say how they were chosen."
        return
    parts = [f"by {source['method']}"] if "method" in source else []
    parts += [f"with {', '.join(filter(None, (told, more)))}"]
    parts += [f"(seed {source['seed']})"] if source.get("seed") is not None and told else []
    begin = "The units are those of a plan that was given. It says that they" if replayed else "The units"
    yield f"{begin} were chosen {' '.join(parts)}."
    if calibration := source.get("calibration"):
        amount = f"{calibration['samples']} sequences of {calibration['seq_len']} tokens"
        yield f"Calibration: {amount} of {Path(calibration['source']).name}."


def _settings(values: Mapping[str, Any]) -> Iterator[str]:
    """`name` value, for every setting that has an effect."""
    for name, value in values.items():
        if value and WITHOUT_EFFECT.get(name) != value:
            yield f"`{name}` {'on' if value is True else _plain(value)}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " and ".join(f"{_plain(k)}: {_plain(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, (list, tuple)):
        return " and ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def recovery(steps: Sequence[Step]) -> list[str]:
    """Paragraphs on how it was recovered, if it was."""
    return [line for step in steps if "recovery" in step for line in (_lora(step["recovery"]), "")]


def training(steps: Sequence[Step]) -> list[str]:
    """Paragraphs on the training during which units went, if there was one."""
    return [line for step in steps if "training" in step for line in (_lora(step["training"]), "")]


def _lora(run: Step) -> str:
    done = run["settings"]
    length = f"{done['steps']:,} steps" if done["steps"] else f"{done['epochs']:g} epochs, in steps"
    data = ", ".join(Path(corpus["source"]).name for corpus in run["data"])
    adapters = (
        f"LoRA of rank {done['rank']} (alpha {done['alpha']:g}, dropout {done['dropout']:g}), merged into the weights"
    )
    if parts := done.get("also_train"):
        adapters += f", and {' and '.join(parts)} whole at a tenth of the rate"
    what = "All weights" if done.get("full_weights") else adapters
    return (
        f"{what}: {length} of {done['batch_size']} sequences of up to {done['seq_len']} tokens of {data}, peak "
        f"learning rate {done['learning_rate']:g}, seed {done['seed']}.{_distilled(run)}{_mixed(run)}"
    )


def _distilled(run: Step) -> str:
    """A sentence on what was learnt from the dense model, if anything was."""
    if not (done := run["settings"].get("distill")):
        return ""
    known = f", of its {done['top_k']:,} likeliest tokens and the rest" if done["top_k"] else ""
    hidden = f", and the distance of hidden states with weight {done['hidden']:g}" if done["hidden"] else ""
    return (
        f" It was distilled from {Path(run['dense']['source']).name}: weight {done['weight']:g} of the divergence at "
        f"temperature {done['temperature']:g}{known}{hidden}."
    )


def _mixed(run: Step) -> str:
    """A sentence on the mix of the data, if there was more to it than pooling."""
    if not (mix := run.get("mix")):
        return ""
    how = {
        "uniform": "as much from every source",
        "dynamic": "more from the sources on which it was worst, compared with the dense model",
    }[mix["kind"]]
    steps = mix["rounds"][-1]["step"] + mix["rounds"][-1]["steps"]
    return f" The data of its {len(mix['rounds'])} rounds ({steps:,} steps) was a {mix['kind']} mix: {how}."


def figures(steps: Sequence[Step]) -> list[str]:
    """A table of the perplexities since the last cut, and what they were measured with."""
    cut = [number for number, step in enumerate(steps) if step.get("command") == "prune"]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    ways: dict[str, None] = {}
    for step in steps[cut[-1] if cut else 0 :]:
        for name, facts in step.get("perplexity", {}).items():
            row = rows.setdefault((name, *(facts.get(key) for key in PROTOCOL)), dict(facts))
            row |= {stage: facts[stage] for stage in STAGES if stage in facts}
            ways[f"{_windows(facts)}; {_machine(step)}"] = None
            if packed := step.get("protocol", {}).get("quantised"):
                ways[f"`dense` is the model with its linear modules packed by {packed}, as it was trained on"] = None
    if not rows:
        return ["No perplexity was measured."]
    stages = [stage for stage in STAGES if any(stage in row for row in rows.values())]
    head = ["before this cut" if stage == "dense" and len(cut) > 1 else stage for stage in stages]
    lines = ["| " + " | ".join(["perplexity", "tokens", "window", *head]) + " |", "| --- " * (3 + len(head)) + "|"]
    for (name, *_), row in rows.items():
        values = [f"{row[stage]:.3f}" if stage in row else "" for stage in stages]
        lines.append("| " + " | ".join([name, f"{row['tokens']:,}", f"{row['seq_len']:,}", *values]) + " |")
    lines += ["", *(f"{way}." for way in ways)]
    return [*lines, "", NOT_AGAIN] if steps[-1].get("command") == "export" else lines


def _windows(facts: Step) -> str:
    stride = facts.get("stride")
    moved = f"move by {stride} tokens" if stride else "do not overlap"
    return f"Windows {moved} and {'begin with' if facts.get('bos') else 'have no'} BOS token"


def _machine(step: Step) -> str:
    """Versions, dtype and device that a step was run with."""
    protocol = step.get("protocol", {})
    where = " on ".join(str(protocol[name]) for name in ("dtype", "device") if name in protocol)
    return ", ".join(filter(None, (_versions(step), where)))


def _versions(step: Step) -> str:
    found = step.get("protocol", {}).get("versions", {})
    return ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers") if name in found)


def checks(step: Step) -> list[str]:
    """How what lies in the folder was compared with what was meant."""
    lines = []
    if check := step.get("streaming", {}).get("check"):
        lines.append(f"Cut tensor by tensor without loading the model: {check}.")
    if (difference := step.get("export", {}).get("max_logit_difference_to_source")) is not None:
        lines.append(f"Compared with the model it was made from: largest difference of logits {_figure(difference)}.")
    if (difference := step.get("masked_minus_cut")) is not None:
        lines.append(
            f"Cut and merged, compared with the masked model in training: largest difference of logits "
            f"{_figure(difference)}."
        )
    if reason := step.get("parity_reason"):
        lines.append(f"Not checked by running it: {reason}.")
    if parity := step.get("parity"):
        lines.append(_in_llama_cpp(parity, step) if parity["process"] == "llama.cpp" else _loaded(parity, step))
    return "\n\n".join(lines or ["Not checked."]).split("\n")


def _loaded(parity: Step, step: Step) -> str:
    fresh = parity["process"] == "fresh"
    where = "in a fresh process, with transformers and without Secateur" if fresh else "in the same process"
    text = f"Loaded again {where}: largest difference of logits {_figure(parity['max_logit_difference'])}"
    if "perplexity_before" in parity:
        text += (
            f", perplexity {parity['perplexity_before']:.4f} before and {parity['perplexity_after']:.4f} after "
            f"({parity['tokens']} tokens: {parity['text']})"
        )
    return "; ".join(filter(None, (text, _machine(step)))) + "."


def _in_llama_cpp(parity: Step, step: Step) -> str:
    gap = f"tokens that are {parity['greedy_gap']:.1e} nats less likely at most, which rounding explains"
    same = "the same tokens" if parity["same_greedy"] else gap
    text = f"{parity['tokens']} tokens: {parity['text']}"
    return (
        f"Run by llama.cpp and compared with transformers in float32: log-probabilities differ by "
        f"{_figure(parity['max_difference'])} at most and {_figure(parity['mean_difference'])} on average "
        f"({parity['positions']} positions), perplexity is {parity['perplexity_before']:.4f} before and "
        f"{parity['perplexity_after']:.4f} after ({text}), greedy decoding gives {same}; "
        f"xllamacpp {parity['xllamacpp']}, {_versions(step)}."
    )


def _figure(value: float) -> str:
    return f"{value:.1e}" if value else "0"
