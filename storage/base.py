"""A base on disk: a Hugging Face directory of config.json and model.safetensors, here or on their hub."""

import hashlib
import http.client
import os
import shutil
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPT, Decoder, GPTConfig
from storage.files import read_json, read_tensors, saved_file, write_json, write_tensors

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that weights may have; for float8, torch has no sum
HUB = "https://huggingface.co/{repo}/resolve/main/{file}"
HUB_REPOS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_REPOS["distilgpt2"] = "distilbert/distilgpt2"
BASE_FILES = ["config.json", "vocab.json", "merges.txt", "model.safetensors"]

# What config.json says of every model here; of a foreign one, what it says otherwise is refused by name.
ARCHITECTURE = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "n_inner": None,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
THEIR_NAMES = {"block_size": "n_positions"}


def base_directory(name_or_dir: str | Path) -> Path:
    """A directory -> itself; one of OpenAI's names -> the folder that its files were downloaded to, once."""
    if str(name_or_dir) not in HUB_REPOS:
        return Path(name_or_dir)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = Path(cache) / "prefix-tuning" / str(name_or_dir)
    for file in BASE_FILES:
        if not (directory / file).exists():
            url = HUB.format(repo=HUB_REPOS[str(name_or_dir)], file=file)
            print(f"downloading {url} to {directory}", flush=True)
            try:
                download(url, directory / file)
            except (OSError, http.client.HTTPException) as error:
                put = f"put {', '.join(BASE_FILES)} of {name_or_dir} into {directory}"
                raise ValueError(f"cannot download {url} ({str(error)[:200] or type(error).__name__}): {put}") from None
    return directory


def download(url: str, path: Path) -> None:
    """Fetches a file, whole or not at all. Raises OSError if the answer ends early."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url) as answer, open(part, "wb") as file:
            shutil.copyfileobj(answer, file)
            if answer.length:  # bytes that were promised and did not come
                raise OSError(f"the answer ended {answer.length:,} bytes early")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_base(name_or_dir: str | Path) -> Decoder:
    """A Hugging Face directory, or one of OpenAI's names -> the model, in the dtype of its file.

    The file is mapped, not read: weights enter memory when they are first used. Raises ValueError, with what was
    found, for a missing, broken or foreign file.
    """
    directory = base_directory(name_or_dir)
    with torch.device("meta"):
        model = GPT(read_config(directory))
    model.name = str(name_or_dir)
    if (directory / "model.safetensors.index.json").exists():
        raise ValueError(f"{directory} holds sharded weights: save them as one model.safetensors")
    tensors = read_tensors(saved_file(directory, "model.safetensors"))
    found = {key.removeprefix("transformer."): t for key, t in tensors.items()}
    weights = {}
    for name, parameter in model.state_dict().items():
        if name not in found:
            raise ValueError(f"{directory}/model.safetensors has no {name}: it is not the file of a GPT-2 of {model.config}")
        weights[name] = stored(name, found.pop(name))
        shape, dtype = tuple(weights[name].shape), weights[name].dtype
        if shape != parameter.shape or dtype not in FLOATS:
            expected = tuple(parameter.shape)
            raise ValueError(f"{directory}: {name} is {dtype} of shape {shape}, config.json asks for {expected}")
        if not weights[name].isfinite().all():
            raise ValueError(f"{directory}: {name} holds numbers that are not finite: save or download it again")
    head = found.pop("lm_head.weight", weights["wte.weight"])
    if not torch.equal(head, weights["wte.weight"]):
        raise ValueError(f"{directory}: lm_head.weight differs from wte.weight; only a tied head can be loaded")
    unknown = [name for name in found if not name.endswith((".attn.bias", ".attn.masked_bias"))]  # old mask buffers
    if unknown:
        raise ValueError(f"{directory}/model.safetensors holds {unknown[0]}, which a GPT-2 does not have")
    model.load_state_dict(weights, assign=True)
    return model


def save_base(model: GPT, directory: str | Path) -> None:
    """Writes config.json and model.safetensors as Hugging Face's GPT2LMHeadModel does; the config, without which no one
    loads them, comes last."""
    directory = Path(directory)
    sizes = {THEIR_NAMES.get(name, name): value for name, value in asdict(model.config).items()}
    end = model.config.vocab_size - 1  # GPT-2's last token is the end of text, and serves as the beginning too
    config = {"architectures": ["GPT2LMHeadModel"], "bos_token_id": end, "eos_token_id": end} | ARCHITECTURE | sizes
    tensors = {f"transformer.{name}": stored(name, tensor) for name, tensor in model.state_dict().items()}
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "config.json", config)


def fingerprint(model: Decoder) -> str:
    """-> 16 hex digits that tell one base from another.

    Taken of the weights rounded to bfloat16, so that a base has one fingerprint in every dtype that it runs in.
    """
    digest = hashlib.sha256(repr(model.config).encode())
    for parameter in model.state_dict().values():
        digest.update(parameter.bfloat16().contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def stored(name: str, weight: Tensor) -> Tensor:
    """A weight as nn.Linear holds it -> as the file does, and back: Hugging Face's Conv1D stores (in, out); biases stay."""
    return weight.transpose(0, -1) if ".c_" in name else weight


def read_config(directory: Path) -> GPTConfig:
    """config.json -> GPTConfig. Raises ValueError for what is not this architecture, or no size."""
    path = saved_file(directory, "config.json")
    found = read_json(path)
    *fields, _ = GPTConfig.__annotations__
    sizes: dict[str, Any] = {field: found.get(THEIR_NAMES.get(field, field)) for field in fields}
    epsilon = found.get("layer_norm_epsilon", 1e-5)
    if not all(type(n) is int and 0 < n < 10**6 for n in sizes.values()) or sizes["n_layer"] > 1000 or type(epsilon) is not float:
        raise ValueError(f"{path}: {sizes}, layer_norm_epsilon {epsilon!r} (block_size is n_positions) are not a GPT-2's")
    if sizes["n_embd"] % sizes["n_head"]:
        raise ValueError(f"{path}: n_embd {sizes['n_embd']} does not divide into n_head {sizes['n_head']} heads of one width")
    same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 4 * sizes["n_embd"]}  # other words for what we have
    for key, ours in ARCHITECTURE.items():
        if found.get(key, ours) not in (ours, same.get(key, ours)):
            raise ValueError(f"{path}: {key} is {found[key]!r}; this GPT-2 has {ours!r}")
    return GPTConfig(**sizes, layer_norm_epsilon=epsilon)
