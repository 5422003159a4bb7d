"""Kill a run at thirty seeded moments and start it again. It must end as an undisturbed one does.

    python tests/kill.py            about five minutes on two cores; --moments N for fewer

Half of the moments are points in time. The others are touches of a file: before the n-th opening,
renaming or removing below the working folder, the process kills itself. So saving is met at every
stage. After each kill, whatever lies there must load. In the end every file is the same to the bit.
A kill may leave only the writer's own temporary files behind, `.….new`.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import train  # noqa: E402
from command.models import load_adapters  # noqa: E402
from storage.base import load_base  # noqa: E402
from storage.tokenizers import load_tokenizer  # noqa: E402

# The run pretrains a base, briefly, tunes a prefix through its MLP, and leaves many checkpoints
FLAGS = "--data few.jsonl --film --mid-dim 4 --steps 40 --eval-every 3 --batch-size 2".split()
FLAGS += ["--device", "cpu"]
OUT = "out/few/prefix"
CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
fatal, touches, own = int(sys.argv[2]), 0, 0
import functools
import command.models, train
command.models.pretrain = functools.partial(command.models.pretrain, steps=10)

def count(event, arguments):
    global touches, own
    touching = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
    if touching and str(arguments[0]).startswith(("out", ".", os.getcwd())):
        touches, own = touches + 1, own + str(arguments[0]).endswith(".new")
        if touches == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
train.main(sys.argv[3:])
print(touches, own)
"""


def start(folder: Path, fatal: int = 0) -> subprocess.Popen:
    root, checkpoint = str(Path(train.__file__).parent), folder / OUT / "checkpoint.pt"
    lines = [json.dumps({"input": letter, "target": letter}) + "\n" for letter in "abcdefgh"]
    (folder / "few.jsonl").write_text("".join(lines))
    resume = ["--resume"] if checkpoint.exists() else []
    command = [sys.executable, "-c", CHILD, root, str(fatal), *FLAGS, *resume]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check_what_is_there(folder: Path) -> str:
    """-> what was found and loads: a base, a checkpoint, an adapter, half-written files."""
    base, out, found = folder / "out/base", folder / OUT, []
    if (base / "config.json").exists():
        model = load_base(base)
        load_tokenizer(base)
        found.append("a base")
    if (out / "checkpoint.pt").exists():
        step = torch.load(out / "checkpoint.pt")["metrics"][-1]["step"]
        found.append(f"a checkpoint of step {step}")
    if (out / "adapter_config.json").exists():
        load_adapters(out, model)
        found.append("an adapter")
    found += ["a half-written file"] * len(list(folder.rglob(".*.new")))
    return ", ".join(found) or "nothing yet"


def result(folder: Path) -> dict[str, bytes]:
    """-> every file of the run, by its name, but for the writer's own."""
    files = {
        str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    whole = {name: path for name, path in files.items() if not path.match(".*.new")}
    return {name: path.read_bytes() for name, path in whole.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed = Path(temporary) / "undisturbed"
        undisturbed.mkdir()
        begin = time.perf_counter()
        printed, _ = start(undisturbed).communicate()
        seconds, expected = time.perf_counter() - begin, result(undisturbed)
        touches, own = map(int, printed.splitlines()[-1].split())
        counts = f"{touches} touches of files, {own} of them temporary"
        print(f"undisturbed: {seconds:.1f} s, {counts}; {len(expected)} files in the end")
        for moment in range(args.moments):
            folder = Path(temporary) / str(moment)
            folder.mkdir()
            if moment % 2:
                fatal = rng.randint(1, touches)
                when = f"at touch {fatal}"
                start(folder, fatal).communicate()
            else:
                pause = rng.uniform(0, seconds)
                when = f"after {pause:.1f} s"
                process = start(folder)
                time.sleep(pause)
                process.kill()
                process.communicate()
            found = check_what_is_there(folder)
            printed, _ = start(folder).communicate()
            got = result(folder)
            names = sorted(got.keys() | expected)
            other = [name for name in names if got.get(name) != expected.get(name)]
            end = "ANOTHER END" if other else "the same to the last bit"
            print(f"killed {when}: {found}; started again, {end}", flush=True)
            if other:
                sys.exit(f"{printed}\nnot as in the undisturbed run: {', '.join(other)}")


if __name__ == "__main__":
    main()
