"""9. Can the strength of an adapter be turned like a dial?

    python classroom/exp9_dial.py                         some five minutes of one core

Each adapter is trained for one form, 100 steps of 8 rows. Then it is scaled: 0 is off, 1 is as
trained. Two things can be scaled. *Values*: a prefix keeps its keys, and its values are multiplied.
*Way*: all numbers move on the straight line from where they started, a text of the task, to where
training brought them. Of a soft prompt only the way makes sense.

The share is the probability that an answer begins in the wanted form: of so many sampled answers
each would. *Steps up* is the largest change between neighbouring scales, from 0 to 1: a coarse dial
jumps. *Falls* is the largest change in the wrong direction. The learning rate of each cell is the
one with the lowest loss on a fourth base, which is not reported.
"""

import copy
import itertools
import statistics
from typing import Any

import torch
from common import Experiment, best_rate, colour, looks_of, spread
from exp1_demand import MIDDLES, label
from torch import Tensor, nn

from command.console import run_command
from command.models import load_examples
from data import Row
from model import Decoder, stacked_past_kv
from prefix import Prefix
from soft_prompt import SoftPrompt
from train import evaluate

TASKS = ["reply", "chat"]  # the base itself gives the first in a third of cases, the other never
SIZES = [("prefix", 8), ("soft_prompt", 64)]  # 8,192 numbers each
SCALES = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
BATCH, STEPS, UNREPORTED = 8, 100, 100


def scaled(adapter: nn.Module, start: nn.Module, what: str, scale: float) -> nn.Module:
    """-> the adapter with its values, or its way from the start, times a scale."""
    (trained,), (begin,) = adapter.parameters(), start.parameters()
    if what == "values":  # (P, L, 2, H, D): keys stay
        factors = torch.tensor([1.0, scale], device=trained.device)
        return Prefix(trained.detach() * factors[:, None, None])
    moved: Tensor = begin + scale * (trained.detach() - begin)
    return type(adapter)(moved.detach())


@torch.no_grad()
def share(model: Decoder, adapters: list[nn.Module], rows: list[Row]) -> float:
    """-> how often a sampled answer begins with the first token of the target, in percent.

    No two forms begin with the same token, so this is the share of the wanted form.
    """
    past_kv, shares = stacked_past_kv(adapters, model), []
    for row in rows:
        logits, _ = model(torch.tensor([row.source], device=model.device), past_kv)
        shares.append(logits[0, -1].softmax(dim=-1)[row.target[0]].item())
    return 100 * statistics.mean(shares)


def steps_of(shares: list[float]) -> list[float]:
    """-> the changes of the share between neighbouring scales, from 0 to 1."""
    upto = shares[: SCALES.index(1) + 1]
    return [after - before for before, after in itertools.pairwise(upto)]


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)

    def run(task: str, method: str, size: int, seed: int, lr: float) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            examples, base = load_examples(task, None, None, seed), experiment.base(seed)
            own = {"n_virtual": size, "lr": lr, "steps": STEPS, "batch_size": BATCH}
            run = experiment.prepared(examples, method, seed, base, **own)
            model, (adapter,), rows = run.model, run.adapters, run.rows["test"][:60]
            start = copy.deepcopy(adapter)
            record = {"loss": looks_of(run)[-1]["validation"]}
            if seed == UNREPORTED:  # only its loss is asked for
                return record
            record["base"] = share(model, [], rows)
            for what in ["values", "way"] if method == "prefix" else ["way"]:
                dial = [scaled(adapter, start, what, scale) for scale in SCALES]
                scores = [evaluate(model, [some], rows, 50) for some in dial]
                record[what] = [round(share(model, [some], rows), 2) for some in dial]
                record[f"exact by {what}"] = [score.exact_match() for score in scores]
                record[f"loss by {what}"] = [round(score.loss, 4) for score in scores]
            return record

        settings = {"task": task, "method": method, "size": size, "seed": seed, "lr": lr}
        return experiment.once(settings, measure)

    cells, rows = {}, []
    for method, size in experiment.grid(SIZES):
        for task in experiment.grid(TASKS):
            loss_at = lambda lr: run(task, method, size, UNREPORTED, lr)["loss"]  # noqa: B023, E731
            rate = best_rate(MIDDLES[method], loss_at)
            runs = [run(task, method, size, seed, rate) for seed in experiment.seeds]
            for what in [key for key in ("values", "way") if key in runs[0]]:
                cells[task, label(method, size), what] = runs
    for (task, name, what), runs in sorted(cells.items()):
        shares = [spread(column, 0) for column in zip(*(some[what] for some in runs))]
        exact = [spread(column, 0) for column in zip(*(some[f"exact by {what}"] for some in runs))]
        changes = [steps_of(some[what]) for some in runs]
        row = [task, name, what, *map(" / ".join, zip(shares, exact))]
        row.append(spread([max(some) for some in changes], 0))
        row.append(spread([max(0, -min(some)) for some in changes], 1))
        rows.append(row)

    def draw(axes: Any) -> None:
        for (task, name, what), runs in cells.items():
            axis = axes[0][TASKS.index(task)]
            means = [statistics.mean(column) for column in zip(*(some[what] for some in runs))]
            axis.plot(SCALES, means, "--" if what == "values" else "-", color=colour(name))

    header = ["task", "method", "scaled", *(f"× {scale:g}" for scale in SCALES)]
    experiment.report([*header, "steps up", "falls"], rows, draw, 2)


if __name__ == "__main__":
    run_command(main)
