"""Takes the solution of an exercise out of the code, and brings it back.

    python classroom/blank.py --list
    python classroom/blank.py 3              empties a function; its docstring says what to write
    pytest -m ex3                            grades what you wrote
    python classroom/blank.py --restore 3    the solution is back; yours is in out/exercises

The exercises of exercises.md come in the order of learning, and none needs a later one. So the
markers have this rule: with exercise N blank, every test marked exN fails, and every test of an
exercise before it passes.
"""

import argparse
import ast
import itertools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

# Nothing of the project is imported: halfway through an exercise, its files may be broken.
ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "out" / "exercises"


class Exercise(NamedTuple):
    title: str
    file: str
    function: str
    minutes: str
    difficulty: str


HEAD = r"^### (\d+)\. (.*)\n\n`(.*)`, `(.*)` — (\d+) minutes, (\w+)\."
SHEET = Path(__file__).with_name("exercises.md").read_text(encoding="utf-8")
FOUND = re.findall(HEAD, SHEET, flags=re.MULTILINE)
EXERCISES = {int(number): Exercise(*what) for number, *what in FOUND}


def solution(number: int) -> Path:
    """-> where the solution of an exercise lies as long as it is out of the code."""
    return KEPT / f"ex{number}-solution.py"


def parts(file: str, function: str) -> tuple[bytes, bytes, bytes, bytes]:
    """-> a file in four: before the function, its head with docstring, its body, the rest."""
    source = (ROOT / file).read_bytes()
    try:
        node = ast.parse(source)
        for name in function.split("."):
            node = next(child for child in node.body if getattr(child, "name", None) == name)
    except SyntaxError as error:
        where = f"{file} line {error.lineno}"
        raise ValueError(f"{where} is not Python ({error.msg}): repair it first") from None
    except StopIteration:
        gone = f"{file} has no {function} any more"
        raise ValueError(f"{gone}: put its def line back first") from None
    lines = source.splitlines(keepends=True)
    cuts = [0, node.lineno - 1, node.body[0].end_lineno, node.end_lineno, len(lines)]
    return tuple(b"".join(lines[a:b]) for a, b in zip(cuts, cuts[1:]))


def blank(number: int, force: bool) -> None:
    """Moves the body of a function to out/exercises. Raises ValueError if work could be lost."""
    title, file, function, *_ = EXERCISES[number]
    if solution(number).exists():
        fill = f"fill in {function} in {file}, or --restore {number}"
        raise ValueError(f"exercise {number} is blank already: {fill}")
    status = f"git status --porcelain -- {file}"
    git = subprocess.run(status, shell=True, cwd=ROOT, capture_output=True)
    if not force and (git.returncode or git.stdout):
        changed = f"{file} has changes that are not committed, or there is no git here to tell"
        raise ValueError(f"{changed}: commit, or add --force")
    before, head, body, behind = parts(file, function)
    KEPT.mkdir(parents=True, exist_ok=True)
    solution(number).write_bytes(head + body)
    indent, line_end = body[: len(body) - len(body.lstrip(b" "))], head[len(head.rstrip(b"\r\n")) :]
    stub = indent + f'raise NotImplementedError("Exercise {number}: {title}")'.encode() + line_end
    (ROOT / file).write_bytes(before + head + stub + behind)
    print(f"{file}: write {function} as its docstring says; pytest -m ex{number} grades it")


def restore(number: int) -> None:
    """Puts the solution back, and the student's version beside it."""
    _, file, function, *_ = EXERCISES[number]
    if not solution(number).exists():
        there = f"{file} holds the solution, or `git checkout {file}` brings it back"
        raise ValueError(f"exercise {number} is not blank: {there}")
    before, head, body, behind = parts(file, function)
    attempts = (KEPT / f"ex{number}-attempt{i}.py" for i in itertools.count(1))
    mine = next(path for path in attempts if not path.exists())
    mine.write_bytes(head + body)
    (ROOT / file).write_bytes(before + solution(number).read_bytes() + behind)
    solution(number).unlink()
    kept = mine.relative_to(ROOT)
    print(f"{file}: the solution of exercise {number} is back; your version is in {kept}")


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("number", nargs="?", metavar="N", type=int, help="of the exercise")
    add("--restore", action="store_true", help="bring the solution of N back")
    add("--list", action="store_true", help="show all exercises")
    add("--force", action="store_true", help="blank a function of a file with uncommitted changes")
    args = parser.parse_args()
    try:
        if args.list:
            for number, (title, file, function, minutes, difficulty) in EXERCISES.items():
                where = f"{file:15} {function:21}"
                print(f"{number:2}  {title:34} {where} {minutes:>2} min  {difficulty}")
        elif args.number not in EXERCISES:
            numbers = f"give a number from 1 to {len(EXERCISES)}, or --list"
            raise ValueError(f"there is no exercise {args.number}: {numbers}")
        elif args.restore:
            restore(args.number)
        else:
            blank(args.number, args.force)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
