"""The methods on real language: the table and ablations of Li & Liang 2021 on E2E, and more.

    pip install -r classroom/requirements.txt
    python classroom/smollm2.py out/smollm2
    python classroom/e2e.py --base out/smollm2 --data pool.jsonl --test test.jsonl

E2E (Novikova et al. 2017) has records of restaurants, and for each several sentences that people
wrote. A file holds one pair a line, as for train.py. Fifty records of --data are held out as
validation data. Learning rates are chosen on these, with a seed that is not reported. Test data are
only scored. A run is stored in e2e.json when it ends, so the same command goes on where it stopped.
The whole takes many hours on two cores: --parts and --seeds do it bit by bit.

Published BLEU scores are of GPT-2 medium, with all data and beam search. Learned inputs of 1, 10
and 20 tokens have 48.1, 62.2 and 61.9, a prefix 70.3, full fine-tuning 68.8 (Li & Liang). LoRA has
70.4 (Hu et al. 2021). Li & Liang's section 6.4 is on values that were not trained on.
"""

import hashlib
import random
import statistics
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from common import NAMES, Experiment, Run, band, best_rate, colour, figure, forward, interleaved
from common import kept_for_backward, looks_of, machine, markdown, n_trainable, spread
from compare import size as size_of
from compare import step
from lora import add_lora
from torch import nn

from command.answers import CUT, answers
from command.console import run_command, say
from command.examples import read_jsonl
from command.models import ADAPTERS_OF, new_adapters
from data import Example, Row, batch_of, encode, source_ids
from model import Decoder, past_length, stacked_past_kv
from prefix import Prefix
from storage.base import fingerprint, load_base
from storage.files import replace_file
from train import Plan, evaluate

try:
    import sacrebleu
except ImportError:
    sacrebleu = None

BEHIND = 20  # tokens of the soft prompt that stands behind a prefix
TASK_TEXT = "Write a sentence about the restaurant of this name , "
TASK_TEXT += "with its area , food , price and rating ."
STEPS, FEWER, BATCH = 200, 100, 10
LIMIT = 80  # tokens of an answer
UNREPORTED = 100  # the seed on which rates are chosen
# Where the search of a rate begins, and the sizes for which it is done
RATES = {"prefix": 0.03, "soft_prompt": 0.03, "both": 0.03, "lora": 1e-3, "full": 1e-4}
SIZES = {"prefix": 10, "soft_prompt": 20, "both": 9, "lora": 4}
WORDS = {  # slots that people put in many ways
    "family friendly": ("famil", "child", "kid", "adult"),
    "price": ("price", "cheap", "expensive", "£"),
    "customer rating": ("rating", "rated", "star", "out of", "review"),
}


class Cell(NamedTuple):
    """What decides a run, apart from its seed and learning rate."""

    method: str
    size: int = 0  # virtual tokens; of LoRA the rank; with an init of LONG, examples
    init: str = "text"  # or "vocab", "random", or one of LONG
    examples: int = 0  # to train on; 0: all
    mid_dim: int | None = None
    steps: int = STEPS


SCORES = {"bleu": "BLEU", "chrf": "chrF", "slots": "slots %"}
LONG = ("examples", "other text")  # the latter: TASK_TEXT, as long as the examples would be
PARTS = {
    "table": [
        Cell("none", steps=0), Cell("prefix", 4, "examples", steps=0),
        Cell("soft_prompt", 20), Cell("prefix", 5),  # the papers' usual sizes
        Cell("soft_prompt", 200), Cell("prefix", 10),  # 115,200 numbers on SmolLM2-135M
        Cell("both", 9), Cell("lora", 2),  # as many
        Cell("lora", 4), Cell("full"),
    ],
    "length": [Cell("soft_prompt", P) for P in (1, 10, 20)]
    + [Cell("prefix", P) for P in (1, 5, 10, 20)],
    "starts": [Cell("prefix", 10, init, 100, steps=FEWER) for init in ("text", "vocab", "random")],
    "MLP": [Cell("prefix", 10), Cell("prefix", 10, mid_dim=512)],
    "demonstrations": [
        Cell("prefix", k, init, steps=n)
        for n in (0, FEWER)
        for init in LONG
        for k in (1, 2, 4, 8)
    ],
    "examples": [
        Cell(method, size, examples=n, steps=FEWER)
        for method, size in (("prefix", 10), ("lora", 2), ("full", 0))
        for n in (50, 100, 200, 500)
    ],
}
AXES = {  # of parts that are drawn: field, name and scale of the x axis
    "length": ("size", "virtual tokens", "linear"),
    "examples": ("examples", "training examples", "log"),
    "demonstrations": ("size", "examples", "log"),
}


def label(cell: Cell) -> str:
    """-> a cell in words."""
    if cell.init in LONG:
        some = "1 example" if cell.size == 1 else f"{cell.size} examples"
        start = some if cell.init == "examples" else f"a text as long as {some}"
        return f"prefix from {start}, " + ("trained" if cell.steps else "as it is")
    sizes = {"both": f" of {cell.size} + {BEHIND}", "lora": f" of rank {cell.size}"}
    sizes |= {"none": "", "full": ""}
    text = NAMES[cell.method] + sizes.get(cell.method, f" of {cell.size}")
    text += {"vocab": ", random words", "random": ", random numbers"}.get(cell.init, "")
    if cell.examples:
        text += f", {cell.examples} examples"
    if cell.mid_dim:
        text += f", MLP of {cell.mid_dim}"
    return text


def stated(record: str, text: str) -> list[bool]:
    """A record and a text -> for each slot, whether the text has its value or mentions it."""
    slots = [slot.split(" : ", 1) for slot in record.split(" | ")]
    words = [WORDS.get(name, (value.lower(),)) for name, value in slots]
    return [any(word in text.lower() for word in some) for some in words]


def percent(some: list[bool]) -> float:
    return 100 * sum(some) / len(some)


class E2E:
    """The data, the runs on them, and what is stored of these."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.tokenizer, base = experiment.load()
        pool = [pair[:2] for pair in read_jsonl(experiment.args.data)]
        test = [pair[:2] for pair in read_jsonl(experiment.args.test)]
        records = sorted({record for record, _ in pool})
        held_out = set(random.Random(0).sample(records, min(50, len(records) // 2)))
        parts = ("train", "validation", "test")
        self.references: dict[str, dict[str, list[str]]] = {part: {} for part in parts}
        for record, sentence in pool:
            part = "validation" if record in held_out else "train"
            self.references[part].setdefault(record, []).append(sentence)
        for record, sentence in test:
            self.references["test"].setdefault(record, []).append(sentence)
        known = {slot for record in records for slot in record.split(" | ")}
        new = [not known.issuperset(record.split(" | ")) for record in self.references["test"]]
        self.with_new_values = percent(new)
        self.rows = {}
        most = {"train": None, "validation": 4, "test": 1}  # a loss needs only some sentences
        for part, references in self.references.items():
            examples = [
                Example(record, text)
                for record, texts in references.items()
                for text in texts[: most[part]]
            ]
            self.rows[part] = encode(self.tokenizer, examples[: experiment.at_most])
        self.n_base = sum(p.numel() for p in base.parameters())
        given = repr((fingerprint(base), sorted(pool), sorted(test)))
        self.seen = hashlib.sha256(given.encode()).hexdigest()[:16]

    def cells(self, part: str) -> list[Cell]:
        return self.experiment.grid(PARTS.get(part, []))

    def ready(self, cell: Cell, plan: Plan) -> Run:
        """-> a run as training begins with it."""
        args, seed = self.experiment.args, plan.seed
        model = load_base(args.base).to(self.experiment.device, torch.bfloat16)
        model.requires_grad_(False)
        n = min(cell.size, 1) if args.quick else cell.size
        rows = self.rows["train"]
        shuffled = random.Random(seed).sample(rows, len(rows))
        rows = self.rows | {"train": shuffled[: cell.examples or None]}
        if cell.method == "full":
            model.float().requires_grad_(True)
        if cell.method == "lora":
            add_lora(model, n, seed=seed)
        shown = [i for row in shuffled[:n] for i in row.source + row.target]
        if cell.init == "examples":
            adapter = Prefix.text(model, torch.tensor(shown, device=model.device))
            return Run(model, [adapter], rows, plan)
        init = cell.init
        if init == "other text":
            init, n = "text", len(shown)
        adapters = []
        for kind, P in zip(ADAPTERS_OF.get(cell.method, []), (n, BEHIND)):
            start = (P, init, TASK_TEXT, seed, cell.mid_dim)
            adapters += new_adapters([kind], model, self.tokenizer, rows["train"], *start)
        return Run(model, adapters, rows, plan)

    def run(self, cell: Cell, seed: int, lr: float) -> dict[str, Any]:
        """-> the record of a run, stored or measured now."""
        seed = 0 if cell.method == "none" else seed  # nothing in it is drawn
        steps = self.experiment.steps(cell.steps) if cell.steps else 0
        plan = Plan(steps, lr, BATCH, seed, eval_every=cell.steps or 1)
        settings = cell._asdict() | {"steps": steps, "seed": seed, "lr": lr}
        settings["base_and_data"] = self.seen
        return self.experiment.once(settings, partial(self.measure, cell, plan))

    def measure(self, cell: Cell, plan: Plan) -> dict[str, Any]:
        """Trains a cell -> its validation losses, and with a reported seed its scores."""
        run = self.ready(cell, plan)
        model, adapters, rows, *_ = run
        record: dict[str, Any] = {"machine": machine(model.device)}
        record["trained"] = n_trainable(model, adapters) if plan.steps else 0
        record["context"] = past_length(stacked_past_kv(adapters, model))
        with low_precision(model):
            looks = looks_of(run)
        record["start"] = looks[0]["validation"]
        record["loss"] = looks[-1]["validation"]
        if plan.seed != UNREPORTED:
            model.to(torch.bfloat16)
            record |= self.scores(model, adapters, "validation")
            if cell in PARTS["table"]:
                scores = self.scores(model, adapters, "test")
                record |= {f"test_{key}": value for key, value in scores.items()}
                record["test_loss"] = evaluate(model, adapters, rows["test"], BATCH).loss
        return record

    def scores(self, model: Decoder, adapters: list[nn.Module], part: str) -> dict[str, Any]:
        """-> BLEU and chrF of greedy answers, against all references; percent of slots stated."""
        records = list(self.references[part])[: self.experiment.at_most]
        sources = [source_ids(self.tokenizer, record) for record in records]
        texts = answers(model, adapters, self.tokenizer, sources, LIMIT)
        texts = [text.removesuffix(CUT).strip() for text in texts]
        references = [self.references[part][record] for record in records]
        columns = list(zip_longest(*references))  # the i-th reference of each record, or None
        scores: dict[str, Any] = {"signatures": []}
        # forced, for E2E's full stops stand apart from the word, which is no mistake
        for metric in (sacrebleu.BLEU(force=True), sacrebleu.CHRF()):
            name = type(metric).__name__.lower()
            scores[name] = metric.corpus_score(texts, columns).score
            scores["signatures"].append(str(metric.get_signature()))
        slots = [slot for record, text in zip(records, texts) for slot in stated(record, text)]
        return scores | {"slots": percent(slots)}

    def rate(self, cell: Cell) -> float:
        """-> the rate of the lowest validation loss, at one size of the method, on UNREPORTED."""
        if not cell.steps:
            return 0.0
        some = Cell(cell.method, SIZES.get(cell.method, 0), mid_dim=cell.mid_dim)
        if cell.init in LONG:
            some = Cell(cell.method, 4, cell.init, steps=cell.steps)
        middle = RATES[cell.method] / (30 if cell.mid_dim else 1)
        return best_rate(middle, lambda lr: self.run(some, UNREPORTED, lr)["loss"])

    def measured(self, cell: Cell, key: str) -> list[float]:
        """-> one measured value of a cell's reported runs, seed by seed."""
        lr = self.rate(cell)
        return [self.run(cell, seed, lr)[key] for seed in self.experiment.seeds]


def low_precision(model: Decoder) -> Any:
    """Computes in bfloat16 what a trained model holds in float32, which small updates need.

    Without autocast's cache, for that holds the weights as they were at the first step.
    """
    enabled = model.dtype == torch.float32
    return torch.autocast(model.device.type, torch.bfloat16, enabled, cache_enabled=False)


def table(e2e: E2E, part: str) -> str:
    """-> a part as a table: scores on validation data, for the part "table" on test data too."""
    test, scores = "", SCORES
    if part == "table":
        test = "test_"
        scores = {"bleu": "BLEU", "slots": "slots %"}
        scores |= {f"test_{key}": f"{name}, test" for key, name in SCORES.items()}
    length = statistics.mean(len(row.target) for row in e2e.rows["test" if test else "validation"])
    rows = []
    for cell in e2e.cells(part):
        trained = e2e.measured(cell, "trained")[0]
        losses = e2e.measured(cell, f"{test}loss")
        row = [label(cell), f"{trained:,}", f"{100 * trained / e2e.n_base:.3g} %"]
        row += [spread(e2e.measured(cell, "context"), 0)]
        row += [spread(losses, 2), spread([loss * length for loss in losses], 0)]
        rows.append(row + [spread(e2e.measured(cell, score), 1) for score in scores])
    header = ["method", "numbers trained", "share", "context"]
    header += [f"loss {unit}" + (", test" if test else "") for unit in ("a token", "an answer")]
    return markdown([*header, *scores.values()], rows)


def plateaus(e2e: E2E) -> str:
    """-> what twice the steps would have given, on the seed that is not reported."""
    rows = []
    for method, size in (SIZES | {"full": 0}).items():
        cell = Cell(method, size)
        lr = e2e.rate(cell)
        once = e2e.run(cell, UNREPORTED, lr)["loss"]
        twice = e2e.run(cell._replace(steps=2 * STEPS), UNREPORTED, lr)["loss"]
        less = f"{100 * (once - twice) / once:.1f} %"
        rows.append([label(cell), f"{lr:g}", f"{once:.4f}", f"{twice:.4f}", less])
    header = ["method", "learning rate", f"loss after {STEPS} steps", f"after {2 * STEPS}", "less"]
    return markdown(header, rows)


def costs(e2e: E2E) -> str:
    """-> what a step of the table's methods takes here, by turns on one batch, and room on disk."""

    def measure() -> dict[str, Any]:
        steps, cells = {}, {}
        for cell in [cell for cell in e2e.cells("table") if cell.steps]:
            model, adapters, rows, *_ = e2e.ready(cell, Plan(0, 0.0, BATCH, seed=0, eval_every=1))
            batch = batch_of(rows["train"][:BATCH], model.device)
            parts = [model, *adapters]
            trained = [p for part in parts for p in part.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-9)
            precision = low_precision(model)
            steps[label(cell)] = precision(partial(step, model, adapters, batch, optimizer))
            kept = kept_for_backward(model, precision(partial(forward, model, adapters, batch)))
            n = n_trainable(model, adapters)
            cells[label(cell)] = {"kept": kept, "optimizer": 8 * n, "disk": 4 * n}
        for name, seconds in interleaved(steps, 5).items():
            cells[name]["ms"] = 1000 * statistics.median(seconds)
        return {"costs": cells}

    settings = {"part": "costs", "machine": machine(e2e.experiment.device)}
    settings["base_and_data"] = e2e.seen
    rows = []
    for name, cell in e2e.experiment.once(settings, measure)["costs"].items():
        sizes = [size_of(cell[key]) for key in ("kept", "optimizer", "disk")]
        rows.append([name, f"{cell['ms']:.0f}", *sizes])
    return markdown(["method", "ms a step", "kept for backward", "optimizer", "on disk"], rows)


def draw(e2e: E2E, part: str, axis: Any) -> None:
    """BLEU against the numbers trained, or on validation data against what another part varies."""
    axis.set(title=part, ylabel="BLEU" if part == "table" else "BLEU, validation data")
    if part == "table":
        axis.set(xlabel="numbers trained", xscale="log")
        for cell in [cell for cell in e2e.cells(part) if cell.steps]:
            numbers = e2e.measured(cell, "trained")
            for key, mark, kind in (("bleu", "+", "validation"), ("test_bleu", "o", "test")):
                name = f"{NAMES[cell.method]}, {kind} data"
                axis.plot(numbers, e2e.measured(cell, key), mark, color=colour(name), label=name)
        return
    x, xlabel, xscale = AXES[part]
    axis.set(xlabel=xlabel, xscale=xscale)
    lines: dict[str, list[Cell]] = {}
    for cell in e2e.cells(part):
        name = NAMES[cell.method]
        if part == "demonstrations":
            name += f" from {cell.init}" + ("" if cell.steps else ", untrained")
        lines.setdefault(name, []).append(cell)
    for name, cells in lines.items():
        style = "." if cells[0].steps else "x"
        style += "--" if cells[0].init == "other text" else "-"
        xs = [getattr(cell, x) for cell in cells]
        band(axis, xs, [e2e.measured(cell, "bleu") for cell in cells], name, style)


def own_flags(add: Any) -> None:
    add("--data", required=True, help="JSONL of pairs to train and validate on")
    add("--test", required=True, help="JSONL of pairs to test on")
    parts = [*PARTS, "plateau", "costs"]
    help_text = f"(default: {' '.join(parts)})"
    add("--parts", nargs="+", choices=parts, default=parts, help=help_text)


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv, own_flags)
    if sacrebleu is None:
        raise ValueError("sacrebleu is missing: pip install -r classroom/requirements.txt")
    e2e = E2E(experiment)
    parts = experiment.args.parts
    for seed in experiment.seeds:
        for cell in [cell for part in parts for cell in e2e.cells(part)]:
            e2e.run(cell, seed, e2e.rate(cell))
    for part in parts:
        text = {"plateau": plateaus, "costs": costs}.get(part, partial(table, part=part))(e2e)
        replace_file(experiment.out / f"e2e_{part}.md", text.encode())
        say(f"\n{part}\n\n{text}")
        if part == "table" or part in AXES:
            path = experiment.out / f"e2e_{part}.png"
            figure(path, lambda axes: draw(e2e, part, axes[0][0]), 1)
    share = f"{e2e.with_new_values:.0f} % of the test records"
    say(f"{share} have a value that no record of --data has")


if __name__ == "__main__":
    run_command(main)
