"""1. How soon does each method learn it, or not at all?

    python classroom/exp1_demand.py                       many hours of one core
    python classroom/exp1_demand.py --demands route-36    one column; another process may do one

The demands grow, so that the methods do not tie. The input is a message that asks a restaurant for
its food. Its name is the key: one of the first N names, or one of 432 pairs of name and food. A
random rule gives each key its own answer:

    route   one of two replies that the base knows, polite or terse; guessing gives 50 %
    fact    a polite reply with an area that the key decides, one of eight: N facts, new to the base
    xor     polite or terse by a bit of the name and a bit of the food; neither says anything alone

Test records are new, their keys are not. A run ends when all validation answers are right, at the
latest after 12,000 steps. What counts is how often it has seen each key by then. Three runs differ
in base, data and start. The learning rate of each cell is the one that is soonest on a fourth base,
data and start, or has the lowest loss after 4,000 steps; that run is not reported.
"""

import math
import random
import statistics
from typing import Any, NamedTuple

from common import NAMES, Experiment, all_right, best_rate, curve_of, looks_of, n_trainable

from command.console import run_command
from data import Example
from small_base.world import FORMS, VALUES, Record, split_of
from storage.checkpoints import Metrics
from train import evaluate


class Demand(NamedTuple):
    kind: str
    N: int  # names, or pairs of name and food

    @property
    def n_keys(self) -> int:
        """-> what a run has to tell apart: an xor of 36 names and 12 foods has 432 pairs."""
        return 12 * self.N if self.kind == "xor" else self.N


DEMANDS = {
    "route-1": Demand("route", 1),
    "route-8": Demand("route", 8),
    "route-36": Demand("route", 36),
    "route-432": Demand("route", 432),
    "fact-36": Demand("fact", 36),
    "xor-36": Demand("xor", 36),
}
MIDDLES = {"soft_prompt": 0.1, "prefix": 0.3, "both": 0.3, "lora": 0.0033, "full": 0.0015}
# Some 8,192 numbers each, but for the usual soft prompt and the whole
SIZES = [
    ("soft_prompt", 20), ("soft_prompt", 64), ("prefix", 8), ("both", 7), ("lora", 4), ("full", 0),
]  # fmt: skip
BATCH, STEPS, STEPS_OF_SEARCH, LOOK, UNREPORTED = 8, 12_000, 4_000, 50, 100


def label(method: str, size: int) -> str:
    sizes = {"both": f" of {size} + {size}", "lora": f" of rank {size}", "full": ""}
    return NAMES[method] + sizes.get(method, f" of {size}")


def examples_of(demand: Demand, split: str, n: int, seed: int) -> list[Example]:
    """-> n examples of a demand; the seed decides its rule and its records."""
    rng = random.Random(f"{split} {seed}")
    rule = random.Random(f"rule {seed}")
    bits = rule.sample(range(12), 12)  # of the foods
    order = rule.sample(range(demand.N), demand.N)
    examples = []
    while len(examples) < n:
        key = rng.randrange(demand.N)
        food = key // 36 if demand.N > 36 else rng.randrange(12)
        record = Record(*map(rng.choice, VALUES))
        record = record._replace(name=VALUES.name[key % 36], food=VALUES.food[food])
        if split_of(record) != split:
            continue
        if demand.kind == "fact":
            target = FORMS["polite"](record._replace(area=VALUES.area[order[key] % 8]))
        else:
            bit = order[key] + (bits[food] if demand.kind == "xor" else 0)
            target = FORMS[("polite", "terse")[bit % 2]](record)
        examples.append(Example(FORMS["message"](record), target))
    return examples


class Grid:
    """The runs of the table, each stored as it ends."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.demands = experiment.grid(experiment.args.demands)
        self.sizes = experiment.grid(SIZES)

    def run(
        self, demand: str, method: str, size: int, seed: int, lr: float, most: int = STEPS
    ) -> dict[str, Any]:
        """-> the record of a run, of at most so many steps: its looks, and test answers."""
        experiment, how = self.experiment, DEMANDS[demand]

        def is_done(metrics: Metrics) -> bool:
            return all_right(metrics) or metrics[-1]["step"] >= most

        def measure() -> dict[str, Any]:
            sizes = {"train": 4000 if how.n_keys > 36 else 1000, "validation": 100, "test": 300}
            examples = {
                split: examples_of(how, split, experiment.at_most or n, seed)
                for split, n in sizes.items()
            }
            run = experiment.prepared(
                examples, method, seed, experiment.base(seed), n_virtual=size, lr=lr,
                steps=STEPS, batch_size=BATCH, looks=STEPS // LOOK,
            )  # fmt: skip
            seen = looks_of(run, is_done)
            scores = evaluate(run.model, run.adapters, run.rows["test"], 50)
            solved = seen[-1]["exact_match"] == 100
            return {
                "steps": seen[-1]["step"], "solved": solved, "loss": seen[-1]["validation"],
                "test": scores.exact_match(), "trained": n_trainable(run.model, run.adapters),
                "curve": curve_of(seen)[:: 1 if solved else 10],  # of a long one, each tenth look
            }  # fmt: skip

        settings = {"demand": demand, "method": method, "size": size, "seed": seed, "lr": lr}
        return experiment.once(settings | {"most": most}, measure)

    def rate(self, demand: str, method: str, size: int) -> float:
        """-> the learning rate that is soonest on a run that is not reported.

        A rate ends where another one was done before. If none is done, the lowest loss counts.
        """
        soonest = STEPS_OF_SEARCH

        def lateness(lr: float) -> float:
            nonlocal soonest
            run = self.run(demand, method, size, UNREPORTED, lr, soonest)
            if not run["solved"]:
                return 1 + run["loss"]
            soonest = run["steps"]
            return run["steps"] / STEPS

        return best_rate(MIDDLES[method], lateness)

    def runs(self, demand: str, method: str, size: int) -> list[dict[str, Any]]:
        """-> the reported runs of a cell."""
        lr = self.rate(demand, method, size)
        return [self.run(demand, method, size, seed, lr) for seed in self.experiment.seeds]


def exposures(run: dict[str, Any]) -> float:
    """-> how often a run has seen each key when it ended."""
    return run["steps"] * BATCH / DEMANDS[run["demand"]].n_keys


def steps_in_words(run: dict[str, Any]) -> str:
    if not run["solved"]:
        return f"> {run['steps']:,}"
    return f"≤ {LOOK}" if run["steps"] == LOOK else f"{run['steps']:,}"


def cell_in_words(runs: list[dict[str, Any]]) -> str:
    """-> exposures a key until solved, median and range; what was not solved counts as more."""
    seen = sorted(runs, key=lambda run: (not run["solved"], run["steps"]))
    words = [f"{'' if run['solved'] else '> '}{exposures(run):.0f}" for run in seen]
    words = ["≤ " * (run["steps"] == LOOK) + word for run, word in zip(seen, words)]
    text = words[len(words) // 2] + (f" [{words[0]}–{words[-1]}]" if len(set(words)) > 1 else "")
    unsolved = [run["test"] for run in runs if not run["solved"]]
    if unsolved:
        text += f", {len(runs) - len(unsolved)} of {len(runs)} ({statistics.mean(unsolved):.0f} %)"
    return text


def draw_grid(grid: Grid, axis: Any) -> None:
    """A cell says how many runs were done, and when; the sooner, the lighter."""
    colours = []
    for y, (method, size) in enumerate(grid.sizes):
        colours.append([])
        for x, demand in enumerate(grid.demands):
            runs = grid.runs(demand, method, size)
            steps = statistics.median(run["steps"] if run["solved"] else STEPS for run in runs)
            colours[-1].append(-math.log(steps))
            middle = sorted(runs, key=lambda run: (not run["solved"], run["steps"]))[len(runs) // 2]
            solved = sum(run["solved"] for run in runs)
            text = f"{solved} of {len(runs)}\n{steps_in_words(middle)}"
            ink = "white" if steps > 3000 else "black"
            axis.text(x, y, text, ha="center", va="center", fontsize=13, color=ink)
    axis.imshow(colours, cmap="viridis", aspect="auto", vmin=-math.log(STEPS), vmax=-math.log(LOOK))
    names = [demand.replace("-", " ") for demand in grid.demands]
    axis.set_xticks(range(len(names)), names, fontsize=13)
    axis.set_yticks(range(len(grid.sizes)), [label(*pair) for pair in grid.sizes], fontsize=13)
    axis.set_title("runs that solved it, and after how many steps (median)", fontsize=14)


def own_flags(add: Any) -> None:
    names = " ".join(DEMANDS)
    help_text = f"columns to measure and report (default: {names})"
    add("--demands", nargs="+", choices=DEMANDS, default=list(DEMANDS), help=help_text)


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv, own_flags)
    grid = Grid(experiment)
    for demand in grid.demands:  # column by column, so that a part of the table is of use
        for method, size in grid.sizes:
            grid.runs(demand, method, size)
    rows = []
    for method, size in grid.sizes:
        cells = [grid.runs(demand, method, size) for demand in grid.demands]
        row = [label(method, size), f"{cells[0][0]['trained']:,}"]
        rows.append(row + list(map(cell_in_words, cells)))
    names = [demand.replace("-", " ") for demand in grid.demands]
    header = ["method", "numbers", *names]
    size = (2.3 * len(names) + 3, 4.5)
    experiment.report(header, rows, lambda axes: draw_grid(grid, axes[0][0]), 1, size)


if __name__ == "__main__":
    run_command(main)
