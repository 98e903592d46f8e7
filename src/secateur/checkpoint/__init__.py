"""Checkpoints: loaded from safetensors only, written whole or not at all, and read back to prove it."""

from secateur.checkpoint.adapted import save_adapted, write_adapter
from secateur.checkpoint.card import Form, checkpoint_form
from secateur.checkpoint.folders import check_space, output_folder, put_aside, put_back
from secateur.checkpoint.lineage import WRITERS, carried_plan, cut_from, earlier, layers_left
from secateur.checkpoint.loading import BUNDLED, Checkpoint, checkpoint_sha256, load, load_skeleton, local_folder
from secateur.checkpoint.memory import available_memory
from secateur.checkpoint.parity import (
    Parity,
    check_same_logits,
    logit_difference,
    verify_in_fresh_process,
    verify_reload,
)
from secateur.checkpoint.quantised import QUANTISERS, WIDTHS, check_packable, quantisation, quantised_copy
from secateur.checkpoint.saving import save, weight_bytes, write, write_about
from secateur.checkpoint.shards import SHARD_SIZE
from secateur.checkpoint.stream import StreamReport, cut_streaming
from secateur.checkpoint.streamed import StreamCheck, verify_streamed

__all__ = [
    "BUNDLED",
    "QUANTISERS",
    "SHARD_SIZE",
    "WIDTHS",
    "WRITERS",
    "Checkpoint",
    "Form",
    "Parity",
    "StreamCheck",
    "StreamReport",
    "available_memory",
    "carried_plan",
    "check_packable",
    "check_same_logits",
    "check_space",
    "checkpoint_form",
    "checkpoint_sha256",
    "cut_from",
    "cut_streaming",
    "earlier",
    "layers_left",
    "load",
    "load_skeleton",
    "local_folder",
    "logit_difference",
    "output_folder",
    "put_aside",
    "put_back",
    "quantisation",
    "quantised_copy",
    "save",
    "save_adapted",
    "verify_in_fresh_process",
    "verify_reload",
    "verify_streamed",
    "weight_bytes",
    "write",
    "write_about",
    "write_adapter",
]
