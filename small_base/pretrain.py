"""Makes the small base: a tokenizer and a GPT of 0.9 M parameters, in less than a minute on two cores."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex
import torch
import torch.nn.functional as F
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor, nn

from command.process import Progress, say
from model import GPT, GPTConfig
from small_base.world import random_document
from storage.base import save_base
from storage.files import TRAINING, check_place, write_json
from storage.tokenizers import build_tokenizer, ranks_of, save_tokenizer


def read_text(path: str | Path) -> str:
    """A UTF-8 file -> its text. Raises ValueError if it is missing, empty or in another encoding."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def train_bpe(texts: Iterable[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Texts -> up to n_merges pairs of byte strings, the most frequent neighbours first (Sennrich et al. 2016).

    Words are GPT-2's (its splitting pattern), counted once each, and a merge revisits only the words that hold it. A run of
    more than 50 characters without a break is no word, and would be revisited by nearly every merge.
    """
    found = (word for text in texts for word in regex.findall(r50k_pat_str, text))
    counts = Counter(word for word in found if len(word) <= 50)
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    pairs, where = Counter(), defaultdict(set)

    def count(i: int, sign: int) -> None:
        parts, n = words[i]
        for pair in zip(parts, parts[1:]):
            pairs[pair] += sign * n
            where[pair].add(i)

    for i in range(len(words)):
        count(i, +1)
    merges = []
    while pairs and len(merges) < n_merges:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        for i in where[best].copy():
            count(i, -1)
            parts, j = words[i][0], 0
            while j < len(parts) - 1:
                if (parts[j], parts[j + 1]) == best:
                    parts[j : j + 2] = [parts[j] + parts[j + 1]]
                j += 1
            count(i, +1)
    return merges


def windows_anywhere(stream: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """(N,) ids -> (n, length) windows of them that start anywhere, so that the base meets every text at every position:
    virtual tokens will shift the text."""
    starts = torch.randint(len(stream) - length + 1, (n, 1), generator=generator)
    return stream[starts + torch.arange(length)]


def initialise(model: GPT) -> None:
    """Starts a model as GPT-2 starts (§2.3), with N(0, 0.02²) and biases of zero, but its tokens with N(0, 0.4²).

    0.02 leaves the tokens of a kind nearly alike, and what they share drowns what tells them apart: no value is copied.
    Where they differ from the outset, all kinds are copied in half the steps.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # what is added to the residual stream starts smaller, by one over the root of its 2 L terms
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * model.config.n_layer) if "c_proj" in name else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(model.wte.weight, std=0.4)


def pretrain(
    out: Path, texts: list[str], steps: int, lr: float, batch_size: int, seed: int, device: torch.device,
    sizes: Sequence[int] = (),
) -> None:  # fmt: skip
    """Makes a base from texts, or from the restaurant world where there are none, and saves it with its tokenizer to `out`.

    Documents are packed into one stream and read in windows. A base is never overwritten, not even by another process that
    finishes later. Raises ValueError if another model is there, the texts are too few, or the loss is no number.
    """
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model already, and a base is not overwritten: name another --out")
    training = {"method": "pretrain", "task": "texts" if texts else "the restaurant world", "data": None, "base": None}
    training |= {"steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed}
    check_place(out, training)
    say(f"pretraining the small base, once, into {out}")
    rng = random.Random(seed)
    texts = texts or [random_document(rng) for _ in range(2 * steps * batch_size)]
    merges = train_bpe(texts[:5000], n_merges=700)
    tokenizer = build_tokenizer(ranks_of(merges))
    stream = torch.tensor([i for ids in tokenizer.encode_ordinary_batch(texts) for i in (*ids, tokenizer.eot_token)])
    torch.manual_seed(seed)
    sizes = dict(zip(("n_layer", "n_head", "n_embd", "block_size"), sizes))  # or those of GPTConfig
    model = GPT(GPTConfig(tokenizer.n_vocab, **sizes)).to(device)
    initialise(model)
    nn.init.constant_(model.ln_f.weight, 0.1)  # so that the head, which is the same matrix, still starts with small logits
    length = model.config.block_size + 1
    if len(stream) < 10 * length:
        raise ValueError(f"the corpus has {len(stream)} tokens; give at least {10 * length} to learn from")
    generator = torch.Generator().manual_seed(seed)
    loss = fit(model, (windows_anywhere(stream, batch_size, length, generator).to(device) for _ in range(steps)), steps, lr)
    if (out / "config.json").exists():
        return say(f"{out} was made by another process meanwhile, and stays")
    write_json(out / TRAINING, training | {"loss": loss})
    save_tokenizer(out, merges)
    save_base(model, out)


def fit(model: GPT, batches: Iterable[Tensor], steps: int, lr: float) -> float:
    """Trains a model to predict each next token of its batches, (B, T + 1) ids, one a step -> the last loss."""
    optimizers, progress = optimizers_of(model, lr), Progress(0, steps)
    for step, tokens in enumerate(batches):
        for optimizer, peak in optimizers:
            # warm-up, a plateau, and a straight line down over the last 30 %
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 30, (steps - step) / (0.3 * steps))
        model.zero_grad()
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss became {loss:.3g} with --lr {lr:g}: lower it. Nothing was saved")
        for optimizer, _ in optimizers:
            optimizer.step()
        progress.show(step + 1, tokens[:, 1:].numel(), loss=loss.item())
    return loss.item()


def optimizers_of(model: GPT, lr: float) -> list[tuple[torch.optim.Optimizer, float]]:
    """-> Muon (Jordan et al. 2024) for the matrices of the blocks, with which copying is learnt sooner than with Adam, and
    AdamW for all else; each with its peak learning rate."""
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1)
    return [(muon, lr), (torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0), 3e-3)]
