"""GPT-2 (Radford et al. 2019) in plain PyTorch. Its key/value cache is an argument and a result.

A transformer sees its past only as keys and values. Whoever hands those in steers the model:

    logits, cache = model(idx)                                   # read a text
    logits, cache = model(more, past_kv=cache)                   # read on, as if it were one text
    logits, _ = model(idx, past_kv=adapter.past_kv(model))       # read on after a *learned* past

Symbols, the same in every file:
    B  batch             P  virtual tokens, or any past     C  n_embd, the width of the model
    T  new positions     S  = P + T, the keys               H  n_head
    V  vocab_size        L  n_layer                         D  = C / H, the width of a head
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KV = tuple[Tensor, Tensor]  # the keys and values of one layer, each (B, H, S, D); P long in a past
KVCache = list[KV]  # those of all L layers; a batch of 1 is shared by all rows


def causal_mask(T: int, S: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """T queries, S keys -> (T, S), added to scores: 0 where a query may look, -∞ where it may not.

    Query t sees the keys 0 … P + t, with P = S - T: all of the past, and the text up to itself.
    """
    return torch.full((T, S), -math.inf, dtype=dtype, device=device).triu(diagonal=S - T + 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(B, H, T, D) queries, (B, H, S, D) keys and values -> softmax(q·kᵀ / √D + mask) v, as q."""
    q = q / math.sqrt(q.size(-1))
    if k.size(2) < 256 and not q.is_cuda:
        scores = q @ k.transpose(2, 3)  # (B, H, T, S)
        weights = (scores + mask).softmax(dim=-1)  # (B, H, T, S): what each query looks at, sum 1
        return weights @ v  # (B, H, T, D)
    # With more keys, or on a GPU, one kernel does the same faster
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)  # q is scaled


def append_past(past: KV | None, k: Tensor, v: Tensor) -> KV:
    """Past (B or 1, H, P, D) and new (B or 1, H, T, D) keys and values -> (B, H, S, D) of both."""
    if past is None:
        return k, v
    B = max(len(past[0]), len(k))
    past_k, past_v, k, v = (tensor.expand(B, -1, -1, -1) for tensor in (*past, k, v))
    return torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    block_size: int = 128  # the most positions that it can see, virtual tokens included
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    layer_norm_epsilon: float = 1e-5


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attend = attend  # an attribute: whoever wants to see the weights replaces it

    def forward(self, x: Tensor, mask: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        """(B, T, C) -> (B, T, C), and the keys and values of all S positions."""
        heads = self.c_attn(x).unflatten(-1, (3 * self.n_head, -1))  # (B, T, H + H + H, D)
        q, k, v = heads.transpose(1, 2).chunk(3, dim=1)  # (B, H, T, D) each
        k, v = append_past(past, k, v)  # (B, H, S, D)
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """A layer, with the norms, attention and MLP of its family."""

    def __init__(self, ln_1: nn.Module, attn: nn.Module, ln_2: nn.Module, mlp: nn.Module):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = ln_1, attn, ln_2, mlp

    def forward(self, x: Tensor, mask: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        """(B, T, C) -> (B, T, C), and the keys and values of all S positions."""
        attended, kv = self.attn(self.ln_1(x), mask, past)
        x = x + attended  # no dropout here or elsewhere: the base is frozen
        return x + self.mlp(self.ln_2(x)), kv


class Decoder(nn.Module):
    """What GPT-2 and Llama share. Each adds its config, wte, add_positions, h and ln_f."""

    name = "an unsaved model"  # what messages call it; load_base puts the directory here
    dtype = property(lambda self: self.wte.weight.dtype)
    device = property(lambda self: self.wte.weight.device)
    head = property(lambda self: self.wte.weight)  # (V, C): hidden @ head.T are the logits

    def kv_shape(self, n_virtual: int) -> tuple[int, ...]:
        """-> (P, L, 2, H, D), of P tokens' keys and values: all that a prefix has to know."""
        c = self.config
        return n_virtual, c.n_layer, 2, c.n_head, c.n_embd // c.n_head

    def forward(self, idx: Tensor, past_kv: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """(B, T) ids -> (B, T, V) logits, and the cache of past and new positions."""
        hidden, cache = self.forward_embeddings(self.wte(idx), past_kv)
        return hidden @ self.head.T, cache

    def forward_embeddings(
        self, x: Tensor, past_kv: KVCache | None = None
    ) -> tuple[Tensor, KVCache]:
        """(B, T, C) token vectors, real or learned -> (B, T, C) states after ln_f, and the cache.

        The new positions are P … P + T - 1. Raises ValueError if P + T > block_size.
        """
        P, T, most = past_length(past_kv), x.size(1), self.config.block_size
        if P + T > most:
            taken = f"{P} virtual or past + {T} new positions > block_size {most}"
            raise ValueError(f"{taken}: shorten the input or lower --n-virtual")
        x, cache = self.add_positions(x, P), []
        mask = causal_mask(T, P + T, x.dtype, x.device)
        for block, past in zip(self.h, past_kv or [None] * len(self.h)):
            x, kv = block(x, mask, past)
            cache.append(kv)
        return self.ln_f(x), cache

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, past_kv: KVCache | None = None,
        temperature: float = 0.0, top_k: int | None = None, stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T) ids -> (B, T + new) ids, new ≤ max_new_tokens.

        The prompt is read once, then each new token behind the cache of all before it. The last one
        is never read, so P + T + max_new_tokens may be block_size + 1. Temperature 0 takes the
        likeliest token. Rows that have emitted stop_token are filled up with it.
        """
        unread, done = idx, torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            hidden, past_kv = self.forward_embeddings(self.wte(unread), past_kv)
            logits = (hidden[:, -1] @ self.head.T).float()  # (B, V)
            if not logits.isfinite().all():
                raise ValueError(f"{self.name} overflows in {self.dtype}: give --dtype float32")
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < kth, -math.inf)
            unread = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            if temperature > 1e-6:
                probabilities = (logits / temperature).softmax(dim=-1)
                unread = torch.multinomial(probabilities, 1, generator=generator)
            if stop_token is not None:
                unread = unread.masked_fill(done, stop_token)
                done |= unread == stop_token
            idx = torch.cat([idx, unread], dim=1)
            if done.all():
                break
        return idx


class GPT(Decoder):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        norm = partial(nn.LayerNorm, config.n_embd, config.layer_norm_epsilon)
        self.h = nn.ModuleList()
        for _ in range(config.n_layer):
            self.h.append(Block(norm(), Attention(config), norm(), MLP(config)))
        self.ln_f = norm()

    def add_positions(self, x: Tensor, P: int) -> Tensor:
        return x + self.wpe.weight[P : P + x.size(1)]


def past_length(past_kv: KVCache | None) -> int:
    """-> P, how many positions a cache holds."""
    return past_kv[0][0].size(2) if past_kv else 0


def stacked_past_kv(adapters: list[nn.Module], model: Decoder) -> KVCache | None:
    """Adapters, the foremost first -> the cache of all: each is computed behind those before it."""
    past_kv = None
    for adapter in adapters:
        past_kv = adapter.past_kv(model, past_kv)
    return past_kv


def rows_of(caches: list[KVCache]) -> KVCache:
    """N caches of batch 1 and one length -> one of batch N: each row has a prefix of its own."""
    lengths = [past_length(cache) for cache in caches]
    if len(set(lengths)) > 1:
        raise ValueError(f"pasts of {lengths} positions in one batch: give adapters of one length")
    return [tuple(torch.cat(tensors) for tensors in zip(*layer)) for layer in zip(*caches)]
