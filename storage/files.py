"""Files that are whole or not there: each is written under another name beside its place, then renamed to it.

No directory is ever swapped, emptied or removed, and no file replaced that another training left: so saving cannot
destroy anything.
"""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

TRAINING = "training.json"  # who trained what is saved beside it, and how; for people, and for `check_place`
OURS = ["config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json"]  # of a base
OURS += ["adapter_config.json", "adapter_model.safetensors", "base.json", "metrics.jsonl", TRAINING]  # of an adapter


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one go: whoever dies on the way leaves the old one whole, and at worst a hidden `.….new` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{secrets.token_hex(4)}.new")
    try:
        with open(new, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_json(path: Path, found: Any, **style: Any) -> None:
    replace_file(path, (json.dumps(found, indent=2, **style) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    replace_file(path, save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata))


def saved_file(directory: Path, name: str) -> Path:
    """-> the path of a file in a saved directory. Raises ValueError if there is none."""
    path = directory / name
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {directory} is not the directory that was meant, or is not complete")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object -> dict. Raises ValueError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested a thousandfold
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not a JSON object")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file -> its tensors by name, mapped into memory. Raises ValueError if it is broken."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): save or download it again") from None


def check_place(directory: Path, training: dict[str, Any]) -> None:
    """Makes a directory to save to. Raises ValueError if that fails, or it holds what this training would not replace.

    It may hold the result of an earlier training that agrees in method, task, data and base, and any files but ours.
    """
    check_writable(directory)
    found = [name for name in OURS if (directory / name).exists()]
    before = read_json(directory / TRAINING) if TRAINING in found else {}
    who = {key: before.get(key) for key in ("method", "task", "data", "base")}
    if found and who != {key: training[key] for key in who}:
        what = "{method} trained for {task}".format(**who) if before else f"{found[0]} of unknown training"
        what += f" ({who['data']})" * bool(who["data"]) + f" on {who['base']}" * bool(who["base"])
        raise ValueError(f"{directory} holds {what}, which is not overwritten: name another --out")


def check_writable(directory: Path) -> None:
    """Makes a directory and a file in it. Raises ValueError if that fails: better before hours of training than after."""
    probe = directory / f".{secrets.token_hex(4)}.new"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{directory} cannot be written to ({error.strerror}): name another place") from None


def check_predictions(file: Path) -> None:
    """Raises ValueError if something else than predictions is there, or no file can be made."""
    if file.exists():
        with open(file if file.is_file() else os.devnull, errors="replace") as opened:
            if '"prediction": ' not in opened.readline(10**6):
                raise ValueError(f"{file} holds no predictions, and is not overwritten: name another file for them")
    check_writable(file.parent)
