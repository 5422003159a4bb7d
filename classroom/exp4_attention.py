"""4. Who listens to the virtual tokens?

    python classroom/exp4_attention.py

The share of its attention that the text pays to the virtual tokens, a₀, by layer and head, before and after training on the
task chat, the mean over 50 validation examples. All else that the text attends to is scaled by 1 - a₀.
"""

import torch
from common import NAMES, Experiment, prepared, spread
from inspect_adapter import virtual_share

from small_base.process import run_command
from train import load_examples, stacked_past_kv

METHODS = ("prefix", "soft_prompt")


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)

    def measure(method: str, when: str, seed: int) -> dict[str, list]:
        if when == "after":
            run = experiment.tuned("chat", method, seed)
        else:
            run = prepared(experiment.args.base, experiment.device, load_examples("chat", None, None, seed), method, seed)
        with torch.no_grad():
            past_kv = stacked_past_kv(run.adapters, run.model)
            return {"share": (100 * virtual_share(run.model, run.rows["validation"][:50], past_kv)).tolist()}

    for seed in experiment.seeds:
        for method in METHODS:
            for when in ("before", "after"):
                settings = {"method": method, "when": when, "seed": seed}
                experiment.once(settings, lambda some=tuple(settings.values()): measure(*some))

    shares = {}  # (method, when) -> (seeds, L, H)
    rows = []
    for method in METHODS:
        for when in ("before", "after"):
            shares[method, when] = torch.tensor(experiment.measured("share", method=method, when=when))  # (seeds, L, H)
            for layer, heads in enumerate(shares[method, when].unbind(dim=1), start=1):
                cells = [f"{value:.0f}" for value in heads.mean(dim=0)]
                rows.append([NAMES[method], when, str(layer), *cells, spread(heads.mean(dim=1).tolist(), 1)])

    def draw(axes) -> None:
        for axis, ((method, when), share) in zip(axes[0], shares.items()):
            image = axis.imshow(share.mean(dim=0).tolist(), vmin=0, vmax=100)
            axis.set(title=f"{NAMES[method]}, {when} training", xlabel="head", ylabel="layer")
            axis.set(xticks=range(share.size(2)))
            axis.set_yticks(range(share.size(1)), range(1, 1 + share.size(1)))
        axes[0][-1].figure.colorbar(image, label="attention to virtual tokens, %")

    heads = [f"head {h}" for h in range(len(cells))]
    experiment.report(["method", "training", "layer", *heads, "all heads"], rows, draw, 4)


if __name__ == "__main__":
    run_command(main)
