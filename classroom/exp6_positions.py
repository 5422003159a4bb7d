"""6. Must the base have seen its texts at every position?

    python classroom/exp6_positions.py

Virtual tokens take the positions 0 … P-1, so the text moves to P and beyond. Two small bases are pretrained on windows of one
document each, padded with the end of text: in the one, all documents start at position 0; in the other, anywhere in the window.
That is their only difference. What does it cost each of them, frozen, to have the text of the task sentence moved by P
positions, with nothing in front? And what does a trained prefix of P tokens make of it? Full fine-tuning moves nothing.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import torch
from common import Experiment, band, moved, spread
from torch import Tensor

from command.process import run_command
from small_base.pretrain import pretrain
from train import RECIPES, evaluate


def at_the_start(stream: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """(N,) ids -> (n, length): one document each from position 0, and the end of text from there on."""
    end = stream.max()
    starts = (stream[:-length] == end).nonzero() + 1  # behind the end of another one
    windows = stream[starts[torch.randint(len(starts), (n,), generator=generator)] + torch.arange(length)]
    windows[(windows == end).cumsum(dim=1) > 0] = end
    return windows


def anywhere(stream: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """(N,) ids -> (n, length): the same, each document moved to the right, at most so far that its end still shows."""
    windows = at_the_start(stream, n, length, generator)
    room = (windows == stream.max()).sum(dim=1, keepdim=True)
    moves = (torch.rand(n, 1, generator=generator) * room).long()
    return windows.gather(1, (torch.arange(length) - moves) % length)


BASES = {"documents at position 0": at_the_start, "documents anywhere": anywhere}


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    lengths = experiment.grid([1, 4, 16, 64])
    methods = {f"P = {P}": (P, "prefix") for P in lengths} | {"full fine-tuning": (0, "full")}
    recipe, rows = RECIPES["pretrain"], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps files that are mapped
        for base, (name, windows) in enumerate(BASES.items()):
            out = Path(folder) / f"base{base}"
            with contextlib.redirect_stdout(io.StringIO()):
                pretrain(out, [], experiment.steps(recipe.steps), recipe.lr, 16, 0, experiment.device, windows)
            _, frozen = experiment.load(out)
            for label, (P, method) in methods.items():
                for seed in experiment.seeds:
                    run = experiment.tuned("sentence", method, seed, n_virtual=P, base=out)
                    found = {"base": name, "method": label, "seed": seed, "loss": run.loss, "exact": run.exact}
                    found["moved"], _ = evaluate(moved(frozen, P), [], run.rows["validation"], 50)
                    experiment.runs.append(found)
    for name in BASES:
        for key, what, digits in [("moved", "loss, frozen", 3), ("loss", "loss, trained", 4), ("exact", "exact %, trained", 1)]:
            cells = [spread(experiment.measured(key, base=name, method=label), digits) for label in methods]
            rows.append([name, what, *cells])

    def draw(axes) -> None:
        for axis, (key, title) in zip(axes[0], [("moved", "frozen, moved by P"), ("loss", "behind a trained prefix of P")]):
            for name in BASES:
                band(axis, lengths, [experiment.measured(key, base=name, method=f"P = {P}") for P in lengths], name)
            axis.set(title=title, xlabel="P", ylabel="validation loss, nats per token", xscale="log", yscale="log")
            axis.set_xticks(lengths, lengths)

    experiment.report(["pretrained on", "measured", *methods], rows, draw, 2)


if __name__ == "__main__":
    run_command(main)
