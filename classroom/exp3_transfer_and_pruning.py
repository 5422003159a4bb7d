"""3. Does an adapter fit another base, and which of its tokens does it need?

    python classroom/exp3_transfer_and_pruning.py

A prefix and a soft prompt of 8, trained for the task chat on one small base, are used on two others, which differ by the seed
of their pretraining alone. And on their own base their tokens are taken out, one after the other, each time that one whose loss
is cheapest, with nothing trained again; beside it one that was trained with two from the start.
"""

from typing import Any

import torch
from common import NAMES, Experiment, band, colour, spread
from torch import nn

from command.process import run_command
from data import encode
from small_base.world import task_examples
from train import evaluate, share

METHODS, OTHERS, LEFT = ("prefix", "soft_prompt"), (1, 2), (8, 6, 4, 3, 2, 1)


def pruned(model: nn.Module, adapter: nn.Module, rows: list) -> dict[int, float]:
    """-> the validation loss with so many virtual tokens left, from all down to one."""
    (numbers,) = (parameter.detach() for parameter in adapter.parameters())
    losses = {len(numbers): evaluate(model, [adapter], rows, 50)[0]}
    while len(numbers) > 1:
        without = [torch.cat([numbers[:i], numbers[i + 1 :]]) for i in range(len(numbers))]
        tried = [evaluate(model, [type(adapter)(some)], rows, 50)[0] for some in without]
        numbers = without[tried.index(min(tried))]
        losses[len(numbers)] = min(tried)
    return losses


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    left = experiment.grid(list(LEFT))

    def measure(method: str, seed: int) -> dict[str, Any]:
        run = experiment.tuned("chat", method, seed, n_virtual=8)
        found = {"loss": run.loss, "exact": run.exact, "others": []}
        for base in OTHERS:
            tokenizer, other = experiment.load(experiment.base(base))
            rows = encode(tokenizer, task_examples("chat", "validation", 200, seed))[: experiment.at_most]
            (frozen, _), (loss, exact) = evaluate(other, [], rows, 50), evaluate(other, run.adapters, rows, 50)
            found["others"].append({"base": base, "frozen": frozen, "loss": loss, "exact": share(exact)})
        losses = pruned(run.model, run.adapters[0], run.rows["validation"][:50])
        found["pruned"] = [losses[n] for n in left]
        return found | {"trained": experiment.tuned("chat", method, seed, n_virtual=2).loss}

    runs = {method: [] for method in METHODS}
    for seed in experiment.seeds:
        for method in METHODS:
            runs[method].append(experiment.once({"method": method, "seed": seed}, lambda m=method, s=seed: measure(m, s)))

    rows = []
    for method, some in runs.items():
        others = [other for run in some for other in run["others"]]
        row = [spread([run["exact"] for run in some], 1), spread([run["loss"] for run in some], 4)]
        row += [spread([other[key] for other in others], n) for key, n in (("exact", 1), ("loss", 2), ("frozen", 2))]
        row += [spread(losses, 3) for losses in list(zip(*(run["pruned"] for run in some)))[1:]]
        rows.append([NAMES[method], *row, spread([run["trained"] for run in some], 4)])

    def draw(axes) -> None:
        for method, some in runs.items():
            name, trained = NAMES[method], [run["trained"] for run in some]
            band(axes[0][0], left, list(zip(*(run["pruned"] for run in some))), f"{name}, of 8")
            axes[0][0].plot([2] * len(some), trained, "x", label=f"{name}, trained with 2", color=colour(name))
        axes[0][0].set(xlabel="virtual tokens left", ylabel="validation loss, nats per token", yscale="log")

    header = ["method", "own base: exact match %", "loss", "other bases: exact match %", "loss there", "without it"]
    header += [*(f"loss with {n} left" for n in left[1:]), "trained with 2"]
    experiment.report(header, rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
