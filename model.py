"""GPT-2 in plain PyTorch, with its key/value cache as an argument and as a result.

The cache is the one idea this project hangs on. A transformer sees its past only through the keys and values that
each layer computed for it, so whoever hands those in can steer the model:

    logits, cache = model(idx)                                   # read a text
    logits, cache = model(more, past_kv=cache)                   # read on, as if it were one text
    logits, _ = model(idx, past_kv=adapter.past_kv(model))       # read on after a *learned* past

Symbols, the same in every file:

    B  batch             P  virtual tokens, or any past     C  n_embd, the width of the model
    T  new positions     S  = P + T, the keys               H  n_head
    V  vocab_size        L  n_layer                         D  = C / H, the width of a head

Architecture: GPT-2 (Radford et al. 2019), its parts under their own names, so that its weights load by name. Without
dropout: the base is nearly always frozen, and dropout would only add noise to what the adapter sees.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data import base_directory, read_json, replaced_directory, saved_file

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that weights may have; for float8, torch has no sum
KVCache = list[tuple[Tensor, Tensor]]  # per layer (keys, values), each (B, H, S, D), or batch 1: shared by all rows


def rows_of(caches: list[KVCache]) -> KVCache:
    """N caches of batch 1 and one length -> one of batch N, (N, H, P, D), so that each row of a batch has its own past.

    Raises ValueError if their lengths differ.
    """
    lengths = [cache[0][0].size(2) for cache in caches]
    if len(set(lengths)) > 1:
        raise ValueError(f"pasts of {lengths} positions cannot be rows of one batch: give adapters of one length")
    return [tuple(torch.cat(tensors) for tensors in zip(*layer)) for layer in zip(*caches)]


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT; the defaults are those of the small base that train.py makes."""

    vocab_size: int
    block_size: int = 128  # the most positions that it can see, virtual tokens included
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    layer_norm_epsilon: float = 1e-5


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """T queries, S keys -> (T, S) bool, True where a query may look.

    Query t stands at position P + t, with P = S - T, and may see keys 0 … P + t: the whole past and itself. So the
    triangle touches the lower right corner; torch's `is_causal=True` puts it into the upper left one.
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


def extend(past: Tensor, new: Tensor, n_past: int) -> Tensor:
    """(B or 1, H, ≥ P, D) past keys (or values), (B, H, T, D) new ones -> (B, H, S, D).

    A past longer than its n_past filled positions is a buffer of `generate`, and the new ones are written into it:
    to copy the past for each token would cost more than the token. Training concatenates, for autograd's sake.
    """
    S = n_past + new.size(2)
    if past.size(2) >= S:
        past[:, :, n_past:S] = new
        return past[:, :, :S]
    return torch.cat([past.expand(new.size(0), -1, -1, -1), new], dim=2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, n, D) queries of the last n positions, (B, H, S, D) keys and values -> softmax(q·k / √D) v, (B, H, n, D).

    A query sees the positions before it and its own (`causal_mask`), and the softmax shares out 1 among those.
    """
    (B, H, n, D), S = q.shape, k.size(2)
    mask = causal_mask(n, S, q.device) if n > 1 else None  # a single query may see everything
    if mask is None or q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # The same, written out: on a CPU, torch's fused attention takes four times as long backward in bfloat16
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.baddbmm(mask.to(q.dtype).log(), q, k.transpose(1, 2), alpha=1 / math.sqrt(D))  # (B·H, n, S), log 0 = -∞
    return (scores.softmax(dim=-1) @ v).view(B, H, n, D)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(…, in) -> (…, out). A single row, as in generation, is a matrix-vector product, and quicker if called that."""
    if x.numel() > x.size(-1):
        return F.linear(x, weight, bias)
    y = torch.mv(weight, x.flatten()) if bias is None else torch.addmv(bias, weight, x.flatten())  # (out,)
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None, n_past: int, last: int):
        """(B, T, C) -> (B, last, C), for the last positions, and the (keys, values) of all, (B, H, S, D) each.

        c_attn makes queries, keys and values at once, C numbers each, in which head after head has its D. The keys and values
        of n_past earlier positions, if there is a past, go in front (`extend`). c_proj mixes what the heads found.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if past is not None:
            k, v = extend(past[0], k, n_past), extend(past[1], v, n_past)  # (B, H, S, D)
            q = q.contiguous()  # for backward, a view would keep k and v in c_attn's output a second time
        y = attend(q[:, :, T - last :], k, v)  # (B, H, last, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, last, C)), (k, v)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None, n_past: int, last: int):
        """(B, T, C) -> (B, last, C), for the last positions, and this layer's (keys, values) of all."""
        attended, kv = self.attn(self.ln_1(x), past, n_past, last)
        x = x[:, x.size(1) - last :] + attended
        return x + self.mlp(self.ln_2(x)), kv


class GPT(nn.Module):
    """The language model: token ids, and whatever past it is given, to logits."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} does not divide into n_head {config.n_head} heads of one width")
        self.config = config
        self.name = "an unsaved model"  # what messages call it; from_pretrained puts the directory here
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # GPT-2 §2.3: what is added to the residual stream starts smaller, by one over the root of its 2 L terms
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def dtype(self) -> torch.dtype:
        return self.wte.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def freeze(self) -> "GPT":
        """-> self, its weights closed to gradients. Gradients still flow *through* it, to what was fed in.

        A bfloat16 base is laid out for speed, too, since it will not change any more.
        """
        if self.dtype == torch.bfloat16:  # as read from a file, matrices are transposed views, three times slower for one row
            for weight in self.parameters():
                weight.data = weight.data.contiguous()
        return self.requires_grad_(False)

    def forward(self, idx: Tensor, past_kv: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """(B, T) ids -> (B, T, V) logits, and the cache of past and new positions.

        The new tokens stand at positions P … P+T-1, behind the past. Raises ValueError if P + T > block_size.
        """
        hidden, cache = self.forward_embeddings(self.wte(idx), past_kv)
        return self.unembed(hidden), cache

    def forward_embeddings(self, x: Tensor, past_kv: KVCache | None = None, last: int | None = None) -> tuple[Tensor, KVCache]:
        """(B, T, C) token vectors, real or learned -> (B, T, C) hidden states after ln_f, and the cache.

        With `last`, the hidden states of that many last positions only, for which the last block need compute no others.
        """
        return self._forward(x, past_kv, past_kv[0][0].size(2) if past_kv else 0, last or x.size(1))

    def unembed(self, hidden: Tensor) -> Tensor:
        """(…, C) hidden states -> (…, V) logits. The head is tied: its matrix is the token embedding."""
        return linear(hidden, self.wte.weight)

    def _forward(self, x: Tensor, past_kv: KVCache | None, n_past: int, last: int) -> tuple[Tensor, KVCache]:
        T = x.size(1)
        S = n_past + T
        if S > self.config.block_size:
            raise ValueError(
                f"{n_past} virtual or past + {T} new positions > block_size {self.config.block_size}: "
                "shorten the input or lower --n-virtual"
            )
        x = x + self.wpe(torch.arange(n_past, S, device=x.device))  # (B, T, C)
        cache = []
        for layer, block in enumerate(self.h, start=1):  # those before the last need all positions
            x, kv = block(x, past_kv[layer - 1] if past_kv else None, n_past, last if layer == len(self.h) else T)
            cache.append(kv)
        return self.ln_f(x), cache

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        past_kv: KVCache | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T + new) ids, new ≤ max_new_tokens.

        The prompt is read once; then each step reads the one token that is new, behind the cache of all before it.
        past_kv is left as it was. Tokens are chosen from float32 logits (`choose`): greedily at temperature 0, otherwise
        sampled, among the top_k likeliest if given. A row that has emitted stop_token is filled up with it, and all end
        when every row has. The last token is never read, so P + T + max_new_tokens may reach block_size + 1; raises
        ValueError beyond that.
        """
        with torch.inference_mode():  # as no_grad, and on a small model a tenth quicker
            hidden, cache = self.forward_embeddings(self.wte(idx), past_kv, last=1)  # the prefill
            n_past = cache[0][0].size(2)
            room = n_past + max_new_tokens - 1
            if room > self.config.block_size:
                raise ValueError(
                    f"{n_past} positions + {max_new_tokens} new tokens > block_size {self.config.block_size} + 1: "
                    "shorten the prompt or lower max_new_tokens"
                )
            buffers = [tuple(F.pad(t, (0, 0, 0, room - n_past)) for t in kv) for kv in cache]  # (B, H, room, D)
            done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
            for step in range(max_new_tokens):
                token = choose(self.unembed(hidden[:, 0]).float(), temperature, top_k, generator)  # (B, 1)
                if stop_token is not None:
                    token = token.masked_fill(done, stop_token)
                    done |= token == stop_token
                idx = torch.cat([idx, token], dim=1)
                if step == max_new_tokens - 1 or (stop_token is not None and done.all()):
                    break
                hidden, _ = self._forward(self.wte(token), buffers, n_past + step, last=1)
        return idx.clone()  # out here: a tensor made in that mode could never be trained on

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors as Hugging Face's GPT2LMHeadModel does."""
        sizes = {THEIR_NAMES.get(name, name): value for name, value in asdict(self.config).items()}
        end = self.config.vocab_size - 1  # GPT-2's last token is the end of text, and serves as the beginning too
        config = {"architectures": ["GPT2LMHeadModel"], "bos_token_id": end, "eos_token_id": end} | ARCHITECTURE | sizes
        tensors = {f"transformer.{name}": stored(name, t).contiguous() for name, t in self.state_dict().items()}
        with replaced_directory(directory) as new:
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path) -> "GPT":
        """A Hugging Face GPT-2 directory, or one of OpenAI's names -> GPT, in the dtype of its file.

        The file is mapped, not read: weights enter memory when they are first used. Raises ValueError, with what was
        found, for a missing, broken or foreign file.
        """
        directory = base_directory(name_or_dir)
        with torch.device("meta"):
            model = cls(read_config(directory))
        model.name = str(name_or_dir)
        if (directory / "model.safetensors.index.json").exists():
            raise ValueError(f"{directory} holds sharded weights: save them as one model.safetensors")
        tensors = read_tensors(saved_file(directory, "model.safetensors"))
        found = {key.removeprefix("transformer."): t for key, t in tensors.items()}
        weights = {}
        for name, parameter in model.state_dict().items():
            if name not in found:
                raise ValueError(f"{directory}/model.safetensors has no {name}: it is not the file of a GPT-2 of {model.config}")
            weights[name] = stored(name, found.pop(name))
            shape, dtype = tuple(weights[name].shape), weights[name].dtype
            if shape != parameter.shape or dtype not in FLOATS:
                expected = tuple(parameter.shape)
                raise ValueError(f"{directory}: {name} is {dtype} of shape {shape}, config.json asks for {expected}")
        head = found.pop("lm_head.weight", weights["wte.weight"])
        if not torch.equal(head, weights["wte.weight"]):
            raise ValueError(f"{directory}: lm_head.weight differs from wte.weight; only a tied head can be loaded")
        unknown = [name for name in found if not name.endswith((".attn.bias", ".attn.masked_bias"))]  # old mask buffers
        if unknown:
            raise ValueError(f"{directory}/model.safetensors holds {unknown[0]}, which a GPT-2 does not have")
        model.load_state_dict(weights, assign=True)
        return model

    def fingerprint(self) -> str:
        """-> 16 hex digits that tell one base from another.

        Taken of the weights rounded to bfloat16, so that a base has one fingerprint in every dtype that it runs in.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        for parameter in self.state_dict().values():
            digest.update(parameter.bfloat16().contiguous().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """(B, V) logits -> (B, 1) ids of the next tokens."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1, generator=generator)


def stored(name: str, weight: Tensor) -> Tensor:
    """A weight as nn.Linear holds it -> as the file does, and back: Hugging Face's Conv1D stores (in, out); biases stay."""
    return weight.transpose(0, -1) if ".c_" in name else weight


# What config.json says of every model here; of a foreign one, what it says otherwise is refused by name.
ARCHITECTURE = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "n_inner": None,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
THEIR_NAMES = {"block_size": "n_positions"}


def read_config(directory: Path) -> GPTConfig:
    """config.json -> GPTConfig. Raises ValueError for what is not this architecture, or no size."""
    path = saved_file(directory, "config.json")
    found = read_json(path)
    *fields, _ = GPTConfig.__annotations__
    sizes = {field: found.get(THEIR_NAMES.get(field, field)) for field in fields}
    epsilon = found.get("layer_norm_epsilon", 1e-5)
    if not all(type(n) is int and 0 < n < 10**6 for n in sizes.values()) or sizes["n_layer"] > 1000 or type(epsilon) is not float:
        raise ValueError(f"{path}: {sizes}, layer_norm_epsilon {epsilon!r} (block_size is n_positions) are not a GPT-2's")
    same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 4 * sizes["n_embd"]}  # other words for what we have
    for key, ours in ARCHITECTURE.items():
        if found.get(key, ours) not in (ours, same.get(key, ours)):
            raise ValueError(f"{path}: {key} is {found[key]!r}; this GPT-2 has {ours!r}")
    return GPTConfig(**sizes, layer_norm_epsilon=epsilon)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file -> its tensors by name, mapped into memory. Raises ValueError if it is broken."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): save or download it again") from None
