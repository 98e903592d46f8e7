"""Configuration of the example that comes with its own code; field names are its own too."""

from transformers import PretrainedConfig


class TinyFusedConfig(PretrainedConfig):
    model_type = "tiny_fused"

    def __init__(
        self,
        vocab_size=131,
        width=48,
        depth=2,
        groups=3,
        queries_per_group=2,
        head_width=10,
        channels=44,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.width = width
        self.depth = depth
        self.groups = groups
        self.queries_per_group = queries_per_group
        self.head_width = head_width
        self.channels = channels
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
