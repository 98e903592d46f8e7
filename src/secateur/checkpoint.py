"""Load and save checkpoints: safetensors only, written whole or not at all, and read back to prove it."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.discovery.setting import quiet_transformers
from secateur.errors import CheckpointError
from secateur.model_card import is_remote, model_card
from secateur.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).parent / "assets"
BUNDLED = {"demo": ASSETS / "demo-model"}
PARITY_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
        model: in evaluation mode.
        tokenizer: None if the checkpoint has none.
        source: as the user named it.
        sha256: of configuration and weights; None for a hub name.
        architecture: `model_type` of the configuration.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    sha256: str | None
    architecture: str


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    to_change: bool = False,
) -> Checkpoint:
    """Load a causal language model and its tokenizer from a folder, a hub name, or `demo`.

    Args:
        dtype: as stored if not given.
        to_change: the weights are going to be cut or trained, for which they must not be quantised.

    Raises:
        CheckpointError: not a checkpoint, corrupted, pickle-only, not a causal language model, or incomplete.
    """
    from transformers import AutoModelForCausalLM

    place = _place(source)
    config = _config(place, trust_remote_code)
    if to_change and (quantised := getattr(config, "quantization_config", None)):
        raise CheckpointError(
            f"{source} is quantised ({_quant_method(quantised)}), and packed weights can be neither cut nor trained: "
            "prune the float checkpoint it was made from, recover that, and quantise the result"
        )
    if isinstance(place, Path):
        _check_weights(place)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=_dtype(dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"cannot load {source}: {_first_line(error)}") from error
    if info["missing_keys"] or info.get("mismatched_keys"):
        names = ", ".join(sorted(str(n) for n in [*info["missing_keys"], *info.get("mismatched_keys", [])])[:5])
        raise CheckpointError(f"{source} lacks weights its config.json asks for, or has them in other shapes: {names}")
    if device:
        model.to(device)
    sha256 = checkpoint_sha256(place) if isinstance(place, Path) else None
    return Checkpoint(model.eval(), _tokenizer(place, trust_remote_code), str(source), sha256, config.model_type)


def load_skeleton(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device: shapes without weights, from `config.json` alone.

    Raises:
        CheckpointError: not a checkpoint, or not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    config = _config(_place(source), trust_remote_code)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval()
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot build the model of {source}: {_first_line(error)}") from error


def _place(source: str | Path) -> Path | str:
    """A folder that exists, or a hub name."""
    if source in BUNDLED:
        return BUNDLED[str(source)]
    path = Path(source)
    if path.is_dir():
        return path
    text = str(source)
    if path.exists():
        raise CheckpointError(f"{source} is a file; give the folder that holds config.json and the weights")
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise CheckpointError(f"{source} does not exist; give a checkpoint folder or a hub name such as org/name")
    return text


def _config(place: Path | str, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if isinstance(place, Path) and not (place / "config.json").is_file():
        if (place / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{place} holds an adapter without its model: merge it into its base and save that, or cut both from "
                "Python (secateur.surgery.slice takes a PeftModel)"
            )
        raise CheckpointError(f"{place} is no checkpoint: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{place} comes with code of its own; read it, then pass --trust-remote-code (trust_remote_code=True)"
            ) from error
        raise CheckpointError(f"cannot read the configuration of {place}: {_first_line(error)}") from error
    heads = config.architectures or []
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    generative = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or remote
    other_head = heads and not any(h.endswith(("ForCausalLM", "LMHeadModel")) for h in heads) and not remote
    if getattr(config, "is_encoder_decoder", False) or not generative or other_head:
        what = heads[0] if heads else config.model_type
        raise CheckpointError(
            f"{place} is {what}, not a causal (decoder-only) language model; Secateur prunes only those"
        )
    return config


def _check_weights(folder: Path) -> None:
    """Open every safetensors file, so that damage is told by file name."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when loaded; convert them to "
                "safetensors first (load in a sandbox with transformers and call save_pretrained)"
            )
        raise CheckpointError(f"{folder} has no weights (*.safetensors)")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    opened.get_slice(name).get_shape()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or corrupted: {_first_line(error)}; copy it again") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(wanted - {f.name for f in files})
        if missing:
            raise CheckpointError(f"{folder} lacks the shard {missing[0]} that its index names; copy it again")


def _tokenizer(place: Path | str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
        return None


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None:
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16")
    return found


def _quant_method(settings: Any) -> str:
    """Name of the method in a quantisation config, which is a dict as read and an object once a quantiser took it."""
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def checkpoint_sha256(folder: Path) -> str:
    """Hash of config.json and all safetensors files of a folder, in name order."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def output_folder(output: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `output` if the block succeeds, and vanishes if it does not.

    Raises:
        CheckpointError: `output` exists and is not empty (unless `overwrite`), or cannot be written.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise CheckpointError(f"{output} exists and is not empty; choose another folder or pass --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {output}: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        _replace(temporary, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"no space left while writing {output}; nothing was written") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, output: Path) -> None:
    """Rename, moving an existing folder out of the way first."""
    if output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
        output.replace(old / "old")
        temporary.replace(output)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(output)


def save(
    model: PreTrainedModel,
    output: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: PruningPlan | None = None,
    results: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that `from_pretrained` loads, and read it back.

    A model whose layers differ in width brings the file of its class along; without Secateur it then loads with
    `trust_remote_code=True`.

    Raises:
        CheckpointError: the folder is in use, or what was written does not load to the same model (it is removed then).
    """
    with output_folder(output, overwrite=overwrite) as folder:
        write(model, folder, tokenizer=tokenizer, plan=plan, results=results)
        verify_reload(folder, model)
    return Path(output)


def write(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: PruningPlan | None = None,
    results: Mapping[str, Any] | None = None,
    base: Checkpoint | None = None,
) -> None:
    """Fill an existing folder: configuration, safetensors, tokenizer, plan.json, results.json, model card."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if plan is not None:
        plan.save(folder / "plan.json")
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    about = (base.source, BUNDLED.get(base.source, Path(base.source))) if base else None
    (folder / "README.md").write_text(model_card(model, results or {}, about), encoding="utf-8")


def verify_reload(folder: Path, model: PreTrainedModel) -> float:
    """Load `folder` with transformers' AutoModel and return the largest difference of logits from `model`.

    Raises:
        CheckpointError: it does not load, or the difference is more than rounding.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=is_remote(model))
        again.to(model.device).eval()
    except Exception as error:  # whatever the class raises, the user must not be left with this folder
        raise CheckpointError(f"the checkpoint just written does not load: {_first_line(error)}") from error
    return check_same_logits(model, again)


def check_same_logits(model: PreTrainedModel, again: PreTrainedModel) -> float:
    """The largest difference of logits between a model and what was loaded from its folder.

    Raises:
        CheckpointError: it is more than rounding.
    """
    ids = torch.arange(32, device=model.device).remainder(model.get_input_embeddings().weight.shape[0])[None]
    training = model.training
    with torch.no_grad():
        wanted = model.eval()(ids, use_cache=False).logits
        difference = float((again(ids, use_cache=False).logits - wanted).abs().max())
    model.train(training)
    if not difference <= PARITY_TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise CheckpointError(f"the checkpoint just written gives other logits (difference {difference:.2g}); removed")
    return difference
