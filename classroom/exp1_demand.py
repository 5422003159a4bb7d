"""1. What can each method do?

    python classroom/exp1_demand.py            a night of one core; started again, it goes on
    python classroom/exp1_demand.py --few      half an hour: four demands, fewer steps and runs

The demands grow, so that the methods do not tie. The input is a message that asks a restaurant for
its food. The first N names are keys, or with 432 the pairs of name and food. A random rule gives
each key its own answer:

    route   one of two replies that the base knows, polite or terse; guessing gives 50 %
    fact    a polite reply with an area that the key decides, one of eight: N facts, new to the base
    xor     polite or terse by a bit of the name and a bit of the food; neither says anything alone

Test records are new, their keys are not. A run ends when it answers all validation examples, at the
latest after 2,400 steps (with --few 400). If its validation loss still fell by a tenth in the last
quarter, it is unfinished. The rate of a cell is chosen on a base, data and a start that are not
reported: the default, unless another one's loss is lower by a tenth. Three bases, three seeds of
data and three of the start meet in nine runs, each pair of seeds once. Of these, --few has three.
"""

import random
import statistics
from typing import Any, NamedTuple

from common import NAMES, Experiment, all_right, best_rate, colour, curve_of, looks_of
from common import n_trainable, spread

from command.console import run_command
from data import Example
from small_base.world import FORMS, VALUES, Record, split_of
from train import evaluate

DEMANDS = [("route", N) for N in (1, 8, 36, 432)] + [("fact", N) for N in (8, 36)] + [("xor", 36)]
RATES = {"soft_prompt": 0.1, "prefix": 0.3, "both": 0.3, "lora": 0.01, "full": 0.0015}  # defaults
# About 8,192 numbers each, a prefix of one token, and the whole; then the usual sizes
SIZES = [("soft_prompt", 64), ("prefix", 1), ("prefix", 8), ("both", 7), ("lora", 4), ("full", 0)]
USUAL = [("soft_prompt", 20), ("prefix", 32)]
FEW = [("route", 1), ("route", 8), ("route", 36), ("fact", 8)]
BATCH, STEPS, STEPS_OF_FEW, LOOK, UNREPORTED = 8, 2400, 400, 50, 100


class Cell(NamedTuple):
    """What decides a run, apart from its seeds, its learning rate and its steps."""

    demand: str
    N: int
    method: str
    size: int  # virtual tokens, of each adapter of a stack; of LoRA the rank


def label(method: str, size: int) -> str:
    sizes = {"both": f" of {size} + {size}", "lora": f" of rank {size}", "full": ""}
    return NAMES[method] + sizes.get(method, f" of {size}")


def examples_of(demand: str, N: int, split: str, n: int, seed: int) -> list[Example]:
    """-> n examples of a demand; the seed decides its rule and its records."""
    rng = random.Random(f"{split} {seed}")
    rule = random.Random(f"rule {seed}")
    bits = rule.sample(range(12), 12)  # of the foods
    order = rule.sample(range(N), N)
    examples = []
    while len(examples) < n:
        key = rng.randrange(N)
        food = key // 36 if N > 36 else rng.randrange(12)
        record = Record(*map(rng.choice, VALUES))
        record = record._replace(name=VALUES.name[key % 36], food=VALUES.food[food])
        if split_of(record) != split:
            continue
        if demand == "fact":
            target = FORMS["polite"](record._replace(area=VALUES.area[order[key] % 8]))
        else:
            bit = order[key] + (bits[food] if demand == "xor" else 0)
            target = FORMS[("polite", "terse")[bit % 2]](record)
        examples.append(Example(FORMS["message"](record), target))
    return examples


def unfinished(run: dict[str, Any]) -> bool:
    """-> whether a run misses answers, and its loss fell by a tenth in the last quarter."""
    losses = [loss for step, loss in run["curve"] if step >= 0.75 * run["curve"][-1][0]]
    return run["exact"] < 100 and losses[-1] < 0.9 * losses[0]


class Demand:
    """The grid, and what is chosen in it."""

    def __init__(self, experiment: Experiment):
        few, self.experiment = experiment.args.few, experiment
        self.demands = experiment.grid(FEW if few else DEMANDS)
        self.sizes = experiment.grid(SIZES if few else SIZES + USUAL)
        self.steps = STEPS_OF_FEW if few else STEPS
        passes = experiment.seeds[: 1 if few else 3]
        bases = range(1 if experiment.args.quick else 3)
        self.seeds = [(b, (b + i) % 3, (b + 2 * i) % 3) for i in passes for b in bases]

    def run(self, cell: Cell, seeds: tuple[int, int, int], lr: float) -> dict[str, Any]:
        """-> the record of a run on the seeds of (base, data, start): losses and right answers."""
        experiment = self.experiment

        def measure() -> dict[str, Any]:
            sizes = {"train": 4000 if cell.N > 36 else 1000, "validation": 100, "test": 300}
            examples = {
                split: examples_of(cell.demand, cell.N, split, experiment.at_most or n, seeds[1])
                for split, n in sizes.items()
            }
            own = {"n_virtual": cell.size, "lr": lr, "steps": self.steps, "batch_size": BATCH}
            base, looks = experiment.base(seeds[0]), self.steps // LOOK
            run = experiment.prepared(examples, cell.method, seeds[2], base, looks=looks, **own)
            seen = looks_of(run, all_right)
            record = {"trained": n_trainable(run.model, run.adapters), "curve": curve_of(seen)}
            record["exact"] = seen[-1]["exact_match"]
            scores = evaluate(run.model, run.adapters, run.rows["test"], 50)
            return record | {"test": scores.exact_match()}

        names = dict(zip(("base", "data", "start"), seeds))
        return experiment.once(cell._asdict() | names | {"lr": lr, "most": self.steps}, measure)

    def rate(self, cell: Cell) -> float:
        """-> the default learning rate, unless another one's loss is lower by a tenth.

        It is chosen on seeds that are not reported. Among rates at chance, the lowest is luck.
        """
        default = RATES[cell.method]

        def loss_at(lr: float) -> float:
            run = self.run(cell, (UNREPORTED,) * 3, lr)
            return 0.0 if run["exact"] == 100 else run["curve"][-1][1]

        usual = loss_at(default)
        best = best_rate(default, loss_at) if usual > 0 else default
        return best if loss_at(best) < 0.9 * usual else default

    def runs(self, cell: Cell) -> list[dict[str, Any]]:
        return [self.run(cell, seeds, self.rate(cell)) for seeds in self.seeds]


def main(argv: list[str] | None = None) -> None:
    def own_flags(add: Any) -> None:
        add("--few", action="store_true", help="a part of the grid")

    experiment = Experiment(__file__, __doc__, argv, own_flags)
    grid = Demand(experiment)
    for demand in grid.demands:
        for method, size in grid.sizes:
            grid.runs(Cell(*demand, method, size))
    rows = []
    for method, size in grid.sizes:
        cells = [grid.runs(Cell(*demand, method, size)) for demand in grid.demands]
        row = [label(method, size), f"{cells[0][0]['trained']:,}"]
        for runs in cells:
            right = spread([run["test"] for run in runs], 0)
            steps = statistics.median(run["curve"][-1][0] for run in runs)
            late = sum(map(unfinished, runs))
            row.append(f"{right}, {steps:.0f} steps" + (f", {late} unfinished" if late else ""))
        rows.append(row)

    names = [f"{kind} {N}" for kind, N in grid.demands]

    def draw(axes) -> None:
        left, right = axes[0]
        for i, (method, size) in enumerate(grid.sizes):
            name = label(method, size)
            line = ":" if (method, size) in USUAL else "--" if size == 1 else "-"
            cells = [grid.runs(Cell(*demand, method, size)) for demand in grid.demands]
            answers = [[run["test"] for run in runs] for runs in cells]
            steps = [[run["curve"][-1][0] for run in runs] for runs in cells]
            for axis, middle, columns in (
                (left, statistics.mean, answers),
                (right, statistics.median, steps),
            ):
                for kind in ("route", "fact", "xor"):  # a line connects demands of one kind
                    there = [x for x, demand in enumerate(grid.demands) if demand[0] == kind]
                    xs = [x + 0.06 * i for x in there]  # side by side, so that equal points show
                    means = [middle(columns[x]) for x in there]
                    axis.plot(xs, means, line, label=name, color=colour(name))
                    axis.plot(xs, [columns[x] for x in there], ".", color=colour(name))
                axis.set_xticks(range(len(names)), names, rotation=45)
        left.set(ylabel="exact match on test data, %", ylim=(0, 104))
        right.set(ylabel=f"steps until all is right (≤ {grid.steps:,})")

    experiment.report(["method", "numbers", *names], rows, draw, 2)


if __name__ == "__main__":
    run_command(main)
