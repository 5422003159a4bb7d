"""5. What can a prefix do, and what can it not?

    python classroom/exp5_what_a_prefix_can_do.py

A prefix is trained for each task, and evaluated on every task: exact match on the test data, as a matrix. Beside it what full
fine-tuning does with the same examples and steps. *Elicited*: the base saw such pairs of forms. *Recombined*: it saw both
forms, never as a pair. *New*: a mapping that it never saw; both methods have 600 steps for it, and 150 for the others.
"""

import statistics

from common import Experiment, spread

from command.process import run_command
from data import encode
from small_base.world import TASKS, task_examples
from train import evaluate, share

METHODS = {"prefix": "prefix", "full": "full fine-tuning"}


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    tasks = experiment.grid(list(TASKS))
    tokenizer, _ = experiment.load()
    for task in tasks:
        tier = TASKS[task].tier
        for method in METHODS:
            for seed in experiment.seeds:
                run = experiment.tuned(task, method, seed, steps=600 if tier == "new" else None)
                for other in tasks if method == "prefix" else [task]:
                    tests = encode(tokenizer, task_examples(other, "test", 500, seed))[: experiment.at_most]
                    found = {"method": method, "trained": task, "tier": tier, "evaluated": other, "seed": seed}
                    found["exact"] = share(evaluate(run.model, run.adapters, tests, 50)[1])
                    if method == "prefix" and other == task:
                        found["frozen"] = share(evaluate(run.model, [], tests, 50)[1])
                    experiment.runs.append(found)

    def exact(task: str, other: str, method: str = "prefix") -> list[float]:
        return experiment.measured("exact", method=method, trained=task, evaluated=other)

    rows = []
    for task in tasks:
        frozen = experiment.measured("frozen", method="prefix", trained=task, evaluated=task)
        elsewhere = [value for other in tasks if other != task for value in exact(task, other)]
        cells = [spread(values, 1) for values in (frozen, *(exact(task, task, method) for method in METHODS))]
        rows.append([task, TASKS[task].tier, *cells, f"{max(elsewhere):.1f}"])

    def draw(axes) -> None:
        matrix = [[statistics.mean(exact(task, other)) for other in tasks] for task in tasks]
        left, right = axes[0]
        left.imshow(matrix, vmin=0, vmax=100)
        for i, line in enumerate(matrix):
            for j, value in enumerate(line):
                left.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 50 else "black", fontsize=8)
        left.set(title="exact match, %", xlabel="evaluated on", ylabel="prefix trained for")
        left.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
        left.set_yticks(range(len(tasks)), tasks)
        for i, (method, name) in enumerate(METHODS.items()):
            values = [exact(task, task, method) for task in tasks]
            right.bar([x + 0.4 * i for x in range(len(tasks))], list(map(statistics.mean, values)), 0.4, label=name)
        right.set(title="each on its own task", ylabel="exact match, %")
        right.set_xticks([x + 0.2 for x in range(len(tasks))], tasks, rotation=45, ha="right")
        right.legend(loc="lower left")

    header = ["task", "tier", "frozen base", *METHODS.values(), "its prefix on another task, at most"]
    experiment.report(header, rows, draw, 2)


if __name__ == "__main__":
    run_command(main)
