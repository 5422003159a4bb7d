"""The README's table of results: every method on every task, three seeds, one JSON line a run.

    python tests/results.py | tee tests/results.jsonl        about ten minutes on two cores
"""

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402

for task in train.data.TASKS:
    for method in ("prefix", "soft_prompt", "both", "full"):
        for seed in range(3):
            flags = ["--method", method, "--task", task, "--seed", str(seed)]
            flags += ["--steps", "600"] if train.data.TASKS[task].tier == "new" else []
            with contextlib.redirect_stdout(sys.stderr):
                result = train.main(flags)
            print(json.dumps({"flags": " ".join(flags)} | result), flush=True)
