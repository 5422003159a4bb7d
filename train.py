"""Tune a frozen language model with a prefix or a soft prompt, save the adapter, evaluate it, and use it.

    python train.py --method prefix                                      tune on an embedded task
    python train.py --method soft_prompt --task chat                     another method, another task
    python train.py --base gpt2 --data mine.jsonl --lr 0.03              your model, your data
    python train.py --adapter out/sentence/prefix --prompt "name : …"    use what was trained
    torchrun --nproc_per_node 2 train.py --method prefix                 tune on several devices at once
"""

import argparse
import hashlib
import json
import math
import os
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command.adapters import STACK, load_adapters, new_adapters, save, save_as_prefix, take_best
from command.flags import DEFAULT_BASE, parse
from command.process import Progress, barrier, pick_device, prompts, run_command, say, start_process
from command.process import sum_over_processes, this_process
from data import IGNORE, Batch, Example, Row, batch_of, check_lengths, encode
from data import hold_out, read_jsonl, shuffled_batches, source_ids
from model import Decoder, KVCache
from prefix import Prefix
from small_base.pretrain import pretrain, read_text
from small_base.world import task_examples
from soft_prompt import SoftPrompt
from storage.base import fingerprint, load_base
from storage.checkpoints import Checkpoint, Curve, looks_since_best
from storage.files import TRAINING, check_place, check_predictions, replace_file, write_json
from storage.tokenizers import load_tokenizer

Rows = dict[str, list[Row]]  # by split: train, validation, test


class Recipe(NamedTuple):
    """What a method trains with unless told otherwise; learning rates were chosen on validation data, for the small base."""

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


def stacked_past_kv(adapters: list[nn.Module], model: Decoder) -> KVCache | None:
    """Adapters, the foremost first -> the cache of them all: each one is computed behind those before it."""
    past_kv = None
    for adapter in adapters:
        past_kv = adapter.past_kv(model, past_kv)
    return past_kv


def n_past(past_kv: KVCache | None) -> int:
    """-> the positions that a cache takes, of those that the model can see."""
    return past_kv[0][0].size(2) if past_kv else 0


def target_hidden(model: Decoder, batch: Batch, past_kv: KVCache | None) -> tuple[Tensor, Tensor]:
    """-> (N, C) hidden states and (N,) ids, at the N positions of the batch that predict a target.

    Only these will be projected onto the vocabulary, which at all positions would be a third of GPT-2's arithmetic.
    """
    hidden, _ = model.forward_embeddings(model.wte(batch.idx), past_kv)  # (B, T, C)
    scored = batch.targets != IGNORE
    return hidden[scored], batch.targets[scored]


def loss_of(model: Decoder, batch: Batch, past_kv: KVCache | None, n_targets: int) -> Tensor:
    """-> the loss in nats, summed over the batch's targets and divided by n_targets.

    V is so much larger than C that logits would be the largest thing in memory: torch makes them 256 positions at a time.
    """
    hidden, targets = target_hidden(model, batch, past_kv)
    in_parts = nn.LinearCrossEntropyOptions(acc_policy="accurate", chunking_method=None, batch_chunk_size=256)
    return F.linear_cross_entropy(hidden, model.head, targets, reduction="sum", options=in_parts) / n_targets


@torch.no_grad()
def evaluate(model: Decoder, adapters: list[nn.Module], rows: list[Row], batch_size: int) -> tuple[float, list[bool]]:
    """-> the loss in nats per target token, and for each row whether the greedy answer is its target exactly.

    Greedy decoding gives the target if and only if, at each of its positions and after the target so far, the likeliest
    token is the target's. So one forward pass tells, and nothing need be generated.
    """
    past_kv = stacked_past_kv(adapters, model)
    total, count, exact = 0.0, 0, torch.ones(len(rows), dtype=torch.bool)
    lengths = torch.tensor([len(row.source) + len(row.target) for row in rows])
    for chunk in lengths.argsort(stable=True).split(batch_size):  # rows of like length, for less padding
        batch = batch_of([rows[i] for i in chunk], model.device)
        hidden, targets = target_hidden(model, batch, past_kv)
        logits = (hidden @ model.head.T).float()  # (N, V)
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
        row_of = (batch.targets != IGNORE).nonzero()[:, 0]  # (N,) the row that a scored position is in
        wrong = row_of[logits.argmax(dim=-1) != targets].cpu()
        exact[chunk[wrong]] = False
    return total / count, exact.tolist()


class Plan(NamedTuple):
    """How a training goes: lengths in optimizer steps, and the learning rate at its peak."""

    steps: int
    lr: float
    batch_size: int
    seed: int
    eval_every: int
    save_every: int
    patience: int | None = None  # looks at the validation data without a new best, after which the training ends

    def rate(self, step: int) -> float:
        """-> the learning rate of a step, counted from 1: a short warm-up, then a straight line down (Li & Liang, appendix)."""
        return self.lr * min(step / 10, (self.steps - step + 1) / self.steps)


class Diverged(ValueError):
    """The loss is no number any more."""


def finite(losses: dict[str, float], plan: Plan) -> dict[str, float]:
    """-> the losses. Raises Diverged if one of them is no number."""
    if not math.isfinite(loss := sum(losses.values())):
        raise Diverged(f"the loss became {loss} with --lr {plan.lr:g}: lower it. What --out held before is untouched")
    return losses


def tune(model: Decoder, adapters: list[nn.Module], rows: Rows, plan: Plan, checkpoint: Checkpoint | None = None) -> Curve:
    """Trains the adapters, or the model itself if there are none -> its validation losses, (step, nats per token)."""
    trainee = nn.ModuleList(adapters or [model])
    optimizer = torch.optim.AdamW(trainee.parameters(), weight_decay=0.0)
    done, curve = checkpoint.load(trainee, optimizer) if checkpoint else (0, [])
    curve = curve or [(0, evaluate(model, adapters, rows["validation"], plan.batch_size)[0])]
    progress, (rank, processes) = Progress(done, plan.steps, curve[-1][1], checkpoint and checkpoint.file), this_process()
    batches = islice(shuffled_batches(rows["train"], plan.batch_size, plan.seed), done, plan.steps)
    for step, step_rows in enumerate(batches, start=done + 1):
        if looks_since_best(curve) == plan.patience:
            break
        batch = batch_of(step_rows[rank::processes], model.device)
        optimizer.param_groups[0]["lr"] = plan.rate(step)
        optimizer.zero_grad()
        loss = loss_of(model, batch, stacked_past_kv(adapters, model), sum(len(row.target) for row in step_rows))
        loss.backward()
        sum_over_processes(loss, trainee)
        optimizer.step()
        if step % plan.eval_every == 0 or step == plan.steps:
            curve.append((step, evaluate(model, adapters, rows["validation"], plan.batch_size)[0]))
        losses = finite({"loss": loss.item(), "validation": curve[-1][1]}, plan)
        progress.show(step, batch.idx.numel(), **losses)
        if checkpoint and rank == 0:
            checkpoint.keep(trainee, optimizer, step, curve, plan)
    return curve


def load_examples(task: str, path: str | None, val_path: str | None, seed: int) -> dict[str, list[Example]]:
    """-> train, validation and test examples, of an embedded task or a user's own.

    Of one's own, the validation examples are the test examples too: whoever selects on them tests elsewhere, by --adapter.
    """
    if path is None:
        sizes = {"train": 1000, "validation": 200, "test": 500}
        return {split: task_examples(task, split, n, seed) for split, n in sizes.items()}
    train = read_jsonl(path)
    held_out, train = (read_jsonl(val_path), train) if val_path is not None else hold_out(train, seed)
    return {"train": train, "validation": held_out, "test": held_out}


@torch.inference_mode()  # as no_grad, and on a small model a tenth quicker
def answers(
    model: Decoder, adapters: list[nn.Module], tokenizer: tiktoken.Encoding, sources: list[list[int]], limit: int, **how: Any
) -> list[str]:
    """Source ids -> their continuations as text, each of at most `limit` tokens, up to the end of text.

    Sources of one length share a batch, so that no padding stands between a source and its answer.
    """
    past_kv = stacked_past_kv(adapters, model)
    texts, end, lengths = [""] * len(sources), tokenizer.eot_token, torch.tensor([len(source) for source in sources])
    for length in lengths.unique().tolist():
        room = max(1, min(limit, model.config.block_size + 1 - n_past(past_kv) - length))
        for chunk in (lengths == length).nonzero()[:, 0].split(32):
            idx = torch.tensor([sources[i] for i in chunk], device=model.device)
            new = model.generate(idx, room, past_kv, stop_token=end, **how)[:, length:]
            for i, row in zip(chunk, new.tolist()):  # filled up with the end of text, once it has come
                texts[i] = tokenizer.decode([token for token in row if token != end and token < tokenizer.n_vocab])
    return texts


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command-line arguments -> what was measured. Raises ValueError, in one sentence, for what a user got wrong."""
    args = parse(argv, __doc__, RECIPES)
    rank, processes = start_process()
    device = pick_device(args.device)
    if args.batch_size < processes:
        raise ValueError(f"--batch-size {args.batch_size} for {processes} processes: give each an example at least")
    if args.method == "pretrain":
        texts = [read_text(path) for path in args.corpus]
        pretrain(args.out, texts, args.steps, args.lr, args.batch_size, args.seed, device, args.sizes)
        return {"method": "pretrain", "out": str(args.out)}
    training = not args.adapter and args.prompt is None
    if processes > 1 and (args.patience or not training):
        raise ValueError("torchrun shares out a training without --patience, and nothing else: run this with python")
    examples = load_examples(args.task, args.data, args.val_data, args.seed) if training else {}
    if Path(args.base) == DEFAULT_BASE and not (DEFAULT_BASE / "config.json").exists() and rank == 0:
        recipe = RECIPES["pretrain"]  # the same for every run
        pretrain(DEFAULT_BASE, [], recipe.steps, recipe.lr, batch_size=16, seed=0, device=device)
    barrier()
    tokenizer, model = load_tokenizer(args.base), load_base(args.base)
    model = model.to(device, args.dtype and getattr(torch, args.dtype)).freeze()
    if training:
        return adapt(args, model, tokenizer, examples)
    adapters = [adapter for directory in args.adapter or [] for adapter in load_adapters(directory, model)]
    if args.export:
        source = " and ".join(os.path.abspath(directory) for directory in args.adapter)
        return save_as_prefix(args.export, stacked_past_kv(adapters, model), model, source)
    if args.prompt is not None:
        return complete(args, model, adapters, tokenizer)
    return assess(args, model, adapters, tokenizer)


def adapt(args: argparse.Namespace, model: Decoder, tokenizer: tiktoken.Encoding, examples: dict[str, list[Example]]) -> dict:
    """Tunes, saves, and only then tests and shows -> what was measured. Whatever could fail is checked before."""
    if args.method == "full" and model.dtype.itemsize < 4:
        raise ValueError(f"--method full needs --dtype float32: {model.dtype} rounds small updates away")
    model.requires_grad_(args.method == "full")
    rows = {split: encode(tokenizer, some) for split, some in examples.items()}
    how = (args.n_virtual, args.init, args.init_text, args.seed, args.mid_dim)
    adapters = new_adapters(RECIPES[args.method].adapters, model, tokenizer, rows["train"], *how)
    context, taken = model.config.block_size, n_past(stacked_past_kv(adapters, model))
    for split in rows:
        check_lengths(examples[split], rows[split], context, taken)
    settings = settings_of(args, model, adapters, rows)
    names = {"task": args.task, "data": args.data and os.path.abspath(args.data), "base": model.name, "out": str(args.out)}
    found = settings | names  # becomes training.json
    places = [args.out / name for name in STACK] if len(adapters) > 1 else [args.out] * (args.method != "none")
    for place in places and [args.out, *places]:  # a stack does not move in with an adapter
        check_place(place, found)
    if args.predict:
        check_predictions(args.predict)
    say(f"base     {model.name}: {found['n_base']:,} parameters, context {context}, {found['dtype']} on {model.device}")
    say("task     {}: {!r} -> {!r}".format(args.task, *examples["train"][0]))
    numbers = "trains {n_trainable:,} numbers, stores {n_stored:,}, which is {percent:.3g} % of the base".format(**found)
    say(f"method   {args.method}: {numbers}")
    say(f"frozen   validation loss {evaluate(model, [], rows['validation'], args.batch_size)[0]:.3f}")
    frozen = evaluate(model, [], rows["test"], args.batch_size)

    checkpoint = Checkpoint(args.out / "checkpoint.safetensors", settings, args.resume)
    found["curve"] = tune(model, adapters, rows, Plan(*(getattr(args, name) for name in Plan._fields)), checkpoint)
    if this_process()[0] > 0:  # one is enough for what remains
        return found
    if args.patience:
        take_best(checkpoint, nn.ModuleList(adapters or [model]), found["curve"])
    save(places, adapters, model, found, checkpoint)
    tuned = evaluate(model, adapters, rows["test"], args.batch_size)
    found |= compared(frozen, tuned)
    for place in places:
        write_json(place / TRAINING, found)
    show(model, adapters, tokenizer, examples["test"], rows["test"], tuned[1], args.predict)
    return found


def settings_of(args: argparse.Namespace, model: Decoder, adapters: list[nn.Module], rows: Rows) -> dict[str, Any]:
    """-> all that decides how a run goes, and its sizes; two runs that agree in it are the same run."""
    flags = ("method", "n_virtual", "init", "init_text", "mid_dim", "steps", "lr", "batch_size")
    flags += ("seed", "eval_every", "patience")
    examples = hashlib.sha256(repr((rows["train"], rows["validation"])).encode()).hexdigest()[:16]
    own = {"dtype": str(model.dtype).removeprefix("torch."), "base": fingerprint(model), "examples": examples}
    n_base = sum(p.numel() for p in model.parameters())
    n_trainable = sum(p.numel() for part in (model, *adapters) for p in part.parameters() if p.requires_grad)
    n_stored = sum(adapter.n_stored() for adapter in adapters) or n_trainable
    own |= {"n_base": n_base, "n_trainable": n_trainable, "n_stored": n_stored, "percent": 100 * n_stored / n_base}
    return {flag: getattr(args, flag) for flag in flags} | own


def compared(frozen: tuple[float, list[bool]], tuned: tuple[float, list[bool]]) -> dict[str, float]:
    """What `evaluate` gave without and with adapters -> the same by name, printed."""
    found = {"loss_frozen": frozen[0], "exact_match_frozen": share(frozen[1]), "loss": tuned[0], "exact_match": share(tuned[1])}
    say("test     frozen  loss {loss_frozen:.3f}  exact match {exact_match_frozen:5.1f} %".format(**found))
    say("         tuned   loss {loss:.3f}  exact match {exact_match:5.1f} %\n".format(**found))
    return found


def share(hits: list[bool]) -> float:
    """-> the percentage of True."""
    return 100 * sum(hits) / len(hits)


def show(
    model: Decoder, adapters: list[nn.Module], tokenizer: tiktoken.Encoding, examples: list[Example], rows: list[Row],
    hits: list[bool], file: Path | None,
) -> None:  # fmt: skip
    """Prints three examples and their greedy answers, wrong ones first; with a file, writes all of them to it as JSONL."""
    order = sorted(range(len(rows)), key=hits.__getitem__)[: None if file else 3]
    sources, limit = [rows[i].source for i in order], 2 * max(len(row.target) for row in rows)
    texts = answers(model, adapters, tokenizer, sources, limit)
    found = {i: {"input": examples[i].input, "target": examples[i].target, "prediction": text} for i, text in zip(order, texts)}
    without = answers(model, [], tokenizer, sources[:3], limit) if adapters else []  # a tuned base is frozen no more
    for i, frozen in zip_longest(order[:3], without):
        say("source   {input}\nexpected {target}\ngot      {prediction}".format(**found[i]))
        say("frozen   {}\n".format(frozen.replace("\n", "\n         ")) if adapters else "")
    if file:
        check_predictions(file)
        replace_file(file, "".join(f"{json.dumps(found[i])}\n" for i in range(len(rows))).encode())


def assess(args: argparse.Namespace, model: Decoder, adapters: list[nn.Module], tokenizer: tiktoken.Encoding) -> dict:
    """Evaluates saved adapters, on all of a file or the test data of a task, and shows answers -> what was measured."""
    examples = read_jsonl(args.data) if args.data else task_examples(args.task, "test", 500, args.seed)
    rows = encode(tokenizer, examples)
    check_lengths(examples, rows, model.config.block_size, n_past(stacked_past_kv(adapters, model)))
    if args.predict:
        check_predictions(args.predict)
    frozen, tuned = (evaluate(model, some, rows, args.batch_size) for some in ([], adapters))
    found = compared(frozen, tuned)
    show(model, adapters, tokenizer, examples, rows, tuned[1], args.predict)
    return {"method": "evaluate"} | found


def complete(args: argparse.Namespace, model: Decoder, adapters: list[nn.Module], tokenizer: tiktoken.Encoding) -> dict:
    """Prints the completions of the prompts -> them."""
    generator, completions = torch.Generator(model.device).manual_seed(args.seed), []
    sampling = {"temperature": args.temperature or 0.0, "top_k": args.top_k, "generator": generator}
    for batch in prompts(args.prompt):
        sources = [source_ids(tokenizer, prompt) for prompt in batch]
        for text in answers(model, adapters, tokenizer, sources, limit=256, **sampling):
            say(text)
            completions.append(text)
    return {"method": "prompt", "completions": completions}


if __name__ == "__main__":
    run_command(main)
