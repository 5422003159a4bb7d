"""A run that was interrupted, in one file: what is trained, the optimizer's averages, the step, the curve and the settings.

The order of the examples needs no random state: it follows from the seed and the step.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn, optim

from storage.files import write_tensors

Curve = list[tuple[int, float]]  # validation losses: (step, nats per target token)


class Checkpoint(NamedTuple):
    file: Path
    settings: dict[str, Any]  # all that decides how a run goes: two runs that agree in it are the same run
    resume: bool

    def save(self, trainee: nn.Module, optimizer: optim.Optimizer, step: int, curve: Curve) -> None:
        """Writes the checkpoint; the last one stays until this one is whole."""
        tensors = trainee.state_dict()
        for i, averages in optimizer.state_dict()["state"].items():  # of the i-th tensor: step, exp_avg, exp_avg_sq
            tensors |= {f"{i}/{name}": average for name, average in averages.items()}
        metadata = {"step": step, "curve": curve, "settings": self.settings}
        write_tensors(self.file, tensors, {key: json.dumps(value) for key, value in metadata.items()})

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
            if not curve or step < 1:
                raise ValueError(f"step {step}, {len(curve)} losses")
        except (SafetensorError, ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:  # it may be anything
            raise ValueError(f"{self.file} is not a whole checkpoint ({error}): delete it to start anew") from None
        if not self.resume:
            raise ValueError(f"{self.file} is of a run stopped after step {step}: add --resume to go on, or delete it")
        for name, value in self.settings.items():
            if found.get(name) != value:
                other = f"{name} {found.get(name)}, not {value}"
                raise ValueError(f"{self.file} is of a run with {other}: repeat its flags, or delete it")
        try:
            state = {}
            for i, parameter in enumerate(trainee.parameters()):
                if parameter.requires_grad:
                    state[i] = {name: tensors.pop(f"{i}/{name}") for name in ("step", "exp_avg", "exp_avg_sq")}
                    if [t.shape for t in state[i].values()] != [(), parameter.shape, parameter.shape] or state[i]["step"] != step:
                        raise KeyError(f"the averages of tensor {i} after step {step}")
            trainee.load_state_dict(tensors)
        except (KeyError, RuntimeError) as error:  # a tensor is missing or of another shape
            reason = str(error).replace("\n", " ")[:200]
            raise ValueError(f"{self.file} is not a whole checkpoint ({reason}): delete it to start anew") from None
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        return step, curve
