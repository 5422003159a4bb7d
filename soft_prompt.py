"""Prompt tuning (Lester et al. 2021): learn P vectors in place of word embeddings, before the text of a frozen model.

Where a prefix is a cache that is learned, a soft prompt is an *input* that is learned. The frozen model itself computes
the cache from it, layer by layer, so P · C numbers steer all L layers:

                  P virtual tokens      T new tokens
               ┌───────────────────┬───────────────────┐
      layer L  │  k, v: computed   │  k, v: computed   │ ◄── the queries of the new tokens
        …      │    …     ▲        │    …     ▲        │     look at both
      layer 1  │  k, v: computed   │  k, v: computed   │
               ├──────────┼────────┼──────────┼────────┤
      inputs   │  vectors: learned │  wte[ids]: frozen │
               └───────────────────┴───────────────────┘
                    (1, P, C)           (B, T, C)

The vectors are run at batch 1, once a training step for all rows, and attention broadcasts their cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Decoder, KVCache
from prefix import drawn, trainable


class SoftPrompt(nn.Module):
    """P virtual tokens as learned input vectors, (P, C)."""

    def __init__(self, vectors: Tensor):
        """(P, C) vectors to start from -> a soft prompt that trains them."""
        super().__init__()
        self.vectors = nn.Parameter(trainable(vectors))

    @classmethod
    def text(cls, model: Decoder, ids: Tensor) -> "SoftPrompt":
        """(P,) ids of a text -> their embeddings. Untrained, it acts exactly as that text in the context would."""
        return cls(model.wte(ids))

    @classmethod
    def vocab(cls, model: Decoder, ids: Tensor, n_virtual: int, generator: torch.Generator | None = None) -> "SoftPrompt":
        """ids of frequent tokens -> the embeddings of P of them, drawn without regard to order (Lester et al. §3.2)."""
        return cls.text(model, drawn(ids, n_virtual, generator))

    @classmethod
    def random(cls, model: Decoder, n_virtual: int, generator: torch.Generator | None = None) -> "SoftPrompt":
        """-> P vectors uniform in ±0.5 (Lester et al. §3.2)."""
        return cls(torch.rand(n_virtual, model.config.n_embd, generator=generator).to(model.device) - 0.5)

    @classmethod
    def zero(cls, model: Decoder, n_virtual: int) -> "SoftPrompt":
        """-> P vectors of zeros. The model adds its positions, so the rows differ, unlike those of a zero prefix."""
        return cls(torch.zeros(n_virtual, model.config.n_embd, device=model.device))

    def past_kv(self, model: Decoder, past_kv: KVCache | None = None) -> KVCache:
        """-> L pairs (k, v) of (1, H, P, D), as the model computes them from the vectors; behind `past_kv` if given.

        The vectors take the place of token embeddings, in the model's dtype, once for each row of that past.
        Raises ValueError if the model is of another width.
        """
        P, C = self.vectors.shape
        if C != model.config.n_embd:
            widths = f"vectors of {C} numbers, but {model.name} has n_embd {model.config.n_embd}"
            raise ValueError(f"the soft prompt has {widths}: load it onto the base that it was trained on")
        B = past_kv[0][0].size(0) if past_kv else 1
        vectors = self.vectors.to(model.dtype).expand(B, P, C)
        return model.forward_embeddings(vectors, past_kv)[1]

    def nearest_tokens(self, model: Decoder, k: int = 1) -> Tensor:
        """-> (P, k) ids nearest to each vector, by the angle: trained ones grow far longer than embeddings (Lester et al. §7)."""
        similarity = F.normalize(self.vectors, dim=1) @ F.normalize(model.wte.weight.to(self.vectors.dtype), dim=1).T
        return similarity.topk(k, dim=1).indices

    def n_stored(self) -> int:
        """-> how many numbers `save` writes."""
        return self.vectors.numel()
