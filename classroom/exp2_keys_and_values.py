"""2. Does a prefix learn in its keys or in its values? And who is the sink?

    python classroom/exp2_keys_and_values.py     some 15 minutes of one core

A prefix of 8 starts as a text, the end of a training example. It is to learn route-36 of experiment
1. All of it is trained, or its values, or its keys, or all but its first token, PEFT's default for
Cartridges. A run ends when all validation answers are right, or after 1,000 steps of 8 rows. Three
runs differ in base, data and start. Each cell has the learning rate that is soonest on a fourth.

A sink is a token that gets attention whatever it says, often the first. What share do the text's
first token and the virtual ones get, from the positions that write the answer? SmolLM2 is asked as
well, behind prefixes that start as a text or as noise.
"""

from functools import partial
from statistics import median
from typing import Any

import torch
from common import Experiment, Run, attention, how_soon, sooner_first, spread
from exp1_demand import DEMANDS, begin, examples_of, steps_in_words

from command.console import run_command
from data import IGNORE, batch_of
from prefix import Prefix

P, STEPS = 8, 1000
SMOLLM2 = "out/smollm2"  # made by smollm2.py
KEYS, VALUES = ((slice(None), slice(None), half) for half in (0, 1))  # of (P, L, 2, H, D)
FROZEN = {"all": slice(0), "values": KEYS, "keys": VALUES, "all but the first token": 0}
SHARES = (
    "even share %", "text's first token, no prefix %", "text's first token %",
    "first virtual token %", "other virtual tokens %",
)  # fmt: skip


def begin_route(experiment: Experiment, seed: int, lr: float = 0.3, base: str | None = None) -> Run:
    """-> a run of route-36, before its first step."""
    demand, sizes = DEMANDS["route-36"], {"train": 1000, "validation": 100, "test": 300}
    examples = {split: examples_of(demand, split, n, seed) for split, n in sizes.items()}
    return begin(experiment, examples, "prefix", P, seed, lr, STEPS, base)


def in_words(runs: list[dict[str, Any]]) -> list[str]:
    """-> their learning rate, steps until solved, median and range, and exact match."""
    words = list(map(steps_in_words, sooner_first(runs)))
    steps = f"{words[len(words) // 2]} [{words[0]}–{words[-1]}]"
    return [f"{runs[0]['lr']:g}", steps, spread([run["test"] for run in runs], 1)]


def freeze(prefix: Prefix, part: str) -> int:
    """Lets only a part of the prefix be trained -> how many numbers that are."""
    mask = torch.ones_like(prefix.start)
    mask[FROZEN[part]] = 0
    prefix.start.register_hook(lambda gradient: gradient * mask)
    return int(mask.sum())


@torch.no_grad()
def attention_of(run: Run) -> dict[str, float]:
    """-> SHARES of the attention, a mean of layers, heads, and the places that predict a target."""
    model, batch = run.model, batch_of(run.rows["test"][:20], run.model.device)
    scored = batch.targets != IGNORE  # (B, T)
    alone, behind = (
        100 * attention(model, batch.idx, past_kv).mean(dim=(0, 2))[scored].mean(dim=0)  # (S,)
        for past_kv in (None, run.adapters[0].past_kv(model))
    )
    even = 100 / (scored.nonzero()[:, 1] + 1)  # without a prefix: a place and those before it
    shares = (even.mean(), alone[0], behind[P], behind[0], behind[1:P].sum())
    return {name: round(share.item(), 2) for name, share in zip(SHARES, shares)}


def draw_bars(axis: Any, bars: dict[str, list[float]], title: str) -> None:
    """A bar is a median, a dot is a run."""
    axis.barh(list(bars), list(map(median, bars.values())))
    for y, values in enumerate(bars.values()):
        axis.plot(values, [y] * len(values), "ko")
    axis.tick_params(labelsize=13)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=14)


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)

    def measure(part: str, seed: int, lr: float, most: int) -> dict[str, Any]:
        run = begin_route(experiment, seed, lr)
        n_trained = freeze(run.adapters[0], part)
        return how_soon(run, most) | {"trained": n_trained} | attention_of(run)

    def untrained(start: str, seed: int) -> dict[str, Any]:
        run = begin_route(experiment, seed, base=SMOLLM2)
        if start == "noise":
            generator = torch.Generator().manual_seed(seed)
            run = run._replace(adapters=[Prefix.random(run.model, P, generator)])
        return attention_of(run)

    rows, steps, sink = [], {}, {}
    for part in experiment.grid(list(FROZEN)):
        runs = experiment.soonest({"part": part}, measure, 0.3, STEPS, STEPS)
        steps[part] = [run["steps"] for run in runs]
        row = ["small base", part, f"{runs[0]['trained']:,}", *in_words(runs)]
        rows.append(row + [spread([run[share] for run in runs], 1) for share in SHARES])
    for start in () if experiment.args.quick else ("text", "noise"):
        runs = []
        for seed in experiment.seeds:
            own = {"start": start, "seed": seed}
            runs.append(experiment.once({"base": SMOLLM2} | own, partial(untrained, **own)))
        shares = [[run[share] for run in runs] for share in SHARES]
        sink |= {"text, no prefix": shares[1], f"text behind {start}": shares[2]}
        sink[f"prefix from {start}"] = shares[3]
        cells = [spread(some, 1) for some in shares]
        rows.append(["SmolLM2", f"nothing, {start}", *"––––", *cells])

    def draw(axes: Any) -> None:
        axes[0][0].figure.set_size_inches(12, 4)
        draw_bars(axes[0][0], steps, "steps until right, by what is trained")
        draw_bars(axes[0][1], sink, "first token: % of SmolLM2's attention")

    header = ["base", "trained", "numbers", "learning rate", "steps", "exact match %", *SHARES]
    experiment.report(header, rows, draw, 2)


if __name__ == "__main__":
    run_command(main)
