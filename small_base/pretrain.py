"""Makes the small base: a tokenizer and a GPT of 0.9 M parameters, in well under a minute.

    python -m small_base.pretrain --corpus a.txt b.txt --out out/own      a base of your own texts

train.py makes the default base itself, where it is not there yet.
"""

if __name__ == "__main__":
    from command.console import before_torch
    from command.flags import pretrain_flags

    before_torch(pretrain_flags, __doc__)

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex
import tiktoken
import torch
import torch.nn.functional as F
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor, nn

from command.console import run_command, say
from command.flags import PRETRAIN_LR, PRETRAIN_STEPS, pretrain_flags
from command.process import Progress, pick_device, start_process
from data import IGNORE
from model import GPT, GPTConfig
from small_base.world import random_document
from storage.base import save_base
from storage.files import TRAINING, check_place, write_json
from storage.tokenizers import build_tokenizer, ranks_of, save_tokenizer


def read_text(path: Path) -> str:
    """A UTF-8 file -> its text. Raises ValueError if it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def train_bpe(texts: Iterable[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Texts -> up to n_merges pairs of byte strings, the most frequent neighbours first.

    (Sennrich et al. 2016.) Words are split as GPT-2 splits them, and each counts as often as it
    occurs. The most frequent ones are enough, without runs of more than 50 characters.
    """
    found = (word for text in texts for word in regex.findall(r50k_pat_str, text))
    counts = Counter(word for word in found if len(word) <= 50)
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.most_common(2000)]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for parts, n in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if pairs[best] < 2:  # 0 if there is no pair
            break
        merges.append(best)
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
                i += 1
    return merges


def packed(documents: list[list[str]], tokenizer: tiktoken.Encoding) -> tuple[Tensor, Tensor]:
    """Documents, each a list of lines -> (N,) ids of one stream, and (N,) targets: the next ids.

    The first of several lines is a source, drawn at random: it teaches nothing, and its noise would
    double the steps. So it has no targets.
    """
    ids, is_target = [], []
    for first, *others in documents:
        source = tokenizer.encode_ordinary(first + "\n" * bool(others))
        rest = tokenizer.encode_ordinary("\n".join(others)) + [tokenizer.eot_token]
        ids += source + rest
        is_target += [not others] * len(source) + [True] * len(rest)
    stream = torch.tensor(ids)
    targets = stream.masked_fill(~torch.tensor(is_target), IGNORE)
    return stream[:-1], targets[1:]


def windows_anywhere(
    stream: tuple[Tensor, Tensor], n: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(N,) ids and targets -> (n, length) windows of both that start anywhere.

    So the base meets every text at every position: virtual tokens will shift the text.
    """
    starts = torch.randint(len(stream[0]) - length + 1, (n, 1), generator=generator)
    ids, targets = (part[starts + torch.arange(length)] for part in stream)
    return ids, targets


@torch.no_grad()
def initialise(model: GPT) -> None:
    """Starts a model as GPT-2 starts (§2.3), but ready to copy, which saves half of the steps.

    Tokens begin far enough apart that a copied one is told from its like. Positions begin as waves
    (Vaswani et al. 2017 §3.5), so neighbours are alike. Attention begins by writing what it reads:
    its output matrix undoes its value matrix (after Trockman & Kolter 2023).
    """
    c = model.config
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # what is added to the residual stream starts smaller, by the root of its 2 L terms
            smaller = math.sqrt(2 * c.n_layer) if "c_proj" in name else 1.0
            nn.init.normal_(parameter, std=0.02 / smaller)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(model.wte.weight, std=0.4)
    nn.init.constant_(model.ln_f.weight, 0.1)  # the head is wte: logits still start small
    speeds = 1000 ** -(torch.arange(0, c.n_embd, 2) / c.n_embd)  # radians a position
    angles = torch.arange(c.block_size)[:, None] * speeds
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)[:, : c.n_embd]  # (block_size, C)
    model.wpe.weight.copy_(0.3 * waves)
    for block in model.h:
        values = nn.init.orthogonal_(block.attn.c_attn.weight[2 * c.n_embd :])
        block.attn.c_proj.weight.copy_(0.3 * values.T)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates (Jordan et al. 2024): it learns to copy sooner than Adam.

    In float32. torch's own computes in bfloat16, which many processors only emulate.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float):
        shapes = {p.shape for p in matrices}  # those of one shape share each product
        groups = [{"params": [p for p in matrices if p.shape == shape]} for shape in sorted(shapes)]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            directions = []
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.2)  # a short memory, for a short training
                directions.append(p.grad.lerp(momentum, 0.8))
            rows, columns = directions[0].shape
            scale = max(1, rows / columns) ** 0.5
            for p, update in zip(group["params"], orthogonal(torch.stack(directions))):
                p.sub_(update, alpha=scale * group["lr"])


def orthogonal(x: Tensor) -> Tensor:
    """(N, rows, columns) -> about the nearest matrices whose singular values are all 1."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT  # (N, rows, rows): x itself, which is wide, is multiplied here and at the end
    product = identity = torch.eye(x.size(1), device=x.device)
    for _ in range(5):  # Newton and Schulz's iteration, x = factor @ x, with Jordan's coefficients
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        gram, product = factor @ gram @ factor, factor @ product
    return product @ x


def pretrain(
    out: Path, corpus: Sequence[str] = (), sizes: Sequence[int] = (4, 4, 128, 128),
    steps: int = PRETRAIN_STEPS, lr: float = PRETRAIN_LR, batch_size: int = 16, seed: int = 0,
    device: torch.device = torch.device("cpu"),
) -> None:  # fmt: skip
    """Makes a base of texts, or of the restaurant world, and saves it with its tokenizer to `out`.

    Documents are packed into one stream and read in windows. A base is never overwritten, not even
    by another process that ends later. Raises ValueError if a model is there, or the texts are too
    few.
    """
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model, which is not overwritten: name another --out")
    record = {"method": "pretrain", "task": "texts" if corpus else "the restaurant world"}
    record |= {"steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed}
    check_place(out, record)
    say(f"pretraining the small base, once, into {out}")
    rng = random.Random(seed)
    documents = [[text] for text in corpus]
    if not documents:
        documents = [random_document(rng) for _ in range(2 * steps * batch_size)]
    merges = train_bpe(["\n".join(lines) for lines in documents[:5000]], n_merges=700)
    tokenizer = build_tokenizer(ranks_of(merges))
    stream = packed(documents, tokenizer)
    torch.manual_seed(seed)
    L, H, C, block_size = sizes
    if len(stream[0]) < 10 * block_size:
        few = f"the corpus has {len(stream[0])} tokens"
        raise ValueError(f"{few}: give at least {10 * block_size} to learn from")
    model = GPT(GPTConfig(tokenizer.n_vocab, block_size, L, H, C)).to(device)
    initialise(model)
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)
    optimizers = {Muon(matrices, lr): lr, adam: lr / 2}  # each with its peak rate
    generator, progress = torch.Generator().manual_seed(seed), Progress(0, steps)
    for step in range(1, steps + 1):
        # a short warm-up, a plateau, and a straight line down over the last 30 %
        share = min(1, step / 10, (steps - step + 1) / (0.3 * steps))
        ids, targets = windows_anywhere(stream, batch_size, block_size, generator)
        model.zero_grad()
        hidden, _ = model.forward_embeddings(model.wte(ids.to(device)))  # (B, T, C)
        scored = targets != IGNORE
        loss = F.cross_entropy(hidden[scored] @ model.head.T, targets[scored].to(device))
        loss.backward()
        for optimizer, peak in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = share * peak
            optimizer.step()
        entry = {"step": step, "loss": loss.item()}
        if not math.isfinite(entry["loss"]):
            raise ValueError(f"the loss became {entry['loss']} with --lr {lr:g}: lower it")
        progress.show(ids.numel(), entry)
    if (out / "config.json").exists():
        say(f"{out} was made by another process meanwhile, and stays")
        return
    write_json(out / TRAINING, record | {"loss": loss.item()})
    save_tokenizer(out, merges)
    save_base(model, out)


def main(argv: list[str] | None = None) -> None:
    args = pretrain_flags(__doc__, argv)
    start_process()
    texts = [read_text(path) for path in args.corpus]
    device = pick_device(args.device)
    pretrain(args.out, texts, args.sizes, args.steps, args.lr, args.batch_size, args.seed, device)


if __name__ == "__main__":
    run_command(main)
