"""2. How long should a prefix be?

    python classroom/exp2_length.py

A prefix of 1, 2, 4 … 64 virtual tokens on the task chat, trained on 1000 examples and on 20: the loss on these,
and on others. A longer prefix can only fit more; whether it should is what the second line says.
"""

from common import Experiment, band, spread

from command.process import run_command
from small_base.world import task_examples
from train import evaluate


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    lengths, sizes = experiment.grid([1, 2, 4, 8, 16, 32, 64]), [1000, 20]
    for size in sizes:
        for P in lengths:
            for seed in experiment.seeds:
                examples = {"train": task_examples("chat", "train", size, seed)}
                examples["validation"] = task_examples("chat", "validation", 200, 0)
                run = experiment.tuned("chat", "prefix", seed, n_virtual=P, examples=examples)
                fitted, _ = evaluate(run.model, run.adapters, run.rows["train"][:200], 50)
                found = {"size": size, "length": P, "seed": seed, "fitted": fitted, "loss": run.loss}
                experiment.runs.append(found | {"numbers": run.adapters[0].n_stored()})

    rows = [[str(P), f"{experiment.measured('numbers', length=P)[0]:,}"] for P in lengths]
    for row, P in zip(rows, lengths):
        row += [spread(experiment.measured(key, length=P, size=size), 4) for size in sizes for key in ("fitted", "loss")]

    def draw(axes) -> None:
        for axis, n in zip(axes[0], sizes):
            for key, name in [("fitted", "trained on"), ("loss", "validation")]:
                band(axis, lengths, [experiment.measured(key, length=P, size=n) for P in lengths], name)
            axis.set(title=f"{n} examples", xlabel="virtual tokens", ylabel="loss, nats per token", xscale="log", yscale="log")
            axis.set_xticks(lengths, lengths)

    header = ["virtual tokens", "numbers"]
    header += [f"{name}, {size} examples" for size in sizes for name in ("training loss", "validation loss")]
    experiment.report(header, rows, draw, 2)


if __name__ == "__main__":
    run_command(main)
