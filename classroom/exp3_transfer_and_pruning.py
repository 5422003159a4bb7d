"""3. Does an adapter fit another base, and which of its tokens does it need?

    python classroom/exp3_transfer_and_pruning.py

A prefix and a soft prompt of 8 are trained for the task chat on one small base. Then they are used
on two others, which differ only by the seed of their pretraining. Three bases take turns. And on
their own base their tokens are taken out one by one, each time the one that is missed least. Nothing is trained again.
Beside them stands an adapter that was trained with two tokens from the start.
"""

from functools import partial
from typing import Any

import torch
from common import NAMES, Experiment, band, colour, spread
from torch import nn

from command.console import run_command
from data import encode
from small_base.world import task_examples
from train import evaluate

METHODS = ("prefix", "soft_prompt")
BASES = (0, 1, 2)  # their seeds
LEFT = (8, 6, 4, 3, 2, 1)
NATS = (0.001, 0.01, 0.1, 1)  # of the figure's axis


def pruned(model: nn.Module, adapter: nn.Module, rows: list) -> dict[int, float]:
    """-> the validation loss with so many virtual tokens left, from all down to one."""
    (numbers,) = (parameter.detach() for parameter in adapter.parameters())
    losses = {len(numbers): evaluate(model, [adapter], rows, 50).loss}
    while len(numbers) > 1:
        without = [torch.cat([numbers[:i], numbers[i + 1 :]]) for i in range(len(numbers))]
        tried = [evaluate(model, [type(adapter)(some)], rows, 50).loss for some in without]
        numbers = without[tried.index(min(tried))]
        losses[len(numbers)] = min(tried)
    return losses


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    left = experiment.grid(list(LEFT))

    def measure(method: str, seed: int) -> dict[str, Any]:
        run = experiment.tuned("chat", method, seed, n_virtual=8)
        record = {"loss": run.loss, "exact": run.exact, "others": []}
        for base in [base for base in BASES if base != seed]:
            tokenizer, other = experiment.load(experiment.base(base))
            examples = task_examples("chat", "validation", 200, seed)
            rows = encode(tokenizer, examples)[: experiment.at_most]
            frozen = evaluate(other, [], rows, 50)
            scores = evaluate(other, run.adapters, rows, 50)
            losses = {"frozen": frozen.loss, "loss": scores.loss}
            record["others"].append({"base": base} | losses | {"exact": scores.exact_match()})
        losses = pruned(run.model, run.adapters[0], run.rows["validation"][:50])
        record["pruned"] = [losses[n] for n in left]
        return record | {"trained": experiment.tuned("chat", method, seed, n_virtual=2).loss}

    runs = {method: [] for method in METHODS}
    for seed in experiment.seeds:
        for method in METHODS:
            settings = {"method": method, "seed": seed}
            runs[method].append(experiment.once(settings, partial(measure, method, seed)))

    rows = []
    for method, some in runs.items():
        others = [other for run in some for other in run["others"]]
        row = [spread([run["exact"] for run in some], 1), spread([run["loss"] for run in some], 4)]
        for key, digits in (("exact", 1), ("loss", 2), ("frozen", 2)):
            row.append(spread([other[key] for other in others], digits))
        columns = list(zip(*(run["pruned"] for run in some)))  # by the tokens that are left
        row += [spread(losses, 3) for losses in columns[1:]]
        rows.append([NAMES[method], *row, spread([run["trained"] for run in some], 4)])

    def draw(axes) -> None:
        axis = axes[0][0]
        for method, some in runs.items():
            name = NAMES[method]
            band(axis, left, list(zip(*(run["pruned"] for run in some))), f"{name}, of 8")
            trained = [run["trained"] for run in some]
            label = f"{name}, trained with 2"
            axis.plot([2] * len(some), trained, "x", markersize=9, label=label, color=colour(name))
        axis.set(xlabel="virtual tokens left", ylabel="loss, nats a token", yscale="log")
        axis.set(title="Two tokens trained beat two tokens left over")
        axis.set_xticks(left, left)
        axis.set_yticks(NATS, NATS)
        axis.minorticks_off()
        axis.invert_xaxis()

    header = ["method", "own base: exact match %", "loss"]
    header += ["other bases: exact match %", "loss there", "without it"]
    header += [*(f"loss with {n} left" for n in left[1:]), "trained with 2"]
    experiment.report(header, rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
