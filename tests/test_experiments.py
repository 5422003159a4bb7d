"""The experiments of classroom/: each one runs, and writes what it measured; what is said to be exact is exact."""

import importlib
import json
from pathlib import Path

import exp6_positions
import pytest
import torch

CLASSROOM = Path(exp6_positions.__file__).parent
NAMES = sorted(path.stem for path in CLASSROOM.glob("exp*.py"))


def experiment(name, base, out) -> dict:
    importlib.import_module(name).main(["--quick", "--base", base, "--device", "cpu", "--out", str(out)])
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_prints_its_table_and_writes_it(name, base, tmp_path, capsys):
    """With the question, the command, the seeds and every single run; and with matplotlib its figure."""
    found = experiment(name, base, tmp_path)
    printed = capsys.readouterr().out
    assert f"python classroom/{name}.py --quick" in found["command"] and found["seeds"] == [0]
    assert found["question"] in printed and found["runs"] and all("seed" in run for run in found["runs"])
    for row in found["table"]:
        assert "| " + " | ".join(row.values()) + " |" in printed
    assert (tmp_path / f"{name}.png").exists() == ("no figure" not in printed)


def test_the_identities_hold_to_rounding(base, tmp_path):
    """In float64; and in the last layer, whose inputs the prefix has changed, they do not: it acts by changing them."""
    deviations = experiment("exp9_identities", base, tmp_path)["runs"][-1]
    assert all(deviations[name] < 1e-12 for name in ("text", "cache", "rescaling, first layer", "log n, first layer"))
    assert deviations["rescaling, last layer"] > 1e-3


def test_the_two_bases_of_experiment_6_differ_in_positions_alone():
    """The same documents from the same generator, whole, with the end of text around them; one kind begins at 0."""
    stream, end = torch.tensor([9, 1, 2, 3, 9, 4, 5, 9, *range(1, 8), 9]), 9
    start, anywhere = (windows(stream, 50, 6, torch.Generator().manual_seed(0)) for windows in exp6_positions.BASES.values())
    documents = {tuple(row) for row in start.tolist()}
    assert documents == {(1, 2, 3, 9, 9, 9), (4, 5, 9, 9, 9, 9), (1, 2, 3, 4, 5, 6)}
    for row, moved in zip(start.tolist(), anywhere.tolist()):
        assert [i for i in row if i != end] == [i for i in moved if i != end]
    assert {row.index(4) for row in anywhere.tolist() if 4 in row and 1 not in row} == {0, 1, 2, 3}  # its end stays visible


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_each_experiment(name):
    """Its question and its figure; and the full results lie beside, of three seeds."""
    readme = (CLASSROOM / "README.md").read_text(encoding="utf-8")
    found = json.loads((CLASSROOM / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert f"## {found['question']}\n\n![](results/{name}.png)" in readme and (CLASSROOM / "results" / f"{name}.png").exists()
    assert found["command"] == f"python classroom/{name}.py" and found["seeds"] == [0, 1, 2]
