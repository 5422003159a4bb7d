"""3. Can the strength of an adapter be turned like a dial?

    python classroom/exp3_dial.py                         some five minutes of one core

Each adapter is trained for one form, 100 steps of 8 rows. Then it is scaled: 0 is off, 1 is as
trained. *Values*: a prefix keeps its keys, and its values are multiplied. *Way*: all numbers move
on the straight line from where they started, a text of the task, to where training brought them.
The share is the probability that an answer begins in the wanted form. *Steps up* is its largest
change between neighbouring scales, from 0 to 1: a coarse dial jumps. *Falls* is the largest change
in the wrong direction. The learning rate of a cell has the lowest loss on a fourth base.
"""

import copy
import itertools
from typing import Any

import torch
from common import UNREPORTED, Experiment, band, best_rate, looks_of, spread
from exp1_demand import MIDDLES, label
from torch import nn

from command.console import run_command
from command.examples import load_examples
from data import Row, batch_of
from model import Decoder, stacked_past_kv
from prefix import Prefix
from train import evaluate

TASKS = ["reply", "chat"]  # the base itself gives the first in a third of cases, the other never
SIZES = [("prefix", 8), ("soft_prompt", 64)]  # 8,192 numbers each
SCALES = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
BATCH, STEPS = 8, 100


def scaled(adapter: nn.Module, start: nn.Module, what: str, scale: float) -> nn.Module:
    """-> the adapter with its values, or its way from the start, times a scale."""
    (trained,), (begin,) = adapter.parameters(), start.parameters()
    if what == "values":  # (P, L, 2, H, D): keys stay
        factors = torch.tensor([1.0, scale], device=trained.device)
        return Prefix(trained.detach() * factors[:, None, None])
    return type(adapter)((begin + scale * (trained - begin)).detach())


@torch.no_grad()
def share(model: Decoder, adapters: list[nn.Module], rows: list[Row]) -> float:
    """-> the probability of the target's first token, in percent: each form has its own."""
    batch, past_kv = batch_of(rows, model.device), stacked_past_kv(adapters, model)
    hidden, _ = model.forward_embeddings(model.wte(batch.idx), past_kv)  # (B, T, C)
    ends = [len(row.source) - 1 for row in rows]
    chances = (hidden[range(len(rows)), ends] @ model.head.T).softmax(dim=-1)  # (B, V)
    return 100 * chances[range(len(rows)), [row.target[0] for row in rows]].mean().item()


def steps_of(shares: list[float]) -> list[float]:
    """-> the changes of the share between neighbouring scales, from 0 to 1."""
    return [b - a for a, b in itertools.pairwise(shares[: SCALES.index(1) + 1])]


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)

    def run(task: str, method: str, size: int, seed: int, lr: float) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            examples, base = load_examples(task, None, None, seed), experiment.base(seed)
            own = {"n_virtual": size, "lr": lr, "steps": STEPS, "batch_size": BATCH}
            run = experiment.prepared(examples, method, seed, base, **own)
            model, (adapter,), rows = run.model, run.adapters, run.rows["test"][:60]
            start, record = copy.deepcopy(adapter), {"loss": looks_of(run)[-1]["validation"]}
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
    for task in experiment.grid(TASKS):
        for pair in experiment.grid(SIZES):
            loss_at = lambda lr: run(task, *pair, UNREPORTED, lr)["loss"]  # noqa: B023, E731
            rate = best_rate(MIDDLES[pair[0]], loss_at)
            runs = [run(task, *pair, seed, rate) for seed in experiment.seeds]
            for what in [key for key in ("values", "way") if key in runs[0]]:
                cells[task, f"{label(*pair)}, {what}", what] = runs
    for (task, name, what), runs in cells.items():
        for kind, digits in (("share %", 0), ("exact %", 0), ("loss", 2)):
            key = what if kind == "share %" else f"{kind.split()[0]} by {what}"
            columns = zip(*(some[key] for some in runs))
            rows.append([task, name, kind, *(spread(column, digits) for column in columns)])
        changes = [steps_of(some[what]) for some in runs]
        ends = [spread(list(map(max, changes)), 0)]
        ends.append(spread([max(0, -min(some)) for some in changes], 1))
        rows[-3:] = [row + some for row, some in zip(rows[-3:], (ends, ["–"] * 2, ["–"] * 2))]

    def draw(axes: Any) -> None:
        for (task, name, what), runs in cells.items():
            if task == experiment.grid(TASKS)[-1]:  # one of them is enough to see
                columns = list(zip(*(some[what] for some in runs)))
                band(axes[0][0], SCALES, columns, name, "o--" if what == "values" else "o-")
        axes[0][0].set_title(f"{task}: % of answers in the wanted form, by scale", fontsize=13)
        axes[0][0].tick_params(labelsize=13)

    header = ["task", "what is scaled", "", *(f"× {scale:g}" for scale in SCALES)]
    experiment.report([*header, "steps up", "falls"], rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
