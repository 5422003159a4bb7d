"""Kill a run at thirty seeded moments, start it again with --resume: it must end bit for bit where an undisturbed one does.

    python tests/kill.py            about five minutes on two cores; --moments N for fewer

Half of the moments are points in time, half are touches of a file: before the n-th opening, renaming or removing below the
working folder the process kills itself, so that saving is met at every stage. After each kill, whatever lies there must load.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import train  # noqa: E402
from model import GPT  # noqa: E402

# The run: it pretrains a base, briefly, tunes a prefix through its MLP, and leaves many checkpoints on the way
FLAGS = "--mid-dim 4 --steps 40 --save-every 3 --eval-every 20 --batch-size 2 --device cpu --resume".split()
CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
fatal, touches = int(sys.argv[2]), 0
import train
train.RECIPES["pretrain"] = train.RECIPES["pretrain"]._replace(steps=10)

def count(event, arguments):
    global touches
    touching = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
    if touching and str(arguments[0]).startswith(("out", ".", os.getcwd())):
        touches += 1
        if touches == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
train.main(sys.argv[3:])
print("touches", touches)
"""


def start(folder: Path, fatal: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(Path(train.__file__).parent), str(fatal), *FLAGS]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check_what_is_there(folder: Path) -> str:
    """-> what of base, checkpoint and adapter was found, after loading each of them."""
    base, out = folder / "out/base", folder / "out/sentence/prefix"
    found = []
    data.restore(base)
    data.restore(out)
    if base.exists():
        model = GPT.from_pretrained(base).freeze()
        data.load_tokenizer(base)
        found.append("base")
    if (out / data.CHECKPOINT).exists():
        with train.safe_open(out / data.CHECKPOINT, "pt") as opened:
            found.append(f"checkpoint of step {opened.metadata()['step']}")
    elif out.exists() and any(out.iterdir()):
        train.load_adapters(str(out), model)
        found.append("adapter")
    return ", ".join(found) or "nothing yet"


def result(folder: Path) -> dict[str, bytes]:
    """-> every file of the run, by its name: all must be as if nothing had happened, and none may be left over."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed = Path(temporary) / "undisturbed"
        undisturbed.mkdir()
        begin = time.perf_counter()
        printed, _ = start(undisturbed).communicate()
        seconds, touches, expected = time.perf_counter() - begin, int(printed.split()[-1]), result(undisturbed)
        print(f"undisturbed: {seconds:.1f} s, {touches} touches of files, {len(expected)} files in the end")
        for moment in range(args.moments):
            folder = Path(temporary) / str(moment)
            folder.mkdir()
            if moment % 2:
                when = f"at touch {(fatal := rng.randint(1, touches))}"
                start(folder, fatal).communicate()
            else:
                when = f"after {(pause := rng.uniform(0, seconds)):.1f} s"
                process = start(folder)
                time.sleep(pause)
                process.kill()
                process.communicate()
            found = check_what_is_there(folder)
            printed, _ = start(folder).communicate()
            got = result(folder)
            other = [name for name in sorted(got.keys() | expected) if got.get(name) != expected.get(name)]
            print(f"killed {when}: {found}; started again, {'ANOTHER END' if other else 'the same to the last bit'}", flush=True)
            if other:
                sys.exit(f"{printed}\nnot as in the undisturbed run: {', '.join(other)}")


if __name__ == "__main__":
    main()
