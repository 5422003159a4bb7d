"""The Llama family behind the hooks of model.py: Llama 2 and 3, SmolLM2, Qwen2 and Qwen3.

Four things differ from GPT-2. Positions turn queries and keys, so keys enter the cache turned.
Several heads of queries share keys and values. RMSNorm is the norm, and SwiGLU the MLP. A prefix
learns keys as they are in the cache, so `kv_shape` is all that it needs to know.

Symbols: those of model.py, and K for n_kv_head, the heads of keys and values. H·D need not be C.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import KV, Block, Decoder, append_past, attend


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_inner: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    rope_scaling: tuple | None = None  # Llama 3: factor, low and high frequency, first context
    tied: bool = True  # the head is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3


def frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """-> (D/2,) radians a position: 1 for the first pair of a head, about 1/theta for the last."""
    pairs = torch.arange(0, config.head_dim, 2, device=device).float()
    turns = 1 / config.rope_theta ** (pairs / config.head_dim)
    if config.rope_scaling:  # Llama 3 slows the pairs that turn seldom, not those that turn often
        factor, low, high, first_context = config.rope_scaling
        rounds = first_context * turns / (2 * math.pi)  # in the context it was first trained on
        kept = ((rounds - low) / (high - low)).clamp(0, 1)
        turns = (1 - kept) * turns / factor + kept * turns
    return turns


def rotate(x: Tensor, P: int, turns: Tensor) -> Tensor:
    """(B, heads, T, D) -> the same, pairs (i, i + D/2) turned by (P + t) · turns[i] (Su 2021)."""
    positions = torch.arange(P, P + x.size(2), device=x.device).float()
    angles = torch.outer(positions, turns)  # (T, D/2), in float32
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        c = self.config = config
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.attend = attend

    def forward(self, x: Tensor, mask: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        """(B, T, C) -> (B, T, C), and the turned keys and the values of all S positions."""
        P = past[0].size(2) if past else 0
        turns = frequencies(self.config, x.device)
        q, k, v = map(self.split_heads, (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k = rotate(self.q_norm(q), P, turns), rotate(self.k_norm(k), P, turns)
        k, v = append_past(past, k, v)  # q (B, H, T, D); k and v (B, K, S, D)
        # H/K heads share keys and values: to `attend`, they are more queries of one head
        _, H, T, D = q.shape
        K = k.size(1)
        y = self.attend(q.reshape(len(q), K, -1, D), k, v, mask.repeat(H // K, 1))
        return self.o_proj(y.reshape(-1, H, T, D).transpose(1, 2).flatten(2)), (k, v)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, heads · D) -> (B, heads, T, D)."""
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


class SwiGLU(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Llama(Decoder):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        norm = partial(nn.RMSNorm, config.n_embd, config.rms_norm_eps)
        self.h = nn.ModuleList()
        for _ in range(config.n_layer):
            self.h.append(Block(norm(), Attention(config), norm(), SwiGLU(config)))
        self.ln_f = norm()
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    head = property(lambda self: self.wte.weight if self.config.tied else self.lm_head.weight)

    def add_positions(self, x: Tensor, P: int) -> Tensor:
        return x  # attention turns queries and keys instead

    def kv_shape(self, n_virtual: int) -> tuple[int, ...]:
        return n_virtual, self.config.n_layer, 2, self.config.n_kv_head, self.config.head_dim
