"""Adapters by the words of the command line: how new ones start, and where saved ones lie."""

from collections import Counter
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import nn

from command.process import say
from data import Row
from model import Decoder, KVCache
from prefix import Prefix
from storage.adapters import load_adapter, save_adapter
from storage.base import save_base
from storage.checkpoints import Checkpoint, Curve
from storage.files import TRAINING, check_place, read_json, read_tensors, write_json
from storage.hub import base_directory
from storage.tokenizers import copy_tokenizer

STACK = ("prefix", "soft_prompt")  # the folders that --method both saves to, the foremost first


def new_adapters(
    kinds: tuple[type[nn.Module], ...], model: Decoder, tokenizer: tiktoken.Encoding, rows: list[Row],
    P: int, init: str, init_text: str | None = None, seed: int = 0, mid_dim: int | None = None,
) -> list[nn.Module]:  # fmt: skip
    """-> adapters of P tokens each, the foremost first, as training starts with them."""
    generator = torch.Generator().manual_seed(seed)
    if init == "random":
        adapters = [kind.random(model, P, generator) for kind in kinds]
    elif init == "zero":
        adapters = [kind.zero(model, P) for kind in kinds]
    elif init == "vocab":
        counts = Counter(i for row in rows for i in row.source + row.target)
        frequent = torch.tensor([token for token, _ in counts.most_common(5000)], device=model.device)
        adapters = [kind.vocab(model, frequent, P, generator) for kind in kinds]
    elif init == "text":
        # By default the end of a training example, so that the input comes where a new document would
        text = tokenizer.encode_ordinary(init_text or "") or (rows[0].source + rows[0].target)[-len(kinds) * P :]
        text = torch.tensor(text * len(kinds) * P, device=model.device)  # as often as need be; each starts from its part
        adapters = [kind.text(model, text[i * P : (i + 1) * P]) for i, kind in enumerate(kinds)]
    else:
        adapters = load_adapters(init, model)
    if tuple(map(type, adapters)) != kinds:
        found, needed = (" and ".join(f"a {kind.__name__}" for kind in some) for some in (map(type, adapters), kinds))
        raise ValueError(f"--init {init} holds {found}, and --method trains {needed or 'no adapter'}")
    if mid_dim:
        torch.manual_seed(seed)
        adapters[0].reparametrise(mid_dim)
    return adapters


def load_adapters(directory: str | Path, model: Decoder) -> list[nn.Module]:
    """A saved adapter, or the folder that a stack was saved to -> the adapters in it, the foremost first."""
    inner = [Path(directory) / name for name in STACK]
    stack = all(folder.is_dir() for folder in inner) and not (Path(directory) / "adapter_config.json").exists()
    folders = inner if stack else [Path(directory)]
    return [load_adapter(folder, model).to(model.device) for folder in folders]


def take_best(checkpoint: Checkpoint, trainee: nn.Module, curve: Curve) -> None:
    """Goes back to the numbers that had the lowest validation loss after the first step."""
    trainee.load_state_dict(read_tensors(checkpoint.best))
    step, loss = min(curve[1:], key=lambda look: look[1])
    say(f"\nkept     step {step}, which has the lowest validation loss, {loss:.3f}")


def save(places: list[Path], adapters: list[nn.Module], model: Decoder, found: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Saves each adapter to its place, or the tuned model; removes the checkpoint, now useless; says how to use it."""
    for place, adapter in zip(places, adapters or [None]):
        write_json(place / TRAINING, found)
        if adapter:
            save_adapter(adapter, place, model)
        else:
            copy_tokenizer(model.name, place)
            save_base(model, place, read_json(base_directory(model.name) / "config.json"))
    checkpoint.end()
    use = f"--base {model.name} --adapter {found['out']}" if adapters else f"--base {found['out']}"
    if places:
        say(f'saved to {found["out"]}; use it with: python train.py {use} --prompt "…"\n')


def save_as_prefix(directory: Path, cache: KVCache, model: Decoder, source: str) -> dict[str, Any]:
    """Saves whatever has a cache as one prefix, which PEFT loads: for a stack of adapters it has no kind -> what was done."""
    done = {"method": "export", "task": source, "data": None, "base": model.name, "out": str(directory)}
    check_place(directory, done)
    write_json(directory / TRAINING, done)
    save_adapter(Prefix.from_cache(cache), directory, model)
    say(f"saved to {directory}, as one prefix")
    return done
