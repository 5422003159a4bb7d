"""4. What does training for one form do to all the others?

    python classroom/exp4_forgetting.py

Trained for the task sentence, a record as a sentence. Then the loss on every pair of source and form that pretraining documents
hold: of the frozen base, after full fine-tuning, and with a prefix on and off. A prefix is off when it is not handed in:
there is nothing to undo.
"""

import random
import statistics
from functools import cache, partial

from common import Experiment, spread

from command.process import run_command
from data import encode
from small_base.world import DOCUMENTS, Task, random_record, task_example
from train import evaluate

STATES = {"frozen": "frozen base", "full": "full fine-tuning", "on": "prefix on", "off": "prefix off"}


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    pairs = {f"{source} → {form}": Task("elicited", source, form) for source, forms in DOCUMENTS.items() for form in forms}
    tokenizer, frozen = experiment.load()
    tuned = cache(partial(experiment.tuned, "sentence"))

    def measure(pair: Task, seed: int) -> dict[str, float]:
        rng, full, prefix = random.Random(seed), tuned("full", seed), tuned("prefix", seed)
        records = [random_record(rng, "validation") for _ in range(200)]
        examples = encode(tokenizer, [task_example(pair, record) for record in records])[: experiment.at_most]
        states = [(frozen, []), (full.model, []), (prefix.model, prefix.adapters), (prefix.model, [])]
        return dict(zip(STATES, (evaluate(*state, examples, 50)[0] for state in states)))

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in pairs}
    for seed in experiment.seeds:
        for name, pair in pairs.items():
            runs[name].append(experiment.once({"pair": name, "seed": seed}, partial(measure, pair, seed)))

    rows = [[name, *(spread([run[state] for run in some], 3) for state in STATES)] for name, some in runs.items()]
    others = list(zip(*(some for name, some in runs.items() if pairs[name].target != "sentence")))  # seed by seed
    means = {state: [statistics.mean(run[state] for run in each) for each in others] for state in STATES}
    rows.append(["all with another target", *(spread(means[state], 3) for state in STATES)])

    def draw(axes) -> None:
        for (state, label), marker in zip(STATES.items(), "os^x"):
            seen = [statistics.mean(run[state] for run in some) for some in runs.values()]
            axes[0][0].plot(seen, list(runs), marker, label=label)
        axes[0][0].set(xlabel="validation loss, nats per token", xscale="log", title="trained for table → sentence")
        axes[0][0].invert_yaxis()
        axes[0][0].grid(axis="y", alpha=0.3)

    experiment.report(["source and form", *STATES.values()], rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
