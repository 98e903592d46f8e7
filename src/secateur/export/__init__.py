"""Other forms of a checkpoint: tiers and what they cost, GGUF for llama.cpp, layouts of vLLM."""

from secateur.export.gguf import GGUFExport, export_gguf
from secateur.export.llama_cpp import LlamaCppParity, compare
from secateur.export.tiers import NOT_NEEDED, Tier, layers_of, plainest, tiers
from secateur.export.vllm import VllmExport, export_vllm, vllm_form, vllm_notes

__all__ = [
    "NOT_NEEDED",
    "GGUFExport",
    "LlamaCppParity",
    "Tier",
    "VllmExport",
    "compare",
    "export_gguf",
    "export_vllm",
    "layers_of",
    "plainest",
    "tiers",
    "vllm_form",
    "vllm_notes",
]
