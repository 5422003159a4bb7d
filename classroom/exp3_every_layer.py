"""3. Is it the reach into every layer, or only the number of numbers?

    python classroom/exp3_every_layer.py

A prefix learns keys and values in each layer; a soft prompt, Li & Liang's "embedding-only", learns inputs. On the small base a
prefix of P tokens has as many numbers as a soft prompt of 2·L·P = 8 P tokens, so the two can be compared at equal numbers. (The
soft prompt pays for it: 64 of its tokens leave half of the context to the text.)
"""

from common import Experiment, band, spread

from command.process import run_command

TASKS = ("sentence", "chat")
METHODS = {"prefix": "prefix", "soft_prompt": "soft prompt"}


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    lengths = experiment.grid([1, 2, 4, 8])
    rows, numbers = [], []
    for P in lengths:
        for task in TASKS:
            for method, n_virtual in [("prefix", P), ("soft_prompt", 8 * P)]:
                for seed in experiment.seeds:
                    run = experiment.tuned(task, method, seed, n_virtual=n_virtual)
                    found = {"task": task, "method": method, "numbers": run.adapters[0].n_stored(), "n_virtual": n_virtual}
                    experiment.runs.append(found | {"seed": seed, "loss": run.loss, "exact": run.exact})
        numbers.append(experiment.runs[-1]["numbers"])
        for task in TASKS:
            row = [task, f"{numbers[-1]:,}"]
            for method, n_virtual in [("prefix", P), ("soft_prompt", 8 * P)]:
                values = [experiment.measured(key, task=task, method=method, numbers=numbers[-1]) for key in ("loss", "exact")]
                row += [str(n_virtual), spread(values[0], 4), spread(values[1], 1)]
            rows.append(row)

    def draw(axes) -> None:
        for axis, task in zip(axes[0], TASKS):
            for method, name in METHODS.items():
                band(axis, numbers, [experiment.measured("loss", task=task, method=method, numbers=n) for n in numbers], name)
            axis.set(title=task, xlabel="numbers trained", ylabel="validation loss, nats per token", xscale="log")
            axis.set_xticks(numbers, numbers)
            axis.minorticks_off()

    header = ["task", "numbers", *(f"{name}: {what}" for name in METHODS.values() for what in ("tokens", "loss", "exact %"))]
    experiment.report(header, rows, draw, 2)


if __name__ == "__main__":
    run_command(main)
