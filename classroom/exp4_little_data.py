"""4. Is a prefix better than full fine-tuning when examples are few?

    python classroom/exp4_little_data.py

Both methods on 10, 50, 100 and 500 examples of the task chat: three random subsets of each size, two seeds of order and start
for each, and always the same held-out examples. Both train for 150 steps at the learning rates that are best with 1000
examples.
"""

from common import Experiment, band, spread

from command.process import run_command
from small_base.world import task_examples

METHODS = {"prefix": "prefix", "full": "full fine-tuning"}


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    sizes = experiment.grid([10, 50, 100, 500])
    for size in sizes:
        for subset in experiment.seeds:
            examples = {"train": task_examples("chat", "train", size, subset)}
            examples["validation"] = task_examples("chat", "validation", 200, 0)
            for method in METHODS:
                for seed in range(1 if experiment.args.quick else 2):
                    run = experiment.tuned("chat", method, seed, examples=examples)
                    found = {"size": size, "subset": subset, "seed": seed, "method": method}
                    experiment.runs.append(found | {"loss": run.loss, "exact": run.exact})

    rows = []
    for size in sizes:
        row = [str(size)]
        for method in METHODS:
            row += [spread(experiment.measured(key, size=size, method=method), n) for key, n in (("loss", 3), ("exact", 1))]
        rows.append(row)

    def draw(axes) -> None:
        for axis, (key, label) in zip(axes[0], [("loss", "validation loss, nats per token"), ("exact", "exact match, %")]):
            for method, name in METHODS.items():
                band(axis, sizes, [experiment.measured(key, size=size, method=method) for size in sizes], name)
            axis.set(xlabel="training examples", ylabel=label, xscale="log", yscale="log" if key == "loss" else "linear")
            axis.set_xticks(sizes, sizes)

    header = ["examples", *(f"{name}: {what}" for name in METHODS.values() for what in ("loss", "exact match %"))]
    experiment.report(header, rows, draw, 2)


if __name__ == "__main__":
    run_command(main)
