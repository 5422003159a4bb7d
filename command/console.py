"""How a program speaks, asks, and ends."""

import gc
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def before_torch(flags: Callable[[str], Any], description: str) -> None:
    """What has to happen before torch is imported, which takes seconds: a wrong flag ends here, and
    threads are told to sleep while they wait.

    By default they spin, and beside busy programs every operation takes several times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    run_command(lambda: flags(description))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends an import without a traceback


def say(text: str, start: str = "", end: str = "\n") -> None:
    """Prints text that may hold a stranger's control characters, to a console that may be gone."""
    try:
        print(start + re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", text), end=end, flush=True)
    except BrokenPipeError:  # as with `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prompts(text: str) -> Iterator[list[str]]:
    """--prompt -> batches of prompts: the text, or for "-" the lines of stdin. On a terminal, each
    line is a batch of its own, so that it is answered at once."""
    if text != "-":
        yield [text]
        return
    stdin = sys.stdin or io.StringIO()  # without one, there are no lines
    lines = (line.rstrip("\r\n") for line in stdin)
    if not stdin.isatty():
        yield list(lines)
    else:
        say("One input a line. Ctrl-D ends it (on Windows Ctrl-Z and Enter).")
        yield from ([line] for line in lines)


def run_command(command: Callable[[], Any]) -> None:
    """Runs a program. A user's mistake ends in one sentence and status 2, Ctrl-C in status 130."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a console that cannot show a character shows another
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
        gc.freeze()  # or Python would look through all of torch's objects once more at its end
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sentence = "".join(c if c.isprintable() else " " for c in str(error))[:1000]
        if isinstance(error, RuntimeError) and ("memory" not in sentence or "illegal" in sentence):
            raise  # a mistake of ours
        if isinstance(error, (MemoryError, RuntimeError)):
            remedy = "lower --batch-size, or train with --micro-batch 1"
            sentence = f"out of memory: {remedy} ({sentence})"
        print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        goes_on = ": --resume goes on from the last checkpoint, if there is one"
        is_training = Path(sys.argv[0]).name == "train.py"
        print("\ninterrupted" + goes_on * is_training, file=sys.stderr)
        sys.exit(130)
