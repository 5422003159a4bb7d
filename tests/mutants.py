"""Mutation testing with mutmut: break the code in one small place, and see whether a test notices.

    pip install mutmut==3.8.1
    python tests/mutants.py                     every break of every file; hours on two cores
    python tests/mutants.py --only prefix       those of one module
    python tests/mutants.py --sample 100        some of them, drawn by --seed

It works on a copy, with tests/mutmut.cfg. mutmut leaves decorated functions alone, so in the copy
`@torch.no_grad()` and the like are applied at the end of the file. Prints what survived, and ends
with status 1 if less than 90 % were noticed, or of a sample so many less as chance allows.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT, GOAL = Path(__file__).resolve().parent.parent, 90  # percent
# One that few tests meet: with none, mutmut would run all tests once more
FIRST = "small_base.world.x_successor__mutmut_1"
WRAPPED = ("model.py", "train.py", "command/answers.py", "small_base/pretrain.py")
DECORATED = re.compile(r"^( *)@torch\.(no_grad|inference_mode)\(\).*\n *def (\w+)", re.MULTILINE)


def undecorated(source: str) -> str:
    """-> the same program: each decorated function is a plain one that is wrapped later."""
    ends = ["\n"]
    for found in DECORATED.finditer(source):
        indent, wrapper, name = found.groups()
        if indent:  # a method, of the last class before it
            classes = re.findall(r"^class (\w+)", source[: found.start()], re.MULTILINE)
            name = f"{classes[-1]}.{name}"
        ends.append(f"{name} = torch.{wrapper}()({name})\n")
    plain = DECORATED.sub(r"\1def \3", source)
    main = plain.rfind('if __name__ == "__main__":')  # the last one: programs begin with another
    main = main if main > 0 else len(plain)
    return plain[:main] + "".join(ends) + plain[main:]


def mutmut(copy: Path, *words: str) -> str:
    command = [sys.executable, "-m", "mutmut", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=copy, env=env, **streams).stdout


def outcomes(copy: Path) -> dict[str, int | None]:
    """-> the tests' exit status on each mutant: 0 where none noticed, None where it was not run."""
    found: dict[str, int | None] = {}
    for file in (copy / "mutants").rglob("*.meta"):
        found |= json.loads(file.read_text())["exit_code_by_key"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("--only", metavar="MODULE", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--children", default="2", help="processes at once (default: 2)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        left_out = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", "mutants")
        copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=left_out))
        shutil.copy(ROOT / "tests" / "mutmut.cfg", copy / "setup.cfg")
        for file in WRAPPED:
            source = (copy / file).read_text(encoding="utf-8")
            (copy / file).write_text(undecorated(source), encoding="utf-8")
        # makes all mutants, and runs this one
        printed = mutmut(copy, "run", "--max-children", args.children, FIRST)
        names = sorted(name for name in outcomes(copy) if name.startswith(args.only))
        if not names:
            sys.exit(printed[-3000:])
        if args.sample:
            names = random.Random(args.seed).sample(names, min(args.sample, len(names)))
        print(f"{len(names)} mutants", flush=True)
        for start in range(0, len(names), 200):
            printed = mutmut(
                copy, "run", "--max-children", args.children, *names[start : start + 200]
            )
            if "failed to" in printed or "Traceback" in printed:
                sys.exit(printed[-3000:])  # the tests do not pass as it is
            found = {name: outcomes(copy)[name] for name in names[: start + 200]}
            missed = (0, None, 33)  # 33: no test meets it
            survived = [name for name, status in found.items() if status in missed]
            percent = 100 - 100 * len(survived) / len(found)
            counts = f"{len(found)} run, {len(survived)} survived"
            print(f"{counts}: {percent:.1f} % noticed", flush=True)
        for name in survived:
            print(mutmut(copy, "show", name))
    chance = 200 * (0.09 / len(found)) ** 0.5 if args.sample else 0  # two standard errors
    sys.exit(percent < GOAL - chance)


if __name__ == "__main__":
    main()
