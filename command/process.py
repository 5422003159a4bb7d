"""A process: how it starts, meets others under torchrun, says what it does, and ends. Every program here uses it."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start_process() -> tuple[int, int]:
    """Makes runs repeat bit for bit, and meets the other processes of torchrun -> the number of this one, and of all.

    MKL's sums must not depend on where memory happens to lie. Its functions (AdamW's root, the tanh of a prefix's MLP) want
    a first call on one thread: on several, one may be left with 3 or 4 digits (github.com/pytorch/pytorch/issues/188792).
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    torch.ones(1).sqrt().tanh()
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group()  # a backend for each kind of device: gloo for the CPU, NCCL for GPUs
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # the first one does the talking
    return this_process()


def this_process() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Waits until every process has come here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU: dist.barrier() may want a GPU for each process


def sum_over_processes(loss: Tensor, trainee: nn.Module) -> None:
    """Sums the loss and the gradients in place. Nothing else has to travel."""
    if dist.is_initialized():
        for tensor in (loss.detach(), *(p.grad for p in trainee.parameters() if p.requires_grad)):
            dist.all_reduce(tensor)


def pick_device(name: str | None) -> torch.device:
    """-> the device asked for, or the best there is. Raises ValueError if it is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = name or there[0]
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's processes take a device each
    try:
        return torch.zeros(1, device=name if name.partition(":")[0] in there else "none").device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name} is not there: this machine has {', '.join(there)}") from None


def say(text: str, start: str = "", end: str = "\n") -> None:
    """Prints what may hold control characters of a stranger's, to a console that may be gone (`| head -1`)."""
    try:
        print(start + re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", text), end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prompts(text: str) -> Iterator[list[str]]:
    """--prompt -> prompts to complete together: the text, or for "-" all lines of stdin, on a terminal each as it comes."""
    if text != "-":
        yield [text]
    elif not sys.stdin.isatty():
        yield [line for line in sys.stdin.read().split("\n") if line]
    else:
        say("An input a line; the end of the file (Ctrl-D, on Windows Ctrl-Z and Enter) ends it.")
        for line in sys.stdin:
            yield [line.rstrip("\n")]


class Progress:
    """One line with step, losses, tokens/s and time left: on a terminal refreshed in place, elsewhere a new one each tenth
    of the steps, and sooner if the last one is five seconds old."""

    def __init__(self, step: int, steps: int, validation: float | None = None, beside: Path | None = None):
        """Steps done before, and in all; the validation loss so far; a file beside which metrics.part gets each step."""
        if validation is not None:
            start = f"resuming after step {step}" if step else "before the first step"
            say(f"start    validation loss {validation:.3f}, {start}")
        self.first, self.steps, self.tokens = step, steps, 0
        self.metrics = beside.with_name("metrics.part") if beside and steps and this_process()[0] == 0 else None
        if self.metrics:  # metrics.jsonl when the run has ended well
            self.metrics.parent.mkdir(parents=True, exist_ok=True)
            before = self.metrics.read_text().splitlines(keepends=True)[:step] if step and self.metrics.exists() else []
            self.metrics.write_text("".join(before))
        self.begin = self.shown = time.perf_counter()

    def show(self, step: int, tokens: int, **losses: float) -> None:
        """Notes that `step` steps are done, the last of them on so many tokens."""
        self.tokens += tokens
        if self.metrics:
            with open(self.metrics, "a") as file:
                file.write(json.dumps({"step": step} | losses) + "\n")
        now, last = time.perf_counter(), step == self.steps
        terminal = sys.stdout is not None and sys.stdout.isatty()
        tenth = not terminal and step % math.ceil(self.steps / 10) == 0
        seconds = now - self.begin
        a_step = seconds / (step - self.first)
        if last or tenth or now - self.shown + a_step > (0.2 if terminal else 5):  # the next one would be late
            self.shown, left = now, a_step * (self.steps - step)
            words = "".join(f"  {name} {loss:.3f}" for name, loss in losses.items())
            line = f"step {step:4}/{self.steps}{words}  {self.tokens / seconds:6,.0f} tokens/s  {left:3.0f} s left"
            say(line, start="\r" if terminal else "", end="\n" if last or not terminal else "")


def run_command(command: Callable[[], Any]) -> None:
    """Runs a program's main; what a user got wrong ends in one sentence and status 2, Ctrl-C in status 130."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a console that cannot show a character shows another
    try:
        command()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        sentence = "".join(c if c.isprintable() else " " for c in str(error))[:1000]  # a file's own words may be in it
        if isinstance(error, RuntimeError) and ("memory" not in sentence or "illegal" in sentence):
            raise  # a mistake of ours
        if isinstance(error, (MemoryError, RuntimeError)):
            sentence = f"the memory does not suffice: lower --batch-size or --n-virtual, or give --dtype bfloat16 ({sentence})"
        print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on from its last checkpoint, if one is left", file=sys.stderr)
        sys.exit(130)
