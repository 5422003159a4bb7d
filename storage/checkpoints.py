"""A run that was interrupted, in one file: the trained numbers, the optimizer's, and the metrics.

The order of the examples needs no random state: it follows from the seed and the step.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn, optim

from storage.files import difference, read_tensors, write_tensors

Metrics = list[dict[str, float]]  # one entry a step; step 0 and each look also have "validation"


def numbers_of(trainee: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """-> all numbers of a training: the weights, and what AdamW keeps of the i-th parameter."""
    numbers = dict(trainee.state_dict())
    for i, averages in optimizer.state_dict()["state"].items():
        numbers |= {f"{i}/{name}": tensor for name, tensor in averages.items()}
    return numbers


class Checkpoint:
    """The place of a run's checkpoint, and what the one that lies there says of itself."""

    def __init__(self, directory: Path, settings: dict[str, Any], resume: bool):
        """Raises ValueError if a checkpoint is there that is not to be resumed, or none that is."""
        self.file = directory / "checkpoint.safetensors"
        self.best = directory / "best.safetensors"
        self.settings: dict[str, Any] = settings
        self.step, self.metrics = 0, []
        if self.file.exists():
            self.read()
            if not resume:
                stopped = f"{self.file} is of a run stopped after step {self.step}"
                raise ValueError(f"{stopped}: add --resume to go on, or delete it")
        elif resume:
            raise ValueError(f"{self.file} does not exist, so there is nothing to --resume: leave it out")

    def read(self) -> None:
        """Takes step and metrics from the file. Raises ValueError if it is broken, or of another run."""
        try:
            with safe_open(self.file, "pt") as opened:
                stored = {key: json.loads(value) for key, value in opened.metadata().items()}
            self.metrics, settings = list(stored["metrics"]), dict(stored["settings"])
            self.step = int(self.metrics[-1]["step"])
        except (SafetensorError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{self.file} is not a whole checkpoint ({error}): delete it to start anew") from None
        other = difference(settings, self.settings)
        if other:
            raise ValueError(f"{self.file} is of a run with other {other}: repeat its flags, or delete it")

    def save(self, trainee: nn.Module, optimizer: optim.Optimizer, metrics: Metrics) -> None:
        """Writes the checkpoint. The last one stays until this one is whole."""
        about = {"metrics": json.dumps(metrics), "settings": json.dumps(self.settings)}
        write_tensors(self.file, numbers_of(trainee, optimizer), about)

    def save_best(self, trainee: nn.Module) -> None:
        write_tensors(self.best, trainee.state_dict())

    def restore(self, trainee: nn.Module, optimizer: optim.Optimizer) -> Metrics:
        """Puts the stored numbers in place -> the metrics so far; an empty list without a checkpoint."""
        if not self.step:
            return []
        for p in trainee.parameters():
            if p.requires_grad:  # AdamW makes these at its first step
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.tensor(0.0)} | zeros
        numbers, stored = numbers_of(trainee, optimizer), read_tensors(self.file)
        shapes = {name: tensor.shape for name, tensor in numbers.items()}
        steps = {tensor.item() for name, tensor in stored.items() if name.endswith("/step")}
        if shapes != {name: tensor.shape for name, tensor in stored.items()} or steps != {self.step}:
            reason = f"not all numbers of step {self.step}"
            raise ValueError(f"{self.file} is not a whole checkpoint ({reason}): delete it to start anew")
        for name, tensor in numbers.items():
            tensor.copy_(stored[name])
        return list(self.metrics)

    def end(self) -> None:
        """Removes what only an interrupted run needs."""
        for file in (self.file, self.best):
            file.unlink(missing_ok=True)
