"""A process: how it starts, what computes, how it meets others under torchrun, and its progress."""

import functools
import inspect
import math
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from command.console import say
from model import Decoder


def start_process(batch_size: int | None = None) -> tuple[int, int]:
    """Makes runs repeat bit for bit, and meets the other processes of torchrun -> rank, processes.

    Raises ValueError if a batch has not an example for each of them.
    MKL's sums must not depend on where memory happens to lie. Its functions want a first call on
    one thread, or they may lose digits on several (github.com/pytorch/pytorch/issues/188792).
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    torch.ones(1).sqrt().tanh()
    leave_torch_compile_out()
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group()  # gloo on a CPU, NCCL on GPUs
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # the first process does the talking
    rank, processes = this_process()
    if batch_size and processes > batch_size:
        raise ValueError(f"{processes} processes need an example each: raise --batch-size")
    return rank, processes


def leave_torch_compile_out() -> None:
    """Strips what imports torch.compile, which takes 2 s: nothing is compiled here.

    These are wrappers of AdamW, and random numbers for the meta tensors of load_base.
    """
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        setattr(Optimizer, name, inspect.unwrap(getattr(Optimizer, name)))
    AdamW.step = torch.no_grad()(inspect.unwrap(AdamW.step))
    fill = inspect.unwrap(nn.Embedding.reset_parameters)

    @functools.wraps(fill)
    def fill_if_real(embedding: nn.Embedding) -> None:
        if not embedding.weight.is_meta:
            fill(embedding)

    nn.Embedding.reset_parameters = fill_if_real


def this_process() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Waits until every process has come here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # dist.barrier() may want a GPU for each process


def sum_over_processes(loss: Tensor, trainee: nn.Module) -> None:
    """Sums the loss and the gradients in place. Nothing else has to travel."""
    if dist.is_initialized():
        for tensor in (loss, *(p.grad for p in trainee.parameters() if p.requires_grad)):
            dist.all_reduce(tensor)


def pick_device(name: str | None) -> torch.device:
    """-> the device asked for, or the best there is. Raises ValueError if it is not there."""
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        there.append("mps")
    there.append("cpu")
    name = name or there[0].partition(":")[0]
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's processes take one each
    if name not in there:
        raise ValueError(f"--device {name} is not there: this machine has {', '.join(there)}")
    return torch.device(name)


def pick_dtype(name: str | None, model: Decoder, device: torch.device, full: bool) -> torch.dtype:
    """--dtype -> the dtype for a base: on a CPU what is quicker, elsewhere that of its files."""
    if full and name == "bfloat16":
        raise ValueError("--method full needs --dtype float32: bfloat16 rounds small updates away")
    if full or name == "float32":
        return torch.float32
    if device.type != "cpu":
        return torch.bfloat16 if name else model.dtype
    if name is None and sum(p.numel() for p in model.parameters()) < 10**7:  # nothing to gain
        return torch.float32
    slower = seconds_of_a_product(torch.bfloat16) / seconds_of_a_product(torch.float32)
    if name and slower > 1:
        cost = f"takes {slower:.0f} times as long as in float32"
        say(f"--dtype bfloat16: this processor emulates it, and {cost}")
    return torch.bfloat16 if name or slower <= 1 else torch.float32


def seconds_of_a_product(dtype: torch.dtype) -> float:
    """-> how long a product takes on this processor: some only emulate bfloat16."""
    x, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


class Progress:
    """A line with step, losses, tokens/s and time left, five times a run, or never if `quiet`. On a
    terminal it is there all the time, refreshed in place."""

    def __init__(self, first: int, steps: int, quiet: bool = False):
        """Steps done before, and in all."""
        self.first, self.steps, self.quiet = first, steps, quiet
        self.tokens, self.validation = 0, ""
        self.begin = time.perf_counter()
        self.terminal = sys.stdout is not None and sys.stdout.isatty()

    def show(self, n_tokens: int, entry: dict[str, float]) -> None:
        """Notes a step on so many tokens, and what was measured of it."""
        step, seconds = int(entry["step"]), time.perf_counter() - self.begin
        self.tokens += n_tokens
        if "validation" in entry:
            self.validation = f"  validation {entry['validation']:.3f}"
        last = step == self.steps
        if not self.terminal and (self.quiet or step % math.ceil(self.steps / 5) and not last):
            return
        left = seconds / (step - self.first) * (self.steps - step)
        speed = f"{self.tokens / seconds:6,.0f} tokens/s  {left:3.0f} s left"
        start = "\r" if self.terminal else ""
        end = "" if self.terminal and not last else "\n"
        losses = f"  loss {entry['loss']:.3f}{self.validation}"
        say(f"step {step:4}/{self.steps}{losses}  {speed}", start, end)
