"""What did training make of an adapter? Who looks at whom, what it says next, its rank, what it costs others.

    python classroom/inspect_adapter.py out/sentence/prefix                        on the test data of --task sentence
    python classroom/inspect_adapter.py out/mine/prefix --base gpt2 --data mine.jsonl

With matplotlib, it draws the attention token by token, a picture a layer with a panel a head, beside the adapter.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from common import attention, load_base, load_tokenizer, markdown
from torch import Tensor

from command.process import pick_device, run_command, say, start_process
from data import Row, check_lengths, encode
from model import Decoder, KVCache
from small_base.world import TASKS, task_examples
from soft_prompt import SoftPrompt
from train import DEFAULT_BASE, evaluate, load_adapters, load_examples, stacked_past_kv


def virtual_share(model: Decoder, rows: list[Row], past_kv: KVCache) -> Tensor:
    """-> (L, H) share of its attention that the text pays to the P virtual tokens, the mean over its positions."""
    P, shares = past_kv[0][0].size(2), []
    for row in rows:  # one by one, so that there is no padding to leave out
        idx = torch.tensor([row.source + row.target[:-1]], device=model.device)
        shares.append(attention(model, idx, past_kv)[:, 0, :, :, :P].sum(dim=-1))  # (L, H, T)
    return torch.cat(shares, dim=-1).mean(dim=-1)


def likeliest(model: Decoder, source: list[int], past_kv: KVCache | None, k: int = 5) -> list[tuple[int, float]]:
    """-> the k likeliest ids behind a source, each with its probability."""
    p = model(torch.tensor([source], device=model.device), past_kv)[0][0, -1].float().softmax(dim=-1)
    return [(i.item(), p[i].item()) for i in p.topk(k).indices]


def effective_rank(matrix: Tensor) -> float:
    """(P, width) rows -> how many directions they take up: the exponential of the entropy of the singular values'
    shares (Roy & Vetterli 2007). 1 if all rows are multiples of one, P if they are orthogonal and of one length."""
    shares = torch.linalg.svdvals(matrix.float())
    shares = shares[shares > 0] / shares.sum()
    return (-(shares * shares.log()).sum()).exp().item()


def draw(path: Path, title: str, weights: Tensor, P: int, asking: list[str], asked: list[str]) -> None:
    """(H, rows, S) attention -> a picture with a panel a head, where a gap parts the P virtual tokens from the text."""
    from matplotlib import colors, pyplot

    columns = math.ceil(len(weights) ** 0.5)
    lines = math.ceil(len(weights) / columns)
    size = columns * (0.13 * len(asked) + 0.6) + 2, lines * (0.17 * len(asking) + 0.5) + 1.9  # inches: each label has room
    figure, axes = pyplot.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    gap = torch.full_like(weights[:, :, :1], torch.nan)
    images, scale = 100 * torch.cat([weights[..., :P], gap, weights[..., P:]], dim=-1), colors.PowerNorm(0.5, vmin=0, vmax=100)
    for head, (axis, image) in enumerate(zip(axes.flat, images), 1):
        drawn = axis.imshow(image.tolist(), norm=scale, cmap="Blues", aspect="auto")
        axis.set(title=f"head {head}: {image[:, :P].sum(dim=-1).mean():.0f} % to the virtual tokens", facecolor="0.6")
        axis.set_xticks(range(len(asked) + 1), [*asked[:P], "", *asked[P:]], rotation=90, fontsize=8)
        axis.set_yticks(range(len(asking)), asking, fontsize=8)
    for axis in axes.flat[len(images) :]:
        axis.set_axis_off()
    figure.suptitle(f"{title}: where each token that predicts the answer (row) looks (column)")
    figure.supxlabel(f"v1 … v{P}: virtual tokens; then the text")
    figure.colorbar(drawn, ax=axes, label="% of the row's attention")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@torch.no_grad()
def inspect(directory: str, base: str, device: str | None, task: str, data: str | None, val_data: str | None) -> dict[str, Any]:
    """Prints and draws it -> what was found."""
    start_process()
    tokenizer, model = load_tokenizer(base), load_base(base).to(pick_device(device)).freeze()
    adapters = load_adapters(directory, model)
    examples = load_examples(task, data, val_data, seed=0)["test"][:50]
    task = Path(data).stem if data else task
    past_kv = stacked_past_kv(adapters, model)
    P = past_kv[0][0].size(2)
    rows = encode(tokenizer, examples)
    check_lengths(examples, rows, model.config.block_size, P)

    share = virtual_share(model, rows, past_kv)
    found: dict[str, Any] = {"share": share.tolist(), "effective_rank": [], "losses": {}}
    say(f"Attention that the text of {task} pays to the {P} virtual tokens, percent:\n")
    heads = [f"head {h}" for h in range(1, share.size(1) + 1)]
    say(markdown(["layer", *heads], [[str(layer), *(f"{100 * s:.1f}" for s in line)] for layer, line in enumerate(share, 1)]))

    def shown(token: int) -> str:
        return repr(tokenizer.decode([token]))[1:-1] if token < tokenizer.n_vocab else f"id {token}"

    row = min(rows, key=lambda row: len(row.source) + len(row.target))
    found["next"] = [likeliest(model, row.source, past) for past in (None, past_kv)]
    say(f"The likeliest next tokens behind {tokenizer.decode(row.source)!r}:\n")
    lines = [[f"`{shown(token)}` {100 * p:.1f} %" for token, p in pair] for pair in zip(*found["next"])]
    say(markdown(["adapter off", "adapter on"], lines))

    for adapter in adapters:
        matrix = adapter.vectors if isinstance(adapter, SoftPrompt) else adapter.kv().flatten(1)
        found["effective_rank"].append(effective_rank(matrix))
        say(f"{type(adapter).__name__}: {len(matrix)} rows of effective rank {found['effective_rank'][-1]:.2f}")
        if isinstance(adapter, SoftPrompt):
            lengths, embedding = adapter.vectors.norm(dim=1), model.wte.weight.float().norm(dim=1).mean()
            say(f"vectors of length {', '.join(f'{n:.1f}' for n in lengths)}; an embedding has {embedding:.1f} on average")
            for vector, ids in enumerate(adapter.nearest_tokens(model, 3).tolist(), 1):
                say(f"vector {vector} is nearest to {' '.join(repr(shown(i)) for i in ids)}")

    say("\nLoss on other texts, nats per token. Off, the base is what it was, bit for bit: nothing is forgotten.\n")
    for other in TASKS:
        examples = task_examples(other, "test", 50, 0)
        others = encode(tokenizer, examples)
        check_lengths(examples, others, model.config.block_size, P)
        found["losses"][other] = [evaluate(model, on, others, batch_size=16)[0] for on in ([], adapters)]
    lines = [[name, f"{off:.3f}", f"{on:.3f}"] for name, (off, on) in found["losses"].items()]
    say(markdown(["task", "adapter off", "adapter on"], lines))

    read, name, first = row.source + row.target[:-1], Path(directory).resolve(), len(row.source) - 1
    weights = attention(model, torch.tensor([read], device=model.device), past_kv)[:, 0, :, first:].float().cpu()
    labels = [f"v{i}" for i in range(1, P + 1)] + [shown(i).strip() for i in read]
    try:
        for layer, heads in enumerate(weights, 1):
            path = name.with_name(f"{name.name}-layer{layer}.png")
            draw(path, f"Layer {layer}", heads, P, labels[P + first :], labels)
            say(f"picture: {path}")
    except ImportError:
        say("no pictures: pip install -r classroom/requirements.txt")
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a trained adapter, or the folder of a stack")
    add = parser.add_argument
    add("--base", default=DEFAULT_BASE, help=f"that it was trained on (default: {DEFAULT_BASE})")
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--task", choices=TASKS, default="sentence", help="whose test data it reads (default: sentence)")
    add("--data", metavar="FILE", help="your own examples instead")
    add("--val-data", metavar="FILE", help="and those to evaluate on (default: a tenth of --data)")
    return inspect(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_command(main)
