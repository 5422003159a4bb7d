"""docs/findings.md and the classroom's experiments: what they say of the runs is so in the runs.

Digits are looked up in the stored tables. Words that compare, such as «alone», «in every pair» or
«longer», stand below beside a computation. Runs are compared in pairs, of one base or seed.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise
from operator import lt as less
from pathlib import Path
from statistics import mean, median

import exp1_demand
import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "classroom" / "results"
FINDINGS = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
CLASSROOM = (ROOT / "classroom" / "README.md").read_text(encoding="utf-8")
EXPERIMENTS = CLASSROOM.split("# Experiments")[1]
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w]|[.,]\d)")
NEVER = float("inf")


@cache  # the claims read each file some hundred times
def stored(name: str, folder: Path = RESULTS) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def table(name: str) -> dict[str, dict[str, str]]:
    """A stored table -> its cells by the first cell and the heading."""
    return rows_in((RESULTS / f"{name}.md").read_text(encoding="utf-8"))


def rows_in(page: str) -> dict[str, dict[str, str]]:
    lines = [line for line in page.splitlines() if line.startswith("|")]
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(heads, row)) for row in rows}


def one_line(page: str) -> str:
    return " ".join(page.split())


def sentences_of(page: str) -> list[str]:
    """-> the sentences of a page, without code, tables, headings and addresses."""
    page = re.sub(r"^(    .*|\|.*|#.*|!\[.*)$", "", page, flags=re.MULTILINE)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)
    paragraphs = re.split(r"\n\s*\n|\n(?=- |\d+\. )", page)
    parts = (re.split(r"(?<=[.!?:])\**\s+", one_line(paragraph)) for paragraph in paragraphs)
    return [sentence for part in parts for sentence in part if re.search(r"\w", sentence)]


def between(numbers: list[float], digits: str = ".2f") -> str:
    return f"{min(numbers):{digits}} to {max(numbers):{digits}}"


def by_seed(runs: list[dict], seeds: Sequence[int] = range(3), **cell: object) -> list[dict]:
    """-> the reported runs of a cell, in the order of their seeds, which are those of bases too."""
    found = [run for run in runs if cell.items() <= run.items() and run.get("seed") in seeds]
    return sorted(found, key=lambda run: run["seed"])


# ------------------------------------------------------------------------------ the stored runs


E2E = [run for run in stored("e2e")["runs"] if run.get("steps") and "test_bleu" in run]
TABLED = [run for run in E2E if "values_apart" not in run]
APART = [run for run in stored("e2e")["runs"] if "test_values" in run]
CHANGED = ("lora", "full")  # methods that change the weights
LOST, LOST_CHRF = (
    {
        changes: [
            run[score] - run[f"test_{score}"]
            for run in TABLED if (run["method"] in CHANGED) == changes
        ]
        for changes in (False, True)
    }
    for score in ("bleu", "chrf")
)  # fmt: skip
LAPTOP, SERVER, GPU = (
    {row["what"]: row for row in stored(f"benchmark-{kind}", ROOT / "tests")["comparison"]}
    for kind in ("AVX2", "AVX512", "NVIDIA-H200")
)
COMPARE = stored("compare")
TASKS = ("sentiment", "sentence", "chat", "verdict", "shifted")


def steps_ratio(*benchmarks: dict[str, dict]) -> list[float]:
    """-> how many times as long a soft prompt's step takes as that of a prefix of its length."""
    return [
        rows[what]["here"] / rows[what.replace("soft_prompt", "prefix")]["here"]
        for rows in benchmarks for what in rows
        if re.match(r"1\d\dM soft_prompt .* step$", what)
    ]  # fmt: skip


def peak_ratio() -> list[float]:
    """-> how much memory a prefix takes at the peak, against a soft prompt of its length."""
    return [
        rows[f"{size} prefix P=20 float32 peak memory"]["here"]
        / rows[f"{size} soft_prompt P=20 float32 peak memory"]["here"]
        for rows in (LAPTOP, SERVER) for size in ("124M", "135M")
    ]  # fmt: skip


def scores(method: str, size: int, key: str) -> list[float]:
    """-> one score of a cell of E2E's table, seed by seed."""
    return [run[key] for run in by_seed(TABLED, method=method, size=size)]


def new_stated(slot: str, method: str, size: int) -> list[float]:
    """-> the percentage of a slot's new values that the test answers state, seed by seed."""
    runs = by_seed(APART, method=method, size=size)
    return [100 * right / n for right, n in (run["test_values"]["new"][slot] for run in runs)]


def lost_apart(method: str) -> list[float]:
    """-> the BLEU that the runs with new values apart lose from validation to test."""
    return [run["bleu"] - run["test_bleu"] for run in by_seed(APART, method=method)]


def from_start(start: str, seeds: Sequence[int] = range(3)) -> list[float]:
    """-> the validation losses of SmolLM2's prefixes that began so, after 50 steps of E2E."""
    runs = by_seed(stored("e2e")["runs"], seeds, method="prefix", init=start, steps=50)
    return [run["loss"] for run in runs]


def at_best(start: str) -> float:
    """-> the lowest of such losses in the search of a rate."""
    return min(from_start(start, [100]))


def of_facts(
    N: int, method: str, width: int, steps: int, seeds: Sequence[int] = range(3)
) -> list[float]:
    """-> the percentages of new records right on bases so wide, pretrained for so many steps."""
    cell = {"base": [width, steps], "demand": f"{N} facts", "method": method}
    runs = [run for run in stored("exp9_size")["runs"] if cell.items() <= run.items()]
    return [run["test"] for run in by_seed(runs, seeds, lr=by_seed(runs)[0]["lr"])]


def starts_in_order() -> bool:
    """-> whether text, words, zeros or noise of 0.02, noise of 1 stand so in every pair."""
    between = [from_start(start) for start in ("zero", "random, 0.02")]
    return all_less(from_start("text"), from_start("words")) and all(
        all_less(from_start("words"), some) and all_less(some, from_start("random, 1"))
        for some in between
    )


HARD = ("route-8", "route-36", "fact-36")
PREFIX, STACK, SOFT_PROMPT, SHORT = (
    ("prefix", 8),
    ("both", 7),
    ("soft_prompt", 64),
    ("soft_prompt", 20),
)
LORA, FULL = ("lora", 4), ("full", 0)


def solved(demand: str, method: str, size: int) -> list[float]:
    """-> the steps until a demand was learned, base by base."""
    runs = by_seed(stored("exp1_demand")["runs"], demand=demand, method=method, size=size)
    return [run["steps"] if run["solved"] else NEVER for run in runs]


def on_new(demand: str, method: str, size: int) -> list[float]:
    """-> the percentage of new records that are right at the end of a run, base by base."""
    return experiment("exp1_demand", "test", demand=demand, method=method, size=size)


def prefix_is_sooner(*sizes: int) -> bool:
    """-> whether a prefix of 8 is, in each pair, than soft prompts of these sizes."""
    return all(
        all_less(solved(demand, "prefix", 8), solved(demand, "soft_prompt", size))
        for demand in HARD for size in sizes
    )  # fmt: skip


def compared(task: str, method: str, key: str = "exact_match") -> list[float]:
    """-> one value of the reported runs of compare.py, seed by seed."""
    reported = [run for run in COMPARE["runs"] if "exact_match" in run]  # a search has no test
    return [run[key] for run in by_seed(reported, range(9), task=task, method=method)]


def experiment(name: str, key: str, **cell: object) -> list:
    """-> one value of an experiment's reported runs, base by base."""
    return [run[key] for run in by_seed(stored(name)["runs"], **cell)]


def all_less(some: list[float], others: list[float]) -> bool:
    """-> whether it is less in every pair."""
    return len(some) == len(others) == 3 and all(a < b for a, b in zip(some, others))


def dials(method: str) -> list[dict]:
    """-> the runs of a method whose strength was turned, in one order of tasks and bases."""
    runs = [run for run in stored("exp3_dial")["runs"] if run["method"] == method and "way" in run]
    return sorted(runs, key=lambda run: (run["task"], run["seed"]))


def largest_steps(method: str) -> list[float]:
    """-> by how many points the share rises at most, from one scale to the next up to 1."""
    ways = [run["way"][:5] for run in dials(method)]
    return [max(b - a for a, b in pairwise(way)) for way in ways]


def same_reply(demand: str) -> list[float]:
    """-> the percentage of new records that the commoner reply alone gets right, base by base."""
    demand, shares = exp1_demand.DEMANDS[demand], []
    for seed in range(3):
        examples = exp1_demand.examples_of(demand, "test", 300, seed)
        replies = Counter(example.target.split()[0] for example in examples)
        shares.append(100 * max(replies.values()) / 300)
    return shares


def switched(method: str, forms: int = 8) -> list[dict]:
    """-> the reported runs that switch between some forms by a word, base by base."""
    return by_seed(stored("exp8_switch")["runs"], forms=forms, method=method)


def switching() -> str:
    """-> after how many steps they do."""
    some = [
        ", ".join("> " * (not run["solved"]) + f"{run['steps']:,}" for run in switched(method))
        for method in ("prefix", "soft_prompt")
    ]
    steps = f"8 forms by a word: {some[0]} steps; soft prompt {some[1]}"
    return f"{steps}. As a dial, both act like switches"


# -------------------------------------------------------------------------------- the verdicts


def test_the_verdicts_are_those_of_the_runs():
    """Eight claims. Each has a verdict, one word first, and the number that it rests on."""
    shares = re.findall(
        r"^\| (?:GPT-2|SmolLM2-135M|Llama 3.2 1B) \| (.+?) \| (.+) \|$",
        (RESULTS / "compare.md").read_text(encoding="utf-8"), re.M,
    )  # fmt: skip
    share = {"prefix": [], "soft prompt": []}
    for method, percents in shares:
        share[method] += [float(cell.removesuffix(" %")) for cell in percents.split(" | ")]
    e2e = table("e2e_table")
    right = [between(on_new("route-432", *cell), ".0f") for cell in (PREFIX, SOFT_PROMPT, LORA)]
    routes = (
        "432 routes, after at most 12,000 steps: prefix {} % right, soft prompt {} %, LoRA {} %"
    )
    stack = e2e["prefix + soft prompt of 9 + 20"]["BLEU, test"]
    alone = e2e["prefix of 10"]["BLEU, test"]
    expected = {
        "A prefix trains": ("depends", f"{between(share['prefix'], 'g')} %"),
        "A soft prompt trains": ("depends", f"{between(share['soft prompt'], 'g')} %"),
        "A prefix needs more memory": (
            "depends",
            f"at the peak, {between(peak_ratio())} of a soft prompt's",
        ),
        "Complex tasks": ("depends", routes.format(*right)),
        "A soft prompt is cheaper": (
            "no",
            f"{between(steps_ratio(LAPTOP, SERVER))} of a prefix's step",
        ),
        "Simple tasks": ("yes", "100 % with 768 numbers"),
        "A prefix gives": ("depends", switching()),
        "Combining both": ("not seen", f"BLEU {stack}; prefix alone {alone}"),
    }
    verdicts = rows_in(FINDINGS.split("\n\nEvery number")[0])
    assert len(verdicts) == 8
    for begin, (verdict, number) in expected.items():
        (row,) = (row for claim, row in verdicts.items() if claim.startswith(begin))
        assert (row["verdict"], row["the number"]) == (verdict, number)
    words = {"yes", "no", "depends", "not seen", "undecided"}
    assert {row["verdict"] for row in verdicts.values()} <= words
    assert {n for task in TASKS[:4] for n in compared(task, "soft_prompt")} == {100}
    assert compared("sentiment", "soft_prompt", "trained") == 3 * [768]


# ---------------------------------------------------------------------------------- the digits


def test_every_table_of_the_pages_is_a_stored_one():
    """No cell was typed, but in the table of verdicts."""
    results = "\n".join(path.read_text(encoding="utf-8") for path in RESULTS.glob("*.md"))
    for page in (FINDINGS.split("\n\nEvery number")[1], EXPERIMENTS):
        for some in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
            assert some in results, some


def derived_numbers() -> set[str]:
    """-> what the findings say that stands in no table, made of the runs."""
    numbers = []
    for lost in [*LOST.values(), *LOST_CHRF.values()]:
        numbers += [f"{edge(lost):.1f}" for edge in (min, max)]
    for changes in (False, True):
        numbers += [f"{edge(lost_on_one_machine()[changes]):.1f}" for edge in (min, max)]
    for benchmarks in ((LAPTOP, SERVER), (GPU,)):
        numbers += [f"{edge(steps_ratio(*benchmarks)):.2f}" for edge in (min, max)]
    numbers += [f"{edge(peak_ratio()):.2f}" for edge in (min, max)]
    numbers.append(f"{median(steps_ratio(LAPTOP, SERVER)):.2f}")
    at_one_rate = {"task": "shifted", "method": "prefix", "lr": 0.3}
    for run in COMPARE["runs"]:
        if at_one_rate.items() <= run.items():  # of the fourth base, and of the three others
            numbers.append(f"{run['validation_exact']:.0f}")
    means = [mean([run["bleu"] for run in cell]) for cell in prefixes()]
    numbers.append(f"{max(means) - min(means):.1f}")
    numbers.append(f"{GPU['135M soft_prompt P=20 float32 step']['/full']:.2f}")
    costs = COMPARE["costs"]
    tokens = [cost["token"] / costs["none"]["token"] for cost in costs.values()]
    for demand, cells in (
        ("route-432", (PREFIX, STACK, SOFT_PROMPT, SHORT, LORA, FULL)),
        ("xor-36", (PREFIX, STACK, SOFT_PROMPT, SHORT, LORA, FULL)),
    ):
        for cell in cells:
            numbers += [f"{n:.0f}" for n in on_new(demand, *cell)]
            numbers += [f"{n:,}" for n in solved(demand, *cell)]
    return set(numbers) | {f"{edge(tokens):.2f}" for edge in (min, max)}


def lost_on_one_machine() -> dict[bool, list[float]]:
    """-> BLEU lost from validation to test in seed 0, by whether the weights change."""
    runs = [run for run in TABLED if run["seed"] == 0]
    assert len({run["machine"] for run in runs}) == 1 and len(runs) == 8
    return {
        changes: [
            run["bleu"] - run["test_bleu"] for run in runs if (run["method"] in CHANGED) == changes
        ]
        for changes in (False, True)
    }


def prefixes() -> list[list[dict]]:
    """-> the reported runs of E2E's prefixes, length by length."""
    runs = [run for run in stored("e2e")["runs"] if run.get("init") == "text"]
    runs = [run for run in runs if "values_apart" not in run and "bleu" in run]
    return [by_seed(runs, method="prefix", size=size, steps=200) for size in (1, 5, 10, 20)]


PARTS = {  # a section of the findings -> the scripts and tables that it reports
    "Usual tasks on the small base": ("compare",),
    "Real language: E2E": ("e2e",),
    "The claims, one by one": (
        "exp1_demand",
        "compare",
        "e2e",
        "exp8_switch",
        "exp6_request",
    ),
    "What each demand needs": ("exp1_demand",),
}
PAPERS = {"2017", "2021", "6.4", "70.3", "68.8", "62.2", "70.4"}  # what they report
COUNTS = {"4,672", "547", "500", "484", "20"}  # of E2E: pairs, records, test ones, new ones, names
CLAIMED = {"0.1", "0.01"}  # percent, of shares


@pytest.mark.parametrize("part", PARTS)
def test_every_number_of_the_findings_was_measured(part):
    """To the digits shown, it is in a table or the script of its part, or made of the runs."""
    text = FINDINGS.split(f"## {part}")[1].split("\n## ")[0]
    scripts = [ROOT / "classroom" / f"{script}.py" for script in PARTS[part]]
    sources = [path.read_text(encoding="utf-8") for path in scripts if path.exists()]
    known = "".join(sources).replace("_000", ",000")
    for script in PARTS[part]:
        known += "".join(path.read_text(encoding="utf-8") for path in RESULTS.glob(f"{script}*.md"))
    said = set(NUMBER.findall(" ".join(sentences_of(text))))
    assert said
    extra = derived_numbers() | PAPERS | COUNTS | CLAIMED
    missing = said - set(NUMBER.findall(known)) - extra
    assert not missing


# ----------------------------------------------------------------------------------- the words


@cache
def claims_of_the_findings() -> dict[str, bool]:
    """-> words of docs/findings.md -> whether the runs say so."""
    frozen, changed = LOST[False], LOST[True]
    seed_0 = lost_on_one_machine()
    five, ten = scores("prefix", 5, "test_bleu"), scores("prefix", 10, "test_bleu")
    stack = scores("both", 9, "test_bleu")
    full = scores("full", 0, "test_bleu")
    lora, lora_4 = (scores("lora", rank, "test_bleu") for rank in (2, 4))
    twenty, long = scores("soft_prompt", 20, "test_bleu"), scores("soft_prompt", 200, "test_bleu")
    demands = stored("exp1_demand")["runs"]
    unsolved = all(
        solved("route-432", *cell) == 3 * [NEVER] for cell in (PREFIX, STACK, SOFT_PROMPT, SHORT)
    )
    reported = [run for run in demands if run["seed"] < 3 and run["demand"] in ("route-1", *HARD)]
    others = [("prefix", 5), ("prefix", 10), ("both", 9), ("lora", 2), ("lora", 4), ("full", 0)]
    losses = [scores(*cell, "test_loss") for cell in [*others[:-1], ("soft_prompt", 20)]]
    rest = [scores(*cell, "test_bleu") for cell in [*others, ("soft_prompt", 200)]]
    shifted = sum(map(less, compared("shifted", "prefix"), compared("shifted", "both")))
    neighbours = [new_stated("near", *cell) for cell in (("prefix", 10), ("lora", 2), ("full", 0))]
    prefix_loss = scores("prefix", 10, "test_loss")
    trained = [*others, ("soft_prompt", 20), ("soft_prompt", 200)]
    bleu = {cell: mean(scores(*cell, "bleu")) for cell in trained}
    return {
        "All methods were done with up to 36 routes and 36 facts": len(reported) == 3 * 6 * 4
        and all(run["solved"] for run in reported),
        "no prefix and no soft prompt was done after 12,000 steps": unsolved,
        "With 432 routes no prefix and no soft prompt is done": unsolved,
        "54 to 65 %, less in every pair": all_less(
            on_new("route-432", *SOFT_PROMPT), on_new("route-432", *PREFIX)
        ),
        "less than the prefix in every pair": all(
            all_less(on_new("route-432", *cell), on_new("route-432", *PREFIX))
            for cell in (SOFT_PROMPT, SHORT)
        ),
        "was done on every base, with 96 to 98 %": max(solved("route-432", *LORA)) < NEVER,
        "With 432 routes they are done on every base": all(
            max(solved("route-432", *cell)) < NEVER for cell in (LORA, FULL)
        ),
        "In xor no soft prompt is done": solved("xor-36", *SOFT_PROMPT) + solved("xor-36", *SHORT)
        == 6 * [NEVER],
        "LoRA learned it on all": max(solved("xor-36", *LORA)) < NEVER,
        "later on the two bases where the prefix is done": [
            prefix < stack
            for prefix, stack in zip(solved("xor-36", *PREFIX), solved("xor-36", *STACK))
        ] == [True, True, False],
        "there is no demand that the stack learns sooner in more than one pair of three": max(
            sum(map(less, solved(demand, *STACK), solved(demand, *PREFIX)))
            for demand in ("route-1", *HARD, "route-432", "xor-36")
        ) == 1,
        "a prefix learned it on two bases and a soft prompt on none": [
            sum(steps < NEVER for cell in cells for steps in solved("xor-36", *cell))
            for cells in ((PREFIX,), (SOFT_PROMPT, SHORT))
        ] == [2, 0],
        "a prefix of 8 gets there sooner than a soft prompt of 20 or of 64, in every pair": (
            prefix_is_sooner(20, 64)
        ),
        "takes 50 steps or fewer with every method": {
            run["steps"] for run in reported if run["demand"] == "route-1"
        } == {50},
        "sooner than a soft prompt* in every pair, on route 8, route 36 and fact 36": (
            prefix_is_sooner(20, 64)
        ),
        "*LoRA and full fine-tuning get there sooner than a prefix* in every pair": all(
            all_less(solved(demand, *cell), solved(demand, "prefix", 8))
            for demand in HARD for cell in (("lora", 4), ("full", 0))
        ),
        "on route 36 it gets there sooner in one pair of three, on fact 36 in one": [
            sum(map(less, solved(demand, "both", 7), solved(demand, "prefix", 8)))
            for demand in ("route-36", "fact-36")
        ] == [1, 1],
        "From 4 forms on, the prefix gets there sooner on every base": all(
            all_less(
                *([run["steps"] for run in switched(m, n)] for m in ("prefix", "soft_prompt"))
            )
            for n in (4, 8)
        ),
        "against 1.46 [1.45–1.46], in every pair": all_less(
            prefix_loss, scores("soft_prompt", 200, "test_loss")
        ),
        "higher in two pairs of three, by less than a point": sum(a > b for a, b in zip(stack, ten))
        == 2 and max(abs(a - b) for a, b in zip(stack, ten)) < 1,
        "Every trained run loses BLEU from validation to test": min(frozen + changed) > 0,
        "In every trained run of this table, methods that leave the weights alone lose": max(frozen)
        < min(changed),
        "In the further runs below they overlap by BLEU, too": min(lost_apart("lora"))
        < max(lost_apart("prefix")),
        "On the one machine where all ran": max(seed_0[False]) < min(seed_0[True]),
        "All three are less in every pair": all(
            all_less(some, other) for some in (full, lora, lora_4) for other in (five, ten, stack)
        ),
        "full fine-tuning stays ahead in every pair": all(
            all_less(scores("full", 0, "test_loss"), some) for some in losses
        ),
        "Further runs, three a method and all on one machine": len(APART) == 9
        and len({run["machine"] for run in APART}) == 1,
        "a prefix states more than LoRA and full fine-tuning in every pair": all(
            all_less(new_stated(slot, *cell), new_stated(slot, "prefix", 10))
            for slot in ("Type", "food") for cell in (("lora", 2), ("full", 0))
        ),
        "the prefix is ahead of full fine-tuning in two pairs of three here": sum(
            prefix["test_bleu"] > full["test_bleu"]
            for prefix, full in zip(
                by_seed(APART, method="prefix", size=10), by_seed(APART, method="full")
            )
        ) == 2,
        "The text has the lowest loss in every pair, words the next, and noise of 1 the highest": (
            starts_in_order()
        ),
        "words were ahead of the text, by a hundredth": (
            0.005 < at_best("text") - at_best("words") < 0.015
        ),
        "Zeros and noise of 0.02 share the place between": sum(
            map(less, from_start("zero"), from_start("random, 0.02"))
        ) in (1, 2),
        "noise of 1 was done sooner on each of three bases": all_less(
            *(
                [run["steps"] for run in by_seed(stored("exp7_start")["runs"], start=start)]
                for start in ("random, 1", "text")
            )
        ),
        "full fine-tuning copies new names about as well": all(
            abs(some - other) < 5
            for some, other in zip(new_stated("name", "full", 0), new_stated("name", "prefix", 10))
        ),
        "the means are close, but the runs of each method lie far apart": all(
            max(some) - min(some) > 20 for some in neighbours
        ) and max(map(mean, neighbours)) - min(map(mean, neighbours)) < 6,
        "full fine-tuning has the highest mean BLEU": max(bleu, key=bleu.get) == ("full", 0),
        "Of what is trained, a soft prompt of 20 has the lowest": min(bleu, key=bleu.get)
        == ("soft_prompt", 20),
        "behind all others that are trained, in every pair": all(
            all_less(twenty, some) for some in rest
        ),
        "more BLEU on test in one pair of three": sum(a > b for a, b in zip(long, ten)) == 1,
        "Two of three pairs join two machines": [
            run["machine"] == other["machine"]
            for method, size in (("full", 0), ("lora", 2), ("lora", 4))
            for run, other in zip(
                by_seed(TABLED, method=method, size=size),
                by_seed(TABLED, method="prefix", size=10),
            )
        ] == 3 * [True, False, False],
        "By chrF the two groups just overlap": min(LOST_CHRF[True])
        < max(LOST_CHRF[False]) < mean(LOST_CHRF[True]),
        "In seed 0 alone, all methods ran on one": True,  # lost_on_one_machine asserts it
        "100 % exact match with every seed": all(
            run["exact_match"] == 100
            for run in COMPARE["runs"] if "exact_match" in run and run["task"] in TASKS[:4]
        ),
        "which is more in every pair": all(
            all_less(*(compared(task, method, "loss") for method in ("prefix", "soft_prompt")))
            for task in TASKS[:4]
        ),
        "more in two pairs of three": shifted == 2,
        "On *shifted*, with fewer numbers, it has more right in two pairs of three": shifted == 2,
        "A prefix's largest step up is smaller in all six pairs": (
            all(map(less, largest_steps("prefix"), largest_steps("soft_prompt")))
        ),
        "it breaks where the soft prompt does not": {
            method: sum(run["exact by way"][-1] < 100 for run in dials(method))
            for method in ("prefix", "soft_prompt")
        } == {"prefix": 5, "soft_prompt": 0},
        "One and the same reply to everything would have as much": all(
            abs(share - on_new("xor-36", *cell)[seed]) < 0.4
            for cell in (SOFT_PROMPT, SHORT) for seed, share in enumerate(same_reply("xor-36"))
        ),
        "That was so with 432 routes for all but full fine-tuning, and in xor for prefix": {
            (run["demand"], run["method"])
            for run in demands if run["seed"] == 100 and run["demand"] in ("route-432", "xor-36")
        } - {
            (run["demand"], run["method"])
            for run in demands if run["seed"] == 100 and run["solved"]
        } == {("route-432", method) for method in ("prefix", "soft_prompt", "both", "lora")}
        | {("xor-36", method) for method in ("prefix", "soft_prompt", "both")},
    }  # fmt: skip


WORDS = r"alone|every (?:single )?(?:run|pair|base|seed)|overlaps?|sooner|longer|ahead|behind"
WORDS += r"|highest|lowest|pairs? of three|needs?|harder|easier"
COMPARING = re.compile(rf"\b(?:{WORDS})\b")
PLAIN = (  # sentences that compare no runs
    "«longer», «alone», «in every pair».", "hold the lowest and the highest run",
    "the cheapest method that keeps up",
    "to predict the text alone", "we saw no cost behind 10 virtual tokens",
    "the lowest loss decided", "Behind 500, the first token",
    "Learning the inputs only is far behind", "A prefix needs more memory to train:",
    "Complex tasks need a prefix:",
    "a prefix with a soft prompt behind it",
)  # fmt: skip


def unsupported(page: str, claims: dict[str, bool]) -> list[str]:
    """-> sentences with a word that compares, but without a claim that is computed."""
    found = [sentence for sentence in sentences_of(page) if COMPARING.search(sentence)]
    return [s for s in found if not any(part in s for part in (*claims, *PLAIN))]


@pytest.mark.parametrize("claim", claims_of_the_findings())
def test_words_of_the_findings_are_so_in_the_runs(claim):
    """The page says it, and the runs do."""
    assert claim in one_line(FINDINGS) and claims_of_the_findings()[claim]


def test_no_word_of_the_findings_compares_without_a_computation():
    """«Alone», «longer», «in every pair» and their like stand in no other sentence."""
    assert not unsupported(FINDINGS, claims_of_the_findings())


@cache
def claims_of_the_classroom() -> dict[str, bool]:
    """-> words of classroom/README.md -> whether the runs say so."""
    forgetting = stored("exp4_forgetting")["runs"]

    def loss(state: str, left_out: str = "") -> list[float]:
        others = [run for run in forgetting if is_other(run) and run["pair"] != left_out]
        return [mean(run[state] for run in others if run["seed"] == seed) for seed in range(3)]

    states = {state: loss(state) for state in ("frozen", "full", "on", "off")}
    distance = partial(experiment, "exp5_distillation", "divergence")
    taught = {n: distance(way="taught by the model with the text", size=n) for n in (2, 8, 16)}
    first, own = (distance(way=way, size=8) for way in ("the first words", "trained on the text"))
    nothing = distance(way="none")
    searched = by_seed(stored("exp5_distillation")["runs"], [100], way="trained on the text")
    rates = {run["lr"]: run["divergence"] for run in searched}
    return {
        "36 routes and 36 facts, and a prefix gets there sooner in every pair": prefix_is_sooner(
            64
        ),
        "LoRA and full fine-tuning are done on every base": all(
            max(solved("route-432", *cell)) < NEVER for cell in (LORA, FULL)
        ),
        "less on two bases, and more on one": sum(map(less, states["on"], states["full"])) == 2,
        "Without one of the eleven pairs, review → verdict, it is less on all three": all_less(
            loss("on", "review → verdict"), loss("full", "review → verdict")
        ),
        "the loss is that of the frozen base, in every run": states["off"] == states["frozen"],
        "less than half of the 0.44, in every pair": all_less(taught[2], [n / 2 for n in nothing]),
        "words of zeros and of noise of 0.02, and noise of 1 is last, in every pair": (
            starts_in_order()
        ),
        "in the search, each larger rate was worse": min(rates.values()) == rates[0.00012]
        and (larger := [rates[lr] for lr in sorted(rates) if lr >= 0.00012]) == sorted(larger),
        "hardly leaves that": max(abs(a - b) for a, b in zip(first, own)) < 0.02,
        "From 64 wide on, full fine-tuning has 99 to 100 %": all(
            99 <= round(mean(of_facts(144, "full", *base))) <= 100 for base in WIDER
        ),
        "less at 256 than at 64 in every pair, but more on the base of the search": all_less(
            of_facts(144, "prefix", 256, 120), of_facts(144, "prefix", 64, 240)
        )
        and of_facts(144, "prefix", 256, 120, [100]) > of_facts(144, "prefix", 64, 240, [100]),
        "A soft prompt of 20 has 15 to 17 % at each width": {
            round(mean(of_facts(144, "soft_prompt", *base))) for base in [(32, 960), *WIDER]
        }
        <= {15, 16, 17},
        "33 and 62 %, and stays behind at each": all(
            mean(of_facts(36, "soft_prompt", *base)) < mean(of_facts(36, "prefix", *base))
            for base in [(32, 960), *WIDER]
        ),
        "neither adapter more than 2 %": all(
            max(of_facts(N, method, 32, 120)) <= 2
            for N in (36, 144)
            for method in ("prefix", "soft_prompt")
        ),
        "the adapters do better in every pair with 144 facts": all(
            all_less(of_facts(144, method, 32, 120), of_facts(144, method, 32, 960))
            for method in ("prefix", "soft_prompt")
        ),
        "Full fine-tuning does worse in every pair": all_less(
            of_facts(144, "full", 32, 960), of_facts(144, "full", 32, 120)
        ),
        "16 have hardly less": abs(mean(taught[8]) - mean(taught[16])) < 0.005,
        "by nats, most of what the text does fits into a few tokens": all_less(
            taught[2], [n / 2 for n in nothing]
        ),
    }


WIDER = [(64, 240), (128, 120), (256, 120)]  # bases of experiment 9: width, steps of pretraining


def is_other(run: dict) -> bool:
    return not run["pair"].endswith("→ sentence")


CHECKED = ("1. ", "4. ", "5. ", "9. ")  # sections of the experiments


@pytest.mark.parametrize("claim", claims_of_the_classroom())
def test_words_of_the_experiments_are_so_in_the_runs(claim):
    """The page says it, and the runs do."""
    assert claim in one_line(EXPERIMENTS) and claims_of_the_classroom()[claim]


def test_no_word_of_the_experiments_compares_without_a_computation():
    """As on the page of findings."""
    parts = [part for part in EXPERIMENTS.split("\n## ") if part.startswith(CHECKED)]
    assert len(parts) == len(CHECKED)
    assert not [s for part in parts for s in unsupported(part, claims_of_the_classroom())]
