"""7. Does the start decide?

    python classroom/exp7_start.py                                   some 15 minutes of one core
    python classroom/exp7_start.py --methods prefix soft_prompt      twice as long

Where does a prefix of 8 start: as a text, the end of a training example, as words of the task,
drawn, as random numbers of standard deviation 0.02, or of 1, which is PEFT's default, or as zeros?
All learn what experiment 2 has its prefixes learn, for as long, at one length. Each start has a
learning rate of its own, chosen as there.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import NAMES, Experiment, Run, spread
from exp2_keys_and_values import P, begun, draw_bars, how_soon, in_words, reported

from command.console import run_command
from command.models import ADAPTERS_OF, new_adapters

DEVIATIONS = {"random, 0.02": 0.02, "random, 1": 1.0, "zero": 0.0}


def started(run: Run, method: str, start: str, seed: int) -> Run:
    """A run that starts as a text -> one with another start."""
    if start == "words":
        own = ADAPTERS_OF[method], run.model, None, run.rows["train"], P, "vocab"
        return run._replace(adapters=new_adapters(*own, seed=seed))
    if start in DEVIATIONS:
        (numbers,) = run.adapters[0].parameters()
        noise = torch.randn(numbers.shape, generator=torch.Generator().manual_seed(seed))
        numbers.data = DEVIATIONS[start] * noise.to(numbers.device)
    return run


def own_flags(add: Callable) -> None:
    add("--methods", nargs="+", default=["prefix"], choices=ADAPTERS_OF, help="(default: prefix)")


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv, own_flags)

    def measure(method: str, start: str, seed: int, lr: float, most: int) -> dict[str, Any]:
        return how_soon(started(begun(experiment, method, seed, lr), method, start, seed), most)

    rows, panels = [], {}
    for method in experiment.args.methods:
        for start in experiment.grid(["text", "words", *DEVIATIONS]):
            runs = reported(experiment, measure, {"method": method, "start": start})
            panels.setdefault(NAMES[method], {})[start] = [run["steps"] for run in runs]
            befores = spread([run["curve"][0][1] for run in runs], 2)
            rows.append([f"{NAMES[method]} of {P}", start, befores, *in_words(runs)])

    def draw(axes: Any) -> None:
        for axis, (name, bars) in zip(axes[0], panels.items()):
            draw_bars(axis, bars, f"{name}: steps until all is right")

    header = ["method", "start", "loss before training", "learning rate", "steps", "exact match %"]
    experiment.report(header, rows, draw, len(panels))


if __name__ == "__main__":
    run_command(main)
