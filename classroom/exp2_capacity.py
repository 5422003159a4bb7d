"""2. How many bits does a trained number hold?

    python classroom/exp2_capacity.py

How long a random text can an adapter make the frozen base write, to the last token? The ids are
drawn from the whole vocabulary. So nothing in the base helps, and each costs log2(V) bits. The text
is doubled until one of the seeds fails at all of three learning rates. Kuratov et al. 2025 (arXiv
2502.13063) ask it of a single input vector of large models.
"""

import math
import random
from functools import partial
from typing import Any

import torch
from common import NAMES, Experiment, Run, all_right, colour, looks_of, n_trainable

from command.console import run_command
from command.models import ADAPTERS_OF
from data import Row
from train import Plan

SIZES = [("soft_prompt", 1), ("prefix", 1), ("soft_prompt", 8)]
LENGTHS = (1, 2, 4, 8, 16, 32, 64)
RATES = {"soft_prompt": (0.03, 0.1, 0.3), "prefix": (0.1, 0.3, 1.0)}
STEPS = 1000


def written(experiment: Experiment, method: str, P: int, length: int, seed: int) -> bool:
    """-> whether the adapter can make the base write the random text of a length and a seed."""
    tokenizer, model = experiment.load()
    rng = random.Random(seed)
    text = [rng.randrange(tokenizer.eot_token) for _ in range(length)]
    row = Row(tokenizer.encode_ordinary("\n"), text)
    rows = {"train": [row], "validation": [row]}

    def measure(lr: float) -> dict[str, Any]:
        (kind,) = ADAPTERS_OF[method]
        adapter = kind.random(model, P, torch.Generator().manual_seed(seed))
        plan = Plan(experiment.steps(STEPS), lr, batch_size=1, seed=seed, eval_every=50)
        last = looks_of(Run(model, [adapter], rows, plan), all_right)[-1]
        bits = length * math.log2(tokenizer.eot_token)
        record = {"numbers": n_trainable(model, [adapter]), "bits": bits, "steps": last["step"]}
        return record | {"loss": last["validation"], "exact": last["exact_match"] == 100}

    for lr in RATES[method]:
        settings = {"method": method, "size": P, "length": length, "seed": seed, "lr": lr}
        if experiment.once(settings, partial(measure, lr))["exact"]:
            return True
    return False


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    rows, bars = [], {}
    for method, P in experiment.grid(SIZES):
        longest = 0
        for length in experiment.grid(list(LENGTHS)):
            if not all(written(experiment, method, P, length, seed) for seed in experiment.seeds):
                break
            longest = length
        run = next(run for run in experiment.runs if (run["method"], run["size"]) == (method, P))
        bits = longest * run["bits"] / run["length"]
        name, n = f"{NAMES[method]} of {P}", run["numbers"]
        bars[name] = bits / n
        rows.append([name, f"{n:,}", str(longest), f"{bits:.0f}", f"{bits / n:.2g}"])

    def draw(axes) -> None:
        axes[0][0].bar(list(bars), list(bars.values()), color=list(map(colour, bars)))
        axes[0][0].set(ylabel="bits a trained number")
        axes[0][0].set(title="the longest random text written exactly")

    header = ["method", "numbers", "tokens, at least", "bits", "bits a number"]
    experiment.report(header, rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
