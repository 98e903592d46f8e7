"""Other forms of a checkpoint: tiers and what they cost, GGUF for llama.cpp, layouts of vLLM."""
