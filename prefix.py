"""Prefix tuning (Li & Liang 2021): learn the keys and values of P virtual tokens, in every layer of a frozen model.

A prefix is a KV cache that you can train. No token produced it and nothing is computed for it; the numbers in the
cache are themselves the parameters, P · L·2·C of them:

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

from model import Decoder, KVCache, behind


class Prefix(nn.Module):
    """P virtual tokens as learned keys and values, (P, L, 2, H, D): token, layer, key or value, head, width."""

    def __init__(self, kv: Tensor):
        """(P, L, 2, H, D) keys and values to start from -> a prefix that trains them."""
        super().__init__()
        self.start = nn.Parameter(trainable(kv))
        self.mlp = None

    @classmethod
    def from_cache(cls, cache: KVCache) -> "Prefix":
        """L pairs (k, v) of (1, H, P, D) -> a prefix of these very numbers.

        So whatever acts through a cache can become a prefix: a text, a soft prompt, a stack of adapters.
        """
        return cls(torch.stack([torch.stack(kv) for kv in cache])[:, :, 0].permute(3, 0, 1, 2, 4))

    @classmethod
    def text(cls, model: Decoder, ids: Tensor) -> "Prefix":
        """(P,) ids -> the keys and values that the model computes for a real text (Li & Liang §6.5).

        Untrained, it acts exactly as that text in the context would, so training starts from a place the model knows.
        """
        _, cache = model(ids[None])
        return cls.from_cache(cache)

    @classmethod
    def vocab(cls, model: Decoder, ids: Tensor, n_virtual: int, generator: torch.Generator | None = None) -> "Prefix":
        """ids of frequent tokens -> the keys and values of P of them, drawn at random (the "random words" of Li & Liang §6.5)."""
        return cls.text(model, drawn(ids, n_virtual, generator))

    @classmethod
    def random(cls, model: Decoder, n_virtual: int, generator: torch.Generator | None = None) -> "Prefix":
        """-> P rows drawn from N(0, 0.02²), the scale of GPT-2's weights. The model never met such keys."""
        return cls(0.02 * torch.randn(model.kv_shape(n_virtual), generator=generator).to(model.device))

    @classmethod
    def zero(cls, model: Decoder, n_virtual: int) -> "Prefix":
        """-> P rows of zeros. Not a no-op, for a zero key still draws attention away from the text; and rows that
        start equal get equal gradients, so they stay equal, and P of them never learn more than one could."""
        return cls(torch.zeros(model.kv_shape(n_virtual), device=model.device))

    def reparametrise(self, mid_dim: int) -> "Prefix":
        """-> self, from now on trained through an MLP: start + MLP(inputs), one small input row a virtual token.

        Li & Liang §4.3, who found that training the keys and values themselves is touchy. `inputs` (P, C) are drawn from
        N(0, 1); `mlp` is C -> mid_dim, a tanh, mid_dim -> L·2·C. Its last layer is zero at first, so that every
        initialisation means the same with and without it; the start itself is held fixed.
        """
        P, L, _, H, D = self.start.shape
        factory = {"device": self.start.device, "dtype": self.start.dtype}
        self.start.requires_grad_(False)
        self.inputs = nn.Parameter(torch.randn(P, H * D, **factory))  # (P, C)
        first, last = nn.Linear(H * D, mid_dim, **factory), nn.Linear(mid_dim, L * 2 * H * D, **factory)
        self.mlp = nn.Sequential(first, nn.Tanh(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return self

    def kv(self) -> Tensor:
        """-> (P, L, 2, H, D), through the MLP if there is one."""
        return self.start if self.mlp is None else self.start + self.mlp(self.inputs).view_as(self.start)

    def n_stored(self) -> int:
        """-> how many numbers `save` writes; training has more of them where there is an MLP."""
        return self.start.numel()

    def bake(self) -> "Prefix":
        """-> the same prefix without its MLP, which only training needs: the MLP's output becomes the numbers."""
        return Prefix(self.kv())

    def past_kv(self, model: Decoder, past_kv: KVCache | None = None) -> KVCache:
        """-> L pairs (k, v) of (1, H, P, D), cast to the model's dtype; behind `past_kv` if there is one, for all its rows.

        Raises ValueError if the model has other sizes than the prefix.
        """
        if self.start.shape != model.kv_shape(len(self.start)):
            shapes = f"(P, L, 2, H, D) = {tuple(self.start.shape)}, but {model.name} needs {model.kv_shape(len(self.start))}"
            raise ValueError(f"the prefix has {shapes}: load it onto the base that it was trained on")
        per_layer = self.kv().to(model.dtype).permute(1, 2, 3, 0, 4)[:, :, None]  # (L, 2, 1, H, P, D)
        if past_kv is None:
            return [(k, v) for k, v in per_layer]
        B = past_kv[0][0].size(0)
        return [behind(past, *kv.expand(-1, B, -1, -1, -1)) for past, kv in zip(past_kv, per_layer)]


def trainable(start: Tensor) -> Tensor:
    """-> a copy in float32, or in the wider dtype it has: half precision would round small updates away."""
    return start.to(torch.promote_types(start.dtype, torch.float32), copy=True).contiguous()


def drawn(ids: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """-> n of the ids, each at most once as long as there are enough."""
    chosen = torch.multinomial(torch.ones(len(ids)), n, replacement=n > len(ids), generator=generator)
    return ids[chosen.to(ids.device)]
