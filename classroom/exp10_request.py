"""10. What does an adapter cost at a request?

    python classroom/exp10_request.py --name mine         six minutes, two threads

A request is a text of 50 tokens. Before it stand P virtual tokens, or as many tokens of text that
say what to do, or nothing. Measured are the time to the first new token, and a token after that.
A soft prompt's cache is filled once and kept; *cold* is the request that fills it. The text is read
anew at each request; kept as a cache, it would be a soft prompt. The models have the sizes of real
ones and random weights, for sizes alone decide the time. Nothing else should run meanwhile.

All take turns. A run's number is the median of its turns; the quartiles are stored. Each run has
weights and texts of its own.
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

MODELS = {
    "GPT-2 small": partial(GPT, GPTConfig(50257, 1024, 12, 12, 768)),
    "SmolLM2-135M": partial(
        Llama, LlamaConfig(49152, 8192, 30, 9, 3, 576, 1536, 64, rope_theta=1e5, rms_norm_eps=1e-5)
    ),
}
TEXT, LENGTHS, TURNS = 50, [10, 100, 500], 7
FIRST = ["none", "prefix", "soft prompt", "soft prompt, cold", "text"]
NEXT = ["none", "prefix", "soft prompt", "text"]


def requests(model: Decoder, lengths: list[int], seed: int) -> dict[str, Callable[[], Tensor]]:
    """-> each kind of request, as a function that reads it and gives the next token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, TEXT + max(lengths)), generator=generator)
    ids = ids.to(model.device)
    text, one = ids[:, :TEXT], ids[:, :1]
    reading = partial(model.generate, max_new_tokens=1)  # reads, and gives the next token
    functions = {"none, first": partial(reading, text)}
    functions["none, next"] = partial(reading, one, past_kv=model(text)[1])
    for P in lengths:
        said = ids[:, TEXT : TEXT + P]
        prefix, prompt = Prefix.text(model, said[0]), SoftPrompt.text(model, said[0])
        for name, adapter in (("prefix", prefix), ("soft prompt, cold", prompt)):
            adapter.requires_grad_(False)
            whole = lambda some=adapter: reading(text, past_kv=some.past_kv(model))  # noqa: E731
            functions[f"{name} {P}, first"] = whole
        kept = prompt.past_kv(model)
        functions[f"soft prompt {P}, first"] = partial(reading, text, past_kv=kept)
        functions[f"text {P}, first"] = partial(reading, torch.cat([said, text], dim=1))
        for name in NEXT[1:]:  # the same work three times: what they differ by is noise
            past_kv = model(text, kept)[1]
            functions[f"{name} {P}, next"] = partial(reading, one, past_kv=past_kv)
    return functions


def own_flags(add: Any) -> None:
    add("--name", default="here", help="what to call this processor (default: here)")
    every = list(MODELS)
    add("--models", nargs="+", choices=every, default=every, help="(default: both)")


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv, own_flags)
    quick, kinds = experiment.args.quick, {}
    lengths = [4, 5] if quick else LENGTHS

    def measure(model_name: str, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = experiment.load()[1] if quick else MODELS[model_name]().to(experiment.device)
        where = {"machine": machine(experiment.device)}
        where["kernels"] = torch.backends.cpu.get_cpu_capability()
        functions = requests(model.requires_grad_(False), lengths, seed)
        times = interleaved(functions, 2 if quick else TURNS)
        return where | {
            what: [round(1000 * value, 2) for value in statistics.quantiles(seconds, n=4)]
            for what, seconds in times.items()
        }

    for seed in experiment.seeds:
        for name in experiment.grid(experiment.args.models):
            settings = {"model": name, "name": experiment.args.name, "seed": seed}
            experiment.once(settings, partial(measure, name, seed))
    for run in experiment.runs:
        kinds.setdefault((run["model"], run["name"]), []).append(run)

    def cell(kind: tuple[str, str], what: str) -> list[float]:
        """-> the median of each run."""
        return [run[what][1] for run in kinds[kind]]

    rows = []
    for kind in sorted(kinds):
        for P in lengths:
            whats = [f"{name} {P}, first" for name in FIRST]
            whats += [f"{name} {P}, next" for name in NEXT]
            whats = [what.replace(f"none {P}", "none") for what in whats]
            rows.append([*kind, str(P), *(spread(cell(kind, what), 0) for what in whats)])

    def draw(axes: Any) -> None:
        """The longest past alone: five bars say it."""
        P, axis, kind = max(lengths), axes[0][0], min(kinds)
        words = dict(zip(FIRST, FIRST)) | {"none": "nothing", "text": "as much text"}
        words |= {"soft prompt, cold": "soft prompt,\nfirst request"}
        whats = ["none, first", *(f"{name} {P}, first" for name in FIRST[1:])]
        heights = [statistics.mean(cell(kind, what)) for what in whats]
        colours = ["0.6" if name in ("none", "text") else colour(name) for name in FIRST]
        bars = axis.barh([words[name] for name in FIRST], heights, color=colours)
        axis.bar_label(bars, [f"{height:.0f}" for height in heights], padding=4, fontsize=13)
        axis.tick_params(labelsize=13)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.figure.suptitle(f"{kind[0]}: ms to the first token behind {P} of …", fontsize=14)
        axis.spines[["top", "right"]].set_visible(False)

    header = ["model", "name", "P", *(f"first: {name}" for name in FIRST)]
    experiment.report(header + [f"next: {name}" for name in NEXT], rows, draw, 1)


if __name__ == "__main__":
    run_command(main)
