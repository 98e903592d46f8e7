"""Load checkpoints: safetensors only, from a folder, a hub name, or the bundled model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from secateur.checkpoint.quantised import Quantiser, quantisation, quantiser, refuse_quantised
from secateur.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = {"demo": Path(__file__).parent.parent / "assets" / "demo-model"}


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

    @property
    def folder(self) -> Path | None:
        """Where it lies; None for a hub name."""
        return local_folder(self.source)


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    to_change: bool = False,
    quantise: Quantiser | None = None,
) -> Checkpoint:
    """Load a causal language model and its tokenizer from a folder, a hub name, or `demo`.

    Args:
        dtype: as stored if not given.
        to_change: the weights are going to be cut or trained, for which they must not be quantised.
        quantise: pack the linear modules while they are loaded; see `checkpoint.quantised`.

    Raises:
        CheckpointError: not a checkpoint, corrupted, pickle-only, not a causal language model, incomplete, or quantised
            already.
    """
    from transformers import AutoModelForCausalLM

    place = _place(source)
    config = _config(place, trust_remote_code)
    if to_change:
        refuse_quantised(source, config)
    packing: dict[str, Any] = {}
    if quantise is not None:
        if method := quantisation(config):
            raise CheckpointError(f"{source} is quantised already ({method}): leave --quantize out")
        packing = {"quantization_config": quantiser(quantise), "device_map": {"": device or "cpu"}}
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
            **packing,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"cannot load {source}: {first_line(error)}") from error
    if info["missing_keys"] or info.get("mismatched_keys"):
        names = ", ".join(sorted(str(n) for n in [*info["missing_keys"], *info.get("mismatched_keys", [])])[:5])
        raise CheckpointError(f"{source} lacks weights its config.json asks for, or has them in other shapes: {names}")
    if device and not packing:
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
        raise CheckpointError(f"cannot build the model of {source}: {first_line(error)}") from error


def local_folder(source: str) -> Path | None:
    """The folder of a checkpoint that is on this machine by that name; None for a hub name."""
    place = BUNDLED.get(source, Path(source))
    return place if place.is_dir() else None


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

    if isinstance(place, Path):
        _refuse_other_forms(place)
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
        raise CheckpointError(f"cannot read the configuration of {place}: {first_line(error)}") from error
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


def _refuse_other_forms(place: Path) -> None:
    """Say of a folder that it is what `export` writes for another program.

    Raises:
        CheckpointError: it is.
    """
    if any(place.glob("*.gguf")) and not any(place.glob("*.safetensors")):
        raise CheckpointError(f"{place} holds a GGUF file, which only llama.cpp runs: use what it was exported from")
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        ours = config["model_type"] == "nemotron-nas" and "AutoModelForCausalLM" not in config["auto_map"]
    except (OSError, ValueError, LookupError, TypeError):  # told by transformers
        return
    if ours:
        raise CheckpointError(
            f"{place} has the nemotron-nas layout, in which heads are filled up for vLLM and which no class of "
            "transformers loads: use the checkpoint that it was exported from"
        )


def _check_weights(folder: Path) -> None:
    """Open every safetensors file, so that damage is told by file name."""
    from safetensors import SafetensorError, safe_open

    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    opened.get_slice(name).get_shape()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or corrupted: {first_line(error)}; copy it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when loaded; convert them to "
                "safetensors first (load in a sandbox with transformers and call save_pretrained)"
            )
        raise CheckpointError(f"{folder} has no weights (*.safetensors)")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(wanted - {f.name for f in files})
        if missing:
            raise CheckpointError(f"{folder} lacks the shard {missing[0]} that its index names; copy it again")
    return files


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


def checkpoint_sha256(folder: Path, stop: Event | None = None) -> str:
    """Hash of config.json and all safetensors files of a folder, in name order.

    Args:
        stop: give up when it is set.

    Raises:
        CancelledError: it was set.
    """
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                if stop is not None and stop.is_set():
                    raise CancelledError
    return digest.hexdigest()


@contextmanager
def hashing(folder: Path) -> Iterator[Future[str]]:
    """The hash of a checkpoint folder, found while the block runs; given up if that fails."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(checkpoint_sha256, folder, stop)
        except BaseException:
            stop.set()
            raise
