"""1. Where should training start, and at which learning rate?

    python classroom/exp1_initialisation.py

A prefix and a soft prompt, each from a real text, from random words, from random numbers and from zeros, at four rates, for 100
steps on the task chat. For the prefix also: how many different directions do its rows end up with? Rows that start equal
get equal gradients.
"""

from common import Experiment, band, spread
from inspect_adapter import effective_rank

from command.flags import STARTS
from command.process import run_command

METHODS = {"prefix": "prefix", "soft_prompt": "soft prompt"}


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    starts, rates = experiment.grid(STARTS), experiment.grid([0.03, 0.1, 0.3, 1.0])
    rows = []
    for method, name in METHODS.items():
        for init in starts:
            for lr in rates:
                for seed in experiment.seeds:
                    run = experiment.tuned("chat", method, seed, init=init, lr=lr, steps=100)
                    found = {"method": method, "init": init, "lr": lr, "seed": seed, "start": run.start, "loss": run.loss}
                    (parameter,) = run.adapters[0].parameters()
                    experiment.runs.append(found | {"rank": effective_rank(parameter.detach().flatten(1))})
            cells = [spread(experiment.measured("loss", method=method, init=init, lr=lr), 3) for lr in rates]
            start = spread(experiment.measured("start", method=method, init=init, lr=rates[0]), 2)
            ranks = [run["rank"] for run in experiment.runs if (run["method"], run["init"]) == (method, init)]
            rows.append([name, init, start, *cells, f"{min(ranks):.1f}–{max(ranks):.1f}"])

    def draw(axes) -> None:
        for axis, (method, name) in zip(axes[0], METHODS.items()):
            for init in starts:
                band(axis, rates, [experiment.measured("loss", method=method, init=init, lr=lr) for lr in rates], init)
            axis.set(title=name, xlabel="learning rate", ylabel="validation loss, nats per token", xscale="log", yscale="log")

    header = ["method", "start", "loss at step 0", *(f"lr {lr:g}" for lr in rates), "effective rank after training"]
    experiment.report(header, rows, draw, 2)


if __name__ == "__main__":
    run_command(main)
