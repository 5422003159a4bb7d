"""A run that was interrupted, in one file: the trained numbers, the optimizer's, and the metrics.

The order of the examples needs no random state: it follows from the seed and the step.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn, optim

from storage.adapters import stored_rows
from storage.files import difference, read_tensors, write_tensors

Metrics = list[dict[str, Any]]  # one entry a step; step 0 and each look also have "validation"


def numbers_of(trainee: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """-> all numbers of a training: the weights, and what AdamW keeps of the i-th parameter."""
    numbers = dict(trainee.state_dict())
    for i, averages in optimizer.state_dict()["state"].items():
        numbers |= {f"{i}/{name}": tensor for name, tensor in averages.items()}
    return numbers


def entry_of(scores: Any) -> dict[str, Any]:
    """What `evaluate` says -> the entry of a look, with the first three rows that are wrong."""
    wrong = [i for i, exact in enumerate(scores.exact) if not exact][:3]
    numbers = {"validation": scores.loss, "tokens": scores.tokens}
    return numbers | {"exact_match": scores.exact_match(), "wrong": wrong}


def curve_of(metrics: Metrics) -> list[tuple[int, float]]:
    """-> step and validation loss of each look."""
    return [(entry["step"], entry["validation"]) for entry in metrics if "validation" in entry]


def best_look(metrics: Metrics) -> dict[str, Any]:
    """-> the entry with the lowest validation loss, step 0 left out; the first of equals."""
    looks = [entry for entry in metrics[1:] if "validation" in entry]
    return min(looks, key=lambda entry: entry["validation"], default=metrics[0])


def looks_since_best(metrics: Metrics) -> int:
    """-> how many looks at the validation data ago the loss was lowest, step 0 left out."""
    best = best_look(metrics)["step"]
    return sum(step > best for step, _ in curve_of(metrics)) if best else 0


class Checkpoint:
    """Where a run keeps its checkpoint, and what the one that lies there says of itself."""

    def __init__(
        self, directory: Path, settings: dict[str, Any], resume: bool, keep_best: bool,
        film: list[Path] = [],
    ):  # fmt: skip
        """Raises ValueError if one is there that is not to be resumed, or none that is.

        With a film, each adapter's numbers are kept, look by look, in the folder it names.
        """
        self.film = film
        self.file = directory / "checkpoint.safetensors"
        self.best = directory / "best.safetensors"
        self.keep_best, self.metrics = keep_best, []
        self.stored: dict[str, Any] = {}
        if self.file.exists():
            self.read()
        elif resume:
            nothing = f"{self.file} does not exist, so there is nothing to resume"
            raise ValueError(f"{nothing}: leave --resume out")
        if self.metrics and not resume:
            stopped = f"{self.file} is of a run stopped after step {self.step}"
            raise ValueError(f"{stopped}: add --resume to go on, or delete it")
        self.settings: dict[str, Any] = {}
        self.add_settings(settings)

    @property
    def step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def lr(self) -> float | None:
        """-> the peak learning rate that the run began with."""
        return self.metrics[0]["lr"] if self.metrics else None

    def read(self) -> None:
        """Takes metrics and settings from the file. Raises ValueError if it is broken."""
        try:
            with safe_open(self.file, "pt") as opened:
                about = opened.metadata()
            self.metrics, self.stored = json.loads(about["metrics"]), json.loads(about["settings"])
            curve_of(self.metrics)  # fails where an entry is none
            whole = self.step > 0 and self.lr > 0 and isinstance(self.stored, dict)
        except (SafetensorError, RecursionError, AttributeError, LookupError, TypeError, ValueError):
            whole = False
        if not whole:
            raise ValueError(f"{self.file} is not a whole checkpoint: delete it to start anew")

    def add_settings(self, settings: dict[str, Any]) -> None:
        """Notes what decides how the run goes. Raises ValueError if the stored run differs."""
        self.settings |= settings
        other = difference(self.stored, settings)
        if self.metrics and other:
            another = f"{self.file} is of another run: {other}"
            raise ValueError(f"{another}: repeat its flags, or delete it")

    def save(self, trainee: nn.Module, optimizer: optim.Optimizer, metrics: Metrics) -> None:
        """Writes the checkpoint. The last one stays until this one is whole."""
        about = {"metrics": json.dumps(metrics), "settings": json.dumps(self.settings)}
        write_tensors(self.file, numbers_of(trainee, optimizer), about)
        self.keep_frame(trainee, metrics[-1]["step"])
        if self.keep_best and looks_since_best(metrics) == 0:
            write_tensors(self.best, trainee.state_dict())

    def keep_frame(self, adapters: nn.ModuleList, step: int) -> None:
        """Adds each adapter's numbers to its film, a tensor a step. Step 0 begins a new one."""
        for folder, adapter in zip(self.film, adapters):
            file = folder / "film.safetensors"
            frames = read_tensors(file) if step else {}
            write_tensors(file, frames | {str(step): stored_rows(adapter)})

    def restore(self, trainee: nn.Module, optimizer: optim.Optimizer) -> Metrics:
        """Puts the stored numbers in place -> the metrics so far, none where there is no file."""
        if not self.metrics:
            self.keep_frame(trainee, 0)
            return []
        for p in trainee.parameters():
            if p.requires_grad:  # AdamW makes these at its first step
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.tensor(0.0)} | zeros
        numbers, stored = numbers_of(trainee, optimizer), read_tensors(self.file)
        shapes = {name: tensor.shape for name, tensor in numbers.items()}
        whole = shapes == {name: tensor.shape for name, tensor in stored.items()}
        steps = [tensor for name, tensor in stored.items() if name.endswith("/step")]
        if not whole or any(step != self.step for step in steps):
            raise ValueError(f"{self.file} is not a whole checkpoint: delete it to start anew")
        for name, tensor in numbers.items():
            tensor.copy_(stored[name])
        return list(self.metrics)

    def restore_best(self, trainee: nn.Module, metrics: Metrics) -> dict[str, Any]:
        """Goes back to the best numbers, if they were kept -> the look at what is there now."""
        if not self.keep_best:
            return metrics[-1]
        trainee.load_state_dict(read_tensors(self.best))
        return best_look(metrics)

    def end(self) -> None:
        """Removes what only an interrupted run needs."""
        for file in (self.file, self.best):
            file.unlink(missing_ok=True)
