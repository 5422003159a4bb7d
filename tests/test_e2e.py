"""The experiment on real language: what its scores count, and that a run is done once."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl

from small_base.world import task_examples

missing = "sacrebleu, which scores, is not installed: see tests/requirements.txt"
pytest.importorskip("sacrebleu", reason=missing)

import e2e  # noqa: E402
import sacrebleu  # noqa: E402
from common import RESULTS, spread  # noqa: E402

from command.answers import CUT  # noqa: E402
from train import Plan  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture
def files(tmp_path):
    """A pool and a test set in the form of E2E: two sentences for a record of the small world."""
    for name, split, n in (("pool", "train", 20), ("test", "test", 4)):
        examples = task_examples("sentence", split, n, 0)
        others = [
            example._replace(target=example.target.replace("The", "Our")) for example in examples
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", examples + others)
    return ["--data", str(tmp_path / "pool.jsonl"), "--test", str(tmp_path / "test.jsonl")]


def measure(files, base, out, *more):
    e2e.main(["--quick", "--base", base, "--device", "cpu", "--out", str(out), *files, *more])
    return json.loads((out / "e2e.json").read_text(encoding="utf-8"))


def made_of(files, base, out, *more) -> e2e.E2E:
    args = ["--base", base, "--device", "cpu", "--out", str(out), *files, *more]
    return e2e.E2E(e2e.Experiment(e2e.__file__, e2e.__doc__, args, e2e.own_flags))


def test_each_run_is_done_once_and_stored_when_it_ends(files, base, tmp_path, capsys, monkeypatch):
    """A second call prints the same tables without a run; runs on other data stand beside them."""
    found = measure(files, base, tmp_path)
    tables = capsys.readouterr().out.split("table\n", 1)[1]
    assert all(f"\n{part}\n" in tables for part in (*list(e2e.PARTS)[1:], "plateau", "costs"))
    for part in (*e2e.PARTS, "plateau", "costs"):
        assert (tmp_path / f"e2e_{part}.md").read_text(encoding="utf-8") in tables
    monkeypatch.setattr(e2e, "looks_of", lambda *_: pytest.fail("trained again"))
    assert measure(files, base, tmp_path, "--parts", *e2e.PARTS)["runs"] == found["runs"]
    assert capsys.readouterr().out.replace("\n", "")[:500] in "table" + tables.replace("\n", "")
    monkeypatch.undo()
    both = measure([*files[:3], files[1]], base, tmp_path, "--parts", "length")["runs"]
    assert both[: len(found["runs"])] == found["runs"]
    assert len({run["base_and_data"] for run in both}) == 2


def test_a_report_measures_nothing(files, base, tmp_path, monkeypatch):
    """Of what is not there, it has no row."""
    monkeypatch.setattr(e2e, "looks_of", lambda *_: pytest.fail("trained"))
    made, parts = made_of(files, base, tmp_path), ["table", "values"]
    where = ["--base", base, "--device", "cpu", "--out", str(tmp_path), *files]
    e2e.main(["--report", *where, "--parts", *parts])
    for part in parts:
        assert len((tmp_path / f"e2e_{part}.md").read_text(encoding="utf-8").splitlines()) == 2
    assert made.runs(e2e.Cell("prefix", 10)) == []


def test_runs_without_known_and_new_values_apart_are_not_taken_for_such(files, base, tmp_path):
    """An older run of the same cell stays in the table, and never enters the table of values."""
    made = made_of(files, base, tmp_path)
    cell = e2e.Cell("prefix", 10)
    old = cell._asdict() | {"seed": 0, "lr": 0.1, "base_and_data": made.seen, "machine": "old"}
    made.experiment.runs = [old, old | {"values_apart": True, "machine": "new"}]
    assert [run["machine"] for run in made.runs(cell)] == ["old"]
    assert [run["machine"] for run in made.runs(cell, "values")] == ["new"]
    other = old | {"values_apart": True, "machine": "another", "seed": 1}
    made.experiment.runs += [other]
    assert [run["machine"] for run in made.runs(cell, "values")] == ["new"]  # no cell mixes two


def test_answers_go_where_git_ignores_them(files, base, tmp_path):
    """They repeat the records. Beside the project's results there is only their score."""
    args = ["--base", base, "--device", "cpu", *files]
    made = e2e.E2E(e2e.Experiment(e2e.__file__, e2e.__doc__, args, e2e.own_flags))
    assert made.answers == Path("out")
    ignored = (Path(e2e.__file__).parent.parent / ".gitignore").read_text(encoding="utf-8").split()
    assert "out/" in ignored
    measure(files, base, tmp_path, "--parts", "values")
    kept = {path.name for path in (tmp_path / "e2e_answers").iterdir()}
    assert any(name.startswith("test-prefix-10-text-200-0-") for name in kept)
    assert not any("-100-" in name for name in kept)  # rates are chosen without an answer


def test_what_is_reported_is_not_what_is_chosen_on(files, base, tmp_path):
    """Rates are chosen by the validation loss of a seed of their own, whose scores are not seen."""
    runs = measure(files, base, tmp_path, "--parts", "table", "length", "values")["runs"]
    chosen_on = [run for run in runs if run["seed"] == e2e.UNREPORTED]
    assert chosen_on and not any("bleu" in run for run in chosen_on)
    reported = [run for run in runs if run["seed"] != e2e.UNREPORTED]
    for run in (run for run in reported if run["steps"]):
        tried = [other for other in chosen_on if other["method"] == run["method"]]
        others = {other["loss"]: other["lr"] for other in tried}
        assert len(others) >= 3 and run["lr"] == others[min(others)]
    on_test = [run for run in reported if "test_bleu" in run]
    assert {run["method"] for run in on_test if run["steps"]} == {"prefix", "lora"}  # not of length


def test_records_held_out_are_never_trained_on(files, base, tmp_path):
    """The split is by record: no sentence of a validation record is among the training data."""
    made = made_of(files, base, tmp_path, "--quick")
    assert len(made.references["validation"]) == 10 and len(made.references["train"]) == 10
    assert not set(made.references["validation"]) & set(made.references["train"])
    for part in made.references.values():
        assert all(len(sentences) == 2 for sentences in part.values())


def test_scores_are_sacrebleus_with_all_references(files, base, tmp_path, monkeypatch):
    """Each answer is held against every reference of its record, without the mark of a cut."""
    made = made_of(files, base, tmp_path)
    references = {"name : A | area : riverside": ["The A is by the river .", "A : riverside ."]}
    references["name : B"] = ["B is a place ."]
    made.references["test"], made.known = references, {"area : riverside", "name : B"}
    monkeypatch.setattr(e2e, "answers", lambda *_: [" A : riverside .", "B is a place ." + CUT])
    found = made.scores(None, [], "test", "right")
    assert [found[key] for key in ("bleu", "chrf")] == pytest.approx([100, 100])
    assert found["values"] == {"known": {"area": [1, 1], "name": [1, 1]}, "new": {"name": [1, 1]}}
    lines = (tmp_path / "e2e_answers" / "test-right.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1]) == {"record": "name : B", "answer": "B is a place ."}
    texts = ["The A is by the sea .", "C is a place ."]
    monkeypatch.setattr(e2e, "answers", lambda *_: texts)
    columns = [["The A is by the river .", "B is a place ."], ["A : riverside .", None]]
    expected = sacrebleu.corpus_bleu(texts, columns)
    found = made.scores(None, [], "test", "wrong")
    assert found["bleu"] == pytest.approx(expected.score)
    assert found["values"] == {"known": {"area": [0, 1], "name": [0, 1]}, "new": {"name": [1, 1]}}
    assert all("nrefs:var" in signature for signature in found["signatures"])


def test_a_value_is_known_if_a_training_record_has_it(files, base, tmp_path):
    """One that only validation or test records have is new."""
    made = made_of(files, base, tmp_path)
    slots = {
        part: {slot for record in records for slot in record.split(" | ")}
        for part, records in made.references.items()
    }
    assert made.known == slots["train"]
    assert (slots["validation"] | slots["test"]) - made.known


@pytest.mark.parametrize(
    "record, text, expected",
    [
        ("name : The Mill | food : Thai", "The mill has THAI food .", [True, True]),
        ("name : The Mill | food : Thai", "A mill with Greek food .", [False, False]),
        ("Type : pub", "A public house .", [False]),
        ("price : moderate", "It is moderately priced .", [True]),
        ("price : £ 20 - 25", "It has a price range of £ 20 to 25 .", [True]),
        ("price : £ 20 - 25", "It has a price range of less than £ 20 .", [False]),
        ("price : cheap", "Its prices are high .", [False]),
        ("price : high", "It is inexpensive .", [False]),
        ("price : high", "It has a price .", [False]),
        ("customer rating : 3 out of 5", "It has three stars .", [True]),
        ("customer rating : 3 out of 5", "It is rated 1 out of 5 .", [False]),
        ("customer rating : 5 out of 5", "It has a high customer rating .", [True]),
        ("customer rating : low", "It has a high customer rating .", [False]),
        ("customer rating : low | price : high", "A high rating and a low price .", [False, False]),
        ("family friendly : no", "It is not family - friendly .", [True]),
        ("family friendly : no", "It is family - friendly .", [False]),
        ("family friendly : yes", "It is not for children .", [False]),
        ("family friendly : yes", "It is not cheap , but family - friendly .", [True]),
        ("family friendly : no", "It is for adults .", [True]),
        ("name : X | family friendly : yes | near : Y", "X is a place .", [True, False, False]),
    ],
)
def test_a_value_is_stated_if_it_is_that_one(record, text, expected):
    """Names, foods, places by their words; of price, rating, families the level, in any words."""
    assert list(e2e.stated(record, text).values()) == expected


def test_full_fine_tuning_is_in_float32(files, base, tmp_path):
    """Small updates of bfloat16 would be rounded away; what is frozen has the quicker dtype."""
    made = made_of(files, base, tmp_path, "--quick")
    made.dtype, plan = torch.bfloat16, Plan(1, 0.01, batch_size=4, seed=0, eval_every=1)
    assert made.ready(e2e.Cell("full"), plan).model.dtype == torch.float32
    assert made.ready(e2e.Cell("prefix", 10), plan).model.dtype == torch.bfloat16


def test_each_start_has_a_rate_of_its_own_after_as_many_steps(files, base, tmp_path, monkeypatch):
    """What a prefix starts as is what its name says; the rate is searched with that start."""
    made = made_of(files, base, tmp_path)
    plan = Plan(0, 0.0, e2e.BATCH, 0, eval_every=1)
    cells = {cell.init: cell for cell in e2e.PARTS["start"]}
    starts = {init: made.ready(cell, plan).adapters[0].start for init, cell in cells.items()}
    assert torch.equal(starts["text"], made.ready(e2e.Cell("prefix", 10), plan).adapters[0].start)
    assert not torch.equal(starts["words"], starts["text"])
    deviations = {init: round(start.std().item(), 2) for init, start in starts.items()}
    assert [deviations[init] for init in ("zero", "random, 0.02", "random, 1")] == [0, 0.02, 1]
    best = {"text": 0.03, "words": 0.01, "zero": 0.09}

    def run(cell: e2e.Cell, seed: int, lr: float) -> dict[str, float]:
        assert (seed, cell.size, cell.steps) == (e2e.UNREPORTED, 10, e2e.SHORT)
        return {"loss": abs(lr - best[cell.init])}

    monkeypatch.setattr(made, "run", run)
    assert {init: made.rate(cells[init]) for init in best} == best


@pytest.mark.parametrize("part", e2e.PARTS)
def test_the_stored_tables_show_the_stored_runs(part):
    """With each run's machine beside it. No cell of the values mixes two."""
    runs = json.loads((RESULTS / "e2e.json").read_text(encoding="utf-8"))["runs"]
    assert all("machine" in run for run in runs)
    reported = [run for run in runs if run.get("seed", 100) < 3]
    file = RESULTS / f"e2e_{part}.md"
    lines = file.read_text(encoding="utf-8").splitlines()[2:] if file.exists() else []
    shown = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    for cell in e2e.PARTS[part]:
        found = [run for run in reported if cell._asdict().items() <= run.items()]
        found = [run for run in found if part != "values" or "values_apart" in run]
        first = {run["seed"]: run for run in reversed(found)}  # of each seed
        some = [first[seed] for seed in sorted(first)]
        name = cell.init if part == "start" else e2e.label(cell)
        assert (name in shown) == bool(some)
        if not some:
            continue
        line = shown[name]
        keys = {"length": ("bleu", "chrf"), "start": ("bleu",)}.get(part, ("bleu", "test_bleu"))
        assert " | ".join(spread([run[key] for run in some], 1) for key in keys) in line
        if part == "values":
            assert f" | {len(some)} | " in line and len({run["machine"] for run in some}) == 1
        else:
            assert f" | {len(some)} | {e2e.machines(some)} |" in line
