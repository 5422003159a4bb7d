"""Prompt tuning (Lester et al. 2021): learn P vectors in place of word embeddings, before the text.

A prefix is a cache that is learned. A soft prompt is an *input* that is learned: the frozen model
itself computes the cache from it, layer by layer, so P · C numbers steer all L layers.

                  P virtual tokens      T new tokens
               ┌───────────────────┬───────────────────┐
      layer L  │  k, v: computed   │  k, v: computed   │ ◄── the queries of the new tokens
        …      │    …     ▲        │    …     ▲        │     look at both
      layer 1  │  k, v: computed   │  k, v: computed   │
               ├──────────┼────────┼──────────┼────────┤
      inputs   │  vectors: learned │  wte[ids]: frozen │
               └───────────────────┴───────────────────┘
                    (1, P, C)           (B, T, C)

The vectors go through the model at batch 1. All rows of a batch share the cache they give.
"""

import torch
from torch import Tensor, nn

from model import Decoder, KVCache
from prefix import trainable


class SoftPrompt(nn.Module):
    """P virtual tokens as learned input vectors, (P, C)."""

    def __init__(self, vectors: Tensor):
        """(P, C) -> a soft prompt that starts there."""
        super().__init__()
        self.vectors = nn.Parameter(trainable(vectors))

    @classmethod
    def text(cls, model: Decoder, ids: Tensor) -> "SoftPrompt":
        """(P,) ids -> their embeddings. Untrained, it acts exactly as that text in the context."""
        return cls(model.wte(ids))

    @classmethod
    def random(
        cls, model: Decoder, P: int, generator: torch.Generator | None = None
    ) -> "SoftPrompt":
        """-> P vectors uniform in ±0.5 (Lester et al. §3.2)."""
        return cls(torch.rand(P, model.config.n_embd, generator=generator).to(model.device) - 0.5)

    @classmethod
    def zero(cls, model: Decoder, P: int) -> "SoftPrompt":
        """-> P vectors of zeros. Their positions tell them apart; rows of a prefix have none."""
        return cls(torch.zeros(P, model.config.n_embd, device=model.device))

    def past_kv(self, model: Decoder, past_kv: KVCache | None = None) -> KVCache:
        """-> L pairs (k, v) of (1, H, P, D), as the model computes them.

        Behind the cache of another adapter they hold its positions too, which come first.
        Raises ValueError if the model is of another width.
        """
        C, width = self.vectors.size(1), model.config.n_embd
        if C != width:
            sizes = f"vectors of {C} numbers, but {model.name} has n_embd {width}"
            raise ValueError(f"the soft prompt has {sizes}: load it onto its own base")
        vectors = self.vectors.to(model.dtype)[None]  # (1, P, C)
        _, cache = model.forward_embeddings(vectors, past_kv)
        return cache
