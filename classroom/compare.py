"""Which method for your task? Parameters, memory, time and quality of each, measured on your task, base and machine.

    python classroom/compare.py                                  five embedded tasks, three seeds
    python classroom/compare.py --data mine.jsonl --base gpt2    yours

Every method trains at its own learning rate, chosen on the validation data of seed 0, which is not reported: three rates a
factor of three apart, and further ones while the outermost is the best by a hundredth. Without --val-data, data of your own
have no test part beside the validation part: one and the same serves for both. The last line names the cheapest method that is
as good as the best. Interrupted, it goes on where it was. Into --out it writes compare.json (of each run settings, curve,
results) and compare.md (the tables).
"""

import hashlib
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import NAMES, RECIPES, Experiment, Run, forward, interleaved, kept_for_backward, lowest, markdown, n_trainable
from common import quietly_tuned, rate, spread
from torch import nn

import train
from command.process import run_command, say
from data import Batch, batch_of
from model import Decoder
from small_base.world import TASKS
from storage.base import fingerprint
from storage.files import replace_file
from train import evaluate, share, stacked_past_kv

METHODS = ["soft_prompt", "both", "prefix", "lora", "full"]  # by the numbers that they train: the cheapest first
# A simple and a complex elicited task, two recombined ones, and a new one, for which every method has four times the steps
DEFAULT_TASKS, STEPS = ["sentiment", "sentence", "chat", "verdict", "shifted"], {"shifted": 600}
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


def ready(experiment: Experiment, task: Task, method: str, seed: int, lr: float | None = None) -> Run:
    """-> a run before its training."""
    examples = train.load_examples(task.name, task.data, task.val_data, seed)
    own = {"lr": lr, "steps": task.steps, "batch_size": experiment.args.batch_size, "looks": 15}
    return experiment.prepared(examples, method, seed, **own)


def tuned(experiment: Experiment, task: Task, method: str, seed: int, lr: float | None) -> dict[str, Any]:
    """-> the record of a run, out of compare.json or from training now; on test data only with a seed that is reported."""
    model, adapters, rows, plan, *_ = ready(experiment, task, method, seed, lr)
    seen = hashlib.sha256(repr((rows["train"], rows["validation"])).encode()).hexdigest()[:16]
    settings = {"task": task.name, "method": method, "base": fingerprint(model), "examples": seen, "seed": seed}
    settings |= {"lr": plan.lr, "steps": plan.steps, "batch_size": plan.batch_size}  # all that decides how it goes

    def measure() -> dict[str, Any]:
        found = {"trained": n_trainable(model, adapters)}
        if seed:
            found["loss_frozen"], hits = evaluate(model, [], rows["test"], plan.batch_size)
            found |= {"exact_match_frozen": share(hits), "length": statistics.mean(len(row.target) for row in rows["test"])}
        curve = quietly_tuned(model, adapters, rows, plan)
        _, hits = evaluate(model, adapters, rows["validation"], plan.batch_size)
        found |= {"validation": curve[-1][1], "validation_exact": share(hits), "curve": curve}
        if seed:
            found["loss"], hits = evaluate(model, adapters, rows["test"], plan.batch_size)
            found["exact_match"] = share(hits)
        return found

    return experiment.once(settings, measure)


def best_rate(experiment: Experiment, task: Task, method: str) -> float:
    """-> the learning rate with the lowest validation loss on seed 0."""
    middle = RECIPES[method].lr
    return rate(middle, lowest(lambda power: tuned(experiment, task, method, 0, rate(middle, power))["validation"]))


def verdict(methods: dict[str, list[dict]]) -> str:
    """Each method's runs, the cheapest method first -> the sentence that names the cheapest that is as good as the best.

    What counts is exact match on validation data, or where that is below one half for all, the loss. The noise is how far apart
    the seeds of one method are, of the best or of the one set against it: what is less than this, another seed may turn.
    """
    exact = max(statistics.mean(run["validation_exact"] for run in runs) for runs in methods.values()) >= 50
    key, sign, unit = ("validation_exact", 1, " % exact match") if exact else ("validation", -1, " nats per token")
    means = {name: statistics.mean(run[key] for run in runs) for name, runs in methods.items()}
    ranges = {name: max(run[key] for run in runs) - min(run[key] for run in runs) for name, runs in methods.items()}
    best = max(means, key=lambda name: sign * means[name])  # of equals, the cheapest
    noise = {name: max(ranges[name], ranges[best]) for name in methods}
    name = next(name for name in methods if abs(means[name] - means[best]) <= noise[name])
    said = f"{NAMES[name]}, {methods[name][0]['trained']:,} numbers: {means[name]:.4g}{unit} on validation data"
    if name != best:
        said += f", where the best, {NAMES[best]}, has {means[best]:.4g}"
        said += f"; the seeds of one method are up to {noise[name]:.2g} apart"
    elif len(methods[best]) == 1:
        said += "; one seed says nothing about noise: give --seeds 3"
    elif name == next(iter(methods)):
        said += ", and none is better"
    else:
        said += f"; no cheaper method is within the noise, which is {ranges[best]:.2g} between the seeds of this one"
    return f"The cheapest method within the noise of the best is {said}."


def step(model: Decoder, adapters: list[nn.Module], batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    forward(model, adapters, batch).backward()
    optimizer.step()


def costs(experiment: Experiment, task: Task) -> dict[str, dict]:
    """-> what each method costs: numbers, bytes, context and time, on the first batch of the training data."""
    found, steps, prefills, one, many = {}, {}, {}, {}, {}
    for method in ["none", *METHODS]:
        model, adapters, rows, plan, *_ = ready(experiment, task, method, 0)
        batch = batch_of(rows["train"][: plan.batch_size], model.device)
        trained = [p for module in (model, *adapters) for p in module.parameters() if p.requires_grad]
        n_trained, past_kv = n_trainable(model, adapters), stacked_past_kv(adapters, model)
        n_past = train.n_past(past_kv)
        source = torch.tensor([rows["test"][0].source], device=model.device)
        n_new = min(33, model.config.block_size + 1 - n_past - source.size(1))
        found[method] = {"trained": n_trained, "share": 100 * n_trained / sum(p.numel() for p in model.parameters())}
        found[method] |= {"context": n_past, "new": n_new}
        found[method]["training"] = 12 * n_trained  # gradients, and the two averages that AdamW keeps
        if trained:
            found[method]["activations"] = kept_for_backward(model, partial(forward, model, adapters, batch))
            steps[method] = partial(step, model, adapters, batch, torch.optim.AdamW(trained, lr=1e-9))
        one[method] = partial(model.generate, source, 1, past_kv)
        many[method] = partial(model.generate, source, n_new, past_kv)
        prefills[method] = torch.no_grad()(partial(stacked_past_kv, adapters, model))
    for key, functions in {"step": steps, "prefill": prefills, "one": one, "many": many}.items():
        for method, seconds in interleaved(functions, 15).items():
            found[method][key] = 1000 * statistics.median(seconds)
    for cells in found.values():
        cells["token"] = (cells["many"] - cells["one"]) / (cells["new"] - 1)
    return found


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"


def cost_table(found: dict[str, dict]) -> str:
    header = ["method", "numbers trained", "share of the base", "context used", "kept for backward", "gradients and optimizer"]
    header += ["ms a step", "of full", "ms to fill its cache", "ms a token, against none"]
    rows, none = [], found["none"]["token"]
    for method, c in found.items():
        row = ["–"] * 7
        if c["trained"]:
            row = [f"{c['trained']:,}", f"{c['share']:.3g} %", f"{c['context']} tokens"]
            row += [size(c["activations"]), size(c["training"]), f"{c['step']:.1f}", f"{c['step'] / found['full']['step']:.2f}"]
        cache = f"{c['prefill']:.2f}" if c["context"] else "–"
        rows.append([NAMES[method], *row, cache, f"{c['token']:.2f}, {c['token'] / none:.2f} ×"])
    return markdown(header, rows)


def share_table() -> str:
    """-> what a soft prompt (P·C numbers) and a prefix (P·2·L·K·D) are of the parameters of real models."""
    rows = []
    for name, (L, C, keys, n) in MODELS.items():
        for method, numbers in (("soft_prompt", C), ("prefix", 2 * L * keys)):
            rows.append([name, NAMES[method], *(f"{100 * P * numbers / n:.2g} %" for P in (10, 20, 100))])
    return markdown(["model", "method", "10 tokens", "20", "100"], rows)


def quality_table(chosen: dict[str, dict[str, list[dict]]]) -> str:
    rows = []
    for task, methods in chosen.items():
        for method, runs in {"none": next(iter(methods.values())), **methods}.items():
            end = "_frozen" * (method == "none")
            losses, exact = ([run[key + end] for run in runs] for key in ("loss", "exact_match"))
            answers = [loss * run["length"] for loss, run in zip(losses, runs)]
            rate = "–" if end else f"{runs[0]['lr']:.2g}"
            rows.append([task, NAMES[method], rate, spread(losses, 4), spread(answers, 3), spread(exact, 1)])
    return markdown(["task", "method", "learning rate", "loss a token", "loss an answer", "exact match %"], rows)


def own_flags(add: Callable) -> None:
    add("--task", nargs="+", choices=TASKS, default=DEFAULT_TASKS, help=f"embedded tasks (default: {' '.join(DEFAULT_TASKS)})")
    add("--data", metavar="FILE", help="your own examples instead")
    add("--val-data", metavar="FILE", help="and those to evaluate on (default: a tenth of --data)")
    add("--steps", type=int, help="of every method (default: 150, of the task shifted 600)")
    add("--lr", type=float, help="of every method (default: its best)")
    add("--batch-size", type=int, default=16, help="(default: 16)")


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv, own_flags, Path("out/compare"))
    args = experiment.args
    for name in ("steps", "lr", "batch_size"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give more than 0")
    tasks = [Task(name, None, None, args.steps or STEPS.get(name)) for name in args.task]
    tasks = [Task(Path(args.data).stem, args.data, args.val_data, args.steps)] if args.data else tasks
    rates = {(task, method): args.lr or best_rate(experiment, task, method) for task in tasks for method in METHODS}
    chosen = {task.name: {} for task in tasks}
    for (task, method), lr in rates.items():
        chosen[task.name][method] = [tuned(experiment, task, method, 1 + i, lr) for i in experiment.seeds]
    found = costs(experiment, tasks[0])
    verdicts = {name: verdict(methods) for name, methods in chosen.items()}
    experiment.store(seeds=[1 + i for i in experiment.seeds], costs=found, verdicts=verdicts)
    text = f"Costs, on {tasks[0].name}:\n\n{cost_table(found)}\nShares of other models:\n\n{share_table()}\n"
    text += f"Quality on test data, mean [range] of {len(experiment.seeds)} seeds:\n\n{quality_table(chosen)}\n"
    text += "\n".join(f"{name}: {sentence}" for name, sentence in verdicts.items())
    replace_file(experiment.out / "compare.md", f"{text}\n".encode())
    say(f"\n{text}")


if __name__ == "__main__":
    run_command(main)
