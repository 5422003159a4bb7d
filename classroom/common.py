"""What the scripts here share: the path to the project, attention made visible, JSON and figures."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402, F401  (it makes the sums of torch reproducible)
from model import GPT, KVCache, causal_mask, rows_of  # noqa: E402, F401
from prefix import Prefix  # noqa: E402, F401
from soft_prompt import SoftPrompt  # noqa: E402, F401


def attention(model: GPT, idx: Tensor, past_kv: KVCache | None = None) -> Tensor:
    """(B, T) ids -> (L, B, H, T, S) attention weights: what each new token looks at, the past included.

    Written out as in the textbook. The model itself never has these numbers: its fused attention does not form them.
    """
    queries = []
    hooks = [block.attn.c_attn.register_forward_hook(lambda _, __, qkv: queries.append(qkv)) for block in model.h]
    _, cache = model(idx, past_kv)
    for hook in hooks:
        hook.remove()
    weights = []
    for qkv, (k, _) in zip(queries, cache):
        B, _, S, D = k.shape
        q = qkv[..., : model.config.n_embd].view(*idx.shape, -1, D).transpose(1, 2)  # (B, H, T, D)
        scores = q @ k.transpose(2, 3) / D**0.5  # (B, H, T, S)
        mask = causal_mask(idx.size(1), S, idx.device)
        weights.append(scores.masked_fill(~mask, -torch.inf).softmax(dim=-1))
    return torch.stack(weights)


def kept_for_backward(model: GPT, forward: Callable[[], Tensor]) -> int:
    """-> the bytes that autograd keeps from a forward pass until the backward pass, the model's own weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # several tensors may be views of one; it is kept once
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()  # held, so that no address comes twice
    del loss
    return sum(size for address, size in kept.items() if address not in weights)


def finish() -> None:
    """Waits for what a GPU still has to do, so that a clock can be read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_json(path: Path, found: Any) -> None:
    with data.replaced_file(path) as new:
        new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def figure(path: Path, draw: Callable[[Any], None], columns: int, rows: int = 1) -> None:
    """Draws into a grid of axes and saves it, or says how to get matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"no figure: pip install -r {Path(__file__).parent / 'requirements.txt'} for {path}")
        return
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    draw(axes)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    print(f"figure: {path}")
