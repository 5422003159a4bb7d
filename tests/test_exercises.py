"""The exercises: what is blank fails and what is before it passes; what is restored is what it was; nothing is lost."""

import doctest
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blank import EXERCISES
from conftest import C, H, L

import data
from model import GPT, GPTConfig
from prefix import Prefix
from soft_prompt import SoftPrompt

ROOT = Path(__file__).parent.parent
CLASSROOM = ROOT / "classroom"

# Blanks one exercise after the other and grades all up to it. One process imports torch and forks for each of them, so that each
# imports the project anew, as it then is.
GRADE = """
import json, os, sys
from pathlib import Path
import pytest, regex, safetensors.torch, tiktoken, torch
torch.testing.assert_close(0, 0)  # the first call imports as much again

sys.path.insert(0, "classroom")
import blank

class Outcomes:
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            failed[report.nodeid] = report.failed
    def pytest_collection_modifyitems(self, items):
        for item in items:
            exercises[item.nodeid] = [int(mark.name[2:]) for mark in item.iter_markers() if mark.name.startswith("ex")]

for number, exercise in blank.EXERCISES.items():
    file = Path(exercise.file)
    before = file.read_bytes()
    blank.blank(number, force=True)
    if not os.fork():
        failed, exercises = {}, {}
        files = [f"tests/test_{name}.py" for name in ("model", "prefix", "soft_prompt", "train")]
        marked = " or ".join(f"ex{i}" for i in range(1, number + 1))
        pytest.main(["-qq", "-p", "no:cacheprovider", "-m", marked, *files], [Outcomes()])
        Path(f"{number}.json").write_text(json.dumps([(exercises[test], failed[test], test) for test in failed]))
        os._exit(0)
    os.wait()
    blank.restore(number)
    assert file.read_bytes() == before
"""


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the project that can be worked on."""
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__"))


def blank(copy: Path, *flags) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "classroom/blank.py", *map(str, flags)], cwd=copy, capture_output=True, text=True)


def refused(done: subprocess.CompletedProcess, message: str) -> bool:
    return done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_blank_exactly_its_own_tests_fail_and_restored_nothing_has_changed(copy):
    """Of the tests of all exercises up to it. So the tests of each exercise need that exercise, and none behind it."""
    done = subprocess.run([sys.executable, "-c", GRADE], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    for number in EXERCISES:
        outcomes = json.loads((copy / f"{number}.json").read_text())
        wrong = [test for marked, failed, test in outcomes if failed != (marked == [number])]
        assert not wrong, f"exercise {number}: {wrong}"
        assert {n for marked, _, _ in outcomes for n in marked} == set(range(1, number + 1))


def test_a_blank_function_names_its_exercise_and_keeps_its_docstring(copy):
    """All blank at once: nothing but bodies is gone, and the files still are Python."""
    for number, exercise in EXERCISES.items():
        assert f"pytest -m ex{number} grades it" in blank(copy, number, "--force").stdout
    assert refused(blank(copy, 4, "--force"), "exercise 4 is blank already")
    for file in {exercise.file for exercise in EXERCISES.values()}:
        compile((copy / file).read_text(), file, "exec")
        stubs = re.findall(r'"""\n +raise NotImplementedError\("Exercise (\d+): (.*)"\)\n', (copy / file).read_text())
        assert {(int(n), title) for n, title in stubs} == {(n, e.title) for n, e in EXERCISES.items() if e.file == file}
    for number in EXERCISES:
        blank(copy, "--restore", number)
    assert all((copy / path.name).read_bytes() == path.read_bytes() for path in ROOT.glob("*.py"))


def test_no_work_is_lost(copy):
    """A changed file is refused; what stood in a function when its solution came back is kept, attempt by attempt."""
    changed = "there is no git here to tell: commit, or add --force"
    assert refused(blank(copy, 5), changed)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "the project"]):
        subprocess.run(["git", *command], cwd=copy, check=True)
    file = copy / "model.py"
    whole = file.read_text()
    for attempt in ("return self", "return None  # mine"):
        assert blank(copy, 5).returncode == 0
        file.write_text(file.read_text().replace('raise NotImplementedError("Exercise 5: freezing")', attempt))
        assert attempt in file.read_text() and refused(blank(copy, 1), changed)
        assert blank(copy, "--restore", 5).returncode == 0 and file.read_text() == whole
    kept = sorted((copy / "out" / "exercises").iterdir())
    assert [path.name for path in kept] == ["ex5-attempt1.py", "ex5-attempt2.py"]
    assert kept[0].read_text().endswith('"""\n        return self\n') and "# mine" in kept[1].read_text()


def test_what_cannot_be_done_is_said_in_one_sentence(copy):
    assert refused(blank(copy), "give a number from 1 to 12, or --list")
    assert refused(blank(copy, 13), "there is no exercise 13")
    assert refused(blank(copy, "--restore", 3), "exercise 3 is not blank")
    blank(copy, 7, "--force")
    file = copy / "prefix.py"
    file.write_text(file.read_text().replace("def text(", "def words("))
    assert refused(blank(copy, "--restore", 7), "prefix.py has no Prefix.text any more")
    file.write_text("if\n" + file.read_text())
    before = file.read_text()
    assert refused(blank(copy, "--restore", 7), "prefix.py line 1 is not Python")
    assert file.read_text() == before and (copy / "out" / "exercises" / "ex7-solution.py").exists()


def test_the_list_shows_every_exercise(copy):
    lines = blank(copy, "--list").stdout.splitlines()
    for number, (line, exercise) in enumerate(zip(lines, EXERCISES.values(), strict=True), start=1):
        assert re.split(r"  +", line.strip()) == [str(number), exercise.title, exercise.file, exercise.function,
                                                 f"{exercise.minutes} min", exercise.difficulty]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- pages


def test_the_walkthrough_shows_what_happens(monkeypatch):
    """Every line of code in it is run, and what it prints compared."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        result = doctest.testfile(str(CLASSROOM / "walkthrough.md"), module_relative=False, encoding="utf-8")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_printoptions(profile="default")
    assert result.failed == 0 and result.attempted > 50


def test_the_sheet_has_every_exercise():
    """With the minutes and the difficulty that --list shows."""
    sheet = (CLASSROOM / "exercises.md").read_text(encoding="utf-8")
    for number, (title, file, function, minutes, difficulty) in EXERCISES.items():
        head = f"### {number}. {title[0].upper() + title[1:]}\n\n`{file}`, `{function}` — {minutes} minutes, {difficulty}."
        assert sheet.count(head) == 1, head


def test_the_python_of_the_sheet_runs(tmp_path, monkeypatch):
    """On a base and adapters of random numbers. The answer to M1 is true of those, too: a prefix is a set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = GPT(GPTConfig(257, 256, L, H, C)).freeze()
    with data.replaced_directory("out/base") as new:
        model.save_pretrained(new)
        data.save_tokenizer(new, [])
    Prefix(torch.randn(4, L, 2, H, C // H)).save("out/sentence/prefix")
    SoftPrompt(torch.randn(4, C)).save("out/sentence/soft_prompt")
    names = {}
    exec((CLASSROOM / "exercises.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], names)
    loss, prefix, prompt = names["loss"], names["prefix"], names["prompt"]
    assert loss(Prefix(prefix.start.flip(0))) == pytest.approx(loss(prefix), rel=1e-5) != loss()
    assert loss(prompt) not in (loss(), loss(prefix))


def test_the_tests_that_the_answers_name_exist():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (CLASSROOM / "answers.md").read_text(encoding="utf-8"))
    assert named and not [name for name in named if f"def {name}(" not in tests]
