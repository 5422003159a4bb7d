"""8. Between how many forms can one adapter switch by a word?

    python classroom/exp8_switch.py                       some twenty minutes of one core

The input is a review behind a code word: `as glad : I had Thai food at …`. The word says which form
the answer has, of N; which word means which is drawn at random. The base knows all words and forms.
Half of the forms follow a review in its documents, half never do. A run ends when all validation
answers are exact, at the latest after 2,400 steps of 8 rows. Three runs differ in base, data, code
and start. A cell's learning rate is the soonest on a fourth base, or has the lowest loss there
after 800 steps; that run is not reported.
"""

import random
import statistics
from typing import Any

from common import Experiment, all_right, curve_of, looks_of, n_trainable, spread
from exp1_demand import Grid, draw_grid, label, steps_in_words

from command.console import run_command
from data import Example
from small_base.world import FORMS, random_record
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


class Switches(Grid):
    """A demand is now a number of forms. Rates and figure are those of experiment 1."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.sizes = experiment, experiment.grid(SIZES)
        self.demands = experiment.grid([f"{N}-forms" for N in experiment.args.forms])

    def run(
        self, demand: str, method: str, size: int, seed: int, lr: float, most: int = STEPS
    ) -> dict[str, Any]:
        """-> the record of a run of at most so many steps; a search ends sooner."""
        experiment, N = self.experiment, int(demand.split("-")[0])
        most = min(most, STEPS_OF_SEARCH if seed == UNREPORTED else STEPS)

        def measure() -> dict[str, Any]:
            sizes = {"train": 1000, "validation": 80, "test": 160}
            examples = {split: examples_of(N, split, n, seed) for split, n in sizes.items()}
            run = experiment.prepared(
                examples, method, seed, experiment.base(seed), n_virtual=size, lr=lr,
                steps=STEPS, batch_size=BATCH, looks=STEPS // LOOK,
            )  # fmt: skip
            seen = looks_of(run, lambda found: all_right(found) or found[-1]["step"] >= most)
            exact = evaluate(run.model, run.adapters, run.rows["test"], 50).exact
            return {
                "steps": seen[-1]["step"], "solved": seen[-1]["exact_match"] == 100,
                "loss": seen[-1]["validation"], "test": 100 * statistics.mean(exact),
                "by form": [round(100 * statistics.mean(exact[i::N]), 1) for i in range(N)],
                "trained": n_trainable(run.model, run.adapters), "curve": curve_of(seen),
            }  # fmt: skip

        settings = {"forms": N, "method": method, "size": size, "seed": seed, "lr": lr}
        return experiment.once(settings | {"most": most}, measure)


def own_flags(add: Any) -> None:
    help_text = "columns to measure and report (default: 2 4 8)"
    add("--forms", nargs="+", type=int, choices=COUNTS, default=COUNTS, help=help_text)


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv, own_flags)
    grid, cells = Switches(experiment), {}
    for demand in grid.demands:  # the easy ones first
        for pair in grid.sizes:
            runs = grid.runs(demand, *pair)
            words = f"{spread([run['test'] for run in runs], 1)} %, steps "
            words += ", ".join(map(steps_in_words, runs))  # by base, so that pairs can be compared
            cells.setdefault(pair, [label(*pair), f"{runs[0]['trained']:,}"]).append(words)

    def draw(axes: Any) -> None:
        draw_grid(grid, axes[0][0])
        axes[0][0].set_title("")
        axes[0][0].figure.suptitle("runs that can switch, after how many steps", fontsize=14)

    header = ["method", "numbers", *(demand.replace("-", " ") for demand in grid.demands)]
    experiment.report(header, list(cells.values()), draw, 1)


if __name__ == "__main__":
    run_command(main)
