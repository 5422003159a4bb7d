"""4. What does training for one form do to all the others?

    python classroom/exp4_forgetting.py

Training is for the task sentence: a record as a sentence. Then the loss is measured on every pair
of source and form in the pretraining documents. Four models are compared: the frozen base, one
after full fine-tuning, and one with a prefix on and off. A prefix is off when it is not handed in:
there is nothing to undo. Each run has a small base of its own.
"""

import random
import statistics
from functools import cache, partial

from common import Experiment, colour, spread

from command.console import run_command
from data import encode
from small_base.world import DOCUMENTS, Task, random_record, task_example
from train import evaluate

STATES = {"frozen": "frozen base", "full": "full fine-tuning"}
ABOVE = {"textcoords": "offset points", "ha": "center"}
STATES |= {"on": "prefix on", "off": "prefix off"}


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    pairs = {
        f"{source} → {form}": Task("elicited", source, form)
        for source, forms in DOCUMENTS.items()
        for form in forms
    }
    tuned = cache(partial(experiment.tuned, "sentence"))

    def measure(pair: Task, seed: int) -> dict[str, float]:
        full, prefix, rng = tuned("full", seed), tuned("prefix", seed), random.Random(seed)
        tokenizer, frozen = experiment.load(experiment.base(seed))
        records = [random_record(rng, "validation") for _ in range(200)]
        examples = [task_example(pair, record) for record in records]
        rows = encode(tokenizer, examples)[: experiment.at_most]
        return {
            "frozen": evaluate(frozen, [], rows, 50).loss,
            "full": evaluate(full.model, [], rows, 50).loss,
            "on": evaluate(prefix.model, prefix.adapters, rows, 50).loss,
            "off": evaluate(prefix.model, [], rows, 50).loss,
        }

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in pairs}
    for seed in experiment.seeds:
        for name, pair in pairs.items():
            settings = {"pair": name, "seed": seed}
            runs[name].append(experiment.once(settings, partial(measure, pair, seed)))

    rows = []
    for name, some in runs.items():
        rows.append([name, *(spread([run[state] for run in some], 3) for state in STATES)])
    others = [some for name, some in runs.items() if pairs[name].target != "sentence"]
    row = ["all with another target"]
    for state in STATES:
        means = [statistics.mean(run[state] for run in each) for each in zip(*others)]  # by seed
        row.append(spread(means, 3))
    rows.append(row)

    def draw(axes) -> None:
        axis = axes[0][0]
        for x, (state, label) in enumerate(STATES.items()):
            means = [statistics.mean(run[state] for run in each) for each in zip(*others)]
            mean = statistics.mean(means)
            axis.bar(x, mean, color=colour(label.removesuffix(" on").removesuffix(" off")))
            axis.plot([x] * len(means), means, ".", color="black")
            axis.annotate(f"{mean:.2f}", (x, max(means)), (0, 5), **ABOVE)
        axis.set_xticks(range(len(STATES)), STATES.values())
        axis.set(ylabel="loss on other forms, nats a token", ylim=(0, 1.15 * axis.get_ylim()[1]))
        axis.set(title="An adapter that is off has forgotten nothing")

    experiment.report(["source and form", *STATES.values()], rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
