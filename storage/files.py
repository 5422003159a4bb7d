"""Files that are whole or not there: each is written beside its place, then renamed to it.

No directory is ever emptied or removed, and no file replaced that another training left.
"""

import json
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

TRAINING = "training.json"  # who trained what lies beside it, for people and for `check_place`
OURS = ["config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json"]
OURS += ["adapter_config.json", "adapter_model.safetensors", "base.json", "film.safetensors"]
OURS += ["metrics.jsonl", "curve.png", TRAINING]
PREDICTION = re.compile(rb'\{"input": .*"target": .*"prediction": .*"cut": (true|false)\}\r?\n')


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Writes a file in one go: whoever dies on the way leaves the old one whole."""
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


def write_json(path: Path, record: Any, **style: Any) -> None:
    replace_file(path, (json.dumps(record, indent=2, **style) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    replace_file(path, save(tensors, {"format": "pt"}))  # transformers asks for the format


def saved_file(path: Path) -> Path:
    """-> the same path. Raises ValueError if no file is there: a pipe would hang."""
    if not path.is_file():
        where = f"{path.parent} is not the directory that was meant, or is not complete"
        raise ValueError(f"{path} does not exist: {where}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object -> dict. Raises ValueError for anything else."""
    content = saved_file(path).read_bytes()
    try:
        record = json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested a thousandfold
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds {type(record).__name__}, not a JSON object")
    return record


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file -> its tensors by name, mapped into memory. Raises ValueError if not."""
    try:
        return load_file(saved_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): get it anew") from None


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Settings of an earlier run and of this one -> the first that differs, in words."""
    for key, value in now.items():
        if before.get(key) != value:
            in_words = f"{key} {before.get(key)}, not {value}"
            return "it was trained on other examples" if key == "examples" else in_words
    return None


def check_place(directory: Path, settings: dict[str, Any]) -> None:
    """Makes a directory to save to. Raises ValueError if it holds what would be lost.

    An earlier run of the same settings is replaced. Files that are not ours stay.
    """
    check_writable(directory)
    ours = [name for name in OURS if (directory / name).exists()]
    before = read_json(directory / TRAINING) if TRAINING in ours else {}
    other = difference(before, settings)
    if ours and other:
        what = f"another run: {other}" if before else f"{ours[0]} of unknown training"
        raise ValueError(f"{directory} holds {what}. It is not overwritten: name another place")


def check_writable(directory: Path) -> None:
    """Makes a directory and a file in it: better to fail before hours of training than after."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        reason = f"{directory} cannot be written to ({error.strerror})"
        raise ValueError(f"{reason}: name another place") from None


def check_predictions(file: Path) -> None:
    """Raises ValueError if something else than predictions is there, or no file can be made."""
    content = file.read_bytes() if file.is_file() else b""
    if file.exists() and not PREDICTION.match(content):
        sentence = f"{file} holds no predictions, and is not overwritten"
        raise ValueError(f"{sentence}: name another file for them")
    check_writable(file.parent)
