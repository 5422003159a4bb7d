"""Models on the Hugging Face hub: their files are downloaded once, into ~/.cache/prefix-tuning."""

import http.client
import os
import re
import secrets
import urllib.error
import urllib.request
from pathlib import Path

from storage.files import read_json

HUB = "https://huggingface.co/{repo}/resolve/main/{file}"
HUB_REPOS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_REPOS["distilgpt2"] = "distilbert/distilgpt2"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def base_directory(name_or_dir: str | Path) -> Path:
    """A directory -> itself; a name on the hub, as OWNER/NAME or one of OpenAI's -> the folder that its files were put into.

    Raises ValueError where that fails, with what to put where by hand.
    """
    name = str(name_or_dir)
    if name not in HUB_REPOS and (os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)):
        return Path(name)
    repo, cache = HUB_REPOS.get(name, name), os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(cache) / "prefix-tuning" / name.replace("/", "--")
    try:
        fetch(repo, "config.json", directory)
        gpt2 = read_json(directory / "config.json").get("model_type") == "gpt2"
        for file in ["vocab.json", "merges.txt"] if gpt2 else ["tokenizer.json"]:
            fetch(repo, file, directory)
        try:
            if not (directory / INDEX).exists():
                fetch(repo, WEIGHTS, directory)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            fetch(repo, INDEX, directory)  # a large model, in several files
        for file in shards(directory):
            fetch(repo, file, directory)
    except (OSError, http.client.HTTPException) as error:
        put = f"put config.json, model.safetensors and vocab.json, merges.txt or tokenizer.json of {repo} into {directory}"
        reason = str(error)[:200] or type(error).__name__
        raise ValueError(f"{name} is no directory here, and cannot be downloaded ({reason}): {put}") from None
    return directory


def fetch(repo: str, file: str, directory: Path) -> None:
    """Downloads a file where there is none, whole or not at all. Raises OSError if that fails."""
    if (directory / file).exists():
        return
    url, part = HUB.format(repo=repo, file=file), directory / f".{secrets.token_hex(4)}.new"
    print(f"downloading {url} to {directory}", flush=True)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        urllib.request.urlretrieve(url, part)  # which counts the bytes that were promised
        part.replace(directory / file)
    finally:
        part.unlink(missing_ok=True)


def shards(directory: Path) -> list[str]:
    """-> the files that hold the weights. Raises ValueError if their index names anything outside the directory."""
    if not (directory / INDEX).exists():
        return [WEIGHTS]
    names = read_json(directory / INDEX).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{directory / INDEX} has no weight_map of file names: download it again")
    return names
