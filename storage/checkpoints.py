"""A run that was interrupted, in one file: weights, the optimizer's state, metrics and settings.

The order of the examples needs no random state: it follows from the seed and the step.
"""

import copy
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from data import Scores
from storage.adapters import stored_rows
from storage.files import difference, replace_file

Metrics = list[dict[str, Any]]  # one entry a step; step 0 and each look also have "validation"


def entry_of(scores: Scores) -> dict[str, Any]:
    """What `evaluate` says -> the entry of a look, with the first three rows that are wrong."""
    wrong = [i for i, exact in enumerate(scores.exact) if not exact][:3]
    numbers = {"validation": scores.loss, "tokens": scores.tokens}
    return numbers | {"exact_match": scores.exact_match(), "wrong": wrong}


def curve_of(metrics: Metrics) -> list[tuple[int, float]]:
    """-> step and validation loss of each look."""
    return [(entry["step"], entry["validation"]) for entry in metrics if "validation" in entry]


def looks_since_best(metrics: Metrics) -> int:
    """-> how many looks at the validation data ago the loss was lowest, step 0 left out."""
    losses = [loss for step, loss in curve_of(metrics) if step > 0]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class Checkpoint:
    """Where a run keeps its checkpoint, and what the one that lies there says of itself."""

    def __init__(
        self, directory: Path, settings: dict[str, Any], resume: bool, keep_best: bool,
        keep_film: bool = False,
    ):  # fmt: skip
        """Raises ValueError if one is there that is not to be resumed, or none that is."""
        self.file = directory / "checkpoint.pt"
        self.keep_best, self.best = keep_best, None  # the weights of the best look
        self.keep_film, self.film = keep_film, {}  # by look, what is stored of each adapter
        self.numbers = {}, {}  # what is stored of the trainee and the optimizer
        self.metrics: Metrics = []
        self.stored: dict[str, Any] = {}  # the settings of the run that lies there
        self.settings: dict[str, Any] = {}  # and of this one
        if self.file.exists():
            self.read()
        elif resume:
            nothing = f"{self.file} does not exist, so there is nothing to resume"
            raise ValueError(f"{nothing}: leave --resume out")
        if self.metrics and not resume:
            stopped = f"{self.file} is of a run stopped after step {self.metrics[-1]['step']}"
            raise ValueError(f"{stopped}: add --resume to go on, or delete it")
        self.add_settings(settings | {"film": keep_film or None})  # None, as in older ones

    def read(self) -> None:
        """Takes what is in the file. Raises ValueError if it is broken, or somebody else's."""
        content = io.BytesIO(self.file.read_bytes())
        try:
            state = torch.load(content, map_location="cpu", weights_only=True)
            self.metrics, self.stored = state["metrics"], state["settings"]
            self.numbers, self.best = (state["trainee"], state["optimizer"]), state["best"]
            self.film = state.get("film", {})  # older checkpoints have none
        except Exception as error:  # there are many ways to be broken
            broken = f"{self.file} is not a whole checkpoint ({error!r:.100})"
            raise ValueError(f"{broken}: name another --out, or delete it") from None

    def add_settings(self, settings: dict[str, Any]) -> None:
        """Notes what decides how the run goes. Raises ValueError if the stored run differs."""
        self.settings |= settings
        other = difference(self.stored, settings)
        if self.metrics and other:
            another = f"{self.file} is of another run: {other}"
            raise ValueError(f"{another}: repeat its flags, or delete it")

    def save(self, trainee: nn.Module, optimizer: optim.Optimizer, metrics: Metrics) -> None:
        """Writes the checkpoint. The last one stays until this one is whole."""
        if self.keep_best and looks_since_best(metrics) == 0:
            self.best = copy.deepcopy(trainee.state_dict())
        self.add_frame(trainee, metrics[-1]["step"])
        state = {"trainee": trainee.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"best": self.best, "film": self.film}
        state |= {"metrics": metrics, "settings": self.settings}
        content = io.BytesIO()
        torch.save(state, content)
        replace_file(self.file, content.getbuffer())

    def add_frame(self, adapters: nn.ModuleList, step: int) -> None:
        """Adds each adapter's numbers to the film, if there is to be one."""
        if self.keep_film:
            self.film[str(step)] = [stored_rows(each).detach().clone() for each in adapters]

    def restore(self, trainee: nn.Module, optimizer: optim.Optimizer) -> Metrics:
        """Puts the stored numbers in place -> the metrics so far, none where there is no file."""
        if not self.metrics:
            self.add_frame(trainee, 0)
            return []
        weights, averages = self.numbers
        trainee.load_state_dict(weights)
        optimizer.load_state_dict(averages)
        return list(self.metrics)

    def restore_best(self, trainee: nn.Module) -> None:
        """Goes back to the best numbers, if they were kept."""
        if self.keep_best:
            trainee.load_state_dict(self.best)

    def end(self) -> None:
        """Removes what only an interrupted run needs."""
        self.file.unlink(missing_ok=True)
