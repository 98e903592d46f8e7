"""What a model makes of a few beginnings: greedy continuations, to be read beside those of other models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 32


@torch.no_grad()
def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = NEW_TOKENS
) -> str:
    """The likeliest token after the other, beginning with BOS if the tokenizer has one.

    Every token takes a whole forward pass, so that any model that has a perplexity has a continuation, whatever it can
    cache. It ends early where the model says so (EOS), or has no more positions.
    """
    ids = tokenizer((tokenizer.bos_token or "") + prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    begin, ids = ids.shape[1], ids.to(model.device)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or begin + new_tokens
    training = model.training
    model.eval()
    try:
        for _ in range(min(new_tokens, room - begin)):
            likeliest = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            if int(likeliest) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, likeliest], dim=1)
    finally:
        model.train(training)
    return str(tokenizer.decode(ids[0, begin:], skip_special_tokens=True))
