"""Which method for your task? Measures the memory, time and quality of each, on your machine.

    python classroom/compare.py                                  five embedded tasks, three seeds
    python classroom/compare.py --data mine.jsonl --base gpt2    yours

Every method trains at its own learning rate. It is chosen on the validation data of a seed that is
not reported. Three rates are tried, a factor of three apart, and further ones while the outermost
is the best by a hundredth. On embedded tasks, each seed has a small base of its own. Without
--val-data, a tenth of your data serves as validation and as test data. The last line names the
cheapest method that keeps up with the best. Interrupted, it goes on where it was. It writes
compare.json (each run) and compare.md (the tables) into --out.
"""

import hashlib
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import NAMES, RECIPES, UNREPORTED, Experiment, Run, best_rate, curve_of, forward
from common import interleaved, kept_for_backward, looks_of, markdown, n_trainable, spread
from torch import nn

from command.console import run_command, say
from command.examples import load_examples
from data import Batch, batch_of
from model import Decoder, past_length, stacked_past_kv
from small_base.world import TASKS
from storage.base import fingerprint
from storage.files import replace_file
from train import evaluate

METHODS = ["soft_prompt", "both", "prefix", "lora", "full"]  # the one that trains least comes first
DEFAULT_TASKS = ["sentiment", "sentence"]  # elicited: a simple and a complex one
DEFAULT_TASKS += ["chat", "verdict"]  # recombined
DEFAULT_TASKS += ["shifted"]  # new
STEPS = {"shifted": 600}  # for every method, four times as many as usual
MODELS = {  # layers, width, numbers of the keys of a token, all parameters
    "GPT-2": (12, 768, 768, 124_439_808),
    "SmolLM2-135M": (30, 576, 192, 134_515_008),
    "Llama 3.2 1B": (16, 2048, 512, 1_235_814_400),
}


class Task(NamedTuple):
    """What all methods are compared on."""

    name: str
    data: str | None  # a file of the user's own, or an embedded task
    val_data: str | None
    steps: int | None  # of every method, or its own


def ready(
    experiment: Experiment, task: Task, method: str, seed: int, lr: float | None = None
) -> Run:
    """-> a run before its training."""
    examples = load_examples(task.name, task.data, task.val_data, seed)
    own = {"lr": lr, "steps": task.steps, "batch_size": experiment.args.batch_size, "looks": 15}
    own["chat"] = experiment.args.chat
    base = experiment.args.base if task.data else experiment.base(seed)
    return experiment.prepared(examples, method, seed, base, **own)


def tuned(
    experiment: Experiment, task: Task, method: str, seed: int, lr: float | None
) -> dict[str, Any]:
    """-> the record of a run, stored or trained now. UNREPORTED never meets the test data."""
    run = ready(experiment, task, method, seed, lr)
    model, adapters, rows, plan, *_ = run
    seen = hashlib.sha256(repr((rows["train"], rows["validation"])).encode()).hexdigest()[:16]
    settings = {"task": task.name, "method": method, "base": fingerprint(model), "examples": seen}
    settings |= {"seed": seed, "lr": plan.lr, "steps": plan.steps, "batch_size": plan.batch_size}

    def measure() -> dict[str, Any]:
        record = {"trained": n_trainable(model, adapters)}
        if seed != UNREPORTED:
            frozen = evaluate(model, [], rows["test"], plan.batch_size)
            record |= {"loss_frozen": frozen.loss, "exact_match_frozen": frozen.exact_match()}
            record["length"] = statistics.mean(len(row.target) for row in rows["test"])
        looks = looks_of(run)
        record["validation"] = looks[-1]["validation"]
        record["validation_exact"] = looks[-1]["exact_match"]
        record["curve"] = curve_of(looks)
        if seed != UNREPORTED:
            scores = evaluate(model, adapters, rows["test"], plan.batch_size)
            record |= {"loss": scores.loss, "exact_match": scores.exact_match()}
        return record

    return experiment.once(settings, measure)


def own_rate(experiment: Experiment, task: Task, method: str) -> float:
    """-> the learning rate with the lowest validation loss on UNREPORTED."""

    def loss_at(lr: float) -> float:
        return tuned(experiment, task, method, UNREPORTED, lr)["validation"]

    return best_rate(RECIPES[method].lr, loss_at)


def verdict(methods: dict[str, list[dict]]) -> str:
    """Runs by method -> the sentence that names the cheapest method that keeps up with the best.

    What counts is exact match on validation data; or the loss, where no method has half of them
    exact. Runs are compared in pairs, of the same base, data and seed. A method keeps up if it
    stays behind in no pair: by more than a point of exact match, or a tenth of the loss. So noise
    speaks for a method less often. Behind in some pairs but not in all, it is undecided.
    """

    def means_of(key: str) -> dict[str, float]:
        return {name: statistics.mean(run[key] for run in runs) for name, runs in methods.items()}

    exact = max(means_of("validation_exact").values()) >= 50
    key, unit = ("validation_exact", " % exact match") if exact else ("validation", " nats a token")
    means = means_of(key)
    best = (max if exact else min)(means, key=means.get)  # of equals, the cheapest

    def keeps_up(run: dict, other: dict) -> bool:
        return run[key] >= other[key] - 1 if exact else run[key] <= 1.1 * other[key]

    wins = {
        name: sum(keeps_up(run, other) for run, other in zip(runs, methods[best]))
        for name, runs in methods.items()
    }
    n_pairs = len(methods[best])
    name = next(name for name, n in wins.items() if n == n_pairs)
    cheaper = list(methods)[: list(methods).index(name)]
    said = f"{NAMES[name]}, {methods[name][0]['trained']:,} numbers: "
    said += f"{means[name]:.4g}{unit} on validation data"
    if name != best:
        said += f", where {NAMES[best]} has {means[best]:.4g}"
    open_ones = [f"{NAMES[one]}, {wins[one]} of {n_pairs}" for one in cheaper if wins[one]]
    if open_ones:
        said += f". Undecided, by the pairs in which it keeps up: {'; '.join(open_ones)}"
    elif cheaper:
        said += ". What is cheaper stays behind in every pair"
    if n_pairs == 1:
        said += ". One pair says little: give --seeds 3"
    return f"The cheapest method that keeps up with the best is {said}."


def step(
    model: Decoder, adapters: list[nn.Module], batch: Batch, optimizer: torch.optim.Optimizer
) -> None:
    optimizer.zero_grad()
    forward(model, adapters, batch).backward()
    optimizer.step()


def costs(experiment: Experiment, task: Task) -> dict[str, dict]:
    """-> what each method costs on a training batch: numbers, bytes, context and time."""
    say("what a step and a token cost, by turns of all methods")
    record, steps, prefills, one, many = {}, {}, {}, {}, {}
    for method in ["none", *METHODS]:
        model, adapters, rows, plan, *_ = ready(experiment, task, method, 0)
        batch = batch_of(rows["train"][: plan.batch_size], model.device)
        parts = [model, *adapters]
        trained = [p for part in parts for p in part.parameters() if p.requires_grad]
        n_trained, n_all = n_trainable(model, adapters), sum(p.numel() for p in model.parameters())
        past_kv = stacked_past_kv(adapters, model)
        P = past_length(past_kv)
        source = torch.tensor([rows["test"][0].source], device=model.device)
        n_new = min(33, model.config.block_size + 1 - P - source.size(1))
        record[method] = {"trained": n_trained, "share": 100 * n_trained / n_all}
        record[method] |= {"context": P, "new": n_new}
        record[method]["training"] = 12 * n_trained  # gradients, and AdamW's two averages
        if trained:
            read = partial(forward, model, adapters, batch)
            record[method]["activations"] = kept_for_backward(model, read)
            optimizer = torch.optim.AdamW(trained, lr=1e-9)
            steps[method] = partial(step, model, adapters, batch, optimizer)
        one[method] = partial(model.generate, source, 1, past_kv)
        many[method] = partial(model.generate, source, n_new, past_kv)
        prefills[method] = torch.no_grad()(partial(stacked_past_kv, adapters, model))
    turns = 1 if experiment.args.quick else 15
    for key, functions in {"step": steps, "prefill": prefills, "one": one, "many": many}.items():
        for method, seconds in interleaved(functions, turns).items():
            record[method][key] = 1000 * statistics.median(seconds)
    for cells in record.values():
        cells["token"] = (cells["many"] - cells["one"]) / (cells["new"] - 1)
    return record


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"


def cost_table(record: dict[str, dict]) -> str:
    header = ["method", "numbers trained", "share of the base", "context used", "kept for backward"]
    header += ["gradients and optimizer", "ms a step", "of full", "ms to fill its cache"]
    header += ["ms a token, against none"]
    rows, none = [], record["none"]["token"]
    for method, c in record.items():
        row = ["–"] * 7
        if c["trained"]:
            row = [f"{c['trained']:,}", f"{c['share']:.3g} %", f"{c['context']} tokens"]
            row += [size(c["activations"]), size(c["training"])]
            row += [f"{c['step']:.1f}", f"{c['step'] / record['full']['step']:.2f}"]
        cache = f"{c['prefill']:.2f}" if c["context"] else "–"
        token = f"{c['token']:.2f}, {c['token'] / none:.2f} ×"
        rows.append([NAMES[method], *row, cache, token])
    return markdown(header, rows)


def share_table() -> str:
    """-> what share of real models a soft prompt (P·C numbers) and a prefix (P·2·L·K·D) are."""
    rows = []
    for name, (L, C, keys, n) in MODELS.items():
        for method, numbers in (("soft_prompt", C), ("prefix", 2 * L * keys)):
            shares = [f"{100 * P * numbers / n:.2g} %" for P in (10, 20, 100)]
            rows.append([name, NAMES[method], *shares])
    return markdown(["model", "method", "10 tokens", "20", "100"], rows)


def quality_table(reported: dict[str, dict[str, list[dict]]]) -> str:
    rows = []
    for task, methods in reported.items():
        for method, runs in {"none": next(iter(methods.values())), **methods}.items():
            end = "_frozen" if method == "none" else ""
            losses, exact = ([run[key + end] for run in runs] for key in ("loss", "exact_match"))
            answers = [loss * run["length"] for loss, run in zip(losses, runs)]
            rate = "–" if end else f"{runs[0]['lr']:.2g}"
            cells = [spread(losses, 4), spread(answers, 3), spread(exact, 1)]
            rows.append([task, NAMES[method], rate, *cells])
    header = ["task", "method", "learning rate", "loss a token", "loss an answer", "exact match %"]
    return markdown(header, rows)


def own_flags(add: Callable) -> None:
    tasks = f"embedded tasks (default: {' '.join(DEFAULT_TASKS)})"
    add("--task", nargs="+", choices=TASKS, default=DEFAULT_TASKS, help=tasks)
    add("--data", metavar="FILE", help="your own examples instead")
    add("--val-data", metavar="FILE", help="and those to evaluate on (default: a tenth of --data)")
    add("--chat", action="store_true", help="put inputs through the model's chat template")
    add("--steps", type=int, help="of every method (default: 150, of the task shifted 600)")
    add("--lr", type=float, help="of every method (default: its best)")
    add("--batch-size", type=int, default=16, help="(default: 16)")


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv, own_flags, Path("out/compare"))
    args = experiment.args
    for name in ("steps", "lr", "batch_size"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give more than 0")
    if args.data:
        tasks = [Task(Path(args.data).stem, args.data, args.val_data, args.steps)]
    else:
        tasks = [Task(name, None, None, args.steps or STEPS.get(name)) for name in args.task]
    rates = {
        (task, method): args.lr or own_rate(experiment, task, method)
        for task in tasks
        for method in METHODS
    }
    seeds = list(experiment.seeds)
    reported = {task.name: {} for task in tasks}
    for (task, method), lr in rates.items():
        runs = [tuned(experiment, task, method, seed, lr) for seed in seeds]
        reported[task.name][method] = runs
    prices = costs(experiment, tasks[0])
    verdicts = {name: verdict(methods) for name, methods in reported.items()}
    experiment.store(seeds=seeds, costs=prices, verdicts=verdicts)
    text = f"Costs, on {tasks[0].name}:\n\n{cost_table(prices)}\n"
    text += f"Shares of other models:\n\n{share_table()}\n\n"
    text += f"Quality on test data, mean [range] of {len(seeds)} runs:\n\n"
    text += f"{quality_table(reported)}\n"
    text += "\n".join(f"{name}: {sentence}" for name, sentence in verdicts.items())
    replace_file(experiment.out / "compare.md", f"{text}\n".encode())
    say(f"\n{text}")


if __name__ == "__main__":
    run_command(main)
