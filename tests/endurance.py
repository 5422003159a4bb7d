"""Tune a prefix for 20,000 steps, with looks and checkpoints on the way: its memory must not grow.

python tests/endurance.py       some minutes on two cores; Linux only
"""

import contextlib
import io
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import train  # noqa: E402
from small_base import pretrain  # noqa: E402

STEPS, ROUNDS = 20_000, 10


def resident() -> float:
    """-> MB of this process that are in memory."""
    return int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3


def main() -> None:
    megabytes, steps, target_hidden = [], 0, train.target_hidden

    def counted(*given):
        nonlocal steps
        steps += torch.is_grad_enabled()  # not in an evaluation
        if steps == (len(megabytes) + 1) * STEPS // ROUNDS:
            megabytes.append(resident())
        return target_hidden(*given)

    train.target_hidden = counted
    with tempfile.TemporaryDirectory() as folder:
        base, out = f"{folder}/base", f"{folder}/out"
        run = ["--base", base, "--device", "cpu", "--lr", "0.03", "--batch-size", "2", "--out", out]
        with contextlib.redirect_stdout(io.StringIO()):
            pretrain.main(["--steps", "20", "--device", "cpu", "--out", base])
            train.main([*run, "--steps", str(STEPS), "--eval-every", "1000"])
    print(f"MB after each {STEPS // ROUNDS} steps:", *(f"{megabyte:.1f}" for megabyte in megabytes))
    if megabytes[-1] > 1.01 * megabytes[0]:
        sys.exit("the process grew")


if __name__ == "__main__":
    main()
