"""Which method for your task? Parameters, memory, time and quality of each, measured on your task, base and machine.

    python classroom/compare.py                                  four embedded tasks, three seeds
    python classroom/compare.py --data mine.jsonl --base gpt2    yours; what train.py understands goes to every run

Every method trains at its own learning rate: three rates a factor of three apart are tried on the validation data of the
first seed, and further ones while the outermost is the best. The test data are looked at once, after that. Without
--val-data, data of your own have no test part beside the validation part, and one and the same serves for both.
An interrupted comparison goes on where it was. Into --out it writes compare.json (each run: settings, curve, results),
compare.md (the table) and, with matplotlib, compare.png (the curves of validation loss).
"""

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    KVCache,
    band,
    data,
    figure,
    finish,
    forward,
    gradients,
    kept_for_backward,
    markdown,
    rows_of,
    spread,
    train,
    write_json,
)

NAMES = {
    "none": "frozen base",
    "soft_prompt": "soft prompt",
    "prefix": "prefix",
    "both": "prefix + soft prompt",
    "full": "full fine-tuning",
}
# A simple and a complex elicited task, a recombined one, and a new one, for which every method has four times the steps
TASKS = {"sentiment": [], "sentence": [], "chat": [], "shifted": ["--steps", "600"]}


def load(flags: list[str], method: str, seed: int, lr: float | None = None) -> tuple[train.Run, argparse.Namespace]:
    """-> a run that is ready to be tuned, on a base of its own, and its settings."""
    args = train.parse([*flags, "--method", method, "--seed", str(seed), *(["--lr", f"{lr:.2g}"] if lr else []), "--resume"])
    args.eval_every = max(1, args.steps // 15)
    args.out = None
    return train.prepare(args, *train.load_base(args)), args


# --------------------------------------------------------------------------------------------------------------- quality


class Trials:
    """The tuning runs of a comparison. Each is done once: compare.json remembers it, and its adapter lies beside."""

    def __init__(self, out: Path, steps: int):
        self.out, self.steps_left, self.steps_done, self.seconds = out, steps, 0, 0.0
        self.file = out / "compare.json"
        self.records = data.read_json(self.file)["runs"] if self.file.exists() else []

    def tuned(self, flags: list[str], method: str, seed: int, lr: float | None) -> dict:
        """-> the record of a run, out of compare.json or from training now."""
        run, args = load(flags, method, seed, lr)
        settings = train.settings_of(run, args)
        args.out = self.out / run.task / f"{method}-{args.lr:.2g}-seed{seed}"
        self.steps_left -= args.steps
        known = [record for record in self.records if record["settings"] == settings]
        if known:
            return known[0]
        left = self.seconds / max(1, self.steps_done) * max(0, self.steps_left + args.steps) / 60
        estimate = f", about {left:.0f} min left" if self.steps_done else ""
        print(f"{run.task}: {NAMES[method]}, learning rate {args.lr:.2g}, seed {seed}{estimate}", flush=True)
        begin = time.perf_counter()
        frozen, _ = train.evaluate(run.model, [], run.rows["validation"], args.batch_size)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                curve = train.tune(run, args)
                train.save(args.out, run)
            except train.Diverged:
                curve = [(args.steps, float("inf"))]
        self.seconds += time.perf_counter() - begin
        self.steps_done += args.steps
        record = {"task": run.task, "method": method, "seed": seed, "lr": args.lr, "out": str(args.out), "frozen": frozen}
        self.records.append(record | {"validation": curve[-1][1], "curve": curve, "settings": settings})
        self.save()
        return self.records[-1]

    def save(self) -> None:
        write_json(self.file, {"runs": self.records})


def best_rate(trials: Trials, flags: list[str], method: str) -> float:
    """-> the learning rate with the lowest validation loss on seed 0. An edge is left when it is better by 0.01 nats."""
    middle = train.RECIPES[method].lr

    def loss(power: int) -> float:
        return trials.tuned(flags, method, 0, middle * 3.0**power)["validation"]

    losses = {power: loss(power) for power in (-1, 0, 1)}
    for direction in (-1, 1):
        edge = direction
        while losses[edge] < min(value for power, value in losses.items() if power != edge) - 0.01:
            edge += direction
            losses[edge] = loss(edge)
    return middle * 3.0 ** min(losses, key=losses.get)


def score(trials: Trials, flags: list[str], record: dict) -> None:
    """Puts loss and exact match on the test data into the record of a chosen run, and those of the frozen base."""
    if "loss" in record:
        return
    run, args = load(flags, record["method"], record["seed"], record["lr"])
    record["loss_frozen"], exact_frozen = train.evaluate(run.model, [], run.rows["test"], args.batch_size)
    if run.adapters:
        model, adapters = run.model, train.load_adapters(record["out"], run.model)
    else:
        model, adapters = train.GPT.from_pretrained(record["out"]).to(run.model.device), []
    record["loss"], exact = train.evaluate(model, adapters, run.rows["test"], args.batch_size)
    record["exact_match"], record["exact_match_frozen"] = train.share(exact), train.share(exact_frozen)
    trials.save()


def steps_to_gain(record: dict, part: float = 0.9) -> int | None:
    """-> the first step at which that part of the final gain over the frozen base is there, None without a gain."""
    gain = record["frozen"] - record["validation"]
    return next((step for step, loss in record["curve"] if record["frozen"] - loss >= part * gain), None) if gain > 0 else None


@torch.no_grad()
def ensemble_match(run: train.Run, caches: list[KVCache], batch_size: int) -> float:
    """N caches of batch 1 -> percentage of test rows that the mean of N adapters' log-probabilities gets right.

    One pass serves them all: each row is read N times, behind another past each time (Lester et al. §6).
    """
    N, hits = len(caches), []
    for start in range(0, len(run.rows["test"]), batch_size):
        chunk = run.rows["test"][start : start + batch_size]
        past_kv = rows_of([cache for cache in caches for _ in chunk])  # (N·B, H, P, D)
        batch = data.batch_of(chunk * N, run.model.device)
        hidden, targets = train.target_hidden(run.model, batch, past_kv)
        log_p = F.log_softmax(run.model.unembed(hidden).float(), dim=-1)  # (N·n, V)
        chosen = log_p.unflatten(0, (N, -1)).mean(dim=0).argmax(dim=-1)  # (n,)
        right = chosen == targets[: len(chosen)]
        lengths = [len(row.target) for row in chunk]
        hits += [bool(part.all()) for part in right.split(lengths)]
    return train.share(hits)


# ----------------------------------------------------------------------------------------------------------------- costs


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


def costs(flags: list[str], chosen: dict[str, dict]) -> dict[str, dict]:
    """-> what each method costs: numbers, bytes, context and time, on the first batch of the training data."""
    found, steps, prefills, one, many = {}, {}, {}, {}, {}
    for method in NAMES:
        run, args = load(flags, method, 0)
        model, adapters = run.model, run.adapters
        batch = data.batch_of(run.rows["train"][: args.batch_size], model.device)
        trained = [p for module in (model, *adapters) for p in module.parameters() if p.requires_grad]
        n_trained = sum(p.numel() for p in trained)
        n_stored = sum(adapter.n_stored() for adapter in adapters) or n_trained
        past_kv = train.stacked_past_kv(adapters, model)
        n_past = past_kv[0][0].size(2) if past_kv else 0
        source = torch.tensor([run.rows["test"][0].source], device=model.device)
        n_new = min(33, model.config.block_size + 1 - n_past - source.size(1))

        def step(run=run, batch=batch, optimizer=torch.optim.AdamW(trained, lr=1e-9) if trained else None) -> None:
            optimizer.zero_grad()
            gradients(run.model, run.adapters, batch)
            optimizer.step()

        n_base = sum(p.numel() for p in model.parameters())
        found[method] = {"trained": n_trained, "stored": n_stored, "share": 100 * n_stored / n_base, "context": n_past}
        found[method] |= {"gradients": 4 * n_trained, "optimizer": 8 * n_trained}  # float32; AdamW keeps two averages
        found[method]["activations"] = kept_for_backward(model, lambda: forward(model, adapters, batch)) if trained else 0
        if trained:
            files = Path(chosen[method]["out"]).rglob("*model.safetensors")
            found[method]["disk"] = sum(file.stat().st_size for file in files)
            steps[method] = step
        one[method] = lambda model=model, source=source, past_kv=past_kv: model.generate(source, 1, past_kv)
        many[method] = lambda model=model, source=source, past_kv=past_kv, n=n_new: model.generate(source, n, past_kv)
        prefills[method] = torch.no_grad()(lambda run=run: train.stacked_past_kv(run.adapters, run.model))
    for key, functions in {"step": steps, "prefill": prefills, "one": one, "many": many}.items():
        for method, ms in interleaved(functions, 15).items():
            found[method][key] = ms
    for cells in found.values():
        cells["token"] = (cells["many"] - cells["one"]) / (n_new - 1)
    return found


# ------------------------------------------------------------------------------------------------------------- the tables


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.1f} kB"


def cost_table(found: dict[str, dict]) -> str:
    header = ["method", "numbers trained", "stored", "share of the base", "on disk", "context used", "kept for backward"]
    header += ["gradients", "optimizer", "ms a step", "of full", "ms to fill its cache", "ms a token, against none"]
    rows = []
    for method, c in found.items():
        row = [NAMES[method]]
        if c["trained"]:
            row += [f"{c['trained']:,}", f"{c['stored']:,}", f"{c['share']:.3g} %", size(c["disk"]), f"{c['context']} tokens"]
            row += [size(c[key]) for key in ("activations", "gradients", "optimizer")]
            row += [f"{c['step']:.1f}", f"{c['step'] / found['full']['step']:.2f}"]
        else:
            row += ["–"] * 10
        row += [f"{c['prefill']:.2f}" if c["context"] else "–", f"{c['token']:.2f}, {c['token'] / found['none']['token']:.2f} ×"]
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
            band(axis, steps, list(zip(*([max(loss, 1e-5) for _, loss in record["curve"]] for record in records))), NAMES[method])
        axis.set(title=task, xlabel="step", ylabel="validation loss, nats per token", yscale="log")
    axes[0][0].legend()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=train.data.TASKS, default=list(TASKS), help="embedded tasks")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method at its learning rate (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="(default: out/compare)")
    args, flags = parser.parse_known_args(argv)
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: give 1 or more")
    own_data = any(flag.startswith("--data") for flag in flags)
    tasks = [flags] if own_data else [["--task", task, *TASKS.get(task, []), *flags] for task in args.task]
    swept = not any(flag.startswith("--lr") for flag in flags)
    train.make_base(train.parse(flags))
    steps = sum(train.parse(task).steps for task in tasks) * (len(NAMES) - 1) * (args.seeds + 2 * swept)
    trials = Trials(args.out, steps)
    chosen, ensembles = {}, {}
    for task_flags in tasks:
        methods = {}
        for method in list(NAMES)[1:]:
            lr = best_rate(trials, task_flags, method) if swept else None
            methods[method] = [trials.tuned(task_flags, method, seed, lr) for seed in range(args.seeds)]
        chosen[methods["full"][0]["task"]] = methods
    for task_flags, (task, methods) in zip(tasks, chosen.items()):
        for method, records in methods.items():
            for record in records:
                score(trials, task_flags, record)
            if method != "full":
                run, settings = load(task_flags, method, 0)
                caches = [train.stacked_past_kv(train.load_adapters(r["out"], run.model), run.model) for r in records]
                ensembles[task, method] = ensemble_match(run, caches, settings.batch_size)
    found = costs(tasks[0], {method: records[0] for method, records in next(iter(chosen.values())).items()})
    text = f"Costs, on {next(iter(chosen))}:\n\n{cost_table(found)}\nQuality, mean [range] of {args.seeds} seeds:\n\n"
    text += quality_table(chosen, ensembles)
    print(f"\n{text}")
    write_json(trials.file, {"runs": trials.records, "costs": found})
    with data.replaced_file(args.out / "compare.md") as new:
        new.write_text(text, encoding="utf-8")
    figure(args.out / "compare.png", lambda axes: draw_curves(axes, chosen), columns=len(chosen))


if __name__ == "__main__":
    train.run_command(main)
