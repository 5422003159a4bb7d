"""Pretrain a small base once, freeze it, steer it with a prefix or a soft prompt, and show what happened.

    python train.py --method prefix                                      tune, evaluate, save
    python train.py --method soft_prompt --task chat                     another method, another task
    python train.py --method prefix --base gpt2 --data my.jsonl          your model, your data
    python train.py --adapter out/sentence/prefix --prompt "name : …"    use what was trained
    torchrun --nproc_per_node 2 train.py --method prefix                 tune on several devices at once
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import data
from data import IGNORE, Batch, Row
from model import GPT, GPTConfig, KVCache
from prefix import Prefix
from soft_prompt import SoftPrompt

# So that a run repeats bit for bit: MKL's sums must not depend on where memory happens to lie, and its functions (AdamW's
# square root, the tanh of a prefix's MLP) want a first call on one thread; a first call on several at once may leave one of
# them with a coarse version, of three or four digits (github.com/pytorch/pytorch/issues/188792).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
torch.ones(1).sqrt().tanh()

DEFAULT_BASE = Path("out/base")
STACK = ("prefix", "soft_prompt")  # the folders that --method both saves to, foremost first
LOGITS_AT_ONCE = 2**23  # numbers, 32 MB of float32


class Recipe(NamedTuple):
    """What a method trains with unless told otherwise; the learning rates were chosen on validation data, for the small base."""

    adapters: tuple[type[nn.Module], ...]
    n_virtual: int  # of each adapter
    lr: float
    steps: int


RECIPES = {
    "prefix": Recipe((Prefix,), 8, 3e-1, 150),
    "soft_prompt": Recipe((SoftPrompt,), 6, 1e-1, 150),
    "both": Recipe((Prefix, SoftPrompt), 4, 3e-1, 150),
    "full": Recipe((), 0, 1.5e-3, 150),
    "none": Recipe((), 0, 0.0, 0),
    "pretrain": Recipe((), 0, 2e-2, 350),
}


class Run(NamedTuple):
    """What a tuning run works on."""

    task: str
    model: GPT
    tokenizer: tiktoken.Encoding
    adapters: list[nn.Module]  # the foremost first; none where the model itself is tuned, or nothing is
    examples: dict[str, list[data.Example]]  # train, validation, test
    rows: dict[str, list[Row]]  # the same in ids


# -------------------------------------------------------------------------------------------------------- the objective


def stacked_past_kv(adapters: list[nn.Module], model: GPT) -> KVCache | None:
    """Adapters, the foremost first -> the cache of them all: each one is computed behind those before it."""
    past_kv = None
    for adapter in adapters:
        past_kv = adapter.past_kv(model, past_kv)
    return past_kv


def target_hidden(model: GPT, batch: Batch, past_kv: KVCache | None) -> tuple[Tensor, Tensor]:
    """-> (N, C) hidden states and (N,) ids, at the N positions of the batch that predict a target.

    The source is read, not scored, so its positions skip most of the last block, and the projection onto the vocabulary, which
    at all positions would be a third of GPT-2's arithmetic.
    """
    first = int((batch.targets != IGNORE).any(dim=0).int().argmax())  # the earliest target of any row
    targets = batch.targets[:, first:]  # (B, last)
    hidden, _ = model.forward_embeddings(model.wte(batch.idx), past_kv, last=targets.size(1))  # (B, last, C)
    scored = targets != IGNORE
    return hidden[scored], targets[scored]


def logits_in_parts(model: GPT, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(N, C), (N,) -> (n, V) float32 logits and (n,) ids, of some positions at a time.

    V is so much larger than C that the logits of a whole batch would be the largest thing in memory.
    """
    n = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for some, ids in zip(hidden.split(n), targets.split(n)):
        yield model.unembed(some).float(), ids


def backward(model: GPT, hidden: Tensor, targets: Tensor, n_targets: int) -> Tensor:
    """(N, C), (N,) -> the loss: summed over these positions, divided by n_targets. Adds its gradients to every .grad.

    n_targets is that of the whole batch, of which a process may have a part. The same as loss.backward() on all logits, but those
    of one part are gone before the next one's are made: each part sends its gradient as far as `cut`, a leaf with the
    numbers of `hidden`; then one pass takes them all on through the blocks.
    """
    cut = hidden.detach().requires_grad_()
    loss = torch.zeros((), device=hidden.device)
    for logits, ids in logits_in_parts(model, cut, targets):
        part = F.cross_entropy(logits, ids, reduction="sum") / n_targets
        part.backward()
        loss += part.detach()
    hidden.backward(cut.grad)
    return loss


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
        hidden, targets = target_hidden(model, batch, past_kv)
        likeliest = []
        for logits, ids in logits_in_parts(model, hidden, targets):
            total += F.cross_entropy(logits, ids, reduction="sum").item()
            likeliest.append(logits.argmax(dim=-1))
        count += len(targets)
        row_of = (batch.targets != IGNORE).nonzero()[:, 0]  # (N,) the row that a scored position is in
        for b in row_of[torch.cat(likeliest) != targets].unique().tolist():
            exact[chunk[b]] = False
    return total / count, exact


# ------------------------------------------------------------------------------------------------------------- training


def tune(run: Run, args: argparse.Namespace) -> list[tuple[int, float]]:
    """Trains the adapters, or the model itself if there are none -> the curve: pairs of step and validation loss.

    Every --save-every steps, and at Ctrl-C, a checkpoint is left in --out, from which --resume goes on to the same end,
    bit for bit. Raises ValueError if the loss stops being a number, or a checkpoint of another run is there.
    """
    trainee = nn.ModuleList(run.adapters or [run.model])
    optimizer = torch.optim.AdamW(trainee.parameters(), weight_decay=0.0)
    checkpoint, settings = args.out / data.CHECKPOINT, settings_of(run, args)
    step, curve = load_checkpoint(checkpoint, trainee, optimizer, settings, args.resume)
    progress = Progress(step, args.steps)
    rank, processes = this_process()

    def validate() -> None:
        loss, _ = evaluate(run.model, run.adapters, run.rows["validation"], args.batch_size)
        check_finite(loss, args.lr)
        curve.append((step, loss))

    if step == 0:
        validate()
        print(f"start    validation loss {curve[0][1]:.3f}, before the first step")
    with postponed_interrupt() as interrupts:
        for rows in islice(shuffled_batches(run.rows["train"], args), step, None):
            batch = data.batch_of(rows[rank::processes], run.model.device)
            hidden, targets = target_hidden(run.model, batch, stacked_past_kv(run.adapters, run.model))
            optimizer.zero_grad()
            loss = backward(run.model, hidden, targets, n_targets=sum(len(row.target) for row in rows))
            loss = summed_over_processes(loss, trainee).item()
            check_finite(loss, args.lr)
            # a short warm-up, then a straight line down (Li & Liang, appendix)
            optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / 10, (args.steps - step) / args.steps)
            optimizer.step()
            step += 1
            if step % args.eval_every == 0 or step == args.steps:
                validate()
            progress.show(step, batch.idx.numel(), f"loss {loss:.3f}  validation {curve[-1][1]:.3f}")
            if rank == 0 and step < args.steps and (interrupts or step % args.save_every == 0):
                save_checkpoint(checkpoint, trainee, optimizer, settings, step, curve)
            if interrupts and step < args.steps:
                raise KeyboardInterrupt(f"stopped after step {step}; the same command with --resume goes on from there")
    return curve


class Diverged(ValueError):
    """The loss is no number any more."""


def check_finite(loss: float, lr: float) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the loss became {loss} with --lr {lr:g}: lower it. What --out held before is untouched")


def shuffled_batches(rows: list[Row], args: argparse.Namespace) -> Iterator[list[Row]]:
    """-> the rows of each step; every one comes once, in a new order, before any comes again. The seed decides it all."""
    rng = random.Random(args.seed)
    queue: list[Row] = []
    for _ in range(args.steps):
        while len(queue) < args.batch_size:
            queue += rng.sample(rows, len(rows))
        yield queue[: args.batch_size]
        del queue[: args.batch_size]


def this_process() -> tuple[int, int]:
    """-> the number of this process and how many there are: torchrun starts several, python one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed_over_processes(loss: Tensor, trainee: nn.Module) -> Tensor:
    """-> the loss over the rows of all processes; the gradients are summed in place. Nothing else has to travel."""
    if dist.is_initialized():
        for tensor in (loss, *(p.grad for p in trainee.parameters() if p.requires_grad)):
            dist.all_reduce(tensor)
    return loss


@contextmanager
def postponed_interrupt() -> Iterator[list]:
    """Yields a list that the first Ctrl-C is noted in, so that the step at hand is finished; a second one acts as ever."""
    interrupts = []

    def note(*signal_and_frame: Any) -> None:
        interrupts.append(signal_and_frame)
        signal.signal(signal.SIGINT, usual)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, usual)


# A checkpoint is one file: what is trained, the optimizer's averages, and as metadata the step, the curve and the
# settings. The order of the examples needs no random state: it follows from the seed and the step.


def settings_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """-> all that decides how a run goes; two runs that agree in it are the same run."""
    flags = ("method", "n_virtual", "init", "init_text", "mid_dim", "steps", "lr", "batch_size", "seed", "dtype", "eval_every")
    examples = hashlib.sha256(repr((run.rows["train"], run.rows["validation"])).encode()).hexdigest()[:16]
    return {flag: getattr(args, flag) for flag in flags} | {"base": run.model.fingerprint(), "examples": examples}


def save_checkpoint(
    file: Path, trainee: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], step: int, curve: list
) -> None:
    """Writes the checkpoint; the last one stays until this one is whole."""
    tensors = trainee.state_dict()
    for i, averages in optimizer.state_dict()["state"].items():  # of the i-th tensor: step, exp_avg, exp_avg_sq
        tensors |= {f"{i}/{name}": average for name, average in averages.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"step": step, "curve": curve, "settings": settings}
    with data.replaced_file(file) as new:
        save_file(tensors, new, metadata={key: json.dumps(value) for key, value in metadata.items()})


def load_checkpoint(
    file: Path, trainee: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], resume: bool
) -> tuple[int, list]:
    """Puts a checkpoint's numbers in place -> its step and curve; 0 and an empty curve where there is none.

    Raises ValueError where one is there that is not to be resumed, or is of another run.
    """
    if not file.exists():
        return 0, []
    try:
        with safe_open(file, "pt") as opened:
            step, curve, found = (json.loads(opened.metadata()[key]) for key in ("step", "curve", "settings"))
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, KeyError, RecursionError, TypeError, ValueError) as error:  # it may have other metadata, or none
        raise ValueError(f"{file} is not a whole checkpoint ({error}): delete it to start anew") from None
    if not resume:
        raise ValueError(f"{file} is of a run that was stopped after step {step}: add --resume to go on, or delete it")
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(f"{file} is of a run with {name} {found.get(name)}, not {value}: repeat its flags, or delete it")
    trained = [i for i, p in enumerate(trainee.parameters()) if p.requires_grad]
    state = {i: {name: tensors.pop(f"{i}/{name}") for name in ("step", "exp_avg", "exp_avg_sq")} for i in trained}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    trainee.load_state_dict(tensors)
    print(f"resuming after step {step}")
    return step, [tuple(point) for point in curve]


def windows_anywhere(stream: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """(N,) ids -> (n, length) windows of them that start anywhere, so that the base meets every text at every position:
    virtual tokens will shift the text. What it costs to leave this out: classroom/exp6_positions.py."""
    starts = torch.randint(len(stream) - length + 1, (n, 1), generator=generator)
    return stream[starts + torch.arange(length)]


def pretrain(out: Path, args: argparse.Namespace, device: torch.device, windows: Callable = windows_anywhere) -> None:
    """Makes the small base, with its tokenizer, from the restaurant world or from the user's own texts.

    Documents are packed into one stream and read in windows.
    """
    texts = [data.read_text(path) for path in args.corpus]
    if not texts:
        rng = random.Random(args.seed)
        texts = [data.random_document(rng) for _ in range(2 * args.steps * args.batch_size)]
    merges = data.train_bpe(texts[:5000], n_merges=700)
    tokenizer = data.build_tokenizer(data.ranks_of(merges))
    stream = torch.tensor([i for ids in tokenizer.encode_ordinary_batch(texts) for i in (*ids, tokenizer.eot_token)])
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(tokenizer.n_vocab)).to(device)
    # GPT-2's 0.02 leaves the tokens of a kind nearly alike: what they share is learnt at once and drowns what tells them
    # apart, and without that no value can be copied. Where they differ from the outset, all kinds are copied in half the steps.
    nn.init.normal_(model.wte.weight, std=0.4)
    nn.init.constant_(model.ln_f.weight, 0.1)  # so that the head, which is the same matrix, still starts with small logits
    length = model.config.block_size + 1
    if len(stream) < 10 * length:
        raise ValueError(f"the corpus has {len(stream)} tokens; give at least {10 * length} to learn from")
    # Muon (Jordan et al. 2024) on the matrices of the blocks: with it the base learns to copy sooner than with Adam
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0),
    ]

    def rate(step: int) -> float:  # warm-up, a plateau, and a straight line down over the last 30 %
        return min(1, (step + 1) / 30, (args.steps - step) / (0.3 * args.steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(args.seed)
    progress = Progress(0, args.steps)
    for step in range(1, args.steps + 1):
        tokens = windows(stream, args.batch_size, length, generator).to(device)  # (B, T + 1)
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        check_finite(loss.item(), args.lr)
        model.zero_grad()
        loss.backward()
        for stepper in optimizers + schedules:
            stepper.step()
        progress.show(step, tokens[:, 1:].numel(), f"loss {loss:.3f}")
    with data.replaced_directory(out) as new:
        model.save_pretrained(new)
        data.save_tokenizer(new, merges)


class Progress:
    """One line with step, losses, tokens/s and time left: refreshed in place on a terminal, ten lines where piped."""

    def __init__(self, step: int, steps: int):
        self.first, self.steps, self.tokens, self.begin = step, steps, 0, time.perf_counter()

    def show(self, step: int, tokens: int, losses: str) -> None:
        """Notes that `step` steps are done, the last of them on so many tokens."""
        self.tokens += tokens
        terminal, last = sys.stdout.isatty(), step == self.steps
        if not (last or step % (5 if terminal else math.ceil(self.steps / 10)) == 0):
            return
        seconds = time.perf_counter() - self.begin
        left = seconds / (step - self.first) * (self.steps - step)
        line = f"step {step:4}/{self.steps}  {losses}  {self.tokens / seconds:6,.0f} tokens/s  {left:3.0f} s left"
        print(f"\r{line}" if terminal else line, end="\n" if last or not terminal else "", flush=True)


# --------------------------------------------------------------------------------------------------------------- set-up

STARTS = ("text", "vocab", "random", "zero")


def pick_device(name: str | None) -> torch.device:
    """-> the device asked for, or the best there is. Raises ValueError if it is not there."""
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    name = name or next(kind for kind in count if count[kind])
    kind, _, index = name.partition(":")
    if kind == "cuda" and not index:
        index = os.environ.get("LOCAL_RANK", "0")  # torchrun's processes take a device each
    if (index or "0") not in map(str, range(count.get(kind, 0))):
        there = ", ".join(f"{n} {kind}" for kind, n in count.items() if n)
        raise ValueError(f"--device {name} (number {index or 0}) is not there: this machine has {there}")
    return torch.device(f"{kind}:{index}" if index else kind)


def make_base(args: argparse.Namespace) -> float:
    """Pretrains the base that is asked for, or the small one where a run needs it and it is not there -> seconds taken."""
    if args.method != "pretrain":
        data.restore(DEFAULT_BASE)
        if args.base != DEFAULT_BASE or DEFAULT_BASE.exists():
            return 0.0
        args = parse(["--method", "pretrain", *(["--device", args.device] if args.device else [])])  # the same for every run
    data.check_replaceable(args.out)
    print(f"pretraining the small base, once, into {args.out}")
    begin = time.perf_counter()
    pretrain(args.out, args, pick_device(args.device))
    return time.perf_counter() - begin


def load_base(args: argparse.Namespace) -> tuple[GPT, tiktoken.Encoding]:
    """-> the frozen model and its tokenizer, on the device and in the dtype that are asked for."""
    tokenizer = data.load_tokenizer(args.base)
    model = GPT.from_pretrained(args.base).to(pick_device(args.device), getattr(torch, args.dtype)).freeze()
    if tokenizer.n_vocab > model.config.vocab_size:
        sizes = f"a tokenizer of {tokenizer.n_vocab} tokens, a model of {model.config.vocab_size}"
        raise ValueError(f"{args.base}: {sizes}: copy the four files of one model again")
    return model, tokenizer


def prepare(args: argparse.Namespace, model: GPT, tokenizer: tiktoken.Encoding) -> Run:
    """Checks that all can be done and saved, makes the adapters -> the run that `tune` and `evaluate` work on."""
    task, examples = load_examples(args)
    args.out = args.out or Path("out") / task / args.method
    data.check_replaceable(args.out)
    if args.predict:
        data.check_writable(Path(args.predict))
    rows = {split: data.encode(tokenizer, examples[split]) for split in examples}
    torch.manual_seed(args.seed)
    adapters = new_adapters(args, model, tokenizer, rows["train"])
    model.requires_grad_(args.method == "full")
    past_kv = stacked_past_kv(adapters, model)
    n_virtual = past_kv[0][0].size(2) if past_kv else 0
    for split in rows:
        data.check_lengths(rows[split], model.config.block_size - n_virtual)
    return Run(task, model, tokenizer, adapters, examples, rows)


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


def new_adapters(args: argparse.Namespace, model: GPT, tokenizer: tiktoken.Encoding, rows: list[Row]) -> list[nn.Module]:
    """-> the adapters of a method, foremost first, as training starts with them."""
    P, kinds = args.n_virtual, RECIPES[args.method].adapters
    generator = torch.Generator().manual_seed(args.seed)

    def start(kind: type[nn.Module], text: list[int]) -> nn.Module:
        match args.init:
            case "text":
                return kind.text(model, torch.tensor(text, device=model.device))
            case "vocab":
                counts = Counter(i for row in rows for i in row.source + row.target)
                frequent = [token for token, _ in counts.most_common(5000)]
                return kind.vocab(model, torch.tensor(frequent, device=model.device), P, generator)
            case "random":
                return kind.random(model, P, generator)
            case "zero":
                return kind.zero(model, P)

    if args.init in STARTS:
        # By default the end of a training example, so that the input comes where a new document would
        text = tokenizer.encode_ordinary(args.init_text or "") or (rows[0].source + rows[0].target)[-len(kinds) * P :]
        text *= len(kinds) * P  # as often as need be; in a stack, each adapter starts from its part
        adapters = [start(kind, text[i * P : (i + 1) * P]) for i, kind in enumerate(kinds)]
    else:
        adapters = load_adapters(args.init, model)
    if tuple(map(type, adapters)) != kinds:
        found, needed = (" and ".join(kind.__name__ for kind in some) for some in (map(type, adapters), kinds))
        raise ValueError(f"--init {args.init} holds a {found}, and --method {args.method} trains a {needed}")
    for adapter in adapters:
        if args.mid_dim and isinstance(adapter, Prefix):
            adapter.reparametrise(args.mid_dim)
    return adapters


def load_adapters(directory: str, model: GPT) -> list[nn.Module]:
    """A saved adapter, or the folder that a stack was saved to -> the adapters in it, foremost first."""
    kinds = {"PREFIX_TUNING": Prefix, "PROMPT_TUNING": SoftPrompt}
    inner = [Path(directory) / name for name in STACK]
    adapters = []
    for folder in inner if all(path.is_dir() for path in inner) else [Path(directory)]:
        kind = str(data.read_json(data.saved_file(folder, "adapter_config.json")).get("peft_type"))
        if kind not in kinds:
            raise ValueError(f"{folder} is an adapter of type {kind}: only {' and '.join(kinds)} can be loaded")
        adapters.append(kinds[kind].load(folder, model).to(model.device))
    return adapters


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
    add("--task", choices=data.TASKS, default="sentence", metavar="TASK", help=f"{', '.join(data.TASKS)} (default: sentence)")
    add("--data", metavar="FILE", help='JSONL, {"input": …, "target": …} a line, instead of a --task')
    add("--val-data", metavar="FILE", help="JSONL to evaluate on (default: a seeded tenth of --data, held out)")
    names = ", ".join(data.HUB_REPOS)
    add("--base", metavar="DIR", default=DEFAULT_BASE, help=f"Hugging Face GPT-2 directory, or {names} (default: {DEFAULT_BASE})")
    add("--corpus", metavar="FILE", nargs="+", default=[], help="pretrain on these texts (default: the restaurant world)")

    add = parser.add_argument_group("the adapter").add_argument
    add("--n-virtual", metavar="P", type=int, help="virtual tokens an adapter (default: prefix 8, soft_prompt 6, both 4 and 4)")
    add("--init", default="text", help=f"start: {', '.join(STARTS)}, or the directory of a trained adapter (default: text)")
    add("--init-text", metavar="TEXT", help="for --init text (default: the end of the first training example)")
    add("--mid-dim", metavar="M", type=int, help="train the prefix through an MLP of this width (default: directly)")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, help="optimizer steps (default: by method)")
    add("--lr", type=float, help="peak learning rate (default: by method)")
    add("--batch-size", metavar="B", type=int, default=16, help="examples a step (default: 16)")
    add("--seed", type=int, default=0, help="of the data, the order and the initialisation (default: 0)")
    add("--eval-every", metavar="STEPS", type=int, help="between two looks at the validation data (default: a tenth of --steps)")
    add("--save-every", metavar="STEPS", type=int, default=500, help="between two checkpoints (default: 500)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen base (default: float32)")

    add = parser.add_argument_group("saving and using").add_argument
    add("--out", metavar="DIR", type=Path, help=f"where to save (default: out/TASK/METHOD; pretrain: {DEFAULT_BASE})")
    add("--predict", metavar="FILE", help="write input, target and prediction of the test data as JSONL")
    add("--adapter", metavar="DIR", nargs="+", default=[], help="trained adapters to use with --prompt, foremost first")
    add("--prompt", metavar="TEXT", help="train nothing; print the completion of this input")

    args = parser.parse_args(argv)
    ranges = {name: (1, 10**9) for name in ("steps", "eval_every", "save_every")}
    ranges |= {"n_virtual": (1, 10**5), "mid_dim": (1, 10**4), "batch_size": (1, 10**5), "seed": (0, 2**63 - 1)}
    for name, (low, high) in ranges.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give {low} to {high}")
    if args.lr is not None and not 0 < args.lr <= 1e38:
        raise ValueError(f"--lr {args.lr}: give a positive number, at most 1e38")
    if args.adapter and args.prompt is None:
        raise ValueError("--adapter trains nothing and needs a --prompt to complete; to train on from one, give it as --init")
    if args.init_text is not None and (args.init != "text" or not args.init_text):
        raise ValueError(f"--init-text {args.init_text!r} with --init {args.init}: it goes with --init text, and needs a text")
    if args.n_virtual and args.init not in STARTS:
        raise ValueError(f"--n-virtual {args.n_virtual} with --init {args.init}: a trained adapter keeps its length")
    if args.mid_dim and args.method not in ("prefix", "both"):
        raise ValueError(f"--mid-dim goes with a prefix, not with --method {args.method}")
    if args.corpus and args.method != "pretrain":
        raise ValueError(f"--corpus goes with --method pretrain, not {args.method}")
    if args.method == "full" and args.dtype != "float32":
        raise ValueError(f"--method full with --dtype {args.dtype}: it needs float32, since less rounds small updates away")
    recipe = RECIPES[args.method]
    args.n_virtual = args.n_virtual or recipe.n_virtual
    args.steps = 0 if args.method == "none" else args.steps or recipe.steps
    args.lr = args.lr or recipe.lr
    args.eval_every = args.eval_every or math.ceil(args.steps / 10)
    if args.method == "pretrain":
        args.out = args.out or DEFAULT_BASE
    return args


def join_processes() -> tuple[int, int]:
    """Under torchrun, meets the other processes -> this one's number and how many there are. The first one does the talking."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return this_process()


def main(argv: list[str] | None = None) -> dict:
    """Command-line arguments -> what was measured. Raises ValueError, in one sentence, for what a user got wrong."""
    args = parse(argv)
    rank, processes = join_processes()
    if args.batch_size < processes:
        raise ValueError(f"--batch-size {args.batch_size} for {processes} processes: give each an example at least")
    seconds_pretrain = make_base(args) if rank == 0 else 0.0
    if processes > 1:
        dist.barrier()
    if args.method == "pretrain":
        return {"method": "pretrain", "seconds_pretrain": seconds_pretrain, "out": str(args.out)}
    model, tokenizer = load_base(args)
    if args.prompt is not None:
        adapters = [adapter for directory in args.adapter for adapter in load_adapters(directory, model)]
        (completion,) = answers(model, adapters, tokenizer, [data.source_ids(tokenizer, args.prompt)], limit=256)
        print(completion)
        return {"method": "prompt", "completion": completion}

    run = prepare(args, model, tokenizer)
    n_base = sum(p.numel() for p in model.parameters())
    n_trainable = sum(p.numel() for module in (model, *run.adapters) for p in module.parameters() if p.requires_grad)
    n_stored = sum(adapter.n_stored() for adapter in run.adapters) or n_trainable
    percent = 100 * n_stored / n_base
    print(f"base     {model.name}: {n_base:,} parameters, context {model.config.block_size}, {args.dtype} on {model.device}")
    print("task     {}: {!r} -> {!r}".format(run.task, *run.examples["train"][0]))
    print(f"method   {args.method}: trains {n_trainable:,} numbers, stores {n_stored:,}, which is {percent:.3g} % of the base")
    loss_before, _ = evaluate(model, [], run.rows["validation"], args.batch_size)
    print(f"frozen   validation loss {loss_before:.3f}")
    test = run.rows["test"]
    loss_frozen, exact_frozen = evaluate(model, [], test, args.batch_size)
    begin = time.perf_counter()
    curve = tune(run, args)
    seconds_train = time.perf_counter() - begin
    if rank > 0:  # one process is enough for what remains
        return {"method": args.method, "curve": curve}
    loss, exact = evaluate(model, run.adapters, test, args.batch_size)

    print(f"test     frozen  loss {loss_frozen:.3f}  exact match {share(exact_frozen):5.1f} %")
    print(f"         tuned   loss {loss:.3f}  exact match {share(exact):5.1f} %\n")
    show_answers(run, exact)
    if args.predict:
        save_answers(Path(args.predict), run)
    if args.method != "none":
        save(args.out, run)
    return {
        "method": args.method, "task": run.task, "n_trainable": n_trainable, "n_stored": n_stored, "n_base": n_base,
        "percent": percent, "loss_frozen": loss_frozen, "loss_init": curve[0][1], "loss": loss, "curve": curve,
        "exact_match_frozen": share(exact_frozen), "exact_match": share(exact),
        "seconds_pretrain": seconds_pretrain, "seconds_train": seconds_train, "out": str(args.out),
    }  # fmt: skip


def share(hits: list[bool]) -> float:
    """-> the percentage of True."""
    return 100 * sum(hits) / len(hits)


def show_answers(run: Run, exact: list[bool]) -> None:
    """Prints three test examples and what the tuned model makes of them, a wrong one first, if there is one."""
    rows = run.rows["test"]
    best_last = sorted(range(len(rows)), key=exact.__getitem__)
    shown = list(dict.fromkeys(best_last[:1] + best_last[-2:]))
    longest = max(len(row.target) for row in rows)
    for i, got in zip(shown, answers(run.model, run.adapters, run.tokenizer, [rows[i].source for i in shown], longest)):
        print(f"source   {run.examples['test'][i].input}\nexpected {run.examples['test'][i].target}\ngot      {got}\n")


def save_answers(file: Path, run: Run) -> None:
    """Writes every test example with what the tuned model makes of it, as JSONL."""
    rows = run.rows["test"]
    longest = max(len(row.target) for row in rows)
    predicted = answers(run.model, run.adapters, run.tokenizer, [row.source for row in rows], 2 * longest)
    lines = [json.dumps(e._asdict() | {"prediction": text}) for e, text in zip(run.examples["test"], predicted)]
    with data.replaced_file(file) as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save(out: Path, run: Run) -> None:
    """Saves one adapter to `out`, a stack to folders in it, the tuned model where there is none, and says how to use it."""
    use = f"--base {run.model.name} --adapter {out}"
    if len(run.adapters) == 1:
        run.adapters[0].save(out, run.model)
    elif run.adapters:
        with data.replaced_directory(out) as new:
            for name, adapter in zip(STACK, run.adapters):
                adapter.save(new / name, run.model)
    else:
        use = f"--base {out}"
        with data.replaced_directory(out) as new:
            run.model.save_pretrained(new)
            for file in ("vocab.json", "merges.txt"):
                shutil.copy(data.base_directory(run.model.name) / file, new)
    print(f'saved to {out}; use it with: python train.py {use} --prompt "…"')


def run_command(command: Callable[[], Any]) -> None:
    """Runs a program's main; what a user got wrong ends in one sentence and status 2, Ctrl-C in status 130."""
    try:
        command()
    except (ValueError, OSError, SafetensorError) as error:  # the last where a disk is full
        sentence = "".join(c if c.isprintable() else " " for c in str(error))[:1000]  # a file's own words may be in it
        print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_command(main)
