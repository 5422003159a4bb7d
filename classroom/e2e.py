"""The methods on real language: the table of Li & Liang 2021 on E2E, and the role of new values.

    pip install -r classroom/requirements.txt
    python classroom/smollm2.py out/smollm2
    python classroom/e2e.py --base out/smollm2 --data pool.jsonl --test test.jsonl

E2E (Novikova et al. 2017) has records of restaurants, and for each several sentences that people
wrote. A file holds one pair a line, as for train.py. Fifty records of --data are held out as
validation data. Learning rates are chosen on these, with a seed that is not reported. Test data are
only scored. A run is stored in e2e.json when it ends, so the same command goes on where it stopped.
Its answers go to out/e2e_answers, which git ignores, for they repeat the records. The whole takes
many hours on two cores: --parts and --seeds do it bit by bit, and --report shows what is there.

Published BLEU scores are of GPT-2 medium, with all data and beam search. Learned inputs of 1, 10
and 20 tokens have 48.1, 62.2 and 61.9, a prefix 70.3, full fine-tuning 68.8 (Li & Liang). LoRA has
70.4 (Hu et al. 2021). Li & Liang's section 6.4 is on values that were not trained on. The starts
of a prefix are those of experiment 7, after fewer steps.
"""

import hashlib
import json
import random
import re
import statistics
from collections.abc import Collection
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import NAMES, RESULTS, UNREPORTED, Experiment, Run, best_rate, colour, figure, forward
from common import interleaved, kept_for_backward, looks_of, machine, markdown, n_trainable, spread
from compare import size as size_of
from compare import step
from exp7_start import DEVIATIONS, started
from lora import add_lora
from torch import nn

from command.answers import CUT, answers
from command.console import run_command, say
from command.examples import read_jsonl
from command.models import ADAPTERS_OF, new_adapters
from command.process import pick_dtype
from data import Example, batch_of, encode, source_ids
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
STEPS, BATCH = 200, 10
SHORT = 50  # steps of a run that compares starts
LIMIT = 80  # tokens of an answer
# Where the search of a rate begins, and the sizes for which it is done
RATES = {"prefix": 0.03, "soft_prompt": 0.03, "both": 0.03, "lora": 1e-3, "full": 1e-4}
SIZES = {"prefix": 10, "soft_prompt": 20, "both": 9, "lora": 4}


def level(words: str, noun: str) -> str:
    """-> a pattern: one of the words, at most two others, and the noun; or the other way round."""
    others = r"\W+(?:(?!low|high|cheap|mod|av|and|but|with|rat|pric)\w+\W+){0,2}"
    return rf"(?:{words})(?:er|est|ly)?{others}(?:{noun})|(?:{noun})\w*{others}(?:{words})"


def stars(n: int, word: str) -> str:
    """-> a pattern: so many of five, in figures or in words."""
    return rf"\b(?:{n}|{word})\W*(?:stars?\W+)?(?:(?:out\W+)?of\W+(?:5|five)|star|/\W*5)"


# What people write for the levels of a slot: in words or figures, whichever the record has
PRICE, RATED = "pric|cost", "rat(?:ed|ing)|review|customer|scor"
LEVELS = {
    ("price", "cheap", "less than £ 20"): r"(?<!not )(?<!in)\b(?:cheap|inexpensive|affordab)|"
    + level("low", PRICE) + r"|(?:less|under|below|lower|within)\W+(?:than\W+)?(?:£\W*)?20",
    ("price", "moderate", "£ 20 - 25"): level("moderate|medium|average|reasonabl|mid|fair", PRICE)
    + r"|\bmoderate|mid\W?(?:range|pric)|20\W+(?:(?:to|and|£)\W+)*(?:£\W*)?25",
    ("price", "high", "more than £ 30"): r"(?<!in)(?<!not )expensive|pricey|costly|"
    + level("high", PRICE) + r"|high\W?end|(?:more|over|above|higher)\W+(?:than\W+)?(?:£\W*)?30",
    ("customer rating", "low", "1 out of 5"): stars(1, "one") + "|poorly|"
    + level("low|poor|bad", RATED),
    ("customer rating", "average", "3 out of 5"): stars(3, "three") + "|"
    + level("average|moderate|decent|medium|mid|fair|mediocre", RATED),
    ("customer rating", "high", "5 out of 5"): stars(5, "five") + "|highly|excellent|"
    + level("high|excellent|good|great|top|well|best", RATED),
}  # fmt: skip
PATTERNS = {(slot, value): text for (slot, *values), text in LEVELS.items() for value in values}
NOT = r"\b(?:not?|non|never|(?:is|are|does|do)?\W*n\W*t|without|unsuitable)\b"
FAMILY = "famil|child|kid"
STEP = r"(?:(?!but|and|with)[\w’']+[\s-]+)"  # a word between, in the same clause
NO = rf"{NOT}[\s’'-]+{STEP}{{0,5}}(?:{FAMILY})|(?:{FAMILY})\w*[\s-]+{STEP}{{0,4}}{NOT}|adult"
PATTERNS["family friendly", "no"] = NO
PATTERNS["family friendly", "yes"] = rf"(?s)^(?!.*(?:{NO})).*(?:{FAMILY})"


class Cell(NamedTuple):
    """What decides a run, apart from its seed and learning rate."""

    method: str
    size: int = 0  # virtual tokens; of LoRA the rank; of "examples" their number
    init: str = "text"  # or one of experiment 7; "examples" is the cache of training examples
    steps: int = STEPS


SCORES = {"bleu": "BLEU", "chrf": "chrF"}
COPIED = ("name", "Type", "food", "near")  # slots that have known as well as new values
LEVELED = ("price", "customer rating", "family friendly", "area")  # all values are known
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
    "values": [
        Cell("prefix", 10), Cell("lora", 2), Cell("full"), Cell("soft_prompt", 200),
        Cell("both", 9),
    ],
    "start": [Cell("prefix", 10, init, SHORT) for init in ("text", "words", *DEVIATIONS)],
}
CHANGING = ("lora", "full")  # methods that change the weights


def label(cell: Cell) -> str:
    """-> a cell in words."""
    if cell.init == "examples":
        return f"prefix from {cell.size} examples, as it is"
    sizes = {"both": f" of {cell.size} + {BEHIND}", "lora": f" of rank {cell.size}"}
    sizes |= {"none": "", "full": ""}
    return NAMES[cell.method] + sizes.get(cell.method, f" of {cell.size}")


def stated(record: str, text: str) -> dict[tuple[str, str], bool]:
    """A record and a text -> for each slot and value, whether the text states that very value.

    A level of price or rating may be in words or figures. Another level, or the mere mention of
    prices, does not count. Of a family, «not» has to be there or not.
    """
    slots = [tuple(slot.split(" : ", 1)) for slot in record.split(" | ")]
    found = {}
    for slot in slots:
        own_words = r"\W+".join(map(re.escape, slot[1].lower().split()))
        pattern = PATTERNS.get(slot, rf"\b{own_words}\b")
        found[slot] = bool(re.search(pattern, text.lower()))
    return found


def values_of(record: str) -> set[str]:
    return set(record.split(" | "))


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
        self.known = set().union(*map(values_of, self.references["train"]))  # values trained on
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
        self.dtype = pick_dtype(None, base, experiment.device, full=False)
        self.answers = experiment.out if experiment.out != RESULTS else Path("out")
        given = repr((fingerprint(base), sorted(pool), sorted(test)))
        self.seen = hashlib.sha256(given.encode()).hexdigest()[:16]

    def cells(self, part: str) -> list[Cell]:
        return self.experiment.grid(PARTS.get(part, []))

    def ready(self, cell: Cell, plan: Plan) -> Run:
        """-> a run as training begins with it."""
        args, seed = self.experiment.args, plan.seed
        full = cell.method == "full"  # in bfloat16, small updates would be rounded away
        model = load_base(args.base)
        model = model.to(self.experiment.device, torch.float32 if full else self.dtype)
        model.requires_grad_(full)
        n = min(cell.size, 1) if args.quick else cell.size
        rows = self.rows["train"]
        shuffled = random.Random(seed).sample(rows, len(rows))
        rows = self.rows | {"train": shuffled}
        if cell.method == "lora":
            add_lora(model, n, seed=seed)
        if cell.init == "examples":
            shown = [i for row in shuffled[:n] for i in row.source + row.target]
            adapter = Prefix.text(model, torch.tensor(shown, device=model.device))
            return Run(model, [adapter], rows, plan)
        adapters = []
        for kind, P in zip(ADAPTERS_OF.get(cell.method, []), (n, BEHIND)):
            start = (P, "text", TASK_TEXT, seed)
            adapters += new_adapters([kind], model, self.tokenizer, rows["train"], *start)
        return started(Run(model, adapters, rows, plan), cell.init, seed)

    def run(self, cell: Cell, seed: int, lr: float, apart: bool = False) -> dict[str, Any]:
        """-> the record of a run, stored or measured now; if asked, with known values `apart`."""
        seed = 0 if cell.method == "none" else seed  # nothing in it is drawn
        steps = self.experiment.steps(cell.steps) if cell.steps else 0
        plan = Plan(steps, lr, BATCH, seed, eval_every=cell.steps or 1)
        settings = cell._asdict() | {"steps": steps, "seed": seed, "lr": lr}
        settings["base_and_data"] = self.seen
        if apart and seed != UNREPORTED:  # older runs had no known and new values apart
            settings["values_apart"] = True
        return self.experiment.once(settings, partial(self.measure, cell, plan))

    def measure(self, cell: Cell, plan: Plan) -> dict[str, Any]:
        """Trains a cell -> its validation losses, and with a reported seed its scores."""
        run = self.ready(cell, plan)
        model, adapters, rows, *_ = run
        record: dict[str, Any] = {"machine": machine(model.device), "dtype": str(model.dtype)}
        record["trained"] = n_trainable(model, adapters) if plan.steps else 0
        record["context"] = past_length(stacked_past_kv(adapters, model))
        looks = looks_of(run)
        record["start"] = looks[0]["validation"]
        record["loss"] = looks[-1]["validation"]
        if plan.seed != UNREPORTED:
            name = "-".join(map(str, [*cell, plan.seed, plan.lr]))
            record |= self.scores(model, adapters, "validation", name)
            if cell in PARTS["table"]:
                scores = self.scores(model, adapters, "test", name)
                record |= {f"test_{key}": value for key, value in scores.items()}
                record["test_loss"] = evaluate(model, adapters, rows["test"], BATCH).loss
            record["values_apart"] = True
        return record

    def scores(
        self, model: Decoder, adapters: list[nn.Module], part: str, name: str
    ) -> dict[str, Any]:
        """-> the scores of greedy answers, which go into a file of that name."""
        records = list(self.references[part])[: self.experiment.at_most]
        sources = [source_ids(self.tokenizer, record) for record in records]
        texts = answers(model, adapters, self.tokenizer, sources, LIMIT)
        texts = [text.removesuffix(CUT).strip() for text in texts]
        pairs = [{"record": record, "answer": text} for record, text in zip(records, texts)]
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        file = self.answers / "e2e_answers" / f"{part}-{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lines.encode())
        return self.scores_of(records, texts, part)

    def scores_of(self, records: list[str], texts: list[str], part: str) -> dict[str, Any]:
        """-> BLEU and chrF against all references, and how many values of each slot are stated.

        Values that occur in the training data are counted apart from new ones: [stated, in all].
        """
        # forced, for E2E's full stops stand apart from the word, which is no mistake
        metrics = {"bleu": sacrebleu.BLEU(force=True), "chrf": sacrebleu.CHRF()}
        references = [self.references[part][record] for record in records]
        columns = list(zip_longest(*references))  # the i-th reference of each record, or None
        scores: dict[str, Any] = {
            name: metric.corpus_score(texts, columns).score for name, metric in metrics.items()
        }
        scores["signatures"] = [str(metric.get_signature()) for metric in metrics.values()]
        counts: dict[str, dict[str, list[int]]] = {"known": {}, "new": {}}
        for record, text in zip(records, texts):
            for (slot, value), right in stated(record, text).items():
                kind = "known" if f"{slot} : {value}" in self.known else "new"
                count = counts[kind].setdefault(slot, [0, 0])
                count[0] += right
                count[1] += 1
        return scores | {"values": counts}

    def rate(self, cell: Cell) -> float:
        """-> the rate of the lowest validation loss, on UNREPORTED.

        Of each method, start and number of steps, it is searched at one size.
        """
        if not cell.steps:
            return 0.0
        some = cell._replace(size=SIZES.get(cell.method, 0))
        return best_rate(RATES[cell.method], lambda lr: self.run(some, UNREPORTED, lr)["loss"])

    def runs(self, cell: Cell, part: str = "table") -> list[dict[str, Any]]:
        """-> the reported runs of a cell that are stored, one for each seed.

        Those with known values apart are of one machine: that of the first.
        """
        settings = cell._asdict() | {"base_and_data": self.seen}
        settings["steps"] = self.experiment.steps(cell.steps) if cell.steps else 0
        runs = [run for run in self.experiment.runs if settings.items() <= run.items()]
        if part == "values":
            runs = [run for run in runs if "values_apart" in run]
            runs = [run for run in runs if run["machine"] == runs[0]["machine"]]
        found = {run["seed"]: run for run in reversed(runs)}  # the first of each seed
        return [found[seed] for seed in self.experiment.seeds if seed in found]


def share(runs: list[dict[str, Any]], kind: str, slots: Collection[str]) -> str:
    """-> the percentage of known or new values of these slots that the test answers state."""
    shares = []
    for run in runs:
        some = [n for slot, n in run["test_values"][kind].items() if slot in slots]
        right, n = map(sum, zip(*some)) if some else (0, 0)
        shares += [100 * right / n] if n else []
    return spread(shares, 0) if shares else "–"


def machines(runs: list[dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(run["machine"].split(" @ ")[0].split(",")[0] for run in runs))


def values_table(e2e: E2E) -> str:
    """-> how many known and new values the test answers state, new ones slot by slot.

    Levels are prices, ratings and the like. Training has all of these.
    """
    rows = []
    for cell in e2e.cells("values"):
        runs = e2e.runs(cell, "values")
        if not runs:
            continue
        row = [label(cell), str(len(runs))]
        row += [spread([run[key] for run in runs], 1) for key in ("bleu", "test_bleu")]
        row.append(share(runs, "known", LEVELED))
        row.append(share(runs, "known", COPIED))
        rows.append(row + [share(runs, "new", [slot]) for slot in COPIED])
    header = ["method", "runs", "BLEU", "BLEU, test", "levels %", "known values %"]
    new = [f"new {slot} %" for slot in ("names", "types", "foods", "neighbours")]
    return markdown(header + new, rows)


def table(e2e: E2E, part: str) -> str:
    """-> a part as a table: scores on validation data, for the part "table" on test data too."""
    test, scores = "", SCORES
    if part == "table":
        test = "test_"
        scores = {"bleu": "BLEU"} | {f"test_{key}": f"{name}, test" for key, name in SCORES.items()}
    length = statistics.mean(len(row.target) for row in e2e.rows["test" if test else "validation"])
    rows = []
    for cell in e2e.cells(part):
        runs = e2e.runs(cell)
        if not runs:
            continue
        trained, losses = runs[0]["trained"], [run[f"{test}loss"] for run in runs]
        row = [label(cell), f"{trained:,}", f"{100 * trained / e2e.n_base:.3g} %"]
        row += [spread([run["context"] for run in runs], 0)]
        row += [spread(losses, 2), spread([loss * length for loss in losses], 0)]
        row += [spread([run[score] for run in runs], 1) for score in scores]
        rows.append([*row, str(len(runs)), machines(runs)])
    header = ["method", "numbers trained", "share", "context"]
    header += [f"loss {unit}" + (", test" if test else "") for unit in ("a token", "an answer")]
    return markdown([*header, *scores.values(), "runs", "machine"], rows)


def starts_table(e2e: E2E) -> str:
    """-> what a prefix's start does, before training and after SHORT steps."""
    rows = []
    for cell in e2e.cells("start"):
        runs = e2e.runs(cell)
        if runs:
            row = [cell.init, spread([run["start"] for run in runs], 2), f"{runs[0]['lr']:g}"]
            row.append(spread([run["loss"] for run in runs], 3))
            row += [spread([run["bleu"] for run in runs], 1), str(len(runs)), machines(runs)]
            rows.append(row)
    header = ["start", "loss before training", "learning rate", "loss", "BLEU", "runs", "machine"]
    return markdown(header, rows)


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
            steps[label(cell)] = partial(step, model, adapters, batch, optimizer)
            kept = kept_for_backward(model, partial(forward, model, adapters, batch))
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


def draw_dumbbells(e2e: E2E, axis: Any) -> None:
    """A dumbbell a method, from BLEU on validation data to BLEU on test data."""
    cells = [cell for cell in e2e.cells("table") if cell.steps and e2e.runs(cell)]
    y, ticks = -1.0, {}
    for changes, title in ((False, "the weights stay frozen"), (True, "the weights change")):
        y += 1
        axis.text(0.01, y, title, transform=axis.get_yaxis_transform(), weight="bold", va="center")
        for cell in [cell for cell in cells if (cell.method in CHANGING) == changes]:
            y += 1
            ticks[y], own = label(cell), colour(NAMES[cell.method])
            before, after = ([run[key] for run in e2e.runs(cell)] for key in ("bleu", "test_bleu"))
            ends = [statistics.mean(before), statistics.mean(after)]
            axis.plot(ends, [y, y], "-", color=own, linewidth=4, alpha=0.5)
            axis.plot(ends[0], y, "o", markersize=11, color=own, markerfacecolor="white")
            axis.plot(ends[1], y, "o", markersize=11, color=own)
            axis.annotate(f"−{ends[0] - ends[1]:.1f}", (max(ends) + 1, y), va="center")
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.set(xlabel="BLEU, means of runs", xlim=(50, 73), ylim=(y + 0.7, -0.7))
    axis.set_title("BLEU lost from validation (hollow) to test data (filled)", loc="right")


def own_flags(add: Any) -> None:
    add("--data", required=True, help="JSONL of pairs to train and validate on")
    add("--test", required=True, help="JSONL of pairs to test on")
    parts = [*PARTS, "plateau", "costs"]
    help_text = f"(default: {' '.join(parts)})"
    add("--parts", nargs="+", choices=parts, default=parts, help=help_text)
    add("--report", action="store_true", help="no new run, only tables and figures of stored ones")


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv, own_flags)
    if sacrebleu is None:
        raise ValueError("sacrebleu is missing: pip install -r classroom/requirements.txt")
    e2e, parts = E2E(experiment), experiment.args.parts
    for part in [] if experiment.args.report else parts:
        for cell in e2e.cells(part):  # one after the other, so that its seeds share a machine
            lr = e2e.rate(cell)
            for seed in experiment.seeds:
                e2e.run(cell, seed, lr, apart=part == "values")
    texts = {"plateau": plateaus, "costs": costs, "values": values_table, "start": starts_table}
    for part in parts:
        text = texts.get(part, partial(table, part=part))(e2e)
        replace_file(experiment.out / f"e2e_{part}.md", text.encode())
        say(f"\n{part}\n\n{text}")
        path = experiment.out / f"e2e_{part}.png"
        if part == "table":
            figure(path, lambda axes: draw_dumbbells(e2e, axes[0][0]), 1, (9, 4.5))
    records = list(e2e.references["test"])
    new = sum(not values_of(record) <= e2e.known for record in records)
    say(f"{new} of {len(records)} test records have a value that no training record has")


if __name__ == "__main__":
    run_command(main)
