"""A base and its adapters in one HTML file to play with. A double click opens it, even offline.

    python classroom/playground.py out/sentence/prefix out/sentiment/soft_prompt
    python classroom/playground.py out/mine/both --base out/mine/base --out mine.html

playground.js is the model of the page. Its numbers are float16, which moves logits by about 0.01.
"""

import argparse
import base64
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import load_base, load_tokenizer
from torch import Tensor

from command.console import run_command, say
from command.examples import read_jsonl
from command.flags import DEFAULT_BASE
from command.models import adapter_folders, training_of
from model import GPT
from small_base.world import TASKS, task_examples
from storage.adapters import load_adapter, stored_rows
from storage.files import read_tensors, replace_file

MOST = 20_000_000  # numbers of a base: 53 MB of HTML


def packed(tensor: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """(…, width) -> the same in base64, for `matrix` in playground.js."""
    numbers = tensor.detach().to(dtype).contiguous().numpy()
    return {"width": tensor.shape[-1], "data": base64.b64encode(numbers).decode()}


def packed_adapter(folder: Path, model: GPT, dtype: torch.dtype) -> dict[str, Any]:
    """A saved adapter -> its numbers, (P, width), after those of its film if there is one."""
    adapter = load_adapter(folder, model)
    rows = stored_rows(adapter)
    film = folder / "film.safetensors"
    kept = read_tensors(film) if film.exists() else {}
    frames = {f"step {step}": kept[step].view_as(rows) for step in sorted(kept, key=int)}
    frames["as saved"] = rows
    found = {"kind": type(adapter).__name__, "n_virtual": len(rows), "steps": list(frames)}
    return found | {"frames": [packed(frame, dtype) for frame in frames.values()]}


def inputs_of(folder: Path, n: int, seed: int) -> list[str]:
    """-> n inputs of the task that an adapter was trained for, if that is known."""
    found = training_of(folder)
    task = found["task"] if found.get("task") in TASKS else "sentence"
    data = found.get("data")
    if data and not Path(data).exists():
        say(f"{data} is not here, so the page has no input of {folder}")
        return [""]
    examples = read_jsonl(data)[:n] if data else task_examples(task, "test", n, seed)
    return [given for given, *_ in examples if isinstance(given, str)] or [""]  # no dialogues


def page_of(base: str | Path, directories: list[str], dtype: torch.dtype = torch.float16) -> str:
    """A base, adapters and stacks -> HTML. Raises ValueError for a base that does not fit."""
    model, tokenizer = load_base(base), load_tokenizer(base)
    n_base = sum(p.numel() for p in model.parameters())
    if not isinstance(model, GPT) or n_base > MOST:
        found = f"{base} is a {type(model).__name__} of {n_base:,} numbers"
        raise ValueError(f"{found}: give a GPT of at most {MOST:,}, such as {DEFAULT_BASE}")
    adapters, examples = [], []
    for directory in map(Path, directories):
        folders = adapter_folders(directory)
        inputs = inputs_of(folders[0], max(1, 4 // len(directories)), len(adapters))
        examples += [{"text": text, "adapter": len(adapters)} for text in inputs]
        for folder in folders:
            name = "/".join(folder.resolve().parts[-1 - len(folders) :])
            adapters.append({"name": name} | packed_adapter(folder, model, dtype))
        if len(folders) > 1:
            adapters[-2]["partner"] = len(adapters) - 1
    names = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab)]
    numbers = {"config": asdict(model.config), "n_base": n_base, "bits": torch.finfo(dtype).bits}
    numbers["vocab"] = [name.decode("latin-1") for name in names]  # a character for each byte
    numbers["weights"] = {name: packed(p, dtype) for name, p in model.state_dict().items()}
    numbers |= {"adapters": adapters, "examples": examples}
    filled = json.dumps(numbers).replace("<", r"\u003c")  # no text in it may end the script
    script = Path(__file__).with_suffix(".js").read_text("utf-8")
    html = Path(__file__).with_suffix(".html").read_text("utf-8")
    html = html.replace(' src="playground.js">', f">\n{script}")
    return html.replace('type="application/json">', f'type="application/json">{filled}')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes a page to play with")
    parser.add_argument("adapter", nargs="+", help="a trained adapter, or the folder of a stack")
    parser.add_argument("--base", default=DEFAULT_BASE, help="their base (default: out/base)")
    parser.add_argument("--out", type=Path, default=Path("out/playground.html"))
    args = parser.parse_args(argv)
    page = page_of(args.base, args.adapter).encode()
    if args.out.exists() and args.out.read_bytes()[:200] != page[:200]:
        raise ValueError(f"{args.out} is no such page, and is not overwritten: name another --out")
    replace_file(args.out, page)
    say(f"wrote {args.out}: open it in a browser")


if __name__ == "__main__":
    run_command(main)
