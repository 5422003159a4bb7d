"""The exercises: a blank fails its own tests alone, and a restored file is what it was."""

import code
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from textwrap import dedent, indent
from typing import NamedTuple

import blank
import notebook
import pytest
import torch
from blank import EXERCISES
from conftest import C, H, L

from model import GPT, GPTConfig
from prefix import Prefix
from soft_prompt import SoftPrompt
from storage.adapters import save_adapter
from storage.base import save_base
from storage.tokenizers import save_tokenizer

ROOT = Path(__file__).parent.parent
CLASSROOM = ROOT / "classroom"
UTF8 = os.environ | {"PYTHONUTF8": "1"}

# Puts version after version of a function into the place of the right one, and runs tests. All this
# in one process, since importing torch takes longer. Code objects are swapped, which reaches every
# name that a function has.
GRADE = r"""
import importlib, json, re, sys, textwrap
from pathlib import Path
import pytest

sys.path[:0] = [".", "classroom"]
import blank
import model, prefix, soft_prompt, train  # before any of them is blank

class Outcomes:
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            outcomes[report.nodeid] = [exercises[report.nodeid], report.failed, message]
    def pytest_collection_modifyitems(self, items):
        for item in items:
            marks = [mark.name for mark in item.iter_markers() if mark.name.startswith("ex")]
            exercises[item.nodeid] = [int(name[2:]) for name in marks]

def grade(number, source, marked, files, *flags):
    module = importlib.import_module(blank.EXERCISES[number].file[:-3])
    *owner, name = blank.EXERCISES[number].function.split(".")
    function = vars(getattr(module, owner[0]) if owner else module)[name]
    function = getattr(function, "__func__", function)  # of a class method
    function = getattr(function, "__wrapped__", function)  # under no_grad
    made, right = {}, function.__code__
    exec(compile(textwrap.dedent(source), f"exercise {number}", "exec"), vars(module), made)
    function.__code__ = made[name].__code__
    # the last of these plugins collects garbage twice a session
    without = ["-pno:cacheprovider", "-pno:randomly", "-pno:unraisableexception"]
    pytest.main(["-qq", "--tb=line", *without, "-m", marked, *flags, *files], [Outcomes()])
    function.__code__ = right

marks = re.compile(r"^@pytest\.mark\.ex\d", re.MULTILINE)
tests = sorted(Path("tests").glob("test_*.py"))
files = [str(test) for test in tests if marks.search(test.read_text(encoding="utf-8"))]
found = {"blank": {}, "wrong": []}
for number, exercise in blank.EXERCISES.items():
    file, outcomes, exercises = Path(exercise.file), {}, {}
    before = file.read_bytes()
    blank.blank(number, force=True)
    _, head, stub, _ = blank.parts(exercise.file, exercise.function)
    marked = " or ".join(f"ex{i}" for i in range(1, number + 1))
    grade(number, (head + stub).decode(), marked, files, "--maxfail=1000")
    found["blank"][number] = outcomes
    blank.restore(number)
    assert file.read_bytes() == before
for number, source in json.loads(Path("wrong.json").read_text(encoding="utf-8")):
    outcomes, exercises = {}, {}
    grade(number, source, f"ex{number}", ["tests/test_graders.py"])
    found["wrong"].append(outcomes)
Path("found.json").write_text(json.dumps(found), encoding="utf-8")
"""

ROW_BY_ROW = """
    exact, losses, n_right, n_targets = [], [], 0, 0
    for row in rows:
        batch = batch_of([row], model.device)
        hidden, targets = target_hidden(model, batch, stacked_past_kv(adapters, model))
        logits = hidden @ model.head.T
        losses.append(F.cross_entropy(logits, targets).item())
        right = logits.argmax(dim=-1) == targets
        n_right, n_targets = n_right + int(right.sum()), n_targets + len(targets)
        exact.append(bool(right.all()))
    return Scores(sum(losses) / len(losses), 100 * n_right / n_targets, exact)"""
HEADS_MIXED = """
    B, T, C = x.shape
    parts = self.c_attn(x).split(C, dim=2)
    q, k, v = (part.reshape(B, self.n_head, T, C // self.n_head) for part in parts)
    k, v = append_past(past, k, v)
    return self.c_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2)), (k, v)"""
PROMPT_ALONE = """
    B = past_kv[0][0].size(0) if past_kv else 1
    vectors = self.vectors.to(model.dtype).expand(B, -1, -1)
    _, cache = model.forward_embeddings(vectors)
    front = past_kv or [tuple(t[:, :, :0] for t in kv) for kv in cache]
    return [tuple(map(torch.cat, zip(*both), (2, 2))) for both in zip(front, cache)]"""
SHIFTED = """
    hidden, _ = model.forward_embeddings(model.wte(batch.idx), past_kv)
    scored = batch.targets[:, 1:] != IGNORE
    return hidden[:, :-1][scored], batch.targets[:, 1:][scored]"""
PER_LAYER = "[append_past(past, k, v) for past, k, v in zip(pasts, keys, values)]"

# What students are likely to hand in. A sentence that they are shown, then the right solution with
# a part of it replaced, or a body of its own.
MISTAKES = {
    1: [
        ("The mask of a past?", ".triu(diagonal=S - T + 1)", ".triu(diagonal=1)"),
        ("is it the other way round?", ".triu(diagonal=S - T + 1)", ".tril(diagonal=S - T)"),
        ("True and False would add 1 and 0", None, "return torch.ones(T, S).tril(S - T).bool()"),
        ("off by one", "S - T + 1)", "S - T + 2)"),
        ("a column for each of S keys", "torch.full((T, S)", "torch.full((T, T)"),
        ("is the return missing?", "return ", ""),
        ("0 · ∞ is not a number", None,
         "return torch.ones(T, S, dtype=dtype).triu(S - T + 1) * -math.inf"),
        ("only that makes a share of 0", "-math.inf", "-1.0"),
    ],
    2: [
        ("not divided by √D", "q / math.sqrt(q.size(-1))", "q"),
        ("divided by D, and should be by √D", "math.sqrt(q.size(-1))", "q.size(-1)"),
        ("multiplied by √D", "q / math", "q * math"),
        ("The mask is not used", "scores + mask", "scores"),
        ("Subtracted", "scores + mask", "scores - mask"),
        ("After it, weights no longer sum to 1", "(scores + mask).softmax(dim=-1)",
         "scores.softmax(dim=-1) + mask"),
        ("over the keys, the last axis", "softmax(dim=-1)", "softmax(dim=-2)"),
        ("is_causal=True", None,
         "return F.scaled_dot_product_attention(q, k, v, is_causal=True)"),
        ("the weights, (B, H, T, S), times v", "return weights @ v", "return weights"),
    ],
    3: [
        ("are those of past and new positions", ".flatten(2)), (k, v)",
         ".flatten(2)), (k[:, :, -x.size(1) :], v[:, :, -x.size(1) :])"),
        ("not behind them", "append_past(past, k, v)",
         "append_past((k, v), *past) if past else (k, v)"),
        ("heads and positions are mixed up", None, HEADS_MIXED),
        ("do not look at the past", "self.attend(q, k, v, mask)",
         "self.attend(q, k[:, :, -x.size(1) :], v[:, :, -x.size(1) :], mask[:, -x.size(1) :])"),
        ("The mask is not handed on", "self.attend(q, k, v, mask)",
         "self.attend(q, k, v, 0 * mask[:1, :1])"),
        ("past is None", "append_past(past, k, v)", "append_past(past[:2], k, v)"),
        ("two things", ".flatten(2)), (k, v)", ".flatten(2))"),
        ("c_proj is missing", "self.c_proj(y.transpose(1, 2).flatten(2))",
         "y.transpose(1, 2).flatten(2)"),
        ("swap H and T back", ".transpose(1, 2).flatten(2)", ".reshape(x.shape)"),
    ],
    4: [
        ("is there no cache?", "past_kv = self.forward_embeddings(self.wte(unread)",
         "_ = self.forward_embeddings(self.wte(idx)"),
        ("do you take over the cache", "hidden, past_kv = self.forward",
         "hidden, _ = self.forward"),
        ("read only what is new", "self.wte(unread)", "self.wte(idx)"),
        ("use the last position", "(hidden[:, -1] @", "(hidden[:, 0] @"),
        ("self.wte of ids", "self.wte(unread)", "unread"),
        ("The temperature is not used", "if temperature > 1e-6:", "if False:"),
        ("not multiplied", "logits / temperature", "logits * temperature"),
        ("top_k is not used", "if top_k is not None:", "if False:"),
        ("not until one is", "if done.all():", "if done.any():"),
        ("once done, it stays done", "unread.masked_fill(done, stop_token)", "unread"),
        ("past_kv is not used", "unread, done = idx,", "past_kv, unread, done = None, idx,"),
    ],
    5: [
        ("joined along the batch", "torch.cat(tensors)", "torch.cat(tensors, dim=2)"),
        ("not one for each cache", "zip(*caches)", "caches"),
        ("k and v swapped?", "zip(*layer)", "list(zip(*layer))[::-1]"),
        ("raise a ValueError", "if len(set(lengths)) > 1:", "if False:"),
        ("in another order", "torch.cat(tensors)", "torch.cat(tensors[::-1])"),
    ],
    6: [
        ("with self.kv() they come through the MLP", "self.kv()", "self.start"),
        ("k and v swapped?", "append_past(past, k, v)", "append_past(past, v, k)"),
        ("Axes are mixed up", None, """
            P, L, _, H, D = self.start.shape
            return [(k, v) for k, v in self.kv().reshape(L, 2, 1, H, P, D)]"""),
        ("the prefix behind it", "append_past(past, k, v)",
         "append_past((k, v), *past) if past else (k, v)"),
        ("are (1, H, P, D)", "layers.unsqueeze(2)", "layers"),
        ("not the two lists", PER_LAYER, "(past_kv or []) + list(zip(keys, values))"),
        ("The past in front is lost", "append_past(past, k, v)", "(k, v)"),
        ("No gradient reaches the prefix", "self.kv()", "self.kv().detach()"),
        ("has the dtype of the model", ".to(model.dtype)", ""),
    ],
    7: [
        ("The model wants a batch", "ids[None]", "ids"),
        ("wants the cache", "_, cache =", "cache ="),
        ("A prefix is (P, L, 2, H, D)", "cls.from_cache(cache)", "cls(model.wte(ids))"),
        ("not P rows of one", "ids[None]", "ids[:, None]"),
        ("not the cache itself", "return cls.from_cache(cache)", "return cache"),
        ("in its order", "ids[None]", "ids[None].flip(1)"),
    ],
    8: [
        ("zero weight and bias", "nn.init.zeros_(last.weight)", "pass"),
        ("The start is held fixed", "self.start.requires_grad_(False)", "pass"),
        ("make them an nn.Parameter", "nn.Parameter(torch.randn(P, H * D, **like))",
         "torch.randn(P, H * D, **like)"),
        ("is the return missing?", "return self", "return None"),
        ("to L·2·C", "L * 2 * H * D, **like", "L * H * D, **like"),
        ("The start stays", "self.start.requires_grad_(False)",
         "self.start = nn.Parameter(0 * self.start, False)"),
        ("a tanh", "nn.Tanh()", "nn.ReLU()"),
    ],
    9: [
        ("The MLP is lost", "self.kv()", "self.start"),
        ("makes a new prefix", None,
         "self.start.data, self.mlp = self.kv().detach(), None\nreturn self"),
        ("not its numbers", "Prefix(self.kv())", "self.kv()"),
    ],
    10: [
        ("hand it to the model", "(vectors, past_kv)", "(vectors, None)"),
        ("a batch of one", "[None]", ""),
        ("training learns nothing", "self.vectors.to", "self.vectors.detach().to"),
        ("Positions are put in twice", "self.vectors.to(model.dtype)",
         "(self.vectors + model.wpe.weight[: len(self.vectors)]).to(model.dtype)"),
        ("returns the cache", "return cache", "return _, cache"),
        ("do not only put it in front", None, PROMPT_ALONE),
    ],
    11: [
        ("do not shift it again", None, SHIFTED),
        ("The past is not used", ", past_kv)", ")"),
        ("Every position was picked", "hidden[scored], batch.targets[scored]",
         "hidden.flatten(0, 1), batch.targets.flatten()"),
        ("two things", "return hidden[scored], batch.targets[scored]", "return hidden[scored]"),
        ("model.wte of the ids", "model.wte(batch.idx)", "batch.idx"),
        ("Hidden states, not logits", "hidden[scored]", "hidden[scored] @ model.head.T"),
    ],
    12: [
        ("a mean of means", None, ROW_BY_ROW),
        ("in the order they came in", "exact[wrong_rows] = False",
         "exact[lengths.argsort(stable=True).argsort()[wrong_rows]] = False"),
        ("The adapters are not used", "stacked_past_kv(adapters, model)", "None"),
        ("not one a position", None,
         ROW_BY_ROW.replace("append(bool(right.all()))", "extend(right.tolist())")),
        ("not if one of them is", None, ROW_BY_ROW.replace("right.all()", "right.any()")),
        ("returns Scores",
         "return Scores(loss / n_targets, 100 * n_right / n_targets, exact.tolist())",
         "return loss / n_targets, exact.tolist()"),
        ("in percent", "100 * n_right / n_targets", "n_right / n_targets"),
    ],
}  # fmt: skip


def handed_in(number: int, old: str | None, new: str) -> str:
    """-> a wrong solution: the right one with a part of it replaced, or a body of its own."""
    exercise = EXERCISES[number]
    _, head, body, _ = (part.decode() for part in blank.parts(exercise.file, exercise.function))
    if old is None:
        return head + indent(dedent(new).strip("\n"), body[: len(body) - len(body.lstrip())])
    assert body.count(old) == 1, f"exercise {number}: {old!r} is not in the solution, once"
    return head + body.replace(old, new)


@pytest.fixture(scope="module")
def graded(tmp_path_factory) -> dict:
    """-> the outcomes of the tests, with each function blank and with each mistake."""
    left_out = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__")
    copy = shutil.copytree(ROOT, tmp_path_factory.mktemp("graded") / "copy", ignore=left_out)
    wrong = [
        (number, handed_in(number, old, new))
        for number, mistakes in MISTAKES.items()
        for _, old, new in mistakes
    ]
    (copy / "wrong.json").write_text(json.dumps(wrong), encoding="utf-8")
    how = {"cwd": copy, "capture_output": True, "text": True, "encoding": "utf-8", "env": UTF8}
    done = subprocess.run([sys.executable, "-c", GRADE], **how)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads((copy / "found.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_blank_exactly_its_own_tests_fail_and_restored_nothing_has_changed(graded):
    """The tests of each exercise need that exercise, and none behind it.

    A test that runs on both families may pass on the Llama, which has an attention of its own.
    """
    for number in EXERCISES:
        outcomes = graded["blank"][str(number)]
        wrong = []
        for test, (marked, failed, _) in outcomes.items():
            may_pass = "[llama" in test and not failed
            if failed != (marked == [number]) and not may_pass:
                wrong.append(test)
        assert not wrong, f"exercise {number}: {wrong}"
        assert {n for marked, *_ in outcomes.values() for n in marked} == set(range(1, number + 1))


@pytest.mark.slow
def test_each_likely_mistake_is_noticed_and_named(graded):
    """Its sentence heads the first message, after which `pytest -m exN` stops."""
    assert MISTAKES.keys() == EXERCISES.keys() and min(map(len, MISTAKES.values())) >= 3
    expected = [
        (number, hint, new) for number, mistakes in MISTAKES.items() for hint, _, new in mistakes
    ]
    wrong = []
    for (number, hint, new), outcomes in zip(expected, graded["wrong"], strict=True):
        sentences = [message.split("\n")[0] for _, failed, message in outcomes.values() if failed]
        if len(sentences) != 1 or hint not in sentences[0]:
            wrong.append(f"exercise {number}, {new}: {hint!r} is not {sentences}")
    assert not wrong, "\n".join(wrong)


# ----------------------------------------------------------------------------------------- blank.py


class Done(NamedTuple):
    status: int
    out: str
    err: str

    def refused(self, sentence: str) -> bool:
        return self.status == 2 and sentence in self.err and self.err.count("\n") == 1


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A folder with the code, on which blank.py works."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(blank, "ROOT", tmp_path)
    monkeypatch.setattr(blank, "KEPT", tmp_path / "out" / "exercises")
    return tmp_path


def blank_py(*flags: object) -> Done:
    """-> what the command says, and its status."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["blank.py", *map(str, flags)])
        try:
            blank.main()
        except SystemExit as end:
            status = end.code
    return Done(status, out.getvalue(), err.getvalue())


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def test_a_blank_function_names_its_exercise_and_keeps_its_docstring(copy):
    """All blank at once: nothing but bodies is gone, and the files still are Python."""
    for number, exercise in EXERCISES.items():
        assert f"pytest -m ex{number} grades it" in blank_py(number, "--force").out
    assert blank_py(4, "--force").refused("exercise 4 is blank already")
    stub = re.compile(r'"""\n +raise NotImplementedError\("Exercise (\d+): (.*)"\)\n')
    for file in {exercise.file for exercise in EXERCISES.values()}:
        compile(text_of(copy / file), file, "exec")
        own = {(str(n), e.title) for n, e in EXERCISES.items() if e.file == file}
        assert set(stub.findall(text_of(copy / file))) == own
    for number in EXERCISES:
        blank_py("--restore", number)
    assert all((copy / path.name).read_bytes() == path.read_bytes() for path in ROOT.glob("*.py"))


def test_no_work_is_lost(copy):
    """A changed file is refused. What is replaced by the solution is kept, attempt by attempt."""
    changed = "there is no git here to tell: commit, or add --force"
    assert blank_py(5).refused(changed)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "the project"]):
        subprocess.run(["git", *words], cwd=copy, check=True)
    file = copy / "model.py"
    whole = text_of(file)
    stub = 'raise NotImplementedError("Exercise 5: A past for each row")'
    for attempt in ("return caches", "return None  # mine"):
        assert blank_py(5).status == 0
        assert stub in text_of(file)
        file.write_text(text_of(file).replace(stub, attempt), encoding="utf-8")
        assert blank_py(1).refused(changed)
        assert blank_py("--restore", 5).status == 0
        assert text_of(file) == whole
    kept = sorted((copy / "out" / "exercises").iterdir())
    assert [path.name for path in kept] == ["ex5-attempt1.py", "ex5-attempt2.py"]
    first, second = map(text_of, kept)
    assert first.endswith('"""\n    return caches\n') and "# mine" in second


def test_what_cannot_be_done_is_said_in_one_sentence(copy):
    """And then no file has changed."""
    assert blank_py().refused("give a number from 1 to 12, or --list")
    assert blank_py(13).refused("there is no exercise 13")
    assert blank_py("--restore", 3).refused("exercise 3 is not blank")
    blank_py(7, "--force")
    file = copy / "prefix.py"
    file.write_text(text_of(file).replace("def text(", "def words("), encoding="utf-8")
    assert blank_py("--restore", 7).refused("prefix.py has no Prefix.text any more")
    file.write_text("if\n" + text_of(file), encoding="utf-8")
    before = text_of(file)
    assert blank_py("--restore", 7).refused("prefix.py line 1 is not Python")
    assert text_of(file) == before
    assert (copy / "out" / "exercises" / "ex7-solution.py").exists()


def test_the_list_shows_every_exercise():
    """As a process of its own: title, file, function, minutes and difficulty."""
    command = [sys.executable, str(CLASSROOM / "blank.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=UTF8)
    sheet = text_of(CLASSROOM / "exercises.md")
    assert list(EXERCISES) == list(range(1, 13)) and sheet.count("\n### ") == 12
    for line, (number, e) in zip(done.stdout.splitlines(), EXERCISES.items(), strict=True):
        cells = [str(number), e.title, e.file, e.function, f"{e.minutes} min", e.difficulty]
        assert re.split(r"  +", line.strip()) == cells


# -------------------------------------------------------------------------------------------- pages


def test_the_walkthrough_shows_what_happens(monkeypatch, capsys):
    """Each line, as if pasted into python from its own folder, shows what the page says."""
    page, file = (text_of(CLASSROOM / f"walkthrough.{kind}") for kind in ("md", "ipynb"))
    assert file == notebook.notebook(page), "make it anew: see notebook.py"
    made = json.loads(file)["cells"]
    shown = [shown for _, _, shown in notebook.cells(page)]
    monkeypatch.chdir(CLASSROOM)
    monkeypatch.setattr(sys, "path", list(sys.path))
    console = code.InteractiveConsole()
    try:
        for cell, expected in zip(made, shown, strict=True):
            lines = "".join(cell["source"]).split("\n") + [""]
            pushed = [console.push(line) for line in lines if cell["cell_type"] == "code"]
            assert not any(pushed[-1:]), "a cell ends in the middle of a statement"
            assert capsys.readouterr() == (expected, ""), "".join(cell["source"])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_printoptions(profile="default")
    assert len(list(filter(None, shown))) > 30


def test_a_notebook_in_another_folder_says_what_to_do(tmp_path, monkeypatch):
    """Its first cell looks for the project."""
    monkeypatch.chdir(tmp_path)
    cells = notebook.cells(text_of(CLASSROOM / "walkthrough.md"))
    first = next(source for kind, source, _ in cells if kind == "code")
    with pytest.raises(AssertionError, match="git clone"):
        exec(first, {})


def test_the_python_of_the_sheet_runs(tmp_path, monkeypatch):
    """It runs on a base and adapters of random numbers. There, too, a prefix is a set (M1)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 256, L, H, C)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data *= 10  # what stands in front makes more of a difference than rounding
    save_base(model, "out/base")
    save_tokenizer("out/base", [])
    save_adapter(Prefix(torch.randn(4, L, 2, H, C // H)), "out/sentence/prefix")
    save_adapter(SoftPrompt(torch.randn(4, C)), "out/sentence/soft_prompt")
    names = {}
    sheet = text_of(CLASSROOM / "exercises.md")
    block = sheet.split("```python\n")[1].split("```")[0]
    exec(block.replace('"test", 200', '"test", 20'), names)
    loss, prefix, prompt = names["loss"], names["prefix"], names["prompt"]
    assert loss(Prefix(prefix.start.flip(0))) == pytest.approx(loss(prefix), rel=1e-5) != loss()
    assert loss(prompt) not in (loss(), loss(prefix))


def test_the_tests_that_the_answers_name_exist():
    """So a question whose answer is a test can be looked up."""
    tests = "".join(map(text_of, (ROOT / "tests").glob("test_*.py")))
    named = re.findall(r"`(test_\w+)`", text_of(CLASSROOM / "answers.md"))
    assert named and not [name for name in named if f"def {name}(" not in tests]
