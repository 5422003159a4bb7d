"""7. Who listens to the virtual tokens?

    python classroom/exp7_attention.py

The share of its attention that the text pays to the virtual tokens, a₀, by layer and head, before and after training on the
task chat, the mean over 50 validation examples. All else that the text attends to is scaled by 1 - a₀.
"""

import torch
from common import Experiment, spread
from inspect_adapter import virtual_share

from small_base.process import run_command
from train import RECIPES, new_adapters, stacked_past_kv

METHODS = {"prefix": "prefix", "soft_prompt": "soft prompt"}


def main(argv: list[str] | None = None) -> None:
    experiment = Experiment(__file__, __doc__, argv)
    tokenizer, _ = experiment.load()
    shares = {}  # (method, when) -> (seeds, L, H)
    for method in METHODS:
        for seed in experiment.seeds:
            run, (kinds, P, *_) = experiment.tuned("chat", method, seed), RECIPES[method]
            untrained = new_adapters(kinds, run.model, tokenizer, run.rows["train"], P, "text", seed=seed)
            for when, adapters in [("before", untrained), ("after", run.adapters)]:
                with torch.no_grad():
                    past_kv = stacked_past_kv(adapters, run.model)
                    share = 100 * virtual_share(run.model, run.rows["validation"][:50], past_kv)
                experiment.runs.append({"method": method, "when": when, "seed": seed, "share": share.tolist()})

    rows = []
    for method, name in METHODS.items():
        for when in ("before", "after"):
            shares[name, when] = torch.tensor(experiment.measured("share", method=method, when=when))  # (seeds, L, H)
            for layer, heads in enumerate(shares[name, when].unbind(dim=1)):
                cells = [f"{value:.0f}" for value in heads.mean(dim=0)]
                rows.append([name, when, str(layer), *cells, spread(heads.mean(dim=1).tolist(), 1)])

    def draw(axes) -> None:
        for axis, ((name, when), share) in zip(axes[0], shares.items()):
            image = axis.imshow(share.mean(dim=0).tolist(), vmin=0, vmax=100)
            axis.set(title=f"{name}, {when} training", xlabel="head", ylabel="layer")
            axis.set(xticks=range(share.size(2)), yticks=range(share.size(1)))
        axes[0][-1].figure.colorbar(image, label="attention to virtual tokens, %")

    heads = [f"head {h}" for h in range(len(cells))]
    experiment.report(["method", "training", "layer", *heads, "all heads"], rows, draw, 4)


if __name__ == "__main__":
    run_command(main)
