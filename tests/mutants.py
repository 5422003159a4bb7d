"""Mutation testing with mutmut: break the code in one small place, run the tests that meet it, see whether any notices.

    pip install mutmut==3.8.1
    python tests/mutants.py                     every break of every file; hours on two cores
    python tests/mutants.py --only prefix       those of one module
    python tests/mutants.py --sample 100        some of them, drawn by --seed

It works on a copy, with tests/mutmut.cfg. mutmut leaves decorated functions alone, so in the copy `@torch.no_grad()` and the
like are applied at the end of the file. Prints what survived, and ends with status 1 if less than 90 % were noticed.
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
FIRST = "small_base.world.x_successor__mutmut_1"  # one that few tests meet: with none, mutmut would run all tests once more
DECORATED = re.compile(r"^( *)@torch\.(no_grad|inference_mode)\(\).*\n *def (\w+)", re.MULTILINE)


def undecorated(source: str) -> str:
    """-> the same program, in which each decorated function is a plain one that is wrapped later."""
    ends = ["\n"]
    for indent, wrapper, name in DECORATED.findall(source):
        where = "Decoder." if indent else ""
        ends.append(f"{where}{name} = torch.{wrapper}()({where}{name})\n")
    body, main, last = DECORATED.sub(r"\1def \3", source).partition('if __name__ == "__main__":')
    return body + "".join(ends) + main + last


def mutmut(copy: Path, *words: str) -> str:
    command = [sys.executable, "-m", "mutmut", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=copy, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def outcomes(copy: Path) -> dict[str, int | None]:
    """-> the exit status of the tests on each mutant; None where it was not run, 0 where none noticed."""
    found: dict[str, int | None] = {}
    for file in (copy / "mutants").rglob("*.meta"):
        found |= json.loads(file.read_text())["exit_code_by_key"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("--only", metavar="MODULE", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--children", default="2", help="processes at once (default: 2)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        left_out = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", "mutants")
        copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=left_out))
        shutil.copy(ROOT / "tests" / "mutmut.cfg", copy / "setup.cfg")
        for file in ("model.py", "train.py"):
            (copy / file).write_text(undecorated((copy / file).read_text(encoding="utf-8")), encoding="utf-8")
        printed = mutmut(copy, "run", "--max-children", args.children, FIRST)  # makes all mutants, and runs this one
        names = sorted(name for name in outcomes(copy) if name.startswith(args.only))
        if not names:
            sys.exit(printed[-3000:])
        if args.sample:
            names = random.Random(args.seed).sample(names, min(args.sample, len(names)))
        print(f"{len(names)} mutants", flush=True)
        for start in range(0, len(names), 200):
            printed = mutmut(copy, "run", "--max-children", args.children, *names[start : start + 200])
            if "failed to" in printed or "Traceback" in printed:
                sys.exit(printed[-3000:])  # the tests do not pass as it is
            found = {name: outcomes(copy)[name] for name in names[: start + 200]}
            survived = [name for name, status in found.items() if status in (0, None, 33)]  # 33: no test meets it
            percent = 100 - 100 * len(survived) / len(found)
            print(f"{len(found)} run, {len(survived)} survived: {percent:.1f} % noticed", flush=True)
        for name in survived:
            print(mutmut(copy, "show", name))
    sys.exit(percent < GOAL)


if __name__ == "__main__":
    main()
