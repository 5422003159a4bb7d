"""GPT-2 (Radford et al. 2019) in plain PyTorch, with its key/value cache as an argument and as a result.

A transformer sees its past only through the keys and values that each layer computed for it. So whoever hands those in
can steer the model:

    logits, cache = model(idx)                                   # read a text
    logits, cache = model(more, past_kv=cache)                   # read on, as if it were one text
    logits, _ = model(idx, past_kv=adapter.past_kv(model))       # read on after a *learned* past

Symbols, the same in every file:
    B  batch             P  virtual tokens, or any past     C  n_embd, the width of the model
    T  new positions     S  = P + T, the keys               H  n_head
    V  vocab_size        L  n_layer                         D  = C / H, the width of a head
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KV = tuple[Tensor, Tensor]  # the keys and values of one layer, each (B, H, S, D), or batch 1: shared by all rows
KVCache = list[KV]  # those of all L layers


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """T queries, S keys -> (T, S) bool, True where a query may look: query t at the keys 0 … P + t, with P = S - T.

    So the triangle touches the lower right corner; torch's `is_causal=True` puts it into the upper left one.
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


@lru_cache(maxsize=1)  # one for all layers: until the backward pass, each would keep its own T · S numbers
@torch.inference_mode(False)  # made in inference mode, it could not be kept for a backward pass
def score_mask(T: int, S: int, repeats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-> (repeats · T, S), to be added to scores: 0 where a query may look, -∞ where not. Heads that share keys repeat it."""
    return causal_mask(T, S, device).repeat(repeats, 1).to(dtype).log()  # log 1 and log 0


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, D) queries, (B, K, S, D) keys and values -> softmax(q·k / √D) v over what a query may see, (B, H, T, D).

    In GPT-2, K = H. In a Llama, H/K heads share keys and values, and act here as more queries of one head.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    q = q.reshape(B, K, H // K * T, D)
    mask = score_mask(T, S, H // K, q.dtype, q.device) if T > 1 else None  # a single query may see everything
    # On a short text torch's own takes 4 times as long backward; on a long one, all these weights would take too much memory
    if 1 < T < 1000 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        y = (q @ k.transpose(2, 3) * D**-0.5 + mask).softmax(dim=-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.reshape(B, H, T, D)


def behind(past: KV | None, k: Tensor, v: Tensor) -> KV:
    """Past (B or 1, H, P, D) and new (B, H, T, D) keys and values -> those of all S positions, (B, H, S, D)."""
    if past is None:
        return k, v
    return tuple(torch.cat([old.expand(len(k), -1, -1, -1), new], dim=2) for old, new in zip(past, (k, v)))


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT-2; the defaults are those of the small base that train.py makes."""
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

    def forward(self, x: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        """(B, T, C) -> (B, T, C), and the (keys, values) of past and new positions, (B, H, S, D) each."""
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        k, v = behind(past, k, v)  # (B, H, S, D)
        y = attend(q.contiguous(), k, v)  # as a view, q would keep c_attn's whole output until backward
        return self.c_proj(y.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        """(B, T, C) -> (B, T, C), and this layer's (keys, values) of past and new positions."""
        attended, kv = self.attn(self.ln_1(x), past)
        x = x + attended  # no dropout here or elsewhere: the base is frozen
        return x + self.mlp(self.ln_2(x)), kv


class Decoder(nn.Module):
    """What GPT-2 and its descendants share: reading behind a past, and generating. A family adds config, wte, h, ln_f."""
    name = "an unsaved model"  # what messages call it; load_base puts the directory here
    dtype = property(lambda self: self.wte.weight.dtype)
    device = property(lambda self: self.wte.weight.device)
    head = property(lambda self: self.wte.weight)  # (V, C), whose product with a hidden state is the logits: tied here

    def freeze(self) -> "Decoder":
        """-> self, its weights closed to gradients. Gradients still flow *through* it, to what was fed in."""
        return self.requires_grad_(False)

    def kv_shape(self, n_virtual: int) -> tuple[int, ...]:
        """-> (P, L, 2, H, D) of the keys and values of P tokens: all that a prefix asks of a model."""
        c = self.config
        return n_virtual, c.n_layer, 2, c.n_head, c.n_embd // c.n_head

    def forward(self, idx: Tensor, past_kv: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """(B, T) ids -> (B, T, V) logits, and the cache of past and new positions. The new ones are P … P+T-1."""
        hidden, cache = self.forward_embeddings(self.wte(idx), past_kv)
        return hidden @ self.head.T, cache

    def forward_embeddings(self, x: Tensor, past_kv: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """(B, T, C) token vectors, real or learned -> (B, T, C) hidden states after ln_f, and the cache.

        Raises ValueError if P + T > block_size.
        """
        n_past, T, cache = past_kv[0][0].size(2) if past_kv else 0, x.size(1), []
        if n_past + T > (most := self.config.block_size):
            raise ValueError(f"{n_past} virtual or past + {T} new positions > block_size {most}: shorten the input or lower --n-virtual")
        x = self.place(x, n_past)
        for block, past in zip(self.h, past_kv or [None] * len(self.h)):
            x, kv = block(x, past)
            cache.append(kv)
        return self.ln_f(x), cache

    def place(self, x: Tensor, n_past: int) -> Tensor:
        return x  # GPT-2 adds its positions here; a Llama turns its queries and keys instead

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, past_kv: KVCache | None = None, temperature: float = 0.0,
        top_k: int | None = None, stop_token: int | None = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T) ids -> (B, T + new) ids, new ≤ max_new_tokens.

        The prompt is read once; then each step reads the one new token, behind the cache of all before it. Temperature 0
        takes the likeliest token; above it, one is sampled, among the top_k likeliest if given. A row that has emitted
        stop_token is filled up with it. The last token is never read, so P + T + max_new_tokens may be block_size + 1.
        """
        new, done = idx, torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            hidden, past_kv = self.forward_embeddings(self.wte(new), past_kv)
            logits = (hidden[:, -1] @ self.head.T).float()  # (B, V)
            if top_k is not None:
                logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -torch.inf)
            new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            if temperature > 1e-6:  # below, the likeliest is all that is left
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1, generator=generator)
            if stop_token is not None:
                new = new.masked_fill(done, stop_token)
                done |= new == stop_token
            idx = torch.cat([idx, new], dim=1)
            if done.all():
                break
        return idx


class GPT(Decoder):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def place(self, x: Tensor, n_past: int) -> Tensor:
        return x + self.wpe.weight[n_past : n_past + x.size(1)]


def rows_of(caches: list[KVCache]) -> KVCache:
    """N caches of batch 1 and one length -> one of batch N, so that each row of a batch has its own past."""
    if len(set(lengths := [cache[0][0].size(2) for cache in caches])) > 1:
        raise ValueError(f"pasts of {lengths} positions cannot be rows of one batch: give adapters of one length")
    return [tuple(torch.cat(tensors) for tensors in zip(*layer)) for layer in zip(*caches)]
