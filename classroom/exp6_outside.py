"""6. What if a prefix stood outside the softmax?

    python classroom/exp6_outside.py

A prefix shares the softmax with the text: the more text there is, the less of the attention is left to it, and what it gets,
the text loses. Wang et al. 2025 (arXiv 2506.13674) put it outside: each head adds φ(q) M to what it found in the text, with
φ(q) = elu(q) + 1 and a trained matrix M. With heads of 32 numbers, the M of all heads have as many as a prefix of 16 tokens.
Both are trained for two tasks, and of the prefix it is measured what share of the attention it has as the text grows.
"""

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import Experiment, attention, colour, fit, lowest, n_trainable, rate, spread
from torch import Tensor, nn

from command.process import run_command
from model import Decoder, KVCache, attend
from train import evaluate, load_examples, share

TASKS, P, STEPS, UNREPORTED = ("chat", "shifted"), 16, 600, 100
PLACES = {"inside": 0.3, "outside": 0.03}  # and where the search for the learning rate begins
GROWING = (8, 16, 32, 64, 112)  # tokens of text


class Outside(nn.Module):
    """A matrix for each head of each layer, in the place of keys and values. It starts as the base itself."""

    def __init__(self, model: Decoder):
        super().__init__()
        _, L, _, _, D = model.kv_shape(1)
        self.family = type(model.h[0].attn).__module__  # where its attention looks up `attend`
        self.matrices = nn.Parameter(torch.zeros(L, model.config.n_head, D, D, device=model.device))

    def past_kv(self, model: Decoder, past_kv: KVCache | None = None) -> KVCache | None:
        return past_kv  # nothing of it is in the cache

    @contextmanager
    def acting(self) -> Iterator[None]:
        """While it lasts, attention adds φ(q) M to what it found; it is asked layer by layer, again and again."""
        layers = cycle(range(len(self.matrices)))

        def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v) + (F.elu(q) + 1) @ self.matrices[next(layers)]

        with mock.patch.object(sys.modules[self.family], "attend", added):
            yield


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)

    def measure(place: str, task: str, seed: int, lr: float) -> dict[str, Any]:
        own = {"n_virtual": P, "lr": lr, "steps": STEPS, "looks": 12}
        run = experiment.prepared(load_examples(task, None, None, seed), "prefix", seed, **own)
        if place == "outside":
            run = run._replace(adapters=[Outside(run.model)])
        with run.adapters[0].acting() if place == "outside" else nullcontext():
            curve, _ = fit(run)
            loss, hits = evaluate(run.model, run.adapters, run.rows["test"], 50)
        found = {"trained": n_trainable(run.model, run.adapters), "curve": curve, "loss": loss, "exact": share(hits)}
        if place == "inside":
            ids = [i for row in run.rows["test"] for i in row.source + row.target][: GROWING[-1]]
            weights = attention(run.model, torch.tensor([ids], device=run.model.device), run.adapters[0].past_kv(run.model))
            found["shares"] = [100 * weights[:, 0, :, T - 1, :P].sum(dim=-1).mean().item() for T in GROWING]
        return found

    def run(place: str, task: str, seed: int, lr: float) -> dict[str, Any]:
        settings = {"place": place, "task": task, "seed": seed, "lr": lr}
        return experiment.once(settings, lambda: measure(**settings))

    rows, shares = [], {}
    for task in TASKS:
        for place, middle in PLACES.items():
            lr = rate(middle, lowest(lambda power: run(place, task, UNREPORTED, rate(middle, power))["curve"][-1][1]))
            runs = [run(place, task, seed, lr) for seed in experiment.seeds]
            row = [task, place, f"{runs[0]['trained']:,}", f"{lr:g}", spread([some["exact"] for some in runs], 1)]
            row += [spread([some["loss"] for some in runs], 4), spread([some["curve"][-1][0] for some in runs], 0)]
            columns = list(zip(*(some.get("shares", ()) for some in runs)))  # none of what stands outside
            if columns:
                shares[task] = columns
            rows.append(row + ([spread(column, 0) for column in columns] or ["–"] * len(GROWING)))

    def draw(axes) -> None:
        for (task, columns), style in zip(shares.items(), ("-", "--")):
            means, name = list(map(statistics.mean, columns)), f"prefix of {P}, {task}"
            axes[0][0].plot(GROWING, means, style, label=name, color=colour(name))
            axes[0][0].plot(GROWING, columns, ".", color=colour(name))
        axes[0][0].set(xlabel="tokens of text", ylabel="% of the attention", ylim=(0, 100))

    header = ["task", "softmax", "numbers", "learning rate", "exact match %", "loss a token", "steps"]
    experiment.report([*header, *(f"share % behind {T} tokens" for T in GROWING)], rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
