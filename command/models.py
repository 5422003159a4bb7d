"""Bases and adapters by the words of the command line: opened, begun, saved."""

import argparse
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import nn

from command.console import say
from command.examples import check_lengths
from command.flags import DEFAULT_BASE
from command.process import barrier, pick_device, pick_dtype, this_process
from data import Example, Row
from model import Decoder, past_length, stacked_past_kv
from prefix import Prefix
from small_base.pretrain import pretrain
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter, save_adapter, stored_rows
from storage.base import load_base, save_base
from storage.checkpoints import Metrics, curve_of
from storage.files import TRAINING, check_place, read_json
from storage.files import replace_file, write_json, write_tensors
from storage.hub import base_directory
from storage.tokenizers import copy_tokenizer, load_chat_template, load_tokenizer

ADAPTERS_OF = {  # by method, the foremost first
    "prefix": [Prefix], "soft_prompt": [SoftPrompt], "both": [Prefix, SoftPrompt], "full": [],
}  # fmt: skip
STACK = ("prefix", "soft_prompt")  # the folders that --method both saves to, the foremost first


def open_base(
    name: str | Path, chat: bool, device: str | None, dtype: str | None, full: bool = False
) -> tuple[Decoder, tiktoken.Encoding, Callable | None]:
    """A base's directory or name -> the frozen model, its tokenizer, and with `chat` its template.

    The small base is made first, where it is not there yet.
    """
    where = pick_device(device)
    if Path(name) == DEFAULT_BASE and not (DEFAULT_BASE / "config.json").exists():
        if this_process()[0] == 0:
            pretrain(DEFAULT_BASE, device=where)
    barrier()
    tokenizer, template = load_tokenizer(name), load_chat_template(name) if chat else None
    model = load_base(name)
    model = model.to(where, pick_dtype(dtype, model, where, full)).requires_grad_(False)
    n, c = sum(p.numel() for p in model.parameters()), model.config
    number_type = str(model.dtype).removeprefix("torch.")
    say(f"base     {name}: {n:,} parameters, context {c.block_size}, {number_type} on {where}")
    return model, tokenizer, template


def new_adapters(
    kinds: list[type[nn.Module]], model: Decoder, tokenizer: tiktoken.Encoding, rows: list[Row],
    P: int, init: str, init_text: str | None = None, seed: int = 0, mid_dim: int | None = None,
) -> list[nn.Module]:  # fmt: skip
    """-> adapters of P tokens each, the foremost first, as training starts with them."""
    generator = torch.Generator().manual_seed(seed)
    if init == "random":
        adapters = [kind.random(model, P, generator) for kind in kinds]
    elif init == "zero":
        adapters = [kind.zero(model, P) for kind in kinds]
    elif init == "vocab":  # words of the task, drawn (Li & Liang §6.5, Lester et al. §3.2)
        counts = Counter(i for row in rows for i in row.source + row.target)
        frequent = [token for token, _ in counts.most_common(5000)]
        drawn = [drawn_tokens(frequent, P, generator).to(model.device) for _ in kinds]
        adapters = [kind.text(model, ids) for kind, ids in zip(kinds, drawn)]
    elif init == "text":
        # By default the end of a training example: the input comes where a new document would
        ids = tokenizer.encode(init_text or "", allowed_special="all")
        ids = ids or (rows[0].source + rows[0].target)[-len(kinds) * P :]
        ids = torch.tensor(ids * len(kinds) * P, device=model.device)  # repeated if too short
        adapters = [kind.text(model, ids[i * P : (i + 1) * P]) for i, kind in enumerate(kinds)]
    else:
        adapters = load_adapters(init, model)
    if [type(adapter) for adapter in adapters] != kinds:
        held = " and ".join(type(adapter).__name__ for adapter in adapters)
        wanted = " and ".join(kind.__name__ for kind in kinds) or "no adapter"
        raise ValueError(f"--init {init} holds {held}, and --method trains {wanted}")
    if mid_dim:
        torch.manual_seed(seed)
        adapters[0].reparametrise(mid_dim)
    return adapters


def drawn_tokens(ids: list[int], n: int, generator: torch.Generator) -> torch.Tensor:
    """-> n of the ids, each at most once as long as there are enough."""
    chosen = torch.multinomial(torch.ones(len(ids)), n, n > len(ids), generator=generator)
    return torch.tensor(ids)[chosen]


def folders_of(method: str, out: Path) -> list[Path]:
    """-> where a method's adapters, or its model, are saved."""
    return [out / name for name in STACK] if method == "both" else [out]


def adapter_folders(directory: str | Path) -> list[Path]:
    """A saved adapter, or the folder of a stack -> the folders of adapters, the foremost first."""
    inner, alone = folders_of("both", Path(directory)), Path(directory) / "adapter_config.json"
    if alone.exists() or not all(map(Path.is_dir, inner)):
        return [Path(directory)]
    # two that were trained apart lie side by side, too, and are no stack
    return inner if training_of(inner[0]).get("method", "both") == "both" else [Path(directory)]


def training_of(folder: Path) -> dict[str, Any]:
    """-> what training.json says of a saved adapter; PEFT's own have none."""
    return read_json(folder / TRAINING) if (folder / TRAINING).exists() else {}


def load_adapters(directory: str | Path, model: Decoder) -> list[nn.Module]:
    """A saved adapter, or the folder of a stack -> the adapters in it, the foremost first."""
    folders = adapter_folders(directory)
    return [load_adapter(folder, model).to(model.device) for folder in folders]


def trained_on(directory: str | Path) -> tuple[str | None, bool]:
    """A saved adapter, or the folder of a stack -> its base's name, and whether it was --chat."""
    folder = adapter_folders(directory)[0]
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return base and str(base), training_of(folder).get("chat", False)


def check_fit(
    examples: dict[str, list[Example]], rows: dict[str, list[Row]], adapters: list[nn.Module],
    model: Decoder,
) -> None:  # fmt: skip
    """Raises ValueError if examples are too long behind the adapters."""
    n_virtual = past_length(stacked_past_kv(adapters, model))
    for split in rows:
        check_lengths(examples[split], rows[split], model.config.block_size, n_virtual)


def settings_of(args: argparse.Namespace, examples: dict[str, list[Example]]) -> dict[str, Any]:
    """-> what decides how a run goes, the base left out. Two runs that agree in it are the same."""
    flags = ["method", "task", "n_virtual", "init", "init_text", "mid_dim", "chat"]
    flags += ["steps", "lr", "batch_size", "seed", "eval_every", "patience"]
    pairs = [example[:2] for split in ("train", "validation") for example in examples[split]]
    digest = hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
    return {flag: getattr(args, flag) for flag in flags} | {"examples": digest}


def sizes_of(model: Decoder, adapters: list[nn.Module]) -> dict[str, Any]:
    """-> how many numbers there are, are trained, and are stored."""
    n_base = sum(p.numel() for p in model.parameters())
    parts = [model, *adapters]
    n_trainable = sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    n_stored = sum(stored_rows(adapter).numel() for adapter in adapters) or n_base
    percent = 100 * n_stored / n_base
    return {"n_base": n_base, "n_trainable": n_trainable, "n_stored": n_stored, "percent": percent}


def check_folders(method: str, out: Path, record: dict[str, Any]) -> None:
    """Raises ValueError if a run's folders hold another run, or cannot be written to."""
    # of a stack, also the folder around it: it does not move in with an adapter
    for folder in dict.fromkeys([out, *folders_of(method, out)]):
        check_place(folder, record)


def save_run(
    record: dict[str, Any], metrics: Metrics, adapters: list[nn.Module], model: Decoder,
    film: dict[str, list[torch.Tensor]],
) -> None:  # fmt: skip
    """Saves the adapters and their film, or the tuned model, with how it was trained."""
    out = Path(record["out"])
    record["curve"] = curve_of(metrics)
    save_record(record)
    for i, folder in enumerate(folders_of(record["method"], out)):
        if adapters:
            save_adapter(adapters[i], folder, model)
        else:
            copy_tokenizer(model.name, folder)
            save_base(model, folder, read_json(base_directory(model.name) / "config.json"))
        if film:
            frames = {step: rows[i] for step, rows in film.items()}
            write_tensors(folder / "film.safetensors", frames)
    lines = "".join(f"{json.dumps(entry)}\n" for entry in metrics)
    replace_file(out / "metrics.jsonl", lines.encode())
    draw_curve(out / "curve.png", metrics)
    use = f"--adapter {shlex.quote(str(out))}" if adapters else f"--base {shlex.quote(str(out))}"
    use += " --chat" * (record["chat"] and not adapters)  # an adapter remembers it
    say(f'saved to {out}; use it with: python generate.py {use} --prompt "…"')


def save_record(record: dict[str, Any]) -> None:
    """Writes what was trained, how, and how it tested, beside each adapter."""
    out = Path(record["out"])
    for folder in {out, *folders_of(record["method"], out)}:
        write_json(folder / TRAINING, record)


def draw_curve(file: Path, metrics: Metrics) -> None:
    """Draws the losses by step, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("validation", ".-")):
        points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
        axes.plot(*zip(*points), style, label=name)
    axes.set(xlabel="step", ylabel="nats a token", yscale="log")
    axes.legend()
    figure.savefig(file, dpi=100)
