"""The experiment on real language: what its scores count, and that a run is done once."""

import json

import pytest
from conftest import write_jsonl

from small_base.world import task_examples

pytest.importorskip("sacrebleu", reason="sacrebleu, which scores, is not installed: see tests/requirements.txt")

import e2e  # noqa: E402
import sacrebleu  # noqa: E402
from common import RESULTS, looks_of, spread  # noqa: E402

from command.answers import CUT  # noqa: E402
from train import Plan, evaluate  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture
def files(tmp_path):
    """A pool and a test set in the form of E2E, of the restaurant world: two sentences for a record."""
    for name, split, n in (("pool", "train", 20), ("test", "test", 4)):
        examples = task_examples("sentence", split, n, 0)
        examples += [example._replace(target=example.target.replace("The", "Our")) for example in examples]
        write_jsonl(tmp_path / f"{name}.jsonl", examples)
    return ["--data", str(tmp_path / "pool.jsonl"), "--test", str(tmp_path / "test.jsonl")]


def measure(files, base, out, *more):
    e2e.main(["--quick", "--base", base, "--device", "cpu", "--out", str(out), *files, *more])
    return json.loads((out / "e2e.json").read_text(encoding="utf-8"))


def made_of(files, base, out, *more) -> e2e.E2E:
    args = ["--base", base, "--device", "cpu", "--out", str(out), *files, *more]
    return e2e.E2E(e2e.Experiment(e2e.__file__, e2e.__doc__, args, e2e.own_flags))


def test_each_run_is_done_once_and_stored_when_it_ends(files, base, tmp_path, capsys, monkeypatch):
    """A second call prints the same tables without a run; runs on other data are others, and stand beside them."""
    found = measure(files, base, tmp_path)
    tables = capsys.readouterr().out.split("table\n", 1)[1]
    assert all(f"\n{part}\n" in tables for part in (*list(e2e.PARTS)[1:], "plateau", "costs"))
    assert all((tmp_path / f"e2e_{part}.md").read_text(encoding="utf-8") in tables for part in (*e2e.PARTS, "plateau", "costs"))
    monkeypatch.setattr(e2e, "looks_of", lambda *_: pytest.fail("trained again"))
    assert measure(files, base, tmp_path, "--parts", *e2e.PARTS)["runs"] == found["runs"]
    assert capsys.readouterr().out.replace("\n", "")[:500] in "table" + tables.replace("\n", "")
    monkeypatch.undo()
    both = measure([*files[:3], files[1]], base, tmp_path, "--parts", "length")["runs"]
    assert both[: len(found["runs"])] == found["runs"] and len({run["base_and_data"] for run in both}) == 2


def test_what_is_reported_is_not_what_is_chosen_on(files, base, tmp_path):
    """Learning rates are chosen by the validation loss of a seed of their own, and no score of that is looked at."""
    runs = measure(files, base, tmp_path, "--parts", "table", "length", "examples")["runs"]
    chosen_on = [run for run in runs if run["seed"] == e2e.UNREPORTED]
    assert chosen_on and not any("bleu" in run for run in chosen_on)
    reported = [run for run in runs if run["seed"] != e2e.UNREPORTED]
    for run in (run for run in reported if run["steps"]):
        others = {other["loss"]: other["lr"] for other in chosen_on if other["method"] == run["method"]}
        assert len(others) >= 3 and run["lr"] == others[min(others)]
    assert all(("test_bleu" in run) == (run["steps"] == 0) for run in reported)  # the table's first two cells


def test_records_held_out_are_never_trained_on(files, base, tmp_path):
    """The split is by record, so that no sentence of a validation record is among the training data."""
    made = made_of(files, base, tmp_path, "--quick")
    assert len(made.references["validation"]) == 10 and len(made.references["train"]) == 10
    assert not set(made.references["validation"]) & set(made.references["train"])
    assert all(len(sentences) == 2 for part in made.references.values() for sentences in part.values())


def test_scores_are_sacrebleus_with_all_references(files, base, tmp_path, monkeypatch):
    """Each answer is held against every reference of its record, without the mark of a cut."""
    made = made_of(files, base, tmp_path)
    references = {"name : A | area : riverside": ["The A is by the river .", "A : riverside ."], "name : B": ["B is a place ."]}
    made.references["test"] = references
    monkeypatch.setattr(e2e, "answers", lambda *_: [" A : riverside .", "B is a place ." + CUT])
    found = made.scores(None, [], "test")
    assert [found[key] for key in ("bleu", "chrf", "slots")] == pytest.approx([100, 100, 100])
    texts = ["The A is by the sea .", "C is a place ."]
    monkeypatch.setattr(e2e, "answers", lambda *_: texts)
    columns = [["The A is by the river .", "B is a place ."], ["A : riverside .", None]]
    expected = sacrebleu.corpus_bleu(texts, columns)
    found = made.scores(None, [], "test")
    assert found["bleu"] == pytest.approx(expected.score) and found["slots"] == pytest.approx(100 / 3)
    assert all("nrefs:var" in signature for signature in found["signatures"])


@pytest.mark.parametrize(
    "record, text, expected",
    [
        ("name : The Mill | food : Thai", "The mill has THAI food .", [True, True]),
        ("name : The Mill | food : Thai", "A mill with Greek food .", [False, False]),
        ("name : X | price : moderate | customer rating : 3 out of 5", "X is not cheap and has three stars .", [True, True, True]),
        ("name : X | family friendly : no", "X is for adults .", [True, True]),
        ("name : X | family friendly : yes | near : Y", "X is a place .", [True, False, False]),
    ],
)
def test_a_slot_is_stated_by_its_value_or_mentioned(record, text, expected):
    """Names, foods and places by their value; price, rating and families by any word for the matter."""
    assert e2e.stated(record, text) == expected


def test_a_model_that_is_trained_in_low_precision_is_trained(files, base, tmp_path):
    """Each step uses the weights as they are now: the trained model has training's last loss."""
    made = made_of(files, base, tmp_path, "--quick")
    run = made.ready(e2e.Cell("full"), Plan(5, 0.01, batch_size=4, seed=0, eval_every=5))
    with e2e.low_precision(run.model):
        first, last = looks_of(run)
    with e2e.low_precision(run.model):
        again = evaluate(run.model, [], run.rows["validation"], 4)
    assert again.loss == pytest.approx(last["validation"], rel=1e-6)
    assert again.loss < first["validation"]


@pytest.mark.parametrize("part", e2e.PARTS)
def test_the_stored_tables_show_the_stored_runs(part):
    """With as many seeds as the README says; and on each run stands on which machine it was done."""
    runs, shown = json.loads((RESULTS / "e2e.json").read_text(encoding="utf-8"))["runs"], {"table": 3, "length": 2, "starts": 2}
    assert all("machine" in run for run in runs)
    runs = [run for run in runs if run.get("seed", 100) < shown.get(part, 1)]
    lines = (RESULTS / f"e2e_{part}.md").read_text(encoding="utf-8").splitlines()[2:]
    keys = ("bleu", "slots", "test_bleu", "test_chrf", "test_slots") if part == "table" else ("bleu", "chrf", "slots")
    for cell, line in zip(e2e.PARTS[part], lines, strict=True):
        some = [run for run in runs if cell._asdict().items() <= run.items()]
        assert line.startswith(f"| {e2e.label(cell)} | {some[0]['trained']:,} |")
        assert f" | {spread([run['test_loss' if part == 'table' else 'loss'] for run in some], 2)} | " in line
        assert line.endswith(" | ".join(spread([run[key] for run in some], 1) for key in keys) + " |")
