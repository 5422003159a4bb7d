"""7. Does the start decide?

    python classroom/exp7_start.py     some 15 minutes of one core

Where does a prefix of 8 start: as a text, the end of a training example, as words of the task,
drawn, as random numbers of standard deviation 0.02, or of 1, which is PEFT's default, or as zeros?
All learn what experiment 2 has its prefixes learn, for as long. Each start has a learning rate of
its own, chosen as there.
"""

from typing import Any

import torch
from common import Experiment, Run, how_soon, spread
from exp2_keys_and_values import STEPS, begin_route, draw_bars, in_words

from command.console import run_command
from command.models import ADAPTERS_OF, new_adapters

DEVIATIONS = {"random, 0.02": 0.02, "random, 1": 1.0, "zero": 0.0}


def started(run: Run, start: str, seed: int) -> Run:
    """A run whose prefix starts as a text -> one with another start, of the same length."""
    if start == "text":
        return run
    numbers, generator = run.adapters[0].start, torch.Generator().manual_seed(seed)
    if start == "words":
        own = ADAPTERS_OF["prefix"], run.model, None, run.rows["train"], len(numbers), "vocab"
        return run._replace(adapters=new_adapters(*own, seed=seed))
    noise = torch.randn(numbers.shape, generator=generator).to(numbers.device)
    numbers.data = DEVIATIONS[start] * noise
    return run


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)

    def measure(start: str, seed: int, lr: float, most: int) -> dict[str, Any]:
        run = begin_route(experiment, seed, lr)
        return how_soon(started(run, start, seed), most)

    rows, bars = [], {}
    for start in experiment.grid(["text", "words", *DEVIATIONS]):
        runs = experiment.soonest({"start": start}, measure, 0.3, STEPS, STEPS)
        bars[start] = [run["steps"] for run in runs]
        before = spread([run["curve"][0][1] for run in runs], 2)
        rows.append([start, before, *in_words(runs)])

    def draw(axes: Any) -> None:
        draw_bars(axes[0][0], bars, "steps until all answers are right")

    header = ["start", "loss before training", "learning rate", "steps", "exact match %"]
    experiment.report(header, rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
