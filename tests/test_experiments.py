"""The experiments of classroom/: each one runs, and writes what it measured; what is said to be exact is exact."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import common
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


def test_a_console_that_lacks_a_character_costs_no_result(base, tmp_path):
    """exp8 prints «→», which cp1252 does not have: it shows another, and all that was measured is in the file."""
    console = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    command = [sys.executable, str(CLASSROOM / "exp8_forgetting.py"), "--quick", "--base", base, "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=console, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"| table ? sentence |" in done.stdout
    assert len(json.loads((tmp_path / "out" / "quick" / "exp8_forgetting.json").read_text(encoding="utf-8"))["runs"]) == 13


def test_the_results_are_written_before_they_are_shown(base, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("the console is gone")

    for show in ("markdown", "figure"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the console is gone"):
            patch.setattr(common, show, broken)
            experiment("exp9_identities", base, tmp_path / show)
        assert json.loads((tmp_path / show / "exp9_identities.json").read_text(encoding="utf-8"))["runs"]


def test_quick_never_writes_over_what_was_measured(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    importlib.import_module("exp9_identities").main(["--quick", "--base", base, "--device", "cpu"])
    assert (tmp_path / "out" / "quick" / "exp9_identities.json").exists()
    with pytest.raises(ValueError, match="--quick measures nothing, and .*results holds what was measured"):
        experiment("exp9_identities", base, common.RESULTS)


def test_a_file_of_results_has_a_run_a_line(tmp_path):
    found = {"question": "à → b?", "seeds": [0, 1], "runs": [{"seed": 0, "curve": [[0, 1.5]]}, {"seed": 1, "curve": []}]}
    common.write_json(tmp_path / "found.json", found)
    lines = (tmp_path / "found.json").read_text(encoding="utf-8").split("\n")
    assert json.loads("".join(lines)) == found and '  {"seed": 1, "curve": []}' in lines and len(lines) == 9
    for path in common.RESULTS.glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        common.write_json(tmp_path / path.name, found)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes().replace(b"\r\n", b"\n")


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_each_experiment(name):
    """Its question and its figure; and the full results lie beside, of three seeds."""
    readme = (CLASSROOM / "README.md").read_text(encoding="utf-8")
    found = json.loads((CLASSROOM / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert f"## {found['question']}\n\n![](results/{name}.png)" in readme and (CLASSROOM / "results" / f"{name}.png").exists()
    assert found["command"] == f"python classroom/{name}.py" and found["seeds"] == [0, 1, 2]
