"""A run that was interrupted, in one file: what is trained, the optimizer's averages, the step, the curve and the settings.

The order of the examples needs no random state: it follows from the seed and the step.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn, optim

from storage.files import write_tensors

Curve = list[tuple[int, float]]  # validation losses: (step, nats per target token)


def looks_since_best(curve: Curve) -> int:
    """-> how many looks at the validation data ago the loss was lowest, that before the first step left out."""
    losses = [loss for _, loss in curve[1:]]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def numbers_of(trainee: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """-> all numbers of a training, by name: the weights, and AdamW's step and two averages of the i-th parameter."""
    averages = optimizer.state_dict()["state"]
    return trainee.state_dict() | {f"{i}/{name}": tensor for i, own in averages.items() for name, tensor in own.items()}


class Checkpoint(NamedTuple):
    file: Path
    settings: dict[str, Any]  # all that decides how a run goes: two runs that agree in it are the same run
    resume: bool

    @property
    def best(self) -> Path:
        return self.file.with_name("best.safetensors")

    def save(self, trainee: nn.Module, optimizer: optim.Optimizer, step: int, curve: Curve) -> None:
        """Writes the checkpoint; the last one stays until this one is whole."""
        metadata = {"step": step, "curve": curve, "settings": self.settings}
        write_tensors(self.file, numbers_of(trainee, optimizer), {key: json.dumps(value) for key, value in metadata.items()})

    def keep(self, trainee: nn.Module, optimizer: optim.Optimizer, step: int, curve: Curve, plan: Any) -> None:
        """Saves what is due after a step: a checkpoint, and where a plan has patience, numbers that are the best so far."""
        if step % plan.save_every == 0 and step < plan.steps:
            self.save(trainee, optimizer, step, curve)
        if plan.patience and curve[-1][0] == step and looks_since_best(curve) == 0:
            write_tensors(self.best, trainee.state_dict())

    def end(self) -> None:
        """Removes what only an interrupted run needs, and gives the metrics their name."""
        for file in (self.file, self.best):
            file.unlink(missing_ok=True)
        if (metrics := self.file.with_name("metrics.part")).exists():
            metrics.replace(metrics.with_suffix(".jsonl"))

    def load(self, trainee: nn.Module, optimizer: optim.Optimizer) -> tuple[int, Curve]:
        """Puts a checkpoint's numbers in place -> its step and curve; 0 and an empty curve where there is none.

        Raises ValueError where one is there that is not to be resumed, is broken, or is of another run.
        """
        if not self.file.exists():
            return 0, []
        try:
            with safe_open(self.file, "pt") as opened:
                step, curve, found = (json.loads(opened.metadata()[key]) for key in ("step", "curve", "settings"))
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            step, curve, found = int(step), [(int(at), float(loss)) for at, loss in curve], dict(found)
        except (SafetensorError, ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:  # whatever it is
            raise ValueError(f"{self.file} is not a whole checkpoint ({error}): delete it to start anew") from None
        if not self.resume:
            raise ValueError(f"{self.file} is of a run stopped after step {step}: add --resume to go on, or delete it")
        for name, value in self.settings.items():
            if found.get(name) != value:
                other = f"{name} {found.get(name)}, not {value}"
                raise ValueError(f"{self.file} is of a run with {other}: repeat its flags, or delete it")
        for p in trainee.parameters():
            if p.requires_grad:  # what AdamW has of it from the first step on
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.tensor(0.0)} | zeros
        places = numbers_of(trainee, optimizer)
        whole = curve and {name: t.shape for name, t in places.items()} == {name: t.shape for name, t in tensors.items()}
        if not whole or step < 1 or any(t.item() != step for name, t in tensors.items() if name.endswith("/step")):
            raise ValueError(f"{self.file} is not a whole checkpoint (not all numbers of step {step}): delete it to start anew")
        for name, place in places.items():
            place.copy_(tensors[name])
        return step, curve
