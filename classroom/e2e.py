"""The methods on real language: the table and the ablations of Li & Liang 2021 on E2E, and examples as a start.

    pip install -r classroom/requirements.txt
    python classroom/smollm2.py out/smollm2
    python classroom/e2e.py --base out/smollm2 --data pool.jsonl --test test.jsonl

E2E (Novikova et al. 2017) has records of restaurants, and for each several sentences that people wrote. A file holds one pair a
line, as for train.py. Fifty records of --data are held out as validation data. Learning rates are chosen on these, with a seed
that is not reported; test data are only scored. A run is stored in e2e.json when it ends, so the same command goes on where it
stopped. The whole takes many hours on two cores: --parts and --seeds do it bit by bit. Published are, for GPT-2 medium with all
data and beam search, 48.1, 62.2 and 61.9 BLEU for learned inputs of 1, 10 and 20 tokens, 70.3 for a prefix, 68.8 for full
fine-tuning (Li & Liang; their section 6.4 is on values that were not trained on), and 70.4 for LoRA (Hu et al. 2021).
"""

import hashlib
import random
import statistics
from functools import partial
from typing import Any, NamedTuple

import torch
from common import NAMES, RECIPES, Experiment, band, colour, figure, forward, interleaved, kept_for_backward, lowest
from common import machine, markdown, n_trainable, quietly_tuned, rate, spread
from compare import size as size_of, step
from lora import add_lora
from torch import nn

import train
from command.process import run_command, say
from data import Example, Row, batch_of, encode, read_jsonl, source_ids
from model import Decoder
from prefix import Prefix
from storage.base import fingerprint, load_base
from storage.files import replace_file

try:
    import sacrebleu
except ImportError:
    sacrebleu = None

BEHIND = 20  # tokens of the soft prompt that stands behind a prefix
TASK_TEXT = "Write a sentence about the restaurant of this name , with its area , food , price and rating ."
STEPS, FEWER, BATCH, LIMIT, UNREPORTED = 200, 100, 10, 80, 100
RATES = {"prefix": 0.03, "soft_prompt": 0.03, "both": 0.03, "lora": 1e-3, "full": 1e-4}  # where the search begins
SIZES = {"prefix": 10, "soft_prompt": 20, "both": 9, "lora": 4}  # for which it is done
WORDS = {"family friendly": ("famil", "child", "kid", "adult"), "price": ("price", "cheap", "expensive", "£")}
WORDS |= {"customer rating": ("rating", "rated", "star", "out of", "review")}  # slots that are put in many ways


class Cell(NamedTuple):
    """What decides a run, apart from its seed and learning rate."""

    method: str
    size: int = 0  # virtual tokens; of LoRA the rank; with the last two values of `init` that many examples' tokens
    init: str = "text"  # or "vocab", "random", "examples", or "other text": TASK_TEXT, as long as those examples would be
    examples: int = 0  # to train on; 0: all
    mid_dim: int | None = None
    steps: int = STEPS


SCORES = {"bleu": "BLEU", "chrf": "chrF", "slots": "slots %"}
LONG = ("examples", "other text")
PARTS = {
    # The usual sizes of the papers; four times 115,200 numbers on SmolLM2-135M; LoRA's usual size; all numbers
    "table": [Cell("none", steps=0), Cell("prefix", 4, "examples", steps=0), Cell("soft_prompt", 20), Cell("prefix", 5)]
    + [Cell("soft_prompt", 200), Cell("prefix", 10), Cell("both", 9), Cell("lora", 2), Cell("lora", 4), Cell("full")],
    "length": [*(Cell("soft_prompt", P) for P in (1, 10, 20)), *(Cell("prefix", P) for P in (1, 5, 10, 20))],
    "starts": [Cell("prefix", 10, init, 100, steps=FEWER) for init in ("text", "vocab", "random")],
    "MLP": [Cell("prefix", 10), Cell("prefix", 10, mid_dim=512)],
    "demonstrations": [Cell("prefix", k, init, steps=n) for n in (0, FEWER) for init in LONG for k in (1, 2, 4, 8)],
    "examples": [
        Cell(method, size, examples=n, steps=FEWER)
        for method, size in (("prefix", 10), ("lora", 2), ("full", 0))
        for n in (50, 100, 200, 500)
    ],
}
AXES = {"length": ("size", "virtual tokens", "linear"), "examples": ("examples", "training examples", "log")}
AXES |= {"demonstrations": ("size", "examples", "log")}  # of parts that are drawn: field, name and scale of the x axis


def label(cell: Cell) -> str:
    """-> a cell in words."""
    if cell.init in LONG:
        some = f"{cell.size} example{'s' * (cell.size > 1)}"
        text = f"prefix from {some}" if cell.init == LONG[0] else f"prefix from a text as long as {some}"
        return text + (", trained" if cell.steps else ", as it is")
    sizes = {"both": f" of {cell.size} + {BEHIND}", "lora": f" of rank {cell.size}", "none": "", "full": ""}
    start = {"vocab": ", random words", "random": ", random numbers"}.get(cell.init, "")
    some, mlp = f", {cell.examples} examples" * bool(cell.examples), f", MLP of {cell.mid_dim}" * bool(cell.mid_dim)
    return NAMES[cell.method] + sizes.get(cell.method, f" of {cell.size}") + start + some + mlp


def stated(record: str, text: str) -> list[bool]:
    """A record and a text for it -> for each of its slots, whether the text has the value, or mentions the matter."""
    slots = [slot.split(" : ", 1) for slot in record.split(" | ")]
    return [any(word in text.lower() for word in WORDS.get(name, (value.lower(),))) for name, value in slots]


class E2E:
    """The data, the runs on them, and what is stored of these."""

    def __init__(self, experiment: Experiment):
        self.experiment, (self.tokenizer, base) = experiment, experiment.load()
        pool, test = ([pair[:2] for pair in read_jsonl(path)] for path in (experiment.args.data, experiment.args.test))
        records = sorted({record for record, _ in pool})
        held_out = set(random.Random(0).sample(records, min(50, len(records) // 2)))
        self.references: dict[str, dict[str, list[str]]] = {"train": {}, "validation": {}, "test": {}}
        for part, pairs in (("train", pool), ("test", test)):
            for record, sentence in pairs:
                sentences = self.references["validation" if part == "train" and record in held_out else part]
                sentences.setdefault(record, []).append(sentence)
        known = {slot for record in records for slot in record.split(" | ")}
        self.with_new_values = train.share([not known.issuperset(record.split(" | ")) for record in self.references["test"]])
        self.rows = {}
        for part, most in (("train", None), ("validation", 4), ("test", 1)):  # a loss needs less than all sentences of a record
            pairs = [(record, text) for record, texts in self.references[part].items() for text in texts[:most]]
            self.rows[part] = encode(self.tokenizer, [Example(*pair) for pair in pairs][: experiment.at_most])
        self.n_base = sum(p.numel() for p in base.parameters())
        self.seen = hashlib.sha256(repr((fingerprint(base), sorted(pool), sorted(test))).encode()).hexdigest()[:16]

    def cells(self, part: str) -> list[Cell]:
        return self.experiment.grid(PARTS.get(part, []))

    def ready(self, cell: Cell, seed: int) -> tuple[Decoder, list[nn.Module], dict[str, list[Row]]]:
        """-> model, adapters and rows, as training begins with them."""
        model = load_base(self.experiment.args.base).to(self.experiment.device, torch.bfloat16).freeze()
        rows, n = dict(self.rows), min(cell.size, 1) if self.experiment.args.quick else cell.size
        shuffled = random.Random(seed).sample(rows["train"], len(rows["train"]))
        rows["train"] = shuffled[: cell.examples or None]
        if cell.method == "full":
            model.float().requires_grad_(True)
        if cell.method == "lora":
            add_lora(model, n, seed=seed)
        shown = [i for row in shuffled[:n] for i in row.source + row.target]
        if cell.init == "examples":
            return model, [Prefix.text(model, torch.tensor(shown, device=model.device))], rows
        n, init = (len(shown), "text") if cell.init == "other text" else (n, cell.init)
        how = (init, TASK_TEXT, seed, cell.mid_dim)
        adapters = [
            train.new_adapters((kind,), model, self.tokenizer, rows["train"], P, *how)[0]
            for kind, P in zip(RECIPES[cell.method].adapters, (n, BEHIND))
        ]
        return model, adapters, rows

    def run(self, cell: Cell, seed: int, lr: float) -> dict[str, Any]:
        """-> the record of a run, stored or done now: its loss, and with a reported seed its scores."""
        seed = 0 if cell.method == "none" else seed  # nothing in it is drawn
        plan = train.Plan(self.experiment.steps(cell.steps) if cell.steps else 0, lr, BATCH, seed, cell.steps or 1, 1)
        settings = cell._asdict() | {"steps": plan.steps, "seed": seed, "lr": lr, "base_and_data": self.seen}
        return self.experiment.once(settings, partial(self.measure, cell, plan))

    def measure(self, cell: Cell, plan: train.Plan) -> dict[str, Any]:
        """Trains a cell -> its losses on the validation data before and after, and with a reported seed its scores."""
        model, adapters, rows = self.ready(cell, plan.seed)
        trained = n_trainable(model, adapters) if plan.steps else 0
        context = train.n_past(train.stacked_past_kv(adapters, model))
        record = {"machine": machine(model.device), "trained": trained, "context": context}
        with low_precision(model):
            (_, record["start"]), *_, (_, record["loss"]) = 2 * quietly_tuned(model, adapters, rows, plan)
        if plan.seed != UNREPORTED:
            model.to(torch.bfloat16)
            record |= self.scores(model, adapters, "validation")
            if cell in PARTS["table"]:
                record |= {f"test_{key}": value for key, value in self.scores(model, adapters, "test").items()}
                record["test_loss"], _ = train.evaluate(model, adapters, rows["test"], BATCH)
        return record

    def scores(self, model: Decoder, adapters: list[nn.Module], part: str) -> dict[str, float]:
        """-> BLEU and chrF of greedy answers against all references, and the share of slots that they state, in percent."""
        records = list(self.references[part])[: self.experiment.at_most]
        sources = [source_ids(self.tokenizer, record) for record in records]
        texts = [text.strip() for text in train.answers(model, adapters, self.tokenizer, sources, LIMIT)]
        references = [self.references[part][record] for record in records]
        columns = [[some[i] if i < len(some) else None for some in references] for i in range(max(map(len, references)))]
        found = {}
        for metric in (sacrebleu.BLEU(force=True), sacrebleu.CHRF()):  # E2E's stops stand apart, and that is no mistake
            found[metric.__class__.__name__.lower()] = metric.corpus_score(texts, columns).score
            found["signatures"] = [*found.get("signatures", []), str(metric.get_signature())]
        slots = [slot for record, text in zip(records, texts) for slot in stated(record, text)]
        return found | {"slots": train.share(slots)}

    def rate(self, cell: Cell) -> float:
        """-> the learning rate of the lowest validation loss, at one size of the method, on the seed that is not reported."""
        if not cell.steps:
            return 0.0
        some = Cell(cell.method, SIZES.get(cell.method, 0), mid_dim=cell.mid_dim)
        if cell.init in LONG:
            some = Cell(cell.method, 4, cell.init, steps=cell.steps)
        middle = RATES[cell.method] / (30 if cell.mid_dim else 1)
        return rate(middle, lowest(lambda power: self.run(some, UNREPORTED, rate(middle, power))["loss"]))

    def measured(self, cell: Cell, key: str) -> list[float]:
        """-> one measured value of a cell's reported runs, seed by seed."""
        return [self.run(cell, seed, self.rate(cell))[key] for seed in self.experiment.seeds]


def low_precision(model: Decoder) -> Any:
    """Computes in bfloat16 what a float32 model has, which is trained itself: bfloat16 weights would lose its small updates.
    Without its cache, for that holds the weights as they were at the first step."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.float32, cache_enabled=False)


def table(e2e: E2E, part: str) -> str:
    """-> a part as a table; that of the part "table" has scores on the test data too, others on the validation data alone."""
    test, scores, rows = "", SCORES, []
    if part == "table":
        test, scores = "test_", {"bleu": "BLEU", "slots": "slots %"}
        scores |= {f"test_{key}": f"{name}, test" for key, name in SCORES.items()}
    length = statistics.mean(len(row.target) for row in e2e.rows["test" if test else "validation"])
    for cell in e2e.cells(part):
        trained, losses = e2e.measured(cell, "trained")[0], e2e.measured(cell, f"{test}loss")
        row = [label(cell), f"{trained:,}", f"{100 * trained / e2e.n_base:.3g} %", spread(e2e.measured(cell, "context"), 0)]
        row += [spread(losses, 2), spread([loss * length for loss in losses], 0)]
        rows.append(row + [spread(e2e.measured(cell, score), 1) for score in scores])
    header = ["method", "numbers trained", "share", "context"]
    header += [f"loss {unit}{', test' * bool(test)}" for unit in ("a token", "an answer")]
    return markdown([*header, *scores.values()], rows)


def plateaus(e2e: E2E) -> str:
    """-> what twice the steps would have given, on the seed that is not reported."""
    cells, rows = [Cell(method, size) for method, size in (SIZES | {"full": 0}).items()], []
    for cell in cells:
        once, twice = (e2e.run(some, UNREPORTED, e2e.rate(cell))["loss"] for some in (cell, cell._replace(steps=2 * STEPS)))
        rows.append([label(cell), f"{e2e.rate(cell):g}", f"{once:.4f}", f"{twice:.4f}", f"{100 * (once - twice) / once:.1f} %"])
    return markdown(["method", "learning rate", f"loss after {STEPS} steps", f"after {2 * STEPS}", "less"], rows)


def costs(e2e: E2E) -> str:
    """-> what a training step of the table's methods takes here, by turns on one batch, and what is left on disk."""

    def measure() -> dict[str, Any]:
        steps, found = {}, {}
        for cell in [cell for cell in e2e.cells("table") if cell.steps]:
            model, adapters, rows = e2e.ready(cell, 0)
            given = model, adapters, batch_of(rows["train"][:BATCH], model.device)
            trained = [p for part in (model, *adapters) for p in part.parameters() if p.requires_grad]
            steps[label(cell)] = low_precision(model)(partial(step, *given, torch.optim.AdamW(trained, lr=1e-9)))
            kept = kept_for_backward(model, low_precision(model)(partial(forward, *given)))
            numbers = n_trainable(model, adapters)
            found[label(cell)] = {"kept": kept, "optimizer": 8 * numbers, "disk": 4 * numbers}
        for name, seconds in interleaved(steps, 5).items():
            found[name]["ms"] = 1000 * statistics.median(seconds)
        return {"costs": found}

    settings = {"part": "costs", "machine": machine(e2e.experiment.device), "base_and_data": e2e.seen}
    found = e2e.experiment.once(settings, measure)["costs"]
    rows = [[name, f"{c['ms']:.0f}", *(size_of(c[key]) for key in ("kept", "optimizer", "disk"))] for name, c in found.items()]
    return markdown(["method", "ms a step", "kept for backward", "optimizer", "on disk"], rows)


def draw(e2e: E2E, part: str, axis: Any) -> None:
    """BLEU against the numbers trained, or on validation data against what another part varies."""
    axis.set(title=part, ylabel="BLEU" if part == "table" else "BLEU, validation data")
    if part == "table":
        axis.set(xlabel="numbers trained", xscale="log")
        for cell in [cell for cell in e2e.cells(part) if cell.steps]:
            for key, mark, data in (("bleu", "+", "validation"), ("test_bleu", "o", "test")):
                name = f"{NAMES[cell.method]}, {data} data"
                axis.plot(e2e.measured(cell, "trained"), e2e.measured(cell, key), mark, color=colour(name), label=name)
        return
    x, xlabel, xscale = AXES[part]
    axis.set(xlabel=xlabel, xscale=xscale)
    lines: dict[str, list[Cell]] = {}
    for cell in e2e.cells(part):
        name = NAMES[cell.method]
        if part == "demonstrations":
            name += f" from {cell.init}" + ", untrained" * (not cell.steps)
        lines.setdefault(name, []).append(cell)
    for name, cells in lines.items():
        style = ("." if cells[0].steps else "x") + ("--" if cells[0].init == "other text" else "-")
        band(axis, [getattr(cell, x) for cell in cells], [e2e.measured(cell, "bleu") for cell in cells], name, style)


def main(argv: list[str] | None = None) -> None:
    def own(add: Any) -> None:
        add("--data", required=True, help="JSONL of pairs to train and validate on")
        add("--test", required=True, help="JSONL of pairs to test on")
        parts = [*PARTS, "plateau", "costs"]
        add("--parts", nargs="+", choices=parts, default=parts, help=f"(default: {' '.join(parts)})")

    experiment = Experiment(__file__, __doc__, argv, own)
    if sacrebleu is None:
        raise ValueError("sacrebleu is missing: pip install -r classroom/requirements.txt")
    e2e, parts = E2E(experiment), experiment.args.parts
    for seed in experiment.seeds:
        for cell in [cell for part in parts for cell in e2e.cells(part)]:
            e2e.run(cell, seed, e2e.rate(cell))
    for part in parts:
        text = {"plateau": plateaus, "costs": costs}.get(part, partial(table, part=part))(e2e)
        replace_file(experiment.out / f"e2e_{part}.md", text.encode())
        say(f"\n{part}\n\n{text}")
        if part == "table" or part in AXES:
            figure(experiment.out / f"e2e_{part}.png", lambda axes: draw(e2e, part, axes[0][0]), 1)
    say(f"{e2e.with_new_values:.0f} % of the test records have a value that no record of --data has")


if __name__ == "__main__":
    run_command(main)
