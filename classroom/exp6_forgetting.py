"""8. What does training for one form do to all the others?

    python classroom/exp8_forgetting.py

Trained for the task sentence, a record as a sentence. Then the loss on every pair of source and form that pretraining documents
hold: of the frozen base, after full fine-tuning, and with a prefix on and off. A prefix is off when it is not handed in:
there is nothing to undo.
"""

import random
import statistics

from common import Experiment, spread

from data import encode
from small_base.process import run_command
from small_base.world import DOCUMENTS, Task, random_record, task_example
from train import evaluate

STATES = {"frozen": "frozen base", "full": "after full fine-tuning", "on": "prefix on", "off": "prefix off"}


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    pairs = [Task("elicited", source, form) for source, forms in DOCUMENTS.items() for form in forms]
    names = [f"{pair.source} → {pair.target}" for pair in pairs]
    for seed in experiment.seeds:
        tokenizer, model = experiment.load()
        prefix, full = (experiment.tuned("sentence", method, seed) for method in ("prefix", "full"))
        rng = random.Random(seed)
        records = [random_record(rng, "validation") for _ in range(200)]
        for pair, name in zip(pairs, names):
            examples = encode(tokenizer, [task_example(pair, record) for record in records])[: experiment.at_most]
            states = [(model, []), (full.model, []), (prefix.model, prefix.adapters), (prefix.model, [])]
            losses = [evaluate(*state, examples, 50)[0] for state in states]
            experiment.runs.append({"pair": name, "seed": seed, **dict(zip(STATES, losses))})

    rows = [[name, *(spread(experiment.measured(state, pair=name), 3) for state in STATES)] for name in names]

    def draw(axes) -> None:
        for (state, label), marker in zip(STATES.items(), "os^x"):
            means = [statistics.mean(experiment.measured(state, pair=name)) for name in names]
            axes[0][0].plot(means, names, marker, label=label)
        axes[0][0].set(xlabel="validation loss, nats per token", xscale="log", title="trained for table → sentence")
        axes[0][0].invert_yaxis()
        axes[0][0].grid(axis="y", alpha=0.3)
        axes[0][0].legend(fontsize=7)

    experiment.report(["source and form", *STATES.values()], rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
