"""What did training make of an adapter? Where attention goes, how large its vectors are, what it costs other texts.

    python classroom/inspect_adapter.py out/sentence/prefix                        on the test data of --task sentence
    python classroom/inspect_adapter.py out/mine/prefix --base gpt2 --data mine.jsonl

With matplotlib it draws attention by layer and head, lengths and losses into a figure beside the adapter.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import attention, figure, load_base, load_tokenizer, markdown
from torch import Tensor

from command.process import pick_device, run_command, say, start_process
from data import Row, check_lengths, encode
from model import GPT, KVCache
from small_base.world import TASKS, task_examples
from soft_prompt import SoftPrompt
from train import DEFAULT_BASE, evaluate, load_adapters, load_examples, stacked_past_kv


def virtual_share(model: GPT, rows: list[Row], past_kv: KVCache) -> Tensor:
    """-> (L, H) share of its attention that the text pays to the P virtual tokens, the mean over its positions."""
    P, shares = past_kv[0][0].size(2), []
    for row in rows:  # one by one, so that there is no padding to leave out
        idx = torch.tensor([row.source + row.target[:-1]], device=model.device)
        shares.append(attention(model, idx, past_kv)[:, 0, :, :, :P].sum(dim=-1))  # (L, H, T)
    return torch.cat(shares, dim=-1).mean(dim=-1)


def effective_rank(matrix: Tensor) -> float:
    """(P, width) rows -> how many directions they take up: the exponential of the entropy of the singular values'
    shares (Roy & Vetterli 2007). 1 if all rows are multiples of one, P if they are orthogonal and of one length."""
    shares = torch.linalg.svdvals(matrix.float())
    shares = shares[shares > 0] / shares.sum()
    return (-(shares * shares.log()).sum()).exp().item()


def norms(cache: KVCache, past: slice) -> list[tuple[float, float]]:
    """-> per layer the mean length of the keys, and of the values, at those positions."""
    return [tuple(part[:, :, past].float().norm(dim=-1).mean().item() for part in layer) for layer in cache]


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
    heads = [f"head {h}" for h in range(share.size(1))]
    say(markdown(["layer", *heads], [[str(layer), *(f"{100 * s:.1f}" for s in line)] for layer, line in enumerate(share)]))

    _, cache = model(torch.tensor([rows[0].source], device=model.device), past_kv)
    virtual, real = norms(cache, slice(0, P)), norms(cache, slice(P, None))
    say("Length of keys and values, the mean over heads and positions:\n")
    lines = [[str(layer), *(f"{n:.2f}" for pair in zip(v, r) for n in pair)] for layer, (v, r) in enumerate(zip(virtual, real))]
    say(markdown(["layer", "virtual keys", "text's keys", "virtual values", "text's values"], lines))

    for adapter in adapters:
        matrix = adapter.vectors if isinstance(adapter, SoftPrompt) else adapter.kv().flatten(1)
        found["effective_rank"].append(effective_rank(matrix))
        say(f"{type(adapter).__name__}: {len(matrix)} rows of effective rank {found['effective_rank'][-1]:.2f}")
        if isinstance(adapter, SoftPrompt):
            lengths, embedding = adapter.vectors.norm(dim=1), model.wte.weight.float().norm(dim=1).mean()
            say(f"vectors of length {', '.join(f'{n:.1f}' for n in lengths)}; an embedding has {embedding:.1f} on average")
            for vector, ids in enumerate(adapter.nearest_tokens(model, 3).tolist()):
                near = [repr(tokenizer.decode([i])) for i in ids if i < tokenizer.n_vocab]
                say(f"vector {vector} is nearest to {' '.join(near)}")

    say("\nLoss on other texts, nats per token. Off, the base is what it was, bit for bit: nothing is forgotten.\n")
    for other in TASKS:
        examples = task_examples(other, "test", 50, 0)
        others = encode(tokenizer, examples)
        check_lengths(examples, others, model.config.block_size, P)
        found["losses"][other] = [evaluate(model, on, others, batch_size=16)[0] for on in ([], adapters)]
    lines = [[name, f"{off:.3f}", f"{on:.3f}"] for name, (off, on) in found["losses"].items()]
    say(markdown(["task", "adapter off", "adapter on"], lines))

    def draw(axes) -> None:
        image = axes[0][0].imshow((100 * share).tolist(), vmin=0, vmax=100)
        axes[0][0].set(title="attention to virtual tokens, %", xlabel="head", ylabel="layer")
        axes[0][0].figure.colorbar(image)
        axes[0][0].locator_params(integer=True)
        for part, name in enumerate(("keys", "values")):
            axes[0][1].plot([pair[part] for pair in virtual], f"C{part}-", label=f"virtual {name}")
            axes[0][1].plot([pair[part] for pair in real], f"C{part}:", label=f"the text's {name}")
        axes[0][1].set(title="length", xlabel="layer", ylim=0)
        axes[0][1].locator_params(axis="x", integer=True)
        axes[0][1].legend()
        for bar, name in enumerate(("off", "on")):
            heights = [pair[bar] for pair in found["losses"].values()]
            axes[0][2].barh([y - 0.4 * bar for y in range(len(heights))], heights, height=0.4, label=f"adapter {name}")
        axes[0][2].set(title="loss on other texts", yticks=range(len(heights)), yticklabels=found["losses"])
        axes[0][2].legend()

    whole = Path(directory).resolve()
    figure(whole.with_name(f"{whole.name}-inspect.png"), draw, columns=3)
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
