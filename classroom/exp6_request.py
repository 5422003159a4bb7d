"""6. What does an adapter cost at a request?

    python classroom/exp6_request.py --name mine         some seven minutes of two threads

A request is a text of 50 tokens behind P virtual tokens, P tokens of instructions, or nothing. How
long to the first new token, and to one after it? A soft prompt's cache is filled once and kept;
*cold* is the request that fills it. Instructions are read anew each time; kept as a cache, they are
a soft prompt. The models have real sizes and random weights: the sizes alone decide. All take
turns. A run gives the median of its turns, and its quartiles are stored. Let nothing else run.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Experiment, colour, interleaved, machine, spread
from torch import Tensor

from command.console import run_command
from llama import Llama, LlamaConfig
from model import GPT, Decoder, GPTConfig
from prefix import Prefix
from soft_prompt import SoftPrompt

SMOLLM2 = LlamaConfig(49152, 8192, 30, 9, 3, 576, 1536, 64, rope_theta=1e5, rms_norm_eps=1e-5)
MODELS = {
    "GPT-2 small": lambda: GPT(GPTConfig(50257, 1024, 12, 12, 768)),
    "SmolLM2-135M": lambda: Llama(SMOLLM2),
}
TEXT, LENGTHS, TURNS = 50, [10, 100, 500], 7
FIRST = ["none", "prefix", "soft prompt", "soft prompt, cold", "text"]
NEXT = ["none", "prefix", "soft prompt", "text"]


def requests(model: Decoder, lengths: list[int], seed: int) -> dict[str, Callable[[], Tensor]]:
    """-> each kind of request, as a function that reads it and gives the next token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, TEXT + max(lengths)), generator=generator)
    ids = ids.to(model.device)
    text, one, read = ids[:, :TEXT], ids[:, :1], partial(model.generate, max_new_tokens=1)
    functions = {"none, first": partial(read, text)}
    functions["none, next"] = partial(read, one, past_kv=model(text)[1])
    for P in lengths:
        said = ids[:, TEXT : TEXT + P]
        kinds = {"prefix": Prefix, "soft prompt, cold": SoftPrompt}
        for name, kind in kinds.items():
            past_kv = kind.text(model, said[0]).requires_grad_(False).past_kv
            whole = lambda past_kv=past_kv: read(text, past_kv=past_kv(model))  # noqa: E731
            functions[f"{name} {P}, first"] = whole
        kept = past_kv(model)
        functions[f"soft prompt {P}, first"] = partial(read, text, past_kv=kept)
        functions[f"text {P}, first"] = partial(read, torch.cat([said, text], dim=1))
        for name in NEXT[1:]:  # the same work three times: what they differ by is noise
            functions[f"{name} {P}, next"] = partial(read, one, past_kv=model(text, kept)[1])
    return functions


def main(argv: list[str] | None = None) -> None:
    own_flags = lambda add: add("--name", default="here", help="of this processor")  # noqa: E731
    experiment = Experiment(__file__, __doc__, argv, own_flags)
    quick = experiment.args.quick
    lengths, turns = ([4, 5], 2) if quick else (LENGTHS, TURNS)

    def measure(name: str, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = experiment.load()[1] if quick else MODELS[name]().to(experiment.device)
        functions = requests(model.requires_grad_(False), lengths, seed)
        times = interleaved(functions, turns)
        kernels = torch.backends.cpu.get_cpu_capability()
        return {"machine": machine(experiment.device), "kernels": kernels} | {
            what: [round(1000 * value, 2) for value in statistics.quantiles(seconds, n=4)]
            for what, seconds in times.items()
        }

    for seed in experiment.seeds:
        for name in experiment.grid(list(MODELS)):
            settings = {"model": name, "name": experiment.args.name, "seed": seed}
            experiment.once(settings, partial(measure, name, seed))
    kinds = sorted({(run["model"], run["name"]) for run in experiment.runs})  # measured elsewhere

    def cells(kind: tuple[str, str], P: int, names: list[str], which: str) -> list[list[float]]:
        """-> of each name the medians of the runs."""
        runs = [run for run in experiment.runs if (run["model"], run["name"]) == kind]
        whats = [f"{name} {P}, {which}".replace(f"none {P}", "none") for name in names]
        return [[run[what][1] for run in runs] for what in whats]

    rows = []
    for kind in kinds:
        for P in lengths:
            times = cells(kind, P, FIRST, "first") + cells(kind, P, NEXT, "next")
            rows.append([*kind, str(P), *(spread(some, 0) for some in times)])

    def draw(axes: Any) -> None:
        """Five bars say it, those of the longest past on one machine."""
        axis, P, words = axes[0][0], lengths[-1], ["nothing", "prefix", "soft prompt"]
        words += ["soft prompt,\nfirst request", "as much text"]
        heights = list(map(statistics.mean, cells(kinds[0], P, FIRST, "first")))
        bars = axis.barh(words, heights, color=["0.6", *map(colour, FIRST[1:4]), "0.6"])
        axis.bar_label(bars, [f"{height:.0f}" for height in heights], padding=4, fontsize=13)
        axis.tick_params(labelsize=13)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        title = f"{kinds[0][0]}: ms to the first token behind {P} of …"
        axis.figure.suptitle(title, fontsize=14)

    header = ["model", "name", "P", *(f"first: {name}" for name in FIRST)]
    experiment.report(header + [f"next: {name}" for name in NEXT], rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
