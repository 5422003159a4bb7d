"""8. Between how many forms can one adapter switch by a word?

    python classroom/exp8_switch.py                       about half an hour of one core

The input is a review behind a code word: `as glad : I had Thai food at the …`. The word says which
of N forms the answer is to have. The base knows all forms and all words. It never saw that a word
says anything, and which word means which form is drawn at random. Half of the forms follow a review
in the base's own documents, the other half never do.

A run ends when all validation answers are exact, at the latest after 2,400 steps of 8 rows. Three
runs differ in base, data, code and start. The learning rate of each cell is the one that is soonest
on a fourth base, or has the lowest loss after 800 steps; that run is not reported.
"""

import random
import statistics
from typing import Any

from common import Experiment, all_right, best_rate, colour, curve_of, looks_of, n_trainable
from common import spread
from exp1_demand import MIDDLES, label

from command.console import run_command
from data import Example
from small_base.world import FORMS, random_record
from storage.checkpoints import Metrics
from train import evaluate

KNOWN = ["sentence", "table", "advert", "verdict"]  # after a review, in the documents of the base
FOREIGN = ["casual", "polite", "chat", "terse"]  # only after other sources
WORDS = ["glad", "guest", "still", "ready", "asks", "come", "serve", "rated"]
COUNTS = [2, 4, 8]
SIZES = [("prefix", 8), ("soft_prompt", 64)]  # 8,192 numbers each
BATCH, STEPS, STEPS_OF_SEARCH, LOOK, UNREPORTED = 8, 2_400, 800, 50, 100


def examples_of(N: int, split: str, n: int, seed: int) -> list[Example]:
    """-> n examples with N forms, half of each kind; the seed decides the code and the records."""
    rng, forms = random.Random(f"{split} {seed}"), KNOWN[: N // 2] + FOREIGN[: N // 2]
    words = random.Random(f"code {seed}").sample(WORDS, N)
    examples = []
    for i in range(n):
        record, which = random_record(rng, split), i % N  # each form as often
        source = f"as {words[which]} : {FORMS['review'](record)}"
        examples.append(Example(source, FORMS[forms[which]](record)))
    return examples


class Switches:
    """The runs of the table, each stored as it ends."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.counts = experiment, experiment.grid(COUNTS)
        self.sizes = experiment.grid(SIZES)

    def run(
        self, N: int, method: str, size: int, seed: int, lr: float, most: int = STEPS
    ) -> dict[str, Any]:
        """-> the record of a run of at most so many steps."""
        experiment = self.experiment

        def is_done(metrics: Metrics) -> bool:
            return all_right(metrics) or metrics[-1]["step"] >= most

        def measure() -> dict[str, Any]:
            sizes = {"train": 1000, "validation": 80, "test": 160}
            examples = {split: examples_of(N, split, n, seed) for split, n in sizes.items()}
            run = experiment.prepared(
                examples, method, seed, experiment.base(seed), n_virtual=size, lr=lr,
                steps=STEPS, batch_size=BATCH, looks=STEPS // LOOK,
            )  # fmt: skip
            seen = looks_of(run, is_done)
            exact = evaluate(run.model, run.adapters, run.rows["test"], 50).exact
            by_form = [round(100 * statistics.mean(exact[i::N]), 1) for i in range(N)]
            return {
                "steps": seen[-1]["step"], "solved": seen[-1]["exact_match"] == 100,
                "loss": seen[-1]["validation"], "test": 100 * statistics.mean(exact),
                "by form": by_form, "trained": n_trainable(run.model, run.adapters),
                "curve": curve_of(seen),
            }  # fmt: skip

        settings = {"forms": N, "method": method, "size": size, "seed": seed, "lr": lr}
        return experiment.once(settings | {"most": most}, measure)

    def rate(self, N: int, method: str, size: int) -> float:
        """-> the learning rate that is soonest, or lowest where none is done, on a spare run."""
        soonest = STEPS_OF_SEARCH

        def lateness(lr: float) -> float:
            nonlocal soonest
            run = self.run(N, method, size, UNREPORTED, lr, soonest)
            soonest = run["steps"] if run["solved"] else soonest
            return run["steps"] / STEPS if run["solved"] else 1 + run["loss"]

        return best_rate(MIDDLES[method], lateness)

    def runs(self, N: int, method: str, size: int) -> list[dict[str, Any]]:
        """-> the reported runs of a cell."""
        lr = self.rate(N, method, size)
        return [self.run(N, method, size, seed, lr) for seed in self.experiment.seeds]


def cell_in_words(runs: list[dict[str, Any]]) -> str:
    solved = [run["steps"] for run in runs if run["solved"]]
    text = f"{spread([run['test'] for run in runs], 1)} %, {len(solved)} of {len(runs)}"
    return text + (f", {spread(solved, 0)} steps" if solved else "")


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    switches = Switches(experiment)
    cells, rows = {pair: [] for pair in switches.sizes}, []
    for N in switches.counts:
        for pair in switches.sizes:
            cells[pair].append(switches.runs(N, *pair))
    for pair, columns in cells.items():
        numbers = f"{columns[0][0]['trained']:,}"
        rows.append([label(*pair), numbers, *map(cell_in_words, columns)])

    def draw(axes: Any) -> None:
        for (pair, columns), style in zip(cells.items(), ("o-", "s-")):
            name, axis = label(*pair), axes[0][0]
            middles = [statistics.median(run["steps"] for run in runs) for runs in columns]
            axis.plot(switches.counts, middles, style, label=name, color=colour(name))

    header = ["method", "numbers", *(f"{N} forms" for N in switches.counts)]
    experiment.report(header, rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
