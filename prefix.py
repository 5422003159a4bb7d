"""Prefix tuning (Li & Liang 2021): learn the keys and values of P virtual tokens, in every layer.

A prefix is a KV cache that you can train. No token produced it: the numbers in the cache are
themselves the parameters, P · L·2·C of them (H·D is C in a GPT-2). The text stands at positions
P … P + T - 1, as it would behind P real tokens.

                  P virtual tokens      T new tokens
               ┌───────────────────┬───────────────────┐
      layer L  │  k, v: learned    │  k, v: computed   │ ◄── the queries of the new tokens
        …      │    …              │    …              │     look at both
      layer 1  │  k, v: learned    │  k, v: computed   │
               └───────────────────┴───────────────────┘
      k and v, each  (1, H, P, D)        (B, H, T, D)
"""

import torch
from torch import Tensor, nn

from model import Decoder, KVCache, append_past


class Prefix(nn.Module):
    """P virtual tokens as learned keys and values, (P, L, 2, H, D)."""

    def __init__(self, kv: Tensor):
        """(P, L, 2, H, D): token, layer, key/value, head, width -> a prefix that starts there."""
        super().__init__()
        self.start = nn.Parameter(trainable(kv))
        self.mlp = None

    @classmethod
    def from_cache(cls, cache: KVCache) -> "Prefix":
        """L pairs (k, v) of (1, H, P, D) -> a prefix of these very numbers.

        Whatever acts through a cache can become one: a text, a soft prompt, a stack of adapters.
        """
        layers = [torch.stack([k[0], v[0]]) for k, v in cache]  # (2, H, P, D) each
        return cls(torch.stack(layers).movedim(3, 0))  # (L, 2, H, P, D) -> (P, L, 2, H, D)

    @classmethod
    def text(cls, model: Decoder, ids: Tensor) -> "Prefix":
        """(P,) ids -> the keys and values the model computes for this text (Li & Liang §6.5).

        Untrained, it acts exactly as that text in the context would: a start that the model knows.
        """
        _, cache = model(ids[None])
        return cls.from_cache(cache)

    @classmethod
    def random(cls, model: Decoder, P: int, generator: torch.Generator | None = None) -> "Prefix":
        """-> P rows from N(0, 0.02²), the scale of GPT-2's weights. No text has such keys."""
        return cls(0.02 * torch.randn(model.kv_shape(P), generator=generator).to(model.device))

    @classmethod
    def zero(cls, model: Decoder, P: int) -> "Prefix":
        """-> P rows of zeros. A zero key still draws attention, so this is not a no-op.

        Equal rows get equal gradients and stay equal, unless an MLP tells them apart.
        """
        return cls(torch.zeros(model.kv_shape(P), device=model.device))

    def reparametrise(self, mid_dim: int) -> "Prefix":
        """-> self, from now on trained through an MLP: start + MLP(inputs) (Li & Liang §4.3).

        `inputs` (P, H·D), drawn from N(0, 1), are trained too. `mlp` is H·D -> mid_dim, a tanh, and
        mid_dim -> L·2·H·D. Its last layer is zero at first: training begins at `start` itself.
        """
        P, L, _, H, D = self.start.shape
        like = {"device": self.start.device, "dtype": self.start.dtype}
        self.start.requires_grad_(False)
        self.inputs = nn.Parameter(torch.randn(P, H * D, **like))
        first = nn.Linear(H * D, mid_dim, **like)
        last = nn.Linear(mid_dim, L * 2 * H * D, **like)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(first, nn.Tanh(), last)
        return self

    def kv(self) -> Tensor:
        """-> (P, L, 2, H, D), through the MLP if there is one."""
        if self.mlp is None:
            return self.start
        return self.start + self.mlp(self.inputs).view_as(self.start)

    def bake(self) -> "Prefix":
        """-> the same prefix without its MLP, which only training needs."""
        return Prefix(self.kv())

    def past_kv(self, model: Decoder, past_kv: KVCache | None = None) -> KVCache:
        """-> L pairs (k, v) of (1, H, P, D), in the model's dtype.

        Behind the cache of another adapter they hold its positions too, which come first.
        Raises ValueError if the model has other sizes than the prefix.
        """
        shape, needed = tuple(self.start.shape), model.kv_shape(len(self.start))
        if shape != needed:
            sizes = f"(P, L, 2, H, D) = {shape}, but {model.name} needs {needed}"
            raise ValueError(f"the prefix has {sizes}: load it onto its own base")
        layers = self.kv().to(model.dtype).movedim(0, 3)  # (L, 2, H, P, D)
        keys, values = layers.unsqueeze(2).unbind(1)  # (L, 1, H, P, D) each: a batch of 1
        pasts = past_kv or [None] * len(layers)
        return [append_past(past, k, v) for past, k, v in zip(pasts, keys, values)]


def trainable(start: Tensor) -> Tensor:
    """-> a copy in float32 or wider: half precision would round small updates away.

    nn.Parameter makes a leaf of it, cut off from what computed the numbers.
    """
    return start.to(torch.promote_types(start.dtype, torch.float32), copy=True).contiguous()
