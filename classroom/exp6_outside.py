"""6. What if a prefix stood outside the softmax?

    python classroom/exp6_outside.py

A prefix shares the softmax with the text. The more text there is, the less attention the prefix
gets, and what it gets, the text loses. Wang et al. 2025 (arXiv 2506.13674) put it outside: each
head adds φ(q) M to what it read in the text, with φ(q) = elu(q) + 1 and a trained matrix M. With
heads of 32 numbers, all the M together have as many numbers as a prefix of 16 tokens. Both are
trained for two tasks, on three small bases. The learning rate is chosen on a fourth. And the
prefix's share of the attention is measured as the text grows.
"""

import statistics
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import Experiment, all_right, attending, attention, best_rate, colour, curve_of
from common import looks_of, n_trainable, spread
from torch import Tensor, nn

from command.console import run_command
from command.examples import load_examples
from model import Decoder, KVCache, attend
from train import evaluate

TASKS = ("chat", "shifted")
P, STEPS, UNREPORTED = 16, 600, 100
PLACES = {"inside": 0.3, "outside": 0.03}  # and where the search for the learning rate begins
GROWING = (8, 16, 32, 64, 112)  # tokens of text


class Outside(nn.Module):
    """A matrix for each head of each layer, in place of keys and values. Zeros change nothing."""

    def __init__(self, model: Decoder):
        super().__init__()
        _, L, _, _, D = model.kv_shape(1)
        zeros = torch.zeros(L, model.config.n_head, D, D, device=model.device)
        self.matrices = nn.Parameter(zeros)

    def past_kv(self, model: Decoder, past_kv: KVCache | None = None) -> KVCache | None:
        return past_kv  # nothing of it is in the cache

    def acting(self, model: Decoder) -> AbstractContextManager:
        """While it lasts, each layer of the model adds φ(q) M to what its attention read."""

        def added(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            matrices = self.matrices[layer]  # (H, D, D)
            heads = q.reshape(len(q), len(matrices), -1, q.size(3))  # a Llama's come folded
            return attend(q, k, v, mask) + ((F.elu(heads) + 1) @ matrices).view_as(q)

        return attending(model, [partial(added, layer) for layer in range(len(model.h))])


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)

    def measure(place: str, task: str, seed: int, lr: float) -> dict[str, Any]:
        own = {"n_virtual": P, "lr": lr, "steps": STEPS, "looks": 12}
        examples = load_examples(task, None, None, seed)
        run = experiment.prepared(examples, "prefix", seed, experiment.base(seed), **own)
        model, acting = run.model, nullcontext()
        if place == "outside":
            run = run._replace(adapters=[Outside(model)])
            acting = run.adapters[0].acting(model)
        with acting:
            looks = looks_of(run, all_right)
            scores = evaluate(model, run.adapters, run.rows["test"], 50)
        record = {"trained": n_trainable(model, run.adapters), "curve": curve_of(looks)}
        record |= {"loss": scores.loss, "exact": scores.exact_match()}
        if place == "inside":
            ids = [i for row in run.rows["test"] for i in row.source + row.target]
            idx = torch.tensor([ids[: GROWING[-1]]], device=model.device)
            weights = attention(model, idx, run.adapters[0].past_kv(model))  # (L, 1, H, T, S)
            shares = weights[:, 0, :, :, :P].sum(dim=-1).mean(dim=(0, 1))  # (T,)
            record["shares"] = [100 * shares[T - 1].item() for T in GROWING]
        return record

    def run(place: str, task: str, seed: int, lr: float) -> dict[str, Any]:
        settings = {"place": place, "task": task, "seed": seed, "lr": lr}
        return experiment.once(settings, lambda: measure(**settings))

    rows, shares = [], {}
    for task in TASKS:
        for place, middle in PLACES.items():
            lr = best_rate(middle, lambda lr: run(place, task, UNREPORTED, lr)["curve"][-1][1])
            runs = [run(place, task, seed, lr) for seed in experiment.seeds]
            row = [task, place, f"{runs[0]['trained']:,}", f"{lr:g}"]
            row += [spread([some["exact"] for some in runs], 1)]
            row += [spread([some["loss"] for some in runs], 4)]
            row += [spread([some["curve"][-1][0] for some in runs], 0)]
            if place == "inside":
                shares[task] = list(zip(*(some["shares"] for some in runs)))
                row += [spread(column, 0) for column in shares[task]]
            else:
                row += ["–"] * len(GROWING)
            rows.append(row)

    def draw(axes) -> None:
        for (task, columns), style in zip(shares.items(), ("-", "--")):
            means, name = list(map(statistics.mean, columns)), f"prefix of {P}, {task}"
            axes[0][0].plot(GROWING, means, style, label=name, color=colour(name))
            axes[0][0].plot(GROWING, columns, ".", color=colour(name))
        axes[0][0].set(xlabel="tokens of text", ylabel="% of the attention", ylim=(0, 100))
        axes[0][0].set(title="The more text, the less attention a prefix gets")
        axes[0][0].set_xticks(GROWING, GROWING)

    header = ["task", "softmax", "numbers", "learning rate", "exact match %", "loss a token"]
    header += ["steps", *(f"share % behind {T} tokens" for T in GROWING)]
    experiment.report(header, rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
