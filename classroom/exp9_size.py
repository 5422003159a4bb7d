"""9. Does a larger base close the gap to full fine-tuning?

    python classroom/exp9_size.py                         about two hours of one core

Lester et al. 2021 (figure 1) say so of a soft prompt, on T5 of 77 M to 11 B parameters. Here the
bases are 32 to 256 wide, with four layers each. Narrow ones learn the world more slowly and are
pretrained for longer. One is not, to tell the size from what the base knows.

A method learns facts of experiment 1 for 600 steps of 8 rows: 36 facts, each by a name, or 144, by
a name and a food. What share of new records does it answer exactly? Three runs differ in base, data
and start. A cell's learning rate has the lowest loss on a fourth; that run is not reported.
"""

from pathlib import Path
from typing import Any, NamedTuple

from common import UNREPORTED, Experiment, band, best_rate, looks_of, n_trainable, spread
from exp1_demand import BATCH, MIDDLES, Demand, examples_of, label

from command.console import run_command
from small_base.pretrain import pretrain
from storage.files import TRAINING, read_json
from train import evaluate


class Base(NamedTuple):
    width: int
    steps: int  # of pretraining


USUAL = Base(128, 120)  # the small base
BASES = [Base(32, 120), Base(32, 960), Base(64, 240), USUAL, Base(256, 120)]
GROWN = BASES[1:]  # those that know the world about as well
DEMANDS = {"36 facts": Demand("fact", 36), "144 facts": Demand("fact", 144)}
SIZES = [("soft_prompt", 20), ("prefix", 8), ("full", 0)]
STEPS = 600
Cells = dict[tuple[Base, str, str], list[dict[str, Any]]]  # by base, demand, method: its runs


def directory_of(experiment: Experiment, base: Base, seed: int) -> Path:
    """-> where the base of a seed is, made if it is not there."""
    if base == USUAL or experiment.args.quick:
        return experiment.base(seed)
    directory = Path("out/bases", f"{base.width}-wide-{base.steps}", str(seed))
    if not (directory / "config.json").exists():
        sizes = (4, 4, base.width, 128)
        pretrain(directory, (), sizes, base.steps, seed=seed, device=experiment.device)
    return directory


def draw_lines(cells: Cells, axes: Any) -> None:
    """A panel a demand, a line a method, over the number of the base's parameters."""
    for axis, name in zip(axes[0], DEMANDS):
        for method, size in SIZES:
            columns = [cells[base, name, method] for base in GROWN if (base, name, method) in cells]
            xs = [runs[0]["parameters"] for runs in columns]
            shares = [[run["test"] for run in runs] for runs in columns]
            band(axis, xs, shares, label(method, size), "o-")
        axis.set(xscale="log", xlabel="parameters of the base", ylim=(-3, 103), title=name)
        axis.set_xticks(xs, [f"{x / 1e6:.2g} M" for x in xs])
        axis.minorticks_off()
    axes[0][0].set_ylabel("% of new records right")


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)

    def run(base: Base, name: str, method: str, size: int, seed: int, lr: float) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            demand, own = DEMANDS[name], directory_of(experiment, base, seed)
            n = {"train": 1000 if demand.N == 36 else 4000, "validation": 100, "test": 300}
            examples = {split: examples_of(demand, split, n[split], seed) for split in n}
            ready = experiment.prepared(examples, method, seed, own, size, lr, STEPS, BATCH)
            found = {"parameters": sum(p.numel() for p in ready.model.parameters())}
            found |= {"base_loss": read_json(own / TRAINING)["loss"]}
            found |= {"trained": n_trainable(ready.model, ready.adapters)}
            found |= {"loss": looks_of(ready)[-1]["validation"]}
            scores = evaluate(ready.model, ready.adapters, ready.rows["test"], 50)
            return found | {"test": scores.exact_match()}

        settings = {"base": list(base), "demand": name, "method": method, "size": size}
        return experiment.once(settings | {"seed": seed, "lr": lr}, measure)

    cells: Cells = {}
    for name in DEMANDS:
        for base in experiment.grid(BASES):
            for method, size in SIZES:
                cell = (base, name, method, size)
                lr = best_rate(MIDDLES[method], lambda lr: run(*cell, UNREPORTED, lr)["loss"])
                cells[cell[:3]] = [run(*cell, seed, lr) for seed in experiment.seeds]
    rows = []
    for base in experiment.grid(BASES):
        own = [cells[base, name, method] for name in DEMANDS for method, _ in SIZES]
        row = [f"{base.width} wide, {base.steps} steps", f"{own[0][0]['parameters']:,}"]
        row.append(spread([run["base_loss"] for run in own[0]], 2))
        rows.append(row + [spread([run["test"] for run in runs], 0) for runs in own])
    learned = [f"{name}: {label(*size)} %" for name in DEMANDS for size in SIZES]
    header = ["base, pretrained for", "parameters", "its loss", *learned]
    experiment.report(header, rows, lambda axes: draw_lines(cells, axes), len(DEMANDS), (9, 4.2))


if __name__ == "__main__":
    run_command(main)
