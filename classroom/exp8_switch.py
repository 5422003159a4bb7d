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
from typing import Any

from common import Experiment, how_soon, spread
from exp1_demand import MIDDLES, Cells, begin, draw_grid, label, steps_in_words

from command.console import run_command
from data import Example
from small_base.world import FORMS, random_record

KNOWN = ["sentence", "table", "advert", "verdict"]  # after a review, in the documents of the base
FOREIGN = ["casual", "polite", "chat", "terse"]  # only after other sources
WORDS = ["glad", "guest", "still", "ready", "asks", "come", "serve", "rated"]
COUNTS = [2, 4, 8]
SIZES = [("prefix", 8), ("soft_prompt", 64)]  # 8,192 numbers each
STEPS, STEPS_OF_SEARCH = 2_400, 800


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


def own_flags(add: Any) -> None:
    help_text = "columns to measure and report (default: 2 4 8)"
    add("--forms", nargs="+", type=int, choices=COUNTS, default=COUNTS, help=help_text)


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv, own_flags)
    counts, sizes = experiment.grid(experiment.args.forms), experiment.grid(SIZES)

    def measure(forms: int, method: str, size: int, seed: int, lr: float, most: int) -> dict:
        n = {"train": 1000, "validation": 80, "test": 160}
        examples = {split: examples_of(forms, split, n[split], seed) for split in n}
        return how_soon(begin(experiment, examples, method, size, seed, lr, STEPS), most)

    cells: Cells = {}
    for N in counts:  # the easy ones first
        for method, size in sizes:
            cell = {"forms": N, "method": method, "size": size}
            runs = experiment.soonest(cell, measure, MIDDLES[method], STEPS, STEPS_OF_SEARCH)
            cells[f"{N} forms", method, size] = runs
    columns = [f"{N} forms" for N in counts]
    rows = []
    for method, size in sizes:
        row = [cells[column, method, size] for column in columns]
        words = [
            f"{spread([run['test'] for run in runs], 1)} %, steps "
            + ", ".join(map(steps_in_words, runs))  # by base, so that pairs can be compared
            for runs in row
        ]
        rows.append([label(method, size), f"{row[0][0]['trained']:,}", *words])

    def draw(axes: Any) -> None:
        draw_grid(cells, axes)
        axes[0][0].set_title("")
        axes[0][0].figure.suptitle("runs that can switch, after how many steps", fontsize=14)

    experiment.report(["method", "numbers", *columns], rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
