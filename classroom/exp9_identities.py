"""9. Which statements about prefixes are exact?

    python classroom/exp9_identities.py

Four equations, each side computed by the small base in float64 on validation examples; deviations should be rounding:

    text         a prefix of a text's keys and values = that text in the context
    cache        a soft prompt's cache as a prefix = the soft prompt
    rescaling    under a prefix, attention among the text = (1 - a₀) · without it
    log n        n equal rows = one row whose score is larger by log n: the same a₀

The last two hold in each layer for what enters it. So they are shown in the first layer, where nothing has been changed yet; in
the last one, whose inputs the prefix has changed below, the same comparison shows how much a prefix does in the end.
"""

import math

import torch
from common import Experiment, attention, moved
from torch import Tensor

from command.process import run_command
from data import encode
from model import GPT
from prefix import Prefix
from small_base.world import task_examples
from soft_prompt import SoftPrompt


@torch.no_grad()
def sides(model: GPT, text: Tensor, idx: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(P,) ids, (1, T) ids -> the two sides of each equation."""
    P = len(text)
    prefix, prompt = Prefix.text(model, text), SoftPrompt.text(model, text)
    past_kv, as_prefix = prefix.past_kv(model), Prefix.from_cache(prompt.past_kv(model)).past_kv(model)
    in_context = model(torch.cat([text[None], idx], dim=1))[0][:, P:]
    under, without = attention(model, idx, past_kv), attention(moved(model, P), idx)  # (L, 1, H, T, P + T or T)
    expected = without * (1 - under[..., :P].sum(dim=-1, keepdim=True))
    equal = Prefix(prefix.kv()[:1].expand(P, -1, -1, -1, -1)).past_kv(model)
    one = [(k[:, :, :1], v[:, :, :1]) for k, v in past_kv]
    of_equal = attention(model, idx, equal)[..., :P].sum(dim=-1)  # (L, 1, H, T)
    of_one = attention(moved(model, P - 1), idx, one)[..., 0]
    larger = torch.sigmoid(of_one.logit() + math.log(P))
    return {
        "text": (model(idx, past_kv)[0], in_context),
        "cache": (model(idx, as_prefix)[0], model(idx, prompt.past_kv(model))[0]),
        "rescaling, first layer": (under[0, ..., P:], expected[0]),
        "rescaling, last layer": (under[-1, ..., P:], expected[-1]),
        "log n, first layer": (of_equal[0], larger[0]),
        "log n, last layer": (of_equal[-1], larger[-1]),
    }


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    tokenizer, model = experiment.load()
    model = model.double()
    shown: dict[str, tuple[Tensor, Tensor]] = {}
    for seed in experiment.seeds:
        for P in experiment.grid([2, 8, 32]):
            for row in encode(tokenizer, task_examples("chat", "validation", 10, seed)):
                text = torch.tensor((row.target * P)[:P], device=model.device)
                shown = sides(model, text, torch.tensor([row.source], device=model.device))
                deviations = {name: (left - right).abs().max().item() for name, (left, right) in shown.items()}
                experiment.runs.append({"seed": seed, "length": P, **deviations})
    rows = [[name, f"{max(experiment.measured(name)):.1e}"] for name in shown]

    def draw(axes) -> None:
        for axis, (name, (left, right)) in zip(axes.flat, shown.items()):
            axis.plot(right.flatten(), left.flatten(), ".", markersize=3)
            axis.axline((left.min(), left.min()), slope=1, color="grey", linewidth=0.5)
            axis.set(title=f"{name}\ndeviation ≤ {max(experiment.measured(name)):.0e}", xlabel="right side", ylabel="left side")

    experiment.report(["equation", "largest deviation"], rows, draw, 3, 2)


if __name__ == "__main__":
    run_command(main)
