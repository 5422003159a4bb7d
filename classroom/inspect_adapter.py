"""What does a trained adapter do? Who looks at it, what comes next, and what it costs elsewhere.

    python classroom/inspect_adapter.py out/sentence/prefix       on test data of --task sentence
    python classroom/inspect_adapter.py out/mine/prefix --data mine.jsonl

With matplotlib, it also draws the attention of each layer, token by token, with a panel for each
head. The pictures lie beside the adapter.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import attention, markdown
from torch import Tensor

from command.console import run_command, say
from command.examples import check_lengths, load_examples
from command.flags import DEFAULT_BASE
from command.models import load_adapters, open_base, trained_on
from command.process import start_process
from data import Row, encode
from model import Decoder, KVCache, past_length, stacked_past_kv
from small_base.world import TASKS, task_examples
from soft_prompt import SoftPrompt
from train import evaluate


def virtual_share(model: Decoder, rows: list[Row], past_kv: KVCache) -> Tensor:
    """-> (L, H) share of the text's attention that goes to the P virtual tokens, on average."""
    P, shares = past_length(past_kv), []
    for row in rows:  # one by one, so that there is no padding to leave out
        idx = torch.tensor([row.source + row.target[:-1]], device=model.device)
        shares.append(attention(model, idx, past_kv)[:, 0, :, :, :P].sum(dim=-1))  # (L, H, T)
    return torch.cat(shares, dim=-1).mean(dim=-1)


def likeliest(
    model: Decoder, source: list[int], past_kv: KVCache | None, k: int = 5
) -> list[tuple[int, float]]:
    """-> the k likeliest ids behind a source, each with its probability."""
    logits, _ = model(torch.tensor([source], device=model.device), past_kv)
    p = logits[0, -1].float().softmax(dim=-1)  # (V,)
    return [(i.item(), p[i].item()) for i in p.topk(k).indices]


def nearest_tokens(vectors: Tensor, embeddings: Tensor, k: int) -> Tensor:
    """(P, C) vectors, (V, C) embeddings -> (P, k) ids of the most alike by cosine, best first.

    Only a hint: trained vectors may lie far from every word (Lester et al. §7).
    """
    x, words = (F.normalize(tensor.float(), dim=-1) for tensor in (vectors, embeddings))
    return (x @ words.T).topk(k, dim=-1).indices


def effective_rank(matrix: Tensor) -> float:
    """(P, width) rows -> how many directions they take up (Roy & Vetterli 2007).

    It is the exponential of the entropy of the singular values' shares: 1 if all rows are multiples
    of one, P if they are orthogonal and of one length.
    """
    shares = torch.linalg.svdvals(matrix.float())
    shares = shares[shares > 0] / shares.sum()
    return (-(shares * shares.log()).sum()).exp().item()


def draw(
    path: Path, layer: int, heads: dict[int, Tensor], P: int, asking: list[str], asked: list[str]
) -> None:
    """Heads by number, (rows, S) attention each -> a picture with a panel for each of them.

    A gap separates the virtual tokens from the text.
    """
    from matplotlib import colors, pyplot

    columns = math.ceil(len(heads) ** 0.5)
    lines = math.ceil(len(heads) / columns)
    width = columns * (0.13 * len(asked) + 0.6) + 2  # inches: each label has room
    height = lines * (0.17 * len(asking) + 0.5) + 1.9
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(width, height), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    gap = torch.full((len(asking), 1), torch.nan)
    scale = colors.PowerNorm(0.5, vmin=0, vmax=100)
    labels = [*asked[:P], "", *asked[P:]]
    for axis, (head, weights) in zip(axes.flat, heads.items()):
        image = 100 * torch.cat([weights[:, :P], gap, weights[:, P:]], dim=-1)
        drawn = axis.imshow(image.tolist(), norm=scale, cmap="Blues", aspect="auto")
        share = image[:, :P].sum(dim=-1).mean()
        axis.set(title=f"head {head}: {share:.0f} % to the virtual tokens", facecolor="0.6")
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        axis.set_yticks(range(len(asking)), asking, fontsize=8)
    for axis in axes.flat[len(heads) :]:
        axis.set_axis_off()
    title = "where each token that predicts the answer (row) looks (column)"
    figure.suptitle(f"Layer {layer}: {title}")
    figure.supxlabel(f"v1 … v{P}: the virtual tokens. Behind them, the text")
    figure.colorbar(drawn, ax=axes, label="% of the row's attention")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@torch.no_grad()
def inspect(
    directory: str, base: str | None, device: str | None, task: str, data: str | None,
    val_data: str | None, head: list[int] | None,
) -> dict[str, Any]:  # fmt: skip
    """Prints and draws what there is to see of an adapter -> the same as numbers."""
    start_process()
    own_base, chat = trained_on(directory)
    name = base or own_base or DEFAULT_BASE
    model, tokenizer, template = open_base(name, chat, device, dtype=None)
    adapters = load_adapters(directory, model)
    examples = load_examples(task, data, val_data, seed=0)["test"][:50]
    task = Path(data).stem if data else task
    past_kv = stacked_past_kv(adapters, model)
    P, block_size = past_length(past_kv), model.config.block_size
    rows = encode(tokenizer, examples, template)
    check_lengths(examples, rows, block_size, P)

    share = virtual_share(model, rows, past_kv)
    numbers: dict[str, Any] = {"share": share.tolist(), "effective_rank": [], "losses": {}}
    if head and not all(0 < number <= most for number, most in zip(head, share.shape)):
        there = "there are {} layers of {} heads".format(*share.shape)
        raise ValueError("--head {} {}: {}".format(*head, there))
    say(f"The share of attention that {task} texts give to the {P} virtual tokens, percent:\n")
    header = ["layer", *(f"head {h}" for h in range(1, share.size(1) + 1))]
    lines = [[f"{100 * s:.1f}" for s in heads] for heads in share]
    say(markdown(header, [[str(layer), *line] for layer, line in enumerate(lines, 1)]))

    def shown(token: int) -> str:
        known = token < tokenizer.n_vocab
        return repr(tokenizer.decode([token]))[1:-1] if known else f"id {token}"

    row = min(rows, key=lambda row: len(row.source) + len(row.target))
    numbers["next"] = [likeliest(model, row.source, past) for past in (None, past_kv)]
    say(f"The likeliest next tokens after {tokenizer.decode(row.source)!r}:\n")
    pairs = zip(*numbers["next"])
    lines = [[f"`{shown(token)}` {100 * p:.1f} %" for token, p in pair] for pair in pairs]
    say(markdown(["adapter off", "adapter on"], lines))

    for adapter in adapters:
        soft = isinstance(adapter, SoftPrompt)
        matrix = adapter.vectors if soft else adapter.kv().flatten(1)
        rank = effective_rank(matrix)
        numbers["effective_rank"].append(rank)
        say(f"{type(adapter).__name__}: {len(matrix)} rows of effective rank {rank:.2f}")
        if soft:
            lengths = ", ".join(f"{length:.1f}" for length in matrix.norm(dim=1))
            usual = model.wte.weight.float().norm(dim=1).mean()
            say(f"vectors of length {lengths}; an embedding has {usual:.1f} on average")
            for i, ids in enumerate(nearest_tokens(matrix, model.wte.weight, 3).tolist(), 1):
                words = " ".join(repr(shown(token)) for token in ids)
                say(f"vector {i} is nearest to {words}")

    say("\nLoss on each task, in nats a token. With the adapter off, the base is unchanged.\n")
    for other in TASKS:
        examples = task_examples(other, "test", 50, 0)
        others = encode(tokenizer, examples, template)
        if P + max(row.n_read for row in others) > block_size:
            continue  # too long for this base and adapter
        off = evaluate(model, [], others, batch_size=16).loss
        on = evaluate(model, adapters, others, batch_size=16).loss
        numbers["losses"][other] = [off, on]
    lines = [[name, f"{off:.3f}", f"{on:.3f}"] for name, (off, on) in numbers["losses"].items()]
    say(markdown(["task", "adapter off", "adapter on"], lines))

    read, first = row.source + row.target[:-1], len(row.source) - 1
    weights = attention(model, torch.tensor([read], device=model.device), past_kv)
    weights = weights[:, 0, :, first:].float().cpu()  # (L, H, rows that predict the answer, S)
    labels = [f"v{i}" for i in range(1, P + 1)] + [shown(i).strip() for i in read]
    pictures = {f"layer{i}": (i, dict(enumerate(heads, 1))) for i, heads in enumerate(weights, 1)}
    if head:
        layer, number = head
        pictures = {f"layer{layer}-head{number}": (layer, {number: weights[layer - 1, number - 1]})}
    folder = Path(directory).resolve()
    try:
        for name, (layer, heads) in pictures.items():
            path = folder.with_name(f"{folder.name}-{name}.png")
            draw(path, layer, heads, P, labels[P + first :], labels)
            say(f"picture: {path}")
    except ImportError:
        say("no pictures: pip install -r classroom/requirements.txt")
    return numbers


def main(argv: list[str] | None = None) -> dict[str, Any]:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("directory", help="a trained adapter, or the folder of a stack")
    add = parser.add_argument
    add("--base", help="the base, if it has moved (default: what the adapter names)")
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    tasks = "the task whose test data is read (default: sentence)"
    either = parser.add_mutually_exclusive_group().add_argument
    either("--task", choices=TASKS, default="sentence", help=tasks)
    either("--data", metavar="FILE", help="your own examples instead")
    add("--val-data", metavar="FILE", help="your own to evaluate on (default: a tenth of --data)")
    head = "draw this head alone, larger"
    add("--head", nargs=2, type=int, metavar=("LAYER", "HEAD"), help=head)
    return inspect(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_command(main)
