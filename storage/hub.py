"""Where a base lies: in a directory, or on the Hugging Face hub, which huggingface_hub reads."""

import os
import re
from functools import cache
from pathlib import Path

TOKENIZER = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"]
TOKENIZER += ["chat_template.jinja", "generation_config.json"]


def base_directory(name_or_dir: str | Path) -> Path:
    """A directory -> itself. A name on the hub, gpt2 or OWNER/NAME -> the folder of its files."""
    name = str(name_or_dir)
    if os.path.isdir(name) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return Path(name)
    return download(name)


@cache  # one revision a process, for weights and tokenizer
def download(repo: str) -> Path:
    """-> the folder in huggingface_hub's cache. Raises ValueError with what to do instead."""
    try:
        from huggingface_hub import snapshot_download

        files = ["config.json", "model*.safetensors", *TOKENIZER]
        return Path(snapshot_download(repo, allow_patterns=files))
    except ImportError:
        reason, remedy = "huggingface_hub is not installed", "pip install huggingface_hub"
    except Exception as error:  # its own kinds, the network's, the disk's
        reason, remedy = " ".join(str(error).split())[:500], "check the name and the network"
    by_hand = "or name a directory with its config.json, model.safetensors and tokenizer.json"
    found = f"{repo} is no directory here, and cannot be downloaded ({reason})"
    raise ValueError(f"{found}: {remedy}, {by_hand}")
