"""Which method for your task? Parameters, memory, time and quality of each, measured on your task, base and machine.

    python classroom/compare.py                                  four embedded tasks, three seeds
    python classroom/compare.py --data mine.jsonl --base gpt2    yours

Every method trains at its own learning rate: three rates a factor of three apart are tried on the validation data of the
first seed, and further ones while the outermost is the best. The test data are looked at once, after that. Without
--val-data, data of your own have no test part beside the validation part, and one and the same serves for both.
An interrupted comparison goes on where it was. Into --out it writes compare.json (each run: settings, curve, results),
compare.md (the table) and, with matplotlib, compare.png (the curves of validation loss).
"""

import argparse
import contextlib
import hashlib
import io
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import NAMES, Run, band, figure, finish, forward, gradients, kept_for_backward, load_base, lowest, markdown, prepared, ready
from common import spread, write_json
from torch import nn

import train
from command.process import pick_device, run_command, say, start_process
from data import Batch, Row, batch_of
from model import Decoder, KVCache, rows_of
from small_base.world import TASKS
from storage.base import fingerprint
from storage.checkpoints import Checkpoint
from storage.files import read_json, replace_file
from train import evaluate, load_adapters, share, stacked_past_kv

METHODS = list(NAMES)[1:]
# A simple and a complex elicited task, a recombined one, and a new one, for which every method has four times the steps
DEFAULT_TASKS, STEPS = ["sentiment", "sentence", "chat", "shifted"], {"shifted": 600}


class Task(NamedTuple):
    """What all methods are compared on."""

    name: str
    data: str | None  # a file of the user's own, or an embedded task
    val_data: str | None
    steps: int | None  # of every method, or its own


class Trials:
    """The tuning runs of a comparison. Each is done once: compare.json remembers it, and its adapter lies beside."""

    def __init__(self, out: Path, base: str | Path, device: torch.device, batch_size: int, steps: int):
        self.out, self.base, self.device, self.batch_size = out, base, device, batch_size
        self.steps_left, self.steps_done, self.seconds = steps, 0, 0.0
        self.file = out / "compare.json"
        self.records = read_json(self.file)["runs"] if self.file.exists() else []

    def load(self, task: Task, method: str, seed: int, lr: float | None = None) -> Run:
        examples = train.load_examples(task.name, task.data, task.val_data, seed)
        own = {"lr": lr and float(f"{lr:.2g}"), "steps": task.steps, "batch_size": self.batch_size, "looks": 15}
        return prepared(self.base, self.device, examples, method, seed, **own)

    def tuned(self, task: Task, method: str, seed: int, lr: float | None) -> dict:
        """-> the record of a run, out of compare.json or from training now."""
        model, adapters, rows, plan, *_ = self.load(task, method, seed, lr)
        seen = hashlib.sha256(repr((rows["train"], rows["validation"])).encode()).hexdigest()[:16]
        settings = {"method": method, "base": fingerprint(model), "examples": seen} | plan._asdict()  # what decides how it goes
        self.steps_left -= plan.steps
        if known := [record for record in self.records if record["settings"] == settings]:
            return known[0]
        left = self.seconds / max(1, self.steps_done) * max(0, self.steps_left + plan.steps) / 60
        estimate = f", about {left:.0f} min left" if self.steps_done else ""
        say(f"{task.name}: {NAMES[method]}, learning rate {plan.lr:.2g}, seed {seed}{estimate}")
        begin, out = time.perf_counter(), self.out / task.name / f"{method}-{plan.lr:.2g}-seed{seed}"
        frozen, _ = evaluate(model, [], rows["validation"], plan.batch_size)
        checkpoint = Checkpoint(out / "checkpoint.safetensors", settings, resume=True)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                curve = train.tune(model, adapters, rows, plan, checkpoint)
                places = [out / name for name in train.STACK] if len(adapters) > 1 else [out]
                train.save(places, adapters, model, settings | {"task": task.name, "out": str(out)}, checkpoint)
            except train.Diverged:
                curve = [(plan.steps, float("inf"))]
            checkpoint.file.unlink(missing_ok=True)
        self.seconds += time.perf_counter() - begin
        self.steps_done += plan.steps
        record = {"task": task.name, "method": method, "seed": seed, "lr": plan.lr, "out": str(out), "frozen": frozen}
        self.records.append(record | {"validation": curve[-1][1], "curve": curve, "settings": settings})
        write_json(self.file, {"runs": self.records})
        return self.records[-1]


def best_rate(trials: Trials, task: Task, method: str) -> float:
    """-> the learning rate with the lowest validation loss on seed 0."""
    middle = train.RECIPES[method].lr
    return middle * 3.0 ** lowest(lambda power: trials.tuned(task, method, 0, middle * 3.0**power)["validation"])


def score(trials: Trials, task: Task, record: dict) -> None:
    """Puts loss and exact match on the test data into the record of a chosen run, and those of the frozen base."""
    if "loss" in record:
        return
    frozen, untrained, rows, *_ = trials.load(task, record["method"], record["seed"])
    adapters = load_adapters(record["out"], frozen) if untrained else []
    model = frozen if adapters else load_base(record["out"]).to(trials.device)
    record["loss_frozen"], exact_frozen = evaluate(frozen, [], rows["test"], trials.batch_size)
    record["loss"], exact = evaluate(model, adapters, rows["test"], trials.batch_size)
    record["exact_match"], record["exact_match_frozen"] = share(exact), share(exact_frozen)
    write_json(trials.file, {"runs": trials.records})


def steps_to_gain(record: dict, part: float = 0.9) -> int | None:
    """-> the first step at which that part of the final gain over the frozen base is there, None without a gain."""
    gain = record["frozen"] - record["validation"]
    return next((step for step, loss in record["curve"] if record["frozen"] - loss >= part * gain), None) if gain > 0 else None


@torch.no_grad()
def ensemble_match(model: Decoder, rows: list[Row], caches: list[KVCache], batch_size: int) -> float:
    """N caches of batch 1 -> percentage of rows that the mean of N adapters' log-probabilities gets right.

    One pass serves them all: each row is read N times, behind another past each time (Lester et al. §6).
    """
    N, hits = len(caches), []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        past_kv = rows_of([cache for cache in caches for _ in chunk])  # (N·B, H, P, D)
        batch = batch_of(chunk * N, model.device)
        hidden, targets = train.target_hidden(model, batch, past_kv)
        log_p = F.log_softmax((hidden @ model.head.T).float(), dim=-1)  # (N·n, V)
        chosen = log_p.unflatten(0, (N, -1)).mean(dim=0).argmax(dim=-1)  # (n,)
        right = chosen == targets[: len(chosen)]
        lengths = [len(row.target) for row in chunk]
        hits += [bool(part.all()) for part in right.split(lengths)]
    return share(hits)


def interleaved(functions: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """-> the median milliseconds of each function; they take turns, so that a slow moment meets them all."""
    times = {name: [] for name in functions}
    for round in range(rounds + 2):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            finish()
            if round >= 2:  # the first two warm up
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def step(model: Decoder, adapters: list[nn.Module], batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    gradients(model, adapters, batch)
    optimizer.step()


def costs(trials: Trials, task: Task, chosen: dict[str, dict]) -> dict[str, dict]:
    """-> what each method costs: numbers, bytes, context and time, on the first batch of the training data."""
    found, steps, prefills, one, many = {}, {}, {}, {}, {}
    for method in NAMES:
        model, adapters, rows, *_ = trials.load(task, method, 0)
        batch = batch_of(rows["train"][: trials.batch_size], model.device)
        trained = [p for module in (model, *adapters) for p in module.parameters() if p.requires_grad]
        n_trained = sum(p.numel() for p in trained)
        n_stored = sum(adapter.n_stored() for adapter in adapters) or n_trained
        past_kv = stacked_past_kv(adapters, model)
        n_past = past_kv[0][0].size(2) if past_kv else 0
        source = torch.tensor([rows["test"][0].source], device=model.device)
        n_new = min(33, model.config.block_size + 1 - n_past - source.size(1))

        n_base = sum(p.numel() for p in model.parameters())
        found[method] = {"trained": n_trained, "stored": n_stored, "share": 100 * n_stored / n_base, "context": n_past}
        found[method] |= {"gradients": 4 * n_trained, "optimizer": 8 * n_trained, "activations": 0}  # AdamW keeps two averages
        if trained:
            found[method]["activations"] = kept_for_backward(model, partial(forward, model, adapters, batch))
            files = Path(chosen[method]["out"]).rglob("*model.safetensors")
            found[method]["disk"] = sum(file.stat().st_size for file in files)
            steps[method] = partial(step, model, adapters, batch, torch.optim.AdamW(trained, lr=1e-9))
        one[method] = partial(model.generate, source, 1, past_kv)
        many[method] = partial(model.generate, source, n_new, past_kv)
        prefills[method] = torch.no_grad()(partial(stacked_past_kv, adapters, model))
    for key, functions in {"step": steps, "prefill": prefills, "one": one, "many": many}.items():
        for method, ms in interleaved(functions, 15).items():
            found[method][key] = ms
    for cells in found.values():
        cells["token"] = (cells["many"] - cells["one"]) / (n_new - 1)
    return found


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"


def cost_table(found: dict[str, dict]) -> str:
    header = ["method", "numbers trained", "stored", "share of the base", "on disk", "context used", "kept for backward"]
    header += ["gradients", "optimizer", "ms a step", "of full", "ms to fill its cache", "ms a token, against none"]
    rows, none = [], found["none"]["token"]
    for method, c in found.items():
        row = [NAMES[method]]
        if c["trained"]:
            row += [f"{c['trained']:,}", f"{c['stored']:,}", f"{c['share']:.3g} %", size(c["disk"]), f"{c['context']} tokens"]
            row += [size(c[key]) for key in ("activations", "gradients", "optimizer")]
            row += [f"{c['step']:.1f}", f"{c['step'] / found['full']['step']:.2f}"]
        else:
            row += ["–"] * 10
        row += [f"{c['prefill']:.2f}" if c["context"] else "–", f"{c['token']:.2f}, {c['token'] / none:.2f} ×"]
        rows.append(row)
    return markdown(header, rows)


def quality_table(chosen: dict[str, dict[str, list[dict]]], ensembles: dict[tuple[str, str], float]) -> str:
    rows = []
    for task, methods in chosen.items():
        any_method = next(iter(methods.values()))
        frozen = [spread([r["loss_frozen"] for r in any_method], 3), spread([r["exact_match_frozen"] for r in any_method], 1)]
        rows.append([task, NAMES["none"], "–", "–", *frozen, "–"])
        for method, records in methods.items():
            gains = [steps_to_gain(record) for record in records]
            row = [task, NAMES[method], f"{records[0]['lr']:.2g}", "–" if None in gains else f"{statistics.median(gains):.0f}"]
            row += [spread([r["loss"] for r in records], 3), spread([r["exact_match"] for r in records], 1)]
            rows.append([*row, f"{ensembles[task, method]:.1f}" if (task, method) in ensembles else "–"])
    header = ["task", "method", "learning rate", "steps to 90 % of the gain", "test loss", "exact match %"]
    return markdown([*header, "ensemble of the seeds %"], rows)


def draw_curves(axes, chosen: dict[str, dict[str, list[dict]]]) -> None:
    """A panel a task, a colour a method; the band spans the seeds."""
    for axis, (task, methods) in zip(axes[0], chosen.items()):
        for method, records in methods.items():
            steps = [step for step, _ in records[0]["curve"]]
            band(axis, steps, list(zip(*([max(loss, 1e-5) for _, loss in r["curve"]] for r in records))), NAMES[method])
        axis.set(title=task, xlabel="step", ylabel="validation loss, nats per token", yscale="log")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", nargs="+", choices=TASKS, default=DEFAULT_TASKS, help=f"embedded tasks (default: {' '.join(DEFAULT_TASKS)})")
    add("--data", metavar="FILE", help="your own examples instead")
    add("--val-data", metavar="FILE", help="and those to evaluate on (default: a tenth of --data)")
    add("--base", default=train.DEFAULT_BASE, help=f"Hugging Face directory, or a name (default: {train.DEFAULT_BASE})")
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--steps", type=int, help="of every method (default: 150, of the task shifted 600)")
    add("--lr", type=float, help="of every method (default: its best)")
    add("--batch-size", type=int, default=16, help="(default: 16)")
    add("--seeds", type=int, default=3, help="runs of each method at its learning rate (default: 3)")
    add("--out", type=Path, default=Path("out/compare"), help="(default: out/compare)")
    args = parser.parse_args(argv)
    for name in ("steps", "lr", "batch_size", "seeds"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give more than 0")
    start_process()
    ready(args.base, device := pick_device(args.device))
    tasks = [Task(name, None, None, args.steps or STEPS.get(name)) for name in args.task]
    tasks = [Task(Path(args.data).stem, args.data, args.val_data, args.steps)] if args.data else tasks
    runs = args.seeds + (0 if args.lr else 2)
    steps = runs * sum(task.steps or train.RECIPES[method].steps for task in tasks for method in METHODS)
    trials = Trials(args.out, args.base, device, args.batch_size, steps)
    chosen, ensembles = {}, {}
    for task in tasks:
        chosen[task.name] = {}
        for method in METHODS:
            lr = args.lr or best_rate(trials, task, method)
            chosen[task.name][method] = [trials.tuned(task, method, seed, lr) for seed in range(args.seeds)]
    for task in tasks:
        for method, records in chosen[task.name].items():
            for record in records:
                score(trials, task, record)
            if method != "full":
                model, _, rows, *_ = trials.load(task, method, 0)
                with torch.no_grad():
                    caches = [stacked_past_kv(load_adapters(record["out"], model), model) for record in records]
                ensembles[task.name, method] = ensemble_match(model, rows["test"], caches, args.batch_size)
    found = costs(trials, tasks[0], {method: records[0] for method, records in chosen[tasks[0].name].items()})
    text = f"Costs, on {tasks[0].name}:\n\n{cost_table(found)}\nQuality, mean [range] of {args.seeds} seeds:\n\n"
    text += quality_table(chosen, ensembles)
    write_json(trials.file, {"runs": trials.records, "costs": found})
    replace_file(args.out / "compare.md", text.encode())
    say(f"\n{text}")
    figure(args.out / "compare.png", lambda axes: draw_curves(axes, chosen), columns=len(chosen))


if __name__ == "__main__":
    run_command(main)
