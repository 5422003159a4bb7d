"""A base on disk: a Hugging Face directory of config.json and model.safetensors, here or on their hub."""

import hashlib
import http.client
import os
import re
import secrets
import shutil
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import Llama, LlamaConfig
from model import GPT, Decoder, GPTConfig
from storage.files import read_json, read_tensors, saved_file, write_json, write_tensors

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that weights may have; for float8, torch has no sum
HUB = "https://huggingface.co/{repo}/resolve/main/{file}"
HUB_REPOS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_REPOS["distilgpt2"] = "distilbert/distilgpt2"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# --------------------------------------------------------------------------------------------------------------- the hub


def base_directory(name_or_dir: str | Path) -> Path:
    """A directory -> itself; a name on the hub -> the folder that its files were downloaded to, once."""
    name = str(name_or_dir)
    repo = HUB_REPOS.get(name, name)
    if name not in HUB_REPOS and (os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)):
        return Path(name)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
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
        put = f"put config.json, model.safetensors and vocab.json, merges.txt or tokenizer.json of {name} into {directory}"
        raise ValueError(f"{name} is no directory, and cannot be downloaded ({str(error)[:200] or type(error).__name__}): {put}") from None
    return directory


def fetch(repo: str, file: str, directory: Path) -> None:
    """Downloads a file where there is none, whole or not at all. Raises OSError if the answer ends early."""
    if (directory / file).exists():
        return
    url, part = HUB.format(repo=repo, file=file), directory / f".{secrets.token_hex(4)}.new"
    print(f"downloading {url} to {directory}", flush=True)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url) as answer, open(part, "wb") as opened:
            shutil.copyfileobj(answer, opened)
            if answer.length:  # bytes that were promised and did not come
                raise OSError(f"{url} ended {answer.length:,} bytes early")
        part.replace(directory / file)
    finally:
        part.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- weights


def shards(directory: Path) -> list[str]:
    """-> the files that hold the weights. Raises ValueError if their index names anything outside the directory."""
    if not (directory / INDEX).exists():
        return [WEIGHTS]
    names = read_json(directory / INDEX).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{directory / INDEX} has no weight_map of file names: download it again")
    return names


def load_base(name_or_dir: str | Path) -> Decoder:
    """A Hugging Face directory, or a name on their hub -> the model, in the dtype of its files.

    They are mapped, not read: weights enter memory when they are first used. Raises ValueError, with what was found, for
    a missing, broken or foreign file.
    """
    directory = base_directory(name_or_dir)
    config = read_config(directory)
    with torch.device("meta"):
        model = GPT(config) if isinstance(config, GPTConfig) else Llama(config)
    model.name = str(name_or_dir)
    found = {}
    for file in shards(directory):
        found |= {re.sub("^(transformer|model)[.]", "", key): t for key, t in read_tensors(saved_file(directory, file)).items()}
    weights = {}
    for name, parameter in model.state_dict().items():
        key = re.sub("^(transformer|model)[.]", "", their_name(name, model))
        if key not in found:
            raise ValueError(f"{directory}: the weights have no {key}, which {config} asks for")
        weights[name] = stored(name, found.pop(key))
        shape, dtype = tuple(weights[name].shape), weights[name].dtype
        if shape != parameter.shape or dtype not in FLOATS:
            raise ValueError(f"{directory}: {key} is {dtype} of shape {shape}, config.json asks for {tuple(parameter.shape)}")
        if not weights[name].isfinite().all():
            raise ValueError(f"{directory}: {key} holds numbers that are not finite: save or download it again")
    head = found.pop("lm_head.weight", weights["wte.weight"])
    if not torch.equal(head, weights["wte.weight"]):
        raise ValueError(f"{directory}: lm_head.weight differs from the embedding, and config.json says that the head is tied")
    unknown = [key for key in found if not key.endswith((".attn.bias", ".attn.masked_bias", ".inv_freq"))]  # buffers of old
    if unknown:
        raise ValueError(f"{directory}: the weights hold {unknown[0]}, which {config} does not have")
    model.load_state_dict(weights, assign=True)
    return model


def save_base(model: Decoder, directory: str | Path, config: dict[str, Any] | None = None) -> None:
    """Writes model.safetensors, and last the config.json without which no one loads it: that of a GPT-2, or the one given."""
    directory, dtype = Path(directory), str(model.dtype).removeprefix("torch.")
    tensors = {their_name(name, model): stored(name, tensor) for name, tensor in model.state_dict().items()}
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
    if config is None:
        sizes = {THEIR_NAMES.get(name, name): value for name, value in asdict(model.config).items()}
        end = model.config.vocab_size - 1  # GPT-2's last token is the end of text, and serves as the beginning too
        config = {"architectures": ["GPT2LMHeadModel"], "bos_token_id": end, "eos_token_id": end} | ARCHITECTURE | sizes
    else:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
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
    """A weight as nn.Linear holds it -> as the file does, and back: GPT-2's Conv1D stores (in, out); all else as it is."""
    return weight.transpose(0, -1) if ".c_" in name else weight


def their_name(name: str, model: Decoder) -> str:
    """What a weight is called here -> in Hugging Face's files."""
    if isinstance(model, GPT):
        return f"transformer.{name}"
    for ours, theirs in LLAMA_NAMES.items():
        name = re.sub(ours, theirs, name)
    return name


# -------------------------------------------------------------------------------------------------------------- configs

# What config.json says of every GPT-2 here; of a foreign one, what it says otherwise is refused by name.
ARCHITECTURE = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "n_inner": None,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
LLAMA_ARCHITECTURE = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "use_sliding_window": False}
LLAMA_ARCHITECTURE |= {"partial_rotary_factor": 1.0, "pretraining_tp": 1}
THEIR_NAMES = {"block_size": "n_positions"}
LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "head_dim": "head_dim",
}
LLAMA_NAMES = {r"^wte": "model.embed_tokens", r"^h\.": "model.layers.", r"^ln_f": "model.norm", r"\.attn\.": ".self_attn."}
LLAMA_NAMES |= {r"\.ln_1": ".input_layernorm", r"\.ln_2": ".post_attention_layernorm"}


def read_config(directory: Path) -> GPTConfig | LlamaConfig:
    """config.json -> the sizes of its family. Raises ValueError for what is not this architecture, or no size."""
    path = saved_file(directory, "config.json")
    found = read_json(path)
    kind, families = found.get("model_type", "gpt2"), ("gpt2", "llama", "qwen2", "qwen3")
    if kind not in families:
        raise ValueError(f"{path}: model_type is {kind!r}; only {', '.join(families)} can be loaded")
    if kind == "gpt2":
        *fields, _ = GPTConfig.__annotations__
        names, fixed, epsilon = {f: THEIR_NAMES.get(f, f) for f in fields}, ARCHITECTURE, found.get("layer_norm_epsilon", 1e-5)
    else:
        names, fixed, epsilon = LLAMA_SIZES, LLAMA_ARCHITECTURE, found.get("rms_norm_eps", 1e-6)
        heads, width = found.get("num_attention_heads"), found.get("hidden_size")
        found.setdefault("num_key_value_heads", heads)
        if found.get("head_dim") is None and type(heads) is type(width) is int and heads:
            found["head_dim"] = width // heads
    sizes: dict[str, Any] = {ours: found.get(theirs) for ours, theirs in names.items()}
    if not all(type(n) is int and 0 < n < 10**7 for n in sizes.values()) or sizes["n_layer"] > 1000 or type(epsilon) is not float:
        raise ValueError(f"{path}: {sizes}, epsilon {epsilon!r} are not the sizes of a {kind}")
    shared = sizes["n_embd"] % sizes["n_head"] if kind == "gpt2" else sizes["n_head"] % sizes["n_kv_head"] or sizes["head_dim"] % 2
    if shared:
        raise ValueError(f"{path}: {sizes} do not divide into heads of one width")
    same = {"activation_function": "gelu_pytorch_tanh", "n_inner": 4 * sizes["n_embd"]}  # other words for what we have
    for key, ours in fixed.items():
        if found.get(key, ours) not in (ours, same.get(key, ours)):
            raise ValueError(f"{path}: {key} is {found[key]!r}; this {kind} has {ours!r}")
    if kind == "gpt2":
        return GPTConfig(**sizes, layer_norm_epsilon=epsilon)
    theta, scaling = rope_of(found, path)
    tied = found.get("tie_word_embeddings") is True
    return LlamaConfig(**sizes, rope_theta=theta, rope_scaling=scaling, rms_norm_eps=epsilon, tied=tied,
                       qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")  # fmt: skip


def rope_of(found: dict[str, Any], path: Path) -> tuple[float, tuple | None]:
    """The config's rotation -> theta, and Llama 3's scaling of it. Raises ValueError for any other scaling."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    theta = rope.get("rope_theta", found.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = tuple(rope.get(key) for key in keys) if kind == "llama3" else None
    if kind not in ("default", "llama3") or not all(type(n) in (int, float) and n > 0 for n in (theta, *(scaling or ()))):
        raise ValueError(f"{path}: the rotation {rope or theta!r} is not known here, only the default and that of Llama 3")
    return theta, scaling
