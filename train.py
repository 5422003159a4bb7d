"""Tune a frozen language model with a prefix or a soft prompt, save the adapter, and test it.

    python train.py --method prefix                                  tune on an embedded task
    python train.py --method soft_prompt --task chat                 another method, another task
    python train.py --base gpt2 --data mine.jsonl                    your model, your data
    torchrun --nproc_per_node 2 train.py --method prefix             on several devices at once

generate.py uses what was trained.
"""

if __name__ == "__main__":
    from command.console import before_torch
    from command.flags import train_flags

    before_torch(train_flags, __doc__)

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command.answers import report, show_examples
from command.console import run_command, say
from command.flags import RECIPES, train_flags
from command.models import KINDS, check_folders, load_examples, new_adapters, open_base
from command.models import save_record, save_run, settings_of, sizes_of
from command.process import Progress, start_process, sum_over_processes, this_process
from data import IGNORE, Batch, Row, batch_of, check_lengths, encode, shuffled_batches
from model import Decoder, KVCache, past_length, stacked_past_kv
from storage.base import fingerprint
from storage.checkpoints import Checkpoint, Metrics, looks_since_best

Rows = dict[str, list[Row]]  # by split: train, validation, test


def target_hidden(model: Decoder, batch: Batch, past_kv: KVCache | None) -> tuple[Tensor, Tensor]:
    """-> (N, C) hidden states and (N,) ids, at the N positions of the batch that predict a target.

    Only these are projected onto the vocabulary: all positions would be a third of GPT-2's work.
    """
    hidden, _ = model.forward_embeddings(model.wte(batch.idx), past_kv)  # (B, T, C)
    scored = batch.targets != IGNORE
    return hidden[scored], batch.targets[scored]


def loss_of(model: Decoder, batch: Batch, past_kv: KVCache | None, n_targets: int) -> Tensor:
    """-> the loss in nats, summed over the batch's targets and divided by n_targets."""
    hidden, targets = target_hidden(model, batch, past_kv)
    logits = hidden @ model.head.T  # (N, V)
    return F.cross_entropy(logits.float(), targets, reduction="sum") / n_targets


class Scores(NamedTuple):
    loss: float  # nats a target token
    tokens: float  # percentage of the target tokens that are the likeliest there
    exact: list[bool]  # for each row, whether the greedy answer is its target

    def exact_match(self) -> float:
        """-> the percentage of exact answers."""
        return 100 * sum(self.exact) / len(self.exact)


@torch.no_grad()
def evaluate(
    model: Decoder, adapters: list[nn.Module], rows: list[Row], batch_size: int
) -> Scores:
    """-> how well the targets are predicted.

    Greedy decoding gives a target if and only if at each of its positions, behind the target so far,
    the likeliest token is the target's. So one forward pass tells, and nothing need be generated.
    """
    past_kv = stacked_past_kv(adapters, model)
    loss, n_right, n_targets, exact = 0.0, 0, 0, torch.ones(len(rows), dtype=torch.bool)
    lengths = torch.tensor([len(row.source) + len(row.target) for row in rows])
    for chunk in lengths.argsort(stable=True).split(batch_size):  # like lengths, for less padding
        batch = batch_of([rows[i] for i in chunk], model.device)
        hidden, targets = target_hidden(model, batch, past_kv)
        logits = (hidden @ model.head.T).float()  # (N, V)
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        right = logits.argmax(dim=-1) == targets  # (N,)
        n_right, n_targets = n_right + int(right.sum()), n_targets + len(targets)
        row_of = (batch.targets != IGNORE).nonzero()[:, 0]  # (N,) the row of each position
        exact[chunk[row_of[~right].cpu()]] = False
    return Scores(loss / n_targets, 100 * n_right / n_targets, exact.tolist())


class Diverged(ValueError):
    """The loss is no number any more."""


class Plan(NamedTuple):
    """How a training goes: lengths in optimizer steps, and the learning rate at its peak."""

    steps: int
    lr: float
    batch_size: int
    seed: int
    eval_every: int
    micro_batch: int | None = None  # rows that go through the model at once

    def rate(self, step: int) -> float:
        """-> the learning rate of a step, from 1 on: a short warm-up, then a straight line down."""
        return self.lr * min(step / 10, (self.steps - step + 1) / self.steps)


def tune(
    model: Decoder, adapters: list[nn.Module], rows: Rows, plan: Plan, checkpoint: Checkpoint | None = None,
    is_done: Callable[[Metrics], bool] = lambda metrics: False,
) -> Metrics:  # fmt: skip
    """Trains the adapters, or the model itself if there are none -> what was measured, by step."""
    trainee = nn.ModuleList(adapters or [model])
    optimizer = torch.optim.AdamW(trainee.parameters(), weight_decay=0.0)
    metrics = checkpoint.restore(trainee, optimizer) if checkpoint else []
    metrics = metrics or [{"step": 0, "lr": plan.lr} | look(model, adapters, rows, plan)]
    first, (rank, processes) = metrics[-1]["step"], this_process()
    progress = Progress(first, plan.steps)
    batches = shuffled_batches(rows["train"], plan.batch_size, plan.seed)
    for step, step_rows in enumerate(islice(batches, first, plan.steps), start=first + 1):
        if is_done(metrics):
            break
        optimizer.param_groups[0]["lr"] = plan.rate(step)
        optimizer.zero_grad()
        n_targets = sum(len(row.target) for row in step_rows)
        total = torch.zeros((), device=model.device)
        own_rows, size = step_rows[rank::processes], plan.micro_batch or len(step_rows)
        for i in range(0, len(own_rows), size):  # once, unless memory is short
            batch = batch_of(own_rows[i : i + size], model.device)
            loss = loss_of(model, batch, stacked_past_kv(adapters, model), n_targets)
            loss.backward()
            total += loss.detach()
        sum_over_processes(total, trainee)
        optimizer.step()
        metrics.append({"step": step, "loss": total.item()})
        if step % plan.eval_every == 0 or step == plan.steps:
            metrics[-1] |= look(model, adapters, rows, plan)
            if checkpoint and rank == 0:
                checkpoint.save(trainee, optimizer, metrics)
        if not math.isfinite(total.item()):
            raise Diverged(f"the loss became {total.item()} with --lr {plan.lr:g}: lower it")
        progress.show(sum(len(row.source + row.target) - 1 for row in own_rows), metrics[-1])
    return metrics


def look(model: Decoder, adapters: list[nn.Module], rows: Rows, plan: Plan) -> dict[str, float]:
    """-> what `evaluate` says of the validation data, by name."""
    scores = evaluate(model, adapters, rows["validation"], plan.batch_size)
    return {"validation": scores.loss, "tokens": scores.tokens, "exact_match": scores.exact_match()}


def search_rate(middle: float, loss_at: Callable[[float], float]) -> dict[float, float]:
    """The validation loss of a short training at a rate -> the losses of the rates that were tried.

    These are the middle, a third and three times of it, and on beyond an edge while that is better
    than all others by a hundredth.
    """
    losses = {rate: loss_at(rate) for rate in (two_digits(middle / 3), middle, two_digits(middle * 3))}
    for factor, outermost in ((1 / 3, min), (3, max)):
        edge = outermost(losses)
        while losses[edge] < 0.99 * min(loss for rate, loss in losses.items() if rate != edge):
            edge = two_digits(edge * factor)
            losses[edge] = loss_at(edge)
    return losses


def two_digits(rate: float) -> float:
    return float(f"{rate:.2g}")


def find_rate(
    begin: Callable[[], list[nn.Module]], model: Decoder, rows: Rows, plan: Plan, middle: float
) -> dict[float, float]:
    """-> the validation losses of short trainings, by learning rate. Each one begins anew."""
    short = plan._replace(steps=math.ceil(plan.steps / 5), eval_every=plan.steps)
    say(f"rate     three or more trainings of {short.steps} steps find the learning rate")
    before = copy.deepcopy(model.state_dict()) if not begin() else None

    def loss_at(rate: float) -> float:
        try:
            loss = tune(model, begin(), rows, short._replace(lr=rate))[-1]["validation"]
        except Diverged:
            loss = math.inf
        if before:
            model.load_state_dict(before)
        say(f"rate     {rate:g}: validation loss {loss:.3f}")
        return loss

    return search_rate(middle, loss_at)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command-line arguments -> what was measured. Raises ValueError for what a user got wrong.

    Whatever could fail is checked before the training, and where it can be, before the model loads.
    """
    args = train_flags(__doc__, argv)
    rank, processes = start_process()
    if processes > min(args.batch_size, args.micro_batch or args.batch_size):
        raise ValueError(f"{processes} processes need an example each: raise --batch-size")
    examples = load_examples(args.task, args.data, args.val_data, args.seed)
    record = settings_of(args, examples)  # becomes training.json
    checkpoint = Checkpoint(args.out, record, args.resume, keep_best=bool(args.patience))
    check_folders(args.method, args.out, record)

    full = args.method == "full"
    model, tokenizer, template = open_base(args.base, args.chat, args.device, args.dtype, full)
    rows = {split: encode(tokenizer, some, template) for split, some in examples.items()}
    start = (args.n_virtual, args.init, args.init_text, args.seed, args.mid_dim)
    begin = partial(new_adapters, KINDS[args.method], model, tokenizer, rows["train"], *start)
    adapters = begin()
    n_virtual = past_length(stacked_past_kv(adapters, model))
    for split in rows:
        check_lengths(examples[split], rows[split], model.config.block_size, n_virtual)
    checkpoint.add_settings({"base": fingerprint(model), "dtype": str(model.dtype)})
    record |= sizes_of(model, adapters) | checkpoint.settings
    check_folders(args.method, args.out, record)  # now with the base's fingerprint

    say("task     {}: {!r} -> {!r}".format(args.task, *examples["train"][0][:2]))
    say("method   {method}: trains {n_trainable:,} numbers, stores {n_stored:,}".format(**record))
    frozen = evaluate(model, [], rows["test"], args.batch_size)
    if not math.isfinite(frozen.loss):
        overflow = f"{model.name} overflows in {model.dtype}: its loss is {frozen.loss}"
        raise ValueError(f"{overflow} before any step; give --dtype float32")
    lr = checkpoint.lr or args.lr
    plan = Plan(args.steps, lr, args.batch_size, args.seed, args.eval_every, args.micro_batch)
    if lr is None:
        record["rates"] = find_rate(begin, model, rows, plan, RECIPES[args.method].middle)
        plan = plan._replace(lr=min(record["rates"], key=record["rates"].get))
    metrics = tune(model, adapters, rows, plan, checkpoint, lambda m: looks_since_best(m) == args.patience)
    if rank > 0:  # one process is enough for what remains
        return record
    if args.patience:
        checkpoint.restore_best(nn.ModuleList(adapters or [model]))
    names = {"data": args.data, "base_name": model.name, "out": str(args.out)}
    curve = [(entry["step"], entry["validation"]) for entry in metrics if "validation" in entry]
    record |= names | {"lr_used": plan.lr, "curve": curve}
    save_run(record, metrics, adapters, model)
    checkpoint.end()
    tuned = evaluate(model, adapters, rows["test"], args.batch_size)
    record |= report("frozen", frozen) | report("tuned", tuned)
    save_record(record)
    show_examples(model, adapters, tokenizer, examples["test"], rows["test"], tuned.exact)
    return record


if __name__ == "__main__":
    run_command(main)
