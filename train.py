"""Pretrain a small base once, freeze it, steer it with a prefix or a soft prompt, and show what happened.

    python train.py --method prefix                                      tune, evaluate, save
    python train.py --method soft_prompt --task chat                     another method, another task
    python train.py --method prefix --base gpt2 --data my.jsonl          your model, your data
    python train.py --adapter out/sentence/prefix --prompt "name : …"    use what was trained
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # before torch: else MKL's sums depend on where memory happens to lie

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import IGNORE, Batch, Row
from model import GPT, GPTConfig, KVCache
from prefix import Prefix
from soft_prompt import SoftPrompt

DEFAULT_BASE = Path("out/base")


class Recipe(NamedTuple):
    """What a method trains with unless told otherwise; the learning rates were chosen on validation data."""

    adapters: tuple[type[nn.Module], ...]
    n_virtual: int  # of each adapter
    lr: float
    steps: int


RECIPES = {
    "prefix": Recipe((Prefix,), 8, 1e-1, 150),
    "soft_prompt": Recipe((SoftPrompt,), 6, 1e-1, 150),
    "both": Recipe((Prefix, SoftPrompt), 4, 1e-1, 150),
    "full": Recipe((), 0, 5e-4, 150),
    "none": Recipe((), 0, 0.0, 0),
    "pretrain": Recipe((), 0, 2e-2, 600),
}

# -------------------------------------------------------------------------------------------------------- the objective


def stacked_past_kv(adapters: list[nn.Module], model: GPT) -> KVCache | None:
    """Adapters, the foremost first -> the cache of them all: each one is computed behind those before it."""
    past_kv = None
    for adapter in adapters:
        past_kv = adapter.past_kv(model, past_kv)
    return past_kv


def target_logits(model: GPT, batch: Batch, past_kv: KVCache | None) -> tuple[Tensor, Tensor]:
    """-> (N, V) float32 logits and (N,) ids, at the N positions of the batch that predict a target.

    The source is read, not scored, so its hidden states skip the projection onto the vocabulary, on GPT-2 a third of
    the arithmetic of a step, and most of the last block.
    """
    first = int((batch.targets != IGNORE).any(dim=0).int().argmax())  # no row has a target before it
    targets = batch.targets[:, first:]  # (B, last)
    hidden, _ = model.forward_embeddings(model.wte(batch.idx), past_kv, last=targets.size(1))  # (B, last, C)
    scored = targets != IGNORE
    return model.unembed(hidden[scored]).float(), targets[scored]


@torch.no_grad()
def evaluate(model: GPT, adapters: list[nn.Module], rows: list[Row], batch_size: int) -> tuple[float, list[bool]]:
    """-> the loss in nats per target token, and for each row whether the greedy answer is its target exactly.

    Greedy decoding gives the target if and only if, at each of its positions and after the target so far, the likeliest
    token is the target's. So one forward pass tells, and nothing need be generated.
    """
    past_kv = stacked_past_kv(adapters, model)
    total, count, exact = 0.0, 0, [True] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].source) + len(rows[i].target))  # less padding
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        batch = data.batch_of([rows[i] for i in chunk], model.device)
        logits, targets = target_logits(model, batch, past_kv)
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
        row_of = (batch.targets != IGNORE).nonzero()[:, 0]  # (N,) the row that a scored position is in
        for b in row_of[logits.argmax(dim=-1) != targets].unique().tolist():
            exact[chunk[b]] = False
    return total / count, exact


# ------------------------------------------------------------------------------------------------------------- training


def tune(model: GPT, adapters: list[nn.Module], rows: list[Row], args: argparse.Namespace) -> None:
    """Trains the adapters, or the model itself if there are none. Raises ValueError if the loss stops being a number."""
    optimizer = torch.optim.AdamW(trainable_parameters(model, adapters), lr=args.lr, weight_decay=0.0)

    def rate(step: int) -> float:  # a short warm-up, then a straight line down (Li & Liang, appendix)
        return min((step + 1) / 10, (args.steps - step) / args.steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    progress = Progress(args.steps)
    for batch in shuffled_batches(rows, args, model.device):
        logits, targets = target_logits(model, batch, stacked_past_kv(adapters, model))
        loss = F.cross_entropy(logits, targets)
        check_finite(loss.item(), args.lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.show(loss.item(), batch.idx.numel())


def trainable_parameters(model: GPT, adapters: list[nn.Module]) -> list[nn.Parameter]:
    return [p for module in (*adapters, model) for p in module.parameters() if p.requires_grad]


def check_finite(loss: float, lr: float) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"the loss became {loss} with --lr {lr:g}: lower it. Nothing was saved, nothing overwritten")


def shuffled_batches(rows: list[Row], args: argparse.Namespace, device: torch.device) -> Iterator[Batch]:
    """-> one batch a step; every row comes once, in a new order, before any comes again."""
    rng = random.Random(args.seed)
    queue: list[Row] = []
    for _ in range(args.steps):
        while len(queue) < args.batch_size:
            queue += rng.sample(rows, len(rows))
        yield data.batch_of(queue[: args.batch_size], device)
        del queue[: args.batch_size]


def pretrain(out: Path, args: argparse.Namespace, device: torch.device) -> None:
    """Makes the small base, with its tokenizer, from the restaurant world or from the user's own texts.

    Documents are packed into one stream and read in windows that start anywhere, so that the base meets every text at
    every position: a prefix will shift the text, and positions that a base never saw it cannot use.
    """
    texts = [data.read_text(path) for path in args.corpus]
    if not texts:
        rng = random.Random(args.seed)
        texts = [data.random_document(rng) for _ in range(4 * args.steps * args.batch_size)]
    merges = data.train_bpe(texts[:5000], n_merges=700)
    tokenizer = data.build_tokenizer(data.ranks_of(merges))
    stream = torch.tensor([i for ids in tokenizer.encode_ordinary_batch(texts) for i in (*ids, tokenizer.eot_token)])
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(tokenizer.n_vocab)).to(device)
    window = torch.arange(model.config.block_size + 1)
    if len(stream) < 10 * len(window):
        raise ValueError(f"the corpus has {len(stream)} tokens; give at least {10 * len(window)} to learn from")
    # Muon (Jordan et al. 2024) on the matrices of the blocks: with it the base learns to copy sooner than with Adam
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1),
        torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0),
    ]

    def rate(step: int) -> float:  # warm-up, a plateau, and a straight line down over the last 30 %
        return min(1, (step + 1) / 30, (args.steps - step) / (0.3 * args.steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(args.seed)
    progress = Progress(args.steps)
    for _ in range(args.steps):
        starts = torch.randint(len(stream) - len(window) + 1, (args.batch_size, 1), generator=generator)
        tokens = stream[starts + window].to(device)  # (B, T + 1)
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for stepper in optimizers + schedules:
            stepper.step()
        progress.show(loss.item(), tokens[:, 1:].numel())
    with data.replaced_directory(out) as new:
        model.save_pretrained(new)
        data.save_tokenizer(new, merges)


class Progress:
    """One line with step, loss, tokens/s and time left: refreshed in place on a terminal, ten lines where piped."""

    def __init__(self, steps: int):
        self.steps, self.step, self.tokens, self.begin = steps, 0, 0, time.perf_counter()

    def show(self, loss: float, tokens: int) -> None:
        self.step += 1
        self.tokens += tokens
        terminal, last = sys.stdout.isatty(), self.step == self.steps
        if not (last or self.step % (5 if terminal else math.ceil(self.steps / 10)) == 0):
            return
        seconds = time.perf_counter() - self.begin
        left = seconds / self.step * (self.steps - self.step)
        line = f"step {self.step:4}/{self.steps}  loss {loss:.3f}  {self.tokens / seconds:6,.0f} tokens/s  {left:3.0f} s left"
        print(f"\r{line}" if terminal else line, end="\n" if last or not terminal else "", flush=True)


# --------------------------------------------------------------------------------------------------------------- set-up


def new_adapters(args: argparse.Namespace, model: GPT, tokenizer: tiktoken.Encoding, rows: list[Row]) -> list[nn.Module]:
    """-> the untrained adapters of a method, foremost first."""
    P, kinds = args.n_virtual, RECIPES[args.method].adapters
    ids = [i for row in rows for i in row.source + row.target]
    # By default the end of a training example, so that the input comes where a new document would
    text = tokenizer.encode_ordinary(args.init_text) if args.init_text else (rows[0].source + rows[0].target)[-len(kinds) * P :]
    text *= len(kinds) * P  # as often as need be
    frequent = [token for token, _ in Counter(ids).most_common(5000)]
    generator = torch.Generator().manual_seed(args.seed)
    adapters = []
    for i, kind in enumerate(kinds):
        starts = {
            "text": (torch.tensor(text[i * P : (i + 1) * P], device=model.device),),
            "vocab": (torch.tensor(frequent, device=model.device), P, generator),
            "random": (P, generator),
            "zero": (P,),
        }
        known = [name for name in starts if hasattr(kind, name)]
        if args.init not in known:
            raise ValueError(f"--init {args.init} is not for a {kind.__name__}: choose one of {', '.join(known)}")
        adapters.append(getattr(kind, args.init)(model, *starts[args.init]))
        if args.mid_dim and kind is Prefix:
            adapters[-1].reparametrise(args.mid_dim)
    return adapters


def load_adapter(directory: str, model: GPT) -> nn.Module:
    """A PEFT directory -> the Prefix or SoftPrompt that it holds."""
    kinds = {"PREFIX_TUNING": Prefix, "PROMPT_TUNING": SoftPrompt}
    kind = str(data.read_json(data.saved_file(Path(directory), "adapter_config.json")).get("peft_type"))
    if kind not in kinds:
        raise ValueError(f"{directory} is an adapter of type {kind}: only {' and '.join(kinds)} can be loaded")
    return kinds[kind].load(directory, model).to(model.device)


def load_examples(args: argparse.Namespace) -> tuple[str, dict[str, list[data.Example]]]:
    """-> a name for the task, and its train, validation and test examples.

    With --data, the validation examples are the test examples too: nothing is selected on them.
    """
    if not args.data:
        sizes = {"train": 1000, "validation": 200, "test": 500}
        return args.task, {split: data.task_examples(args.task, split, n, args.seed) for split, n in sizes.items()}
    train = data.read_jsonl(args.data)
    if args.val_data:
        held_out = data.read_jsonl(args.val_data)
    else:
        random.Random(args.seed).shuffle(train)
        n = math.ceil(len(train) / 10)
        held_out, train = train[:n], train[n:]
        if not train:
            raise ValueError(f"{args.data} has one example, and a tenth is held out: give more, or --val-data")
    return Path(args.data).stem, {"train": train, "validation": held_out, "test": held_out}


def pick_device(name: str | None) -> torch.device:
    """-> the device asked for, or the best there is. Raises ValueError if it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(kind for kind, there in present.items() if there)
    if not present.get(name.split(":")[0]):
        raise ValueError(f"--device {name} is not there: this machine has {', '.join(k for k in present if present[k])}")
    return torch.device(name)


def answers(
    model: GPT, adapters: list[nn.Module], tokenizer: tiktoken.Encoding, sources: list[list[int]], limit: int
) -> list[str]:
    """Source ids -> their greedy continuations as text, each of at most `limit` tokens, up to the end of text.

    Sources of one length share a batch, so that no padding stands between a source and its answer.
    """
    past_kv = stacked_past_kv(adapters, model)
    n_past = past_kv[0][0].size(2) if past_kv else 0
    texts = [""] * len(sources)
    for length in sorted({len(source) for source in sources}):
        same = [i for i, source in enumerate(sources) if len(source) == length]
        room = max(1, min(limit, model.config.block_size + 1 - n_past - length))
        for start in range(0, len(same), 32):
            chunk = same[start : start + 32]
            idx = torch.tensor([sources[i] for i in chunk], device=model.device)
            for i, row in zip(chunk, model.generate(idx, room, past_kv, stop_token=tokenizer.eot_token).tolist()):
                texts[i] = tokenizer.decode([token for token in row[length:] if token < tokenizer.eot_token])  # the last id
    return texts


# ------------------------------------------------------------------------------------------------------ the command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments -> checked flags, method defaults filled in. Raises ValueError for values out of range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    add = parser.add_argument_group("what to do").add_argument
    add("--method", choices=RECIPES, default="prefix", help="(default: prefix)")
    add("--task", default="sentence", help=f"{', '.join(data.TASKS)} (default: sentence)")
    add("--data", metavar="FILE", help='JSONL, {"input": …, "target": …} a line, instead of a --task')
    add("--val-data", metavar="FILE", help="JSONL to evaluate on (default: a seeded tenth of --data, held out)")
    add("--base", metavar="DIR", help=f"Hugging Face GPT-2 directory, or {', '.join(data.HUB_REPOS)} (default: {DEFAULT_BASE})")
    add("--corpus", metavar="FILE", nargs="+", default=[], help="pretrain on these texts (default: the restaurant world)")

    add = parser.add_argument_group("the adapter").add_argument
    add("--n-virtual", metavar="P", type=int, help="virtual tokens an adapter (default: prefix 8, soft_prompt 6, both 4 and 4)")
    add("--init", choices=["text", "vocab", "random", "zero"], default="text", help="starting point (default: text)")
    add("--init-text", metavar="TEXT", help="for --init text (default: the end of the first training example)")
    add("--mid-dim", metavar="M", type=int, help="train the prefix through an MLP of this width (default: directly)")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, help="optimizer steps (default: by method)")
    add("--lr", type=float, help="peak learning rate (default: by method)")
    add("--batch-size", metavar="B", type=int, default=16, help="examples a step (default: 16)")
    add("--seed", type=int, default=0, help="of the data, the order and the initialisation (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen base (default: float32)")

    add = parser.add_argument_group("saving and using").add_argument
    add("--out", metavar="DIR", help=f"where to save (default: out/TASK/METHOD; pretrain: {DEFAULT_BASE})")
    add("--predict", metavar="FILE", help="write input, target and prediction of the test data as JSONL")
    add("--adapter", metavar="DIR", nargs="+", default=[], help="trained adapters to use with --prompt, foremost first")
    add("--prompt", metavar="TEXT", help="train nothing; print the completion of this input")

    args = parser.parse_args(argv)
    for name in ("n_virtual", "mid_dim", "steps", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr}: give a positive number")
    misplaced = {
        "--adapter trains nothing and needs a --prompt to complete": args.adapter and args.prompt is None,
        f"--init-text goes with --init text, not {args.init}, and needs a text": args.init_text == ""
        or (args.init_text and args.init != "text"),
        f"--mid-dim goes with a prefix, not with --method {args.method}": args.mid_dim and args.method not in ("prefix", "both"),
        f"--corpus goes with --method pretrain, not {args.method}": args.corpus and args.method != "pretrain",
        "--method full needs --dtype float32: bfloat16 weights round small updates away": args.method == "full"
        and args.dtype != "float32",
    }
    for sentence, wrong in misplaced.items():
        if wrong:
            raise ValueError(sentence)
    recipe = RECIPES[args.method]
    args.n_virtual = args.n_virtual or recipe.n_virtual
    args.steps = args.steps or recipe.steps
    args.lr = args.lr or recipe.lr
    return args


def prepare_base(args: argparse.Namespace, device: torch.device) -> tuple[str | Path, float]:
    """-> the base's directory or name, and the seconds spent on pretraining it, 0 where it was there already."""
    asked = args.method == "pretrain"
    base = Path(args.out or DEFAULT_BASE) if asked else args.base or DEFAULT_BASE
    data.restore(DEFAULT_BASE)
    if not asked and (base != DEFAULT_BASE or base.exists()):
        return base, 0.0
    if not asked:  # on the way of a tuning run: always the same base, whatever the flags of that run
        args = parse(["--method", "pretrain"])
    data.check_replaceable(base)
    print(f"pretraining the small base, once, into {base}")
    begin = time.perf_counter()
    pretrain(base, args, device)
    return base, time.perf_counter() - begin


def main(argv: list[str] | None = None) -> dict:
    """Command-line arguments -> what was measured. Raises ValueError, in one sentence, for what a user got wrong."""
    args = parse(argv)
    device = pick_device(args.device)
    base, seconds_pretrain = prepare_base(args, device)
    if args.method == "pretrain":
        return {"method": "pretrain", "seconds_pretrain": seconds_pretrain, "out": str(base)}
    tokenizer = data.load_tokenizer(base)
    model = GPT.from_pretrained(base).to(device, getattr(torch, args.dtype)).freeze()
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"{base}: a tokenizer of {tokenizer.n_vocab} tokens, a model of {model.config.vocab_size}: no pair")
    if args.prompt is not None:
        adapters = [load_adapter(directory, model) for directory in args.adapter]
        (completion,) = answers(model, adapters, tokenizer, [data.source_ids(tokenizer, args.prompt)], limit=256)
        print(completion)
        return {"method": "prompt", "completion": completion}

    task, examples = load_examples(args)
    out = Path(args.out or f"out/{task}/{args.method}")
    data.check_replaceable(out)
    limit = model.config.block_size - args.n_virtual * len(RECIPES[args.method].adapters)
    if limit < 1:
        raise ValueError(f"--n-virtual {args.n_virtual} fills the context of {model.config.block_size}: lower it")
    train, validation, test = (data.encode(tokenizer, examples[split], limit) for split in ("train", "validation", "test"))
    torch.manual_seed(args.seed)
    adapters = new_adapters(args, model, tokenizer, train)
    model.requires_grad_(args.method == "full")
    n_base = sum(p.numel() for p in model.parameters())
    n_trainable = sum(p.numel() for p in trainable_parameters(model, adapters))
    n_stored = sum(adapter.n_stored() for adapter in adapters) or n_trainable
    percent = 100 * n_stored / n_base

    first = examples["train"][0]
    print(f"base     {base}: {n_base:,} parameters, context {model.config.block_size}, {args.dtype} on {device}")
    print(f"task     {task}: {first.input!r} -> {first.target!r}")
    print(f"method   {args.method}: trains {n_trainable:,} numbers, stores {n_stored:,}, which is {percent:.3g} % of the base")
    loss_before, _ = evaluate(model, [], validation, args.batch_size)
    loss_init, _ = evaluate(model, adapters, validation, args.batch_size)
    print(f"before   validation loss {loss_before:.3f}, with the untrained adapter {loss_init:.3f}")
    loss_frozen, exact_frozen = evaluate(model, [], test, args.batch_size)
    begin = time.perf_counter()
    if args.method != "none":
        tune(model, adapters, train, args)
    seconds_train = time.perf_counter() - begin
    loss_validation, _ = evaluate(model, adapters, validation, args.batch_size)  # what settings are chosen by
    loss, exact = evaluate(model, adapters, test, args.batch_size)
    check_finite(loss, args.lr)

    print(f"test     frozen  loss {loss_frozen:.3f}  exact match {share(exact_frozen):5.1f} %")
    print(f"         tuned   loss {loss:.3f}  exact match {share(exact):5.1f} %\n")
    best_last = sorted(range(len(test)), key=exact.__getitem__)
    shown = list(dict.fromkeys(best_last[:1] + best_last[-2:]))  # a wrong one first, if there is one
    longest = max(len(row.target) for row in test)
    for i, got in zip(shown, answers(model, adapters, tokenizer, [test[i].source for i in shown], longest)):
        print(f"source   {examples['test'][i].input}\nexpected {examples['test'][i].target}\ngot      {got}\n")
    if args.predict:
        predicted = answers(model, adapters, tokenizer, [row.source for row in test], 2 * longest)
        lines = [json.dumps(e._asdict() | {"prediction": text}) for e, text in zip(examples["test"], predicted)]
        Path(args.predict).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if args.method != "none":
        save(out, adapters, model, base)
    return {
        "method": args.method, "task": task, "n_trainable": n_trainable, "n_stored": n_stored, "n_base": n_base,
        "percent": percent, "loss_frozen": loss_frozen, "loss_init": loss_init, "loss_validation": loss_validation,
        "loss": loss, "exact_match_frozen": share(exact_frozen), "exact_match": share(exact),
        "seconds_pretrain": seconds_pretrain, "seconds_train": seconds_train, "out": str(out),
    }  # fmt: skip


def share(hits: list[bool]) -> float:
    """-> the percentage of True."""
    return 100 * sum(hits) / len(hits)


def save(out: Path, adapters: list[nn.Module], model: GPT, base: str | Path) -> None:
    """Saves one adapter to `out`, a stack to folders in it, the tuned model where there is none, and says how to use it."""
    if len(adapters) == 1:
        folders = [out]
        adapters[0].save(out, model)
    elif adapters:
        folders = [out / name for name in ("prefix", "soft_prompt")]
        with data.replaced_directory(out) as new:
            for folder, adapter in zip(folders, adapters):
                adapter.save(new / folder.name, model)
    else:
        with data.replaced_directory(out) as new:
            model.save_pretrained(new)
            for file in ("vocab.json", "merges.txt"):
                shutil.copy(data.base_directory(base) / file, new)
        print(f'saved to {out}; use it with: python train.py --base {out} --prompt "…"')
        return
    print(f'saved to {out}; use it with: python train.py --base {base} --adapter {" ".join(map(str, folders))} --prompt "…"')


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
