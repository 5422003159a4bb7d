"""The experiments of classroom/: each runs, and writes what it measured."""

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import common
import compare
import exp1_demand
import exp2_keys_and_values
import exp3_dial
import exp5_distillation
import exp6_request
import exp7_start
import exp8_switch
import pytest
import torch
from conftest import random_ids, random_model

from command.answers import CUT
from data import Row
from prefix import Prefix
from small_base.world import DOCUMENTS
from soft_prompt import SoftPrompt

pytestmark = pytest.mark.slow

CLASSROOM = Path(common.__file__).parent
NAMES = sorted(path.stem for path in CLASSROOM.glob("exp*.py"))
STORED = [  # those that have run to their end: only these have a table
    name
    for name in NAMES
    if (common.RESULTS / f"{name}.json").exists()
    and "table" in json.loads((common.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
]


def json_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def experiment(name, base, out) -> dict:
    argv = ["--quick", "--base", base, "--device", "cpu", "--out", str(out)]
    importlib.import_module(name).main(argv)
    return json_of(out / f"{name}.json")


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_prints_its_table_and_writes_it(name, base, tmp_path, capsys):
    """With question, command, seeds and every single run; and with matplotlib its figure."""
    found = experiment(name, base, tmp_path)
    printed = capsys.readouterr().out
    assert f"python classroom/{name}.py --quick" in found["command"] and found["seeds"] == [0]
    assert found["question"] in printed and found["runs"]
    assert all({"seed", "start"} & run.keys() for run in found["runs"])
    for row in found["table"]:
        assert "| " + " | ".join(row.values()) + " |" in printed
    assert (tmp_path / f"{name}.png").exists() == ("no figure" not in printed)


def test_a_stopped_experiment_goes_on_where_it_was(base, tmp_path, monkeypatch):
    """Runs are stored as they end. Run again, an experiment measures nothing and says the same."""
    done, looks_of = [], common.looks_of

    def counted(*given):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(given)
        return looks_of(*given)

    monkeypatch.setattr("common.looks_of", counted)
    with pytest.raises(KeyboardInterrupt):
        experiment("exp1_demand", base, tmp_path)
    assert len(json_of(tmp_path / "exp1_demand.json")["runs"]) == 3
    monkeypatch.setattr("common.looks_of", looks_of)
    found = experiment("exp1_demand", base, tmp_path)
    monkeypatch.setattr("common.looks_of", None)
    assert experiment("exp1_demand", base, tmp_path) == found


@pytest.mark.parametrize("N", [1, 8, 36, 432])
def test_a_key_decides_the_answer(N):
    """Each key has one answer in training and test; of routes, half of the keys have each form."""
    answers = {}
    for split, n in (("train", 9000), ("test", 500)):
        for example in exp1_demand.examples_of(exp1_demand.Demand("fact", N), split, n, seed=0):
            name, food = example.input.split()[4], example.input.split()[-3]
            area = example.target.split()[-2]
            answers.setdefault((name, food) if N > 36 else name, set()).add(area)
    assert len(answers) == N and all(len(some) == 1 for some in answers.values())
    examples = exp1_demand.examples_of(exp1_demand.Demand("route", 8), "train", 500, 0)
    routes = {example.input.split()[4]: example.target.split()[0] for example in examples}
    assert sorted(routes.values()) == 4 * ["Dear"] + 4 * ["Yes"]


def test_neither_field_alone_decides_an_xor():
    """Each name, and each food, has as many polite as terse answers; the two together have one."""
    seen = {}
    for example in exp1_demand.examples_of(exp1_demand.Demand("xor", 36), "train", 20000, seed=0):
        words = example.input.split()
        for key in (words[4], words[-3], (words[4], words[-3])):
            seen.setdefault(key, []).append(example.target.startswith("Yes"))
    for key, bits in seen.items():
        mean = sum(bits) / len(bits)
        assert mean in (0, 1) if isinstance(key, tuple) else 0.4 < mean < 0.6


def test_a_divergence_is_that_of_the_textbook():
    """It is Σ p · ln(p / q) over all answers, p behind the teacher; 0 from the teacher itself."""
    model = random_model()
    rows = [Row([1, 2, 3], [4, 5]), Row([6], [7, 8, 9])]
    own, taught = (Prefix.text(model, random_ids(5, seed=seed)).past_kv(model) for seed in (0, 1))
    terms, same = [], []
    for row in rows:
        idx, first = torch.tensor([row.source + row.target[:-1]]), len(row.source) - 1
        q, p = (model(idx, past_kv)[0][0, first:].softmax(dim=-1) for past_kv in (own, taught))
        terms += (p * (p / q).log()).sum(dim=-1).tolist()
        same += (p.argmax(dim=-1) == q.argmax(dim=-1)).tolist()
    divergence, agreed = exp5_distillation.divergence(model, rows, own, taught)
    assert divergence.item() == pytest.approx(sum(terms) / 5, abs=1e-5)
    assert agreed.item() == pytest.approx(sum(same) / 5)
    itself = exp5_distillation.divergence(model, rows, taught, taught)
    assert [value.item() for value in itself] == [0, 1]


def test_a_prefix_is_not_measured_on_what_it_was_taught_on(base, tmp_path):
    """A quarter of the questions is held out, and answers that were cut have no mark of it."""
    args = ["--base", base, "--device", "cpu", "--out", str(tmp_path)]
    module = exp5_distillation
    grid = module.Distillation(common.Experiment(module.__file__, module.__doc__, args))
    rows, held_out = ({tuple(row.source) for row in some} for some in grid.answered(0))
    assert len(rows) == 54 and len(held_out) == 18 and not rows & held_out
    assert grid.answered(1) != grid.answered(0)
    targets = [grid.tokenizer.decode(row.target) for some in grid.answered(0) for row in some]
    assert not any(CUT in target for target in targets)


@pytest.mark.parametrize("part", exp2_keys_and_values.FROZEN)
def test_what_is_not_trained_stays_as_it_starts(part):
    """Keys, values or the first token: bit for bit, while every other number moves."""
    model = random_model()
    prefix = Prefix.text(model, random_ids(4, seed=1))
    before, n = prefix.start.detach().clone(), exp2_keys_and_values.freeze(prefix, part)
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(random_ids(2, 6), prefix.past_kv(model))[0].square().mean().backward()
        optimizer.step()
    moved = prefix.start != before
    left = {"all": moved[:0], "values": moved[:, :, 0], "keys": moved[:, :, 1]}
    left["all but the first token"] = moved[0]
    assert not left[part].any() and moved.sum() == n == moved.numel() - left[part].numel()


def test_a_prefix_made_of_a_text_gets_the_attention_that_the_text_gets():
    """Its first token, as the text's first in the context. An even share is one of all in sight."""
    model, text = random_model(), random_ids(exp2_keys_and_values.P, seed=1)
    rows = [Row([1, 2, 3], [4, 5]), Row([6], [7, 8, 9])]
    joined = [Row(text.tolist() + row.source, row.target) for row in rows]
    prefix = Prefix.text(model, text)
    runs = [common.Run(model, [prefix], {"test": some}, None) for some in (rows, joined)]
    behind, within = map(exp2_keys_and_values.attention_of, runs)
    even, alone, first, virtual, others = exp2_keys_and_values.SHARES
    assert behind[virtual] == pytest.approx(within[alone], abs=0.011)
    assert behind[even] == pytest.approx(100 * (1 / 3 + 1 / 4 + 1 + 1 / 2 + 1 / 3) / 5, abs=0.01)
    assert 0 < behind[first] < behind[alone]
    assert 0 < behind[others] < 100 - behind[first] - behind[virtual]


def test_a_start_is_what_its_name_says():
    """A text, words of the task, zeros, or noise of the deviation in the name; of equal length."""
    model, rows = random_model(), [Row([1, 2, 3], [4, 5]), Row([6], [7, 8, 9])]
    run = common.Run(model, [Prefix.text(model, random_ids(10, seed=1))], {"train": rows}, None)

    def numbers(start):
        (prefix,) = exp7_start.started(copy.deepcopy(run), start, 0).adapters
        assert prefix.start.shape == run.adapters[0].start.shape
        return prefix.start

    assert torch.equal(numbers("text"), run.adapters[0].start)
    words = [Prefix.text(model, torch.tensor([i])).start[0] for i in range(1, 10)]
    assert any(torch.allclose(numbers("words")[0], word) for word in words)
    assert not numbers("zero").any()
    assert numbers("random, 1").std().item() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(50 * numbers("random, 0.02"), numbers("random, 1"))


@pytest.mark.parametrize("N", exp8_switch.COUNTS)
def test_a_code_word_decides_the_form(N):
    """Each word has one form in training and test, each form one word; only the seed says which."""
    forms = exp8_switch.KNOWN[: N // 2] + exp8_switch.FOREIGN[: N // 2]
    codes = []
    for seed in (0, 1):
        seen = set()
        for split in ("train", "test"):
            examples = exp8_switch.examples_of(N, split, 4 * N, seed)
            assert len({example.input.split()[1] for example in examples}) == N
            for i, example in enumerate(examples):
                seen.add((example.input.split()[1], forms[i % N], example.target.split()[0]))
        words, names, _ = zip(*seen)
        assert len(set(zip(words, names))) == len(set(words)) == len(set(names)) == N
        codes.append(dict(zip(words, names)))
    assert codes[0] != codes[1] and set(exp8_switch.WORDS) >= set(codes[0])
    documents = DOCUMENTS["review"]
    assert set(exp8_switch.KNOWN) == set(documents)
    assert not set(exp8_switch.FOREIGN) & set(documents)


def test_a_dial_at_one_is_the_adapter_and_at_zero_its_start():
    """Along the way; with its values at zero, a prefix keeps its keys."""
    model, scaled = random_model(), exp3_dial.scaled
    for kind in (Prefix, SoftPrompt):
        start, trained = (kind.text(model, random_ids(5, seed=seed)) for seed in (0, 1))
        ends = [scaled(trained, start, "way", scale) for scale in (0, 1, 0.5)]
        (begin,), (end,) = start.parameters(), trained.parameters()
        for some, expected in zip(ends, (begin, end, (begin + end) / 2)):
            torch.testing.assert_close(next(some.parameters()), expected)
    prefix = Prefix.text(model, random_ids(5))
    torch.testing.assert_close(scaled(prefix, prefix, "values", 1).start, prefix.start)
    without = scaled(prefix, prefix, "values", 0).start
    assert torch.equal(without[:, :, 0], prefix.start[:, :, 0]) and not without[:, :, 1].any()


def test_a_share_is_the_probability_of_the_first_token():
    """Its mean over the rows, in percent, as so many sampled answers would begin."""
    model, rows = random_model(), [Row([1, 2, 3], [4, 5]), Row([6], [7, 8])]
    prefix = Prefix.text(model, random_ids(5))
    chances = []
    for row in rows:
        logits, _ = model(torch.tensor([row.source]), prefix.past_kv(model))
        chances.append(logits[0, -1].softmax(dim=-1)[row.target[0]])
    assert exp3_dial.share(model, [prefix], rows) == pytest.approx(50 * sum(chances).item())
    shares = [10, 30, 25, 60, 90, 5, 5]
    assert exp3_dial.steps_of(shares) == [20, -5, 35, 30]


def test_requests_that_are_compared_have_one_answer(monkeypatch):
    """A prefix, a soft prompt and the text that they were made of give the same next token."""
    model = random_model()
    monkeypatch.setattr(exp6_request, "TEXT", 9)
    answers = {what: request() for what, request in exp6_request.requests(model, [7], 0).items()}
    first = [ids[0, -1] for what, ids in answers.items() if what.endswith("7, first")]
    assert len(first) == len(exp6_request.FIRST) - 1 and len(set(map(int, first))) == 1
    assert all(len(ids) == 1 for ids in answers.values()) and len(answers) == 2 + 4 + 3


def test_a_console_that_lacks_a_character_costs_no_result(base, tmp_path):
    """exp4 prints «→», which cp1252 lacks: another shows, and all that was measured is stored."""
    console = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    command = [sys.executable, str(CLASSROOM / "exp4_forgetting.py"), "--quick"]
    command += ["--base", base, "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=console, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"| table ? sentence |" in done.stdout
    assert len(json_of(tmp_path / "out" / "quick" / "exp4_forgetting.json")["runs"]) == 13


def test_the_results_are_written_before_they_are_shown(base, tmp_path, monkeypatch):
    """So a console or a figure that fails costs nothing."""

    def broken(*_):
        raise OSError("the console is gone")

    for show in ("markdown", "figure"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the console is gone"):
            patch.setattr(common, show, broken)
            experiment("exp4_forgetting", base, tmp_path / show)
        assert json_of(tmp_path / show / "exp4_forgetting.json")["runs"]


def test_quick_never_writes_over_what_was_measured(base, tmp_path, monkeypatch):
    """It writes into a folder of its own, and refuses the one of the results."""
    monkeypatch.chdir(tmp_path)
    importlib.import_module("exp4_forgetting").main(["--quick", "--base", base, "--device", "cpu"])
    assert (tmp_path / "out" / "quick" / "exp4_forgetting.json").exists()
    sentence = "--quick measures nothing, and .*results holds what was measured"
    with pytest.raises(ValueError, match=sentence):
        experiment("exp4_forgetting", base, common.RESULTS)


def test_a_file_of_results_has_a_run_a_line(tmp_path):
    """So a new run is one new line of a diff. The stored files are written so."""
    runs = [{"seed": 0, "curve": [[0, 1.5]]}, {"seed": 1, "curve": []}]
    found = {"question": "à → b?", "seeds": [0, 1], "runs": runs}
    common.write_json(tmp_path / "found.json", found)
    lines = (tmp_path / "found.json").read_text(encoding="utf-8").split("\n")
    assert json.loads("".join(lines)) == found
    assert '  {"seed": 1, "curve": []}' in lines and len(lines) == 9
    for path in common.RESULTS.glob("*.json"):
        common.write_json(tmp_path / path.name, json_of(path))
        assert (tmp_path / path.name).read_bytes() == path.read_bytes().replace(b"\r\n", b"\n")


# ---------------------------------------------------------- what the pages say is what was measured


PAGE = (CLASSROOM / "README.md").read_text(encoding="utf-8")
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w]|[.,]\d)")


def stored(name: str) -> str:
    return (common.RESULTS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", STORED)
def test_the_stored_table_is_that_of_the_stored_runs(name, base, tmp_path):
    """Run on a copy of its runs, the script writes the same table: no number in it was typed."""
    kept = {path.name: path.read_bytes() for path in common.RESULTS.glob(f"{name}.*")}
    command = json.loads(kept[f"{name}.json"])["command"].split()
    (tmp_path / f"{name}.json").write_bytes(kept[f"{name}.json"])
    argv = [*command[2:], "--base", base, "--device", "cpu", "--out", str(tmp_path)]
    importlib.import_module(name).main(argv)
    assert (tmp_path / f"{name}.md").read_bytes() == kept[f"{name}.md"]
    again, before = json_of(tmp_path / f"{name}.json"), json.loads(kept[f"{name}.json"])
    assert again["runs"] == before["runs"] and again["table"] == before["table"]


def test_the_stored_comparison_shows_its_runs():
    """Its tables are made of its runs, without those on which the learning rates were chosen."""
    found = json_of(common.RESULTS / "compare.json")
    shown = {task: {method: [] for method in compare.METHODS} for task in compare.DEFAULT_TASKS}
    for run in found["runs"]:
        if "exact_match" in run:  # those of a search meet no test data
            shown[run["task"]][run["method"]].append(run)
    tables = [compare.cost_table(found["costs"]), compare.share_table()]
    for table in (*tables, compare.quality_table(shown)):
        assert table in stored("compare")
    for task, methods in shown.items():
        sentence = compare.verdict(methods)
        assert found["verdicts"][task] == sentence and f"{task}: {sentence}\n" in stored("compare")


def test_every_table_of_the_page_is_a_stored_one():
    """No cell was typed."""
    results = "\n".join(path.read_text(encoding="utf-8") for path in common.RESULTS.glob("*.md"))
    for table in TABLE.findall(PAGE):
        assert table in results, table


def test_every_number_of_the_prose_is_in_a_stored_table():
    """What stands under «*We saw*» has only numbers of its experiment's table or script."""
    cases = []
    for part in PAGE.split("\n## "):
        name = part.split(".png")[0].split("results/")[-1]
        cases += [(name, text) for text in part.split("\n\n") if text.startswith("*We saw")]
    assert len(cases) >= 5
    for name, text in cases:
        known = stored(name) + (CLASSROOM / f"{name}.py").read_text(encoding="utf-8")
        missing = set(NUMBER.findall(text)) - set(NUMBER.findall(known))
        assert not missing, f"{name}: {missing} in {text}"


def dials() -> list[tuple[dict, dict]]:
    """-> the reported runs of a prefix and a soft prompt, in pairs of one task and base."""
    runs = [run for run in json_of(common.RESULTS / "exp3_dial.json")["runs"] if "way" in run]
    by_method = {"prefix": {}, "soft_prompt": {}}
    for run in runs:
        by_method[run["method"]][run["task"], run["seed"]] = run
    return [(run, by_method["soft_prompt"][key]) for key, run in by_method["prefix"].items()]


def test_what_is_said_of_switches_holds_in_each_pair():
    """By 4 and 8 words a prefix is sooner on every base; by 2, both need 100 steps or fewer."""
    runs = json_of(common.RESULTS / "exp8_switch.json")["runs"]
    runs = [run for run in runs if run["seed"] != common.UNREPORTED]
    steps = {(run["forms"], run["method"], run["seed"]): run["steps"] for run in runs}
    for seed in range(3):
        assert max(steps[2, method, seed] for method, _ in exp8_switch.SIZES) <= 100
        assert steps[4, "prefix", seed] < steps[4, "soft_prompt", seed]
        assert 2 * steps[8, "prefix", seed] < steps[8, "soft_prompt", seed]
    unsolved = [run for run in runs if not run["solved"]]
    found = [(run["forms"], run["method"], run["seed"]) for run in unsolved]
    assert found == [(8, "soft_prompt", 1)]


def test_what_is_said_of_dials_holds_in_each_pair():
    """Neither falls, a quarter does nearly all, the prefix's way is gentler and breaks sooner."""
    step = lambda shares: max(exp3_dial.steps_of(shares))  # noqa: E731
    assert len(dials()) == 6
    for prefix, prompt in dials():
        ways = (prefix["way"], prefix["values"], prompt["way"])
        assert all(min(exp3_dial.steps_of(shares)) > -0.15 for shares in ways)
        assert step(prefix["way"]) < step(prompt["way"])
        assert prefix["exact by values"][-1] == prompt["exact by way"][-1] == 100
        assert prefix["values"][1] > 90 and prompt["way"][1] > 85 and prefix["way"][-1] > 99
    assert sum(prefix["exact by way"][-1] < 100 for prefix, _ in dials()) == 5
    assert not all(step(prefix["values"]) < step(prompt["way"]) for prefix, prompt in dials())


def test_what_is_said_of_requests_holds_in_each_run():
    """At GPT-2's sizes, behind 500: text costs five times as much, adapters less than half more."""
    runs = json_of(common.RESULTS / "exp6_request.json")["runs"]
    runs = [run for run in runs if run["model"] == "GPT-2 small"]
    assert len(runs) == 5
    whats = ["none, first", *(f"{name} 500, first" for name in exp6_request.FIRST[1:])]
    for run in runs:
        none, *others = (run[what][1] for what in whats)
        prefix, prompt, cold, text = (other / none for other in others)
        assert 1.1 < prefix < 1.5 and 1.1 < prompt < 1.5 and text > 5 and cold > 5
        assert abs(cold / text - 1) < 0.15
    for run in runs:
        run["behind 10"] = [run[f"{name} 10, first"][1] for name in ("prefix", "soft prompt")]
    ratios = [time / run["none, first"][1] for run in runs for time in run["behind 10"]]
    assert min(ratios) < 1 < max(ratios)  # some are quicker than with nothing
    runs = json_of(common.RESULTS / "exp6_request.json")["runs"]
    runs = [r for r in runs if r["model"].startswith("SmolLM2") and r["kernels"] == "AVX512"]
    assert len(runs) == 3
    for run in runs:
        behind = min(run[f"{name} 500, first"][1] for name in ("prefix", "soft prompt"))
        assert behind > run["none, first"][1]


@pytest.mark.parametrize("name", STORED)
def test_the_readme_shows_each_experiment(name):
    """Its question and its figure; and the full results lie beside."""
    found = json_of(common.RESULTS / f"{name}.json")
    assert f"## {found['question']}\n\n![](results/{name}.png)" in PAGE
    assert (common.RESULTS / f"{name}.png").exists()
    assert found["command"].startswith(f"python classroom/{name}.py")


def test_words_that_compare_parts_and_starts_hold_for_each_pair():
    """A pair is two runs of one base. What was not solved counts as later than what was."""

    def steps(name: str, key: str, cell: str) -> list[float]:
        runs = json_of(common.RESULTS / f"{name}.json")["runs"]
        runs = [run for run in runs if run.get(key) == cell and run["seed"] < 3 and "lr" in run]
        runs = sorted(runs, key=lambda run: run["seed"])
        assert [(run["seed"], run["lr"]) for run in runs] == [(i, runs[0]["lr"]) for i in range(3)]
        return [run["steps"] if run["solved"] else float("inf") for run in runs]

    def sooner(some: list[float], others: list[float]) -> int:
        return sum(a < b for a, b in zip(some, others))

    kept = exp2_keys_and_values.FROZEN
    parts = {part: steps("exp2_keys_and_values", "part", part) for part in kept}
    assert (
        "The whole gets there sooner in every pair, the values sooner than the keys in two."
        in " ".join(PAGE.split())
    )
    assert sooner(parts["all"], parts["values"]) == sooner(parts["all"], parts["keys"]) == 3
    assert sooner(parts["values"], parts["keys"]) == 2
    assert "such a prefix got there sooner in every pair" in " ".join(PAGE.split())
    assert sooner(parts["all but the first token"], parts["all"]) == 3
    others = ("words", *exp7_start.DEVIATIONS)
    starts = {start: steps("exp7_start", "start", start) for start in others}
    text = steps("exp7_start", "start", "text")
    counts = {start: (sooner(some, text), sooner(text, some)) for start, some in starts.items()}
    assert counts["random, 1"] == (3, 0) and counts["zero"] == (0, 3)
    assert counts["words"] == (2, 0) and counts["random, 0.02"][0] == 1
    assert text == parts["all"]  # "the three runs of a text are those of experiment 2"
    assert "In experiment 1 the same three took 250 [250–450]." in " ".join(PAGE.split())
    runs = json_of(common.RESULTS / "exp1_demand.json")["runs"]
    cell = {"demand": "route-36", "method": "prefix", "size": 8, "lr": 0.3}
    assert sorted(r["steps"] for r in runs if cell.items() <= r.items() and r["seed"] < 3) == [
        250, 250, 450
    ]  # fmt: skip

    def on_the_fourth(name: str, **cell: object) -> int:
        runs = json_of(common.RESULTS / f"{name}.json")["runs"]
        cell |= {"seed": common.UNREPORTED, "lr": 0.3}
        return next(run["steps"] for run in runs if cell.items() <= run.items())

    assert "On the base of the search it was later." in " ".join(PAGE.split())
    assert on_the_fourth("exp2_keys_and_values", part="all but the first token") == 250
    assert on_the_fourth("exp2_keys_and_values", part="all") == 200
    assert "on the base of the search they are later, 300 against 200" in " ".join(PAGE.split())
    assert on_the_fourth("exp7_start", start="random, 1") == 300
    assert on_the_fourth("exp7_start", start="text") == 200
