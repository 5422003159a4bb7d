"""2. How many bits does a trained number hold?

    python classroom/exp2_capacity.py

How long a random text can an adapter make the frozen base write, to the last token? The ids are drawn from the whole
vocabulary, so nothing in the base helps, and each costs log2(V) bits. The text is doubled until it fails on one of the seeds,
at three learning rates. (Kuratov et al. 2025, arXiv 2502.13063, ask it of a single input vector of large models.)
"""

import math
import random
from typing import Any

import torch
from common import NAMES, RECIPES, Experiment, Run, colour, fit

from command.process import run_command
from data import Row
from train import Plan

SIZES = [("soft_prompt", 1), ("prefix", 1), ("soft_prompt", 8)]
LENGTHS, RATES, STEPS = (1, 2, 4, 8, 16, 32, 64), {"soft_prompt": (0.03, 0.1, 0.3), "prefix": (0.1, 0.3, 1.0)}, 1000


def written(experiment: Experiment, method: str, P: int, length: int, seed: int) -> bool:
    """-> whether the adapter can make the base write the random text of a length and a seed."""
    tokenizer, model = experiment.load()
    rng = random.Random(seed)
    text = [rng.randrange(tokenizer.eot_token) for _ in range(length)]
    rows = {split: [Row(tokenizer.encode_ordinary("\n"), text)] for split in ("train", "validation")}

    def measure(lr: float) -> dict[str, Any]:
        (kind,) = RECIPES[method].adapters
        adapter = kind.random(model, P, torch.Generator().manual_seed(seed))
        curve, exact = fit(Run(model, [adapter], rows, Plan(experiment.steps(STEPS), lr, 1, seed, 50, 50)))
        bits = length * math.log2(tokenizer.eot_token)
        return {"numbers": adapter.n_stored(), "bits": bits, "steps": curve[-1][0], "loss": curve[-1][1], "exact": exact == 100}

    settings = {"method": method, "size": P, "length": length, "seed": seed}
    return any(experiment.once(settings | {"lr": lr}, lambda lr=lr: measure(lr))["exact"] for lr in RATES[method])


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
        bars[name := f"{NAMES[method]} of {P}"] = bits / run["numbers"]
        rows.append([name, f"{run['numbers']:,}", str(longest), f"{bits:.0f}", f"{bits / run['numbers']:.2g}"])

    def draw(axes) -> None:
        axes[0][0].bar(list(bars), list(bars.values()), color=list(map(colour, bars)))
        axes[0][0].set(ylabel="bits a trained number", title="the longest random text written exactly")

    experiment.report(["method", "numbers", "tokens, at least", "bits", "bits a number"], rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
