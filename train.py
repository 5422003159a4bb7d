"""Tune a frozen language model with a prefix or a soft prompt, save the adapter, and test it.

    python train.py --method prefix                                  tune on an embedded task
    python train.py --method soft_prompt --task chat                 another method, another task
    python train.py --base gpt2 --data mine.jsonl                    your model, your data
    torchrun --nproc_per_node 2 train.py --method prefix             on several devices at once

generate.py uses what was trained.
"""

if __name__ == "__main__":  # a wrong flag is answered before torch takes its seconds to load
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

from command.answers import check_frozen, report, show_examples
from command.console import run_command, say
from command.examples import load_examples
from command.flags import RECIPES, train_flags
from command.models import ADAPTERS_OF, check_fit, check_folders, new_adapters
from command.models import open_base, save_record, save_run, settings_of, sizes_of
from command.process import Progress, start_process, sum_over_processes, this_process
from command.rates import search_rate
from data import IGNORE, Batch, Row, Scores, batch_of, encode, shuffled_batches
from model import Decoder, KVCache, stacked_past_kv
from storage.base import fingerprint
from storage.checkpoints import Checkpoint, Metrics, entry_of, looks_since_best

Rows = dict[str, list[Row]]  # by split: train, validation, test


def target_hidden(model: Decoder, batch: Batch, past_kv: KVCache | None) -> tuple[Tensor, Tensor]:
    """-> (N, C) hidden states and (N,) ids, at the N positions of the batch that predict a target.

    Only these are projected onto the vocabulary: to project all would be a third of GPT-2's work.
    """
    hidden, _ = model.forward_embeddings(model.wte(batch.idx), past_kv)  # (B, T, C)
    scored = batch.targets != IGNORE
    return hidden[scored], batch.targets[scored]


def loss_of(model: Decoder, batch: Batch, past_kv: KVCache | None, n_targets: int) -> Tensor:
    """-> the loss in nats, summed over the batch's targets and divided by n_targets."""
    hidden, targets = target_hidden(model, batch, past_kv)
    logits = hidden @ model.head.T  # (N, V)
    return F.cross_entropy(logits.float(), targets, reduction="sum") / n_targets


@torch.no_grad()
def evaluate(model: Decoder, adapters: list[nn.Module], rows: list[Row], batch_size: int) -> Scores:
    """-> how well the targets are predicted.

    Greedy decoding gives a target exactly if each of its tokens is the likeliest behind those
    before it. So one forward pass tells, and nothing need be generated.
    """
    past_kv = stacked_past_kv(adapters, model)
    loss, n_right, n_targets = 0.0, 0, 0
    exact = torch.ones(len(rows), dtype=torch.bool)
    lengths = torch.tensor([row.n_read for row in rows])
    for chunk in lengths.argsort(stable=True).split(batch_size):  # like lengths, for less padding
        batch = batch_of([rows[i] for i in chunk], model.device)
        hidden, targets = target_hidden(model, batch, past_kv)
        logits = (hidden @ model.head.T).float()  # (N, V)
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        right = logits.argmax(dim=-1) == targets  # (N,)
        n_right += int(right.sum())
        n_targets += len(targets)
        row_of = (batch.targets != IGNORE).nonzero()[:, 0]  # (N,) the row of each position
        wrong_rows = chunk[row_of[~right].cpu()]
        exact[wrong_rows] = False
    return Scores(loss / n_targets, 100 * n_right / n_targets, exact.tolist())


class Diverged(ValueError):
    """The loss is not a number any more."""


class Plan(NamedTuple):
    """How a training goes: `steps` and `eval_every` in optimizer steps, batches in rows."""

    steps: int
    lr: float
    batch_size: int
    seed: int
    eval_every: int
    micro_batch: int | None = None  # rows that go through the model at once, if not all

    def rate(self, step: int) -> float:
        """-> the rate of a step, from 1 on: ten steps up, and a straight line down from `lr`."""
        return self.lr * min(step / 10, (self.steps - step + 1) / self.steps)


def tune(
    model: Decoder, adapters: list[nn.Module], rows: Rows, plan: Plan,
    checkpoint: Checkpoint | None = None, is_done: Callable[[Metrics], bool] | None = None,
) -> Metrics:  # fmt: skip
    """Trains the adapters, or the model itself if there are none -> what was measured, by step.

    It goes on from the checkpoint. `is_done` may end it, after each look at the validation data.
    """
    trainee = nn.ModuleList(adapters or [model])
    optimizer = torch.optim.AdamW(trainee.parameters(), weight_decay=0.0)
    size = plan.micro_batch or plan.batch_size
    look = partial(evaluate, model, adapters, rows["validation"], size)
    metrics = checkpoint.restore(trainee, optimizer) if checkpoint else []  # none in a new run
    metrics = metrics or [{"step": 0, "lr": plan.lr} | entry_of(look())]
    first = metrics[-1]["step"]
    rank, processes = this_process()
    progress = Progress(first, plan.steps, quiet=checkpoint is None)
    batches = shuffled_batches(rows["train"], plan.batch_size, plan.seed)
    for step, step_rows in enumerate(islice(batches, first, plan.steps), start=first + 1):
        if is_done and "validation" in metrics[-1] and is_done(metrics):
            break
        optimizer.param_groups[0]["lr"] = plan.rate(step)
        optimizer.zero_grad()
        n_targets = sum(len(row.target) for row in step_rows)  # so that losses of parts add up
        total = torch.zeros((), device=model.device)
        own_rows = step_rows[rank::processes]
        for i in range(0, len(own_rows), size):  # once, unless memory is short
            batch = batch_of(own_rows[i : i + size], model.device)
            past_kv = stacked_past_kv(adapters, model)  # anew, for backward() frees its graph
            loss = loss_of(model, batch, past_kv, n_targets)
            loss.backward()
            total += loss.detach()
        sum_over_processes(total, trainee)  # the loss and the gradients
        optimizer.step()
        entry = {"step": step, "loss": total.item()}
        is_look = step % plan.eval_every == 0 or step == plan.steps
        if is_look:
            entry |= entry_of(look())
        metrics.append(entry)
        losses = entry["loss"] + entry.get("validation", 0.0)
        if not math.isfinite(losses):
            if checkpoint:
                checkpoint.end()  # a resumed run would only come here again
            raise Diverged(f"the loss became {losses} with --lr {plan.lr:g}: lower it")
        if is_look and checkpoint and rank == 0:
            checkpoint.save(trainee, optimizer, metrics)
        progress.show(sum(row.n_read for row in step_rows), entry)
    return metrics


def find_rate(
    begin: Callable[[], list[nn.Module]], model: Decoder, rows: Rows, plan: Plan
) -> dict[float, float]:
    """-> the validation losses of short trainings, by learning rate. Each one begins anew."""
    short = plan._replace(steps=math.ceil(plan.steps / 5), eval_every=plan.steps)
    say(f"rate     three or more trainings of {short.steps} steps find the learning rate")

    def loss_at(rate: float) -> float:
        adapters = begin()
        trained = model if adapters else copy.deepcopy(model)  # tuning would change it
        try:
            loss = tune(trained, adapters, rows, short._replace(lr=rate))[-1]["validation"]
        except Diverged:
            loss = math.inf
        say(f"rate     {rate:g}: validation loss {loss:.3f}")
        return loss

    return search_rate(plan.lr, loss_at)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command-line arguments -> what was measured. Raises ValueError for what a user got wrong."""
    args = train_flags(__doc__, argv)
    rank, _ = start_process(args.batch_size)  # what can be checked comes before the slow loading
    examples = load_examples(args.task, args.data, args.val_data, args.seed)
    record = settings_of(args, examples)  # becomes training.json
    checkpoint = Checkpoint(args.out, record, args.resume, bool(args.patience), args.film)
    check_folders(args.method, args.out, record)
    full = args.method == "full"
    model, tokenizer, template = open_base(args.base, args.chat, args.device, args.dtype, full)
    model.requires_grad_(full)  # the base is frozen, unless it is what we tune
    rows = {split: encode(tokenizer, some, template) for split, some in examples.items()}
    begin = partial(
        new_adapters, ADAPTERS_OF[args.method], model, tokenizer, rows["train"], P=args.n_virtual,
        init=args.init, init_text=args.init_text, seed=args.seed, mid_dim=args.mid_dim,
    )  # fmt: skip
    adapters = begin()
    check_fit(examples, rows, adapters, model)
    base_settings = {"base": fingerprint(model), "dtype": str(model.dtype)}
    checkpoint.add_settings(base_settings)
    record |= sizes_of(model, adapters) | base_settings
    check_folders(args.method, args.out, record)  # again: now it names the base

    first = examples["train"][0]
    say(f"task     {args.task}: {first.input!r} -> {first.target!r}")
    say("method   {method}: trains {n_trainable:,} numbers, stores {n_stored:,}".format(**record))
    frozen = evaluate(model, [], rows["test"], args.micro_batch)
    check_frozen(frozen, model)
    lr = args.lr or RECIPES[args.method].middle
    plan = Plan(args.steps, lr, args.batch_size, args.seed, args.eval_every, args.micro_batch)
    rates = None
    if args.lr is None:  # searched, unless the checkpoint of a resumed run has the table
        rates = checkpoint.stored.get("rates") or find_rate(begin, model, rows, plan)
        checkpoint.add_settings({"rates": rates})
        plan = plan._replace(lr=min(rates, key=rates.get))

    def is_done(metrics: Metrics) -> bool:
        return looks_since_best(metrics) == args.patience  # never, without patience

    metrics = tune(model, adapters, rows, plan, checkpoint, is_done)
    if rank > 0:  # one process is enough for what remains
        return record
    checkpoint.restore_best(nn.ModuleList(adapters or [model]))
    record |= {"data": args.data, "base_name": model.name, "out": str(args.out)}
    record |= {"lr_used": plan.lr, "rates": rates}
    save_run(record, metrics, adapters, model, checkpoint.film)
    checkpoint.end()
    tuned = evaluate(model, adapters, rows["test"], args.micro_batch)
    record |= report({"frozen": frozen, "tuned": tuned})
    save_record(record)
    show_examples(model, adapters, tokenizer, examples["test"], rows["test"], tuned.exact)
    return record


if __name__ == "__main__":
    run_command(main)
