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
from functools import partial
from typing import Any, NamedTuple

from common import NAMES, Experiment, Run, how_soon, sooner_first

from command.console import run_command
from data import Example
from small_base.world import FORMS, VALUES, Record, split_of


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
    "fact-36": Demand("fact", 36),
    "route-432": Demand("route", 432),
    "xor-36": Demand("xor", 36),
}
MIDDLES = {"soft_prompt": 0.1, "prefix": 0.3, "both": 0.3, "lora": 0.0033, "full": 0.0015}
# Some 8,192 numbers each, but for the usual soft prompt and the whole
SIZES = [
    ("soft_prompt", 20), ("soft_prompt", 64), ("prefix", 8), ("both", 7), ("lora", 4), ("full", 0),
]  # fmt: skip
BATCH, STEPS, STEPS_OF_SEARCH, LOOK = 8, 12_000, 4_000, 50
Cells = dict[tuple[str, str, int], list[dict[str, Any]]]  # by column, method and size: its runs


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


def begin(
    experiment: Experiment, examples: dict[str, list[Example]], method: str, size: int, seed: int,
    lr: float, steps: int, base: str | None = None,
) -> Run:  # fmt: skip
    """-> a run on a base, by default that of its seed, before its first step."""
    base = base or experiment.base(seed)
    return experiment.prepared(examples, method, seed, base, size, lr, steps, BATCH, steps // LOOK)


def exposures(run: dict[str, Any]) -> float:
    """-> how often a run has seen each key when it ended."""
    return run["steps"] * BATCH / DEMANDS[run["demand"]].n_keys


def steps_in_words(run: dict[str, Any]) -> str:
    if not run["solved"]:
        return f"> {run['steps']:,}"
    return f"≤ {LOOK}" if run["steps"] == LOOK else f"{run['steps']:,}"


def cell_in_words(runs: list[dict[str, Any]]) -> str:
    """-> exposures a key until solved, median and range; what was not solved counts as more."""
    seen = sooner_first(runs)
    words = [f"{'' if run['solved'] else '> '}{exposures(run):.0f}" for run in seen]
    words = ["≤ " * (run["steps"] == LOOK) + word for run, word in zip(seen, words)]
    text = words[len(words) // 2] + (f" [{words[0]}–{words[-1]}]" if len(set(words)) > 1 else "")
    unsolved = [run["test"] for run in runs if not run["solved"]]
    if unsolved:
        text += f", {len(runs) - len(unsolved)} of {len(runs)} ({statistics.mean(unsolved):.0f} %)"
    return text


def draw_grid(cells: Cells, axes: Any) -> None:
    """A cell says how many runs were done, and when, or how much is right. Lighter is sooner."""
    axis = axes[0][0]
    columns = list(dict.fromkeys(column for column, *_ in cells))
    labels = list(dict.fromkeys(label(*row) for _, *row in cells))
    colours = [[0.0] * len(columns) for _ in labels]
    for (column, *row), runs in cells.items():
        x, y = columns.index(column), labels.index(label(*row))
        steps = statistics.median(run["steps"] if run["solved"] else STEPS for run in runs)
        colours[y][x] = -math.log(steps)
        solved = sum(run["solved"] for run in runs)
        middle = sooner_first(runs)[len(runs) // 2]
        right = f"{statistics.mean(run['test'] for run in runs):.0f} % right"
        when = steps_in_words(middle) if middle["solved"] else right
        text = f"{solved} of {len(runs)}\n{when}"
        ink = "white" if steps > 2000 else "black"
        axis.text(x, y, text, ha="center", va="center", fontsize=13, color=ink)
    axis.imshow(colours, cmap="viridis", aspect="auto", vmin=-math.log(STEPS), vmax=-math.log(LOOK))
    names = [column.replace("-", " ") for column in columns]
    axis.set_xticks(range(len(names)), names, fontsize=13)
    axis.set_yticks(range(len(labels)), labels, fontsize=13)
    axis.set_title("runs that solved it, and after how many steps (median)", fontsize=14)


def own_flags(add: Any) -> None:
    names = " ".join(DEMANDS)
    help_text = f"columns to measure and report (default: {names})"
    add("--demands", nargs="+", choices=DEMANDS, default=list(DEMANDS), help=help_text)


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv, own_flags)
    demands, sizes = experiment.grid(experiment.args.demands), experiment.grid(SIZES)

    def measure(
        demand: str, method: str, size: int, seed: int, lr: float, most: int
    ) -> dict[str, Any]:
        n = {"train": 4000 if DEMANDS[demand].n_keys > 36 else 1000, "validation": 100, "test": 300}
        examples = {split: examples_of(DEMANDS[demand], split, n[split], seed) for split in n}
        return how_soon(begin(experiment, examples, method, size, seed, lr, STEPS), most)

    cells: Cells = {}
    for demand in demands:  # column by column, so that a part of the table is of use
        for method, size in sizes:
            cell = {"demand": demand, "method": method, "size": size}
            runs = experiment.soonest(cell, measure, MIDDLES[method], STEPS, STEPS_OF_SEARCH)
            cells[demand, method, size] = runs
    rows = []
    for method, size in sizes:
        row = [cells[demand, method, size] for demand in demands]
        trained = f"{row[0][0]['trained']:,}"
        rows.append([label(method, size), trained, *map(cell_in_words, row)])
    header = ["method", "numbers", *(demand.replace("-", " ") for demand in demands)]
    inches = (2.3 * len(demands) + 3, 4.5)
    experiment.report(header, rows, partial(draw_grid, cells), 1, inches)


if __name__ == "__main__":
    run_command(main)
