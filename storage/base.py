"""A base on disk, in Hugging Face's layout: config.json and model.safetensors."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import Llama, LlamaConfig
from model import GPT, Decoder, GPTConfig
from storage.files import read_json, read_tensors, write_json, write_tensors
from storage.hub import base_directory

# config.json, a table a family. A key has our name of a size, or the values that we can compute.
GPT2 = {
    "model_type": ["gpt2"], "vocab_size": "vocab_size", "n_positions": "block_size",
    "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "tie_word_embeddings": [True],
    "layer_norm_epsilon": "layer_norm_epsilon", "scale_attn_weights": [True],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "add_cross_attention": [False],
    "scale_attn_by_inverse_layer_idx": [False],
}  # fmt: skip
LLAMA = {
    "vocab_size": "vocab_size", "max_position_embeddings": "block_size", "mlp_bias": [False],
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "attention_bias": [False],
    "num_key_value_heads": "n_kv_head", "hidden_size": "n_embd", "intermediate_size": "n_inner",
    "head_dim": "head_dim", "rms_norm_eps": "rms_norm_eps", "hidden_act": ["silu"],
    "use_sliding_window": [False], "partial_rotary_factor": [1.0],
}  # fmt: skip
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}
LLAMA_3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NAMES = {  # our names of weights become theirs
    GPT: {r"^": "transformer."},
    Llama: {
        r"^wte": "model.embed_tokens", r"^h\.": "model.layers.", r"^ln_f": "model.norm",
        r"\.attn\.": ".self_attn.", r"\.ln_1": ".input_layernorm",
        r"\.ln_2": ".post_attention_layernorm",
    },
}  # fmt: skip
TRUNK = r"^((_orig_mod|transformer|model)\.)*"  # torch.compile puts one in, others leave it out
BUFFERS = (".attn.bias", ".attn.masked_bias", ".inv_freq")  # no weights, but older files have them


def load_base(name_or_dir: str | Path) -> GPT | Llama:
    """A directory, or a name on the hub -> the model, in the dtype of its files.

    They are mapped: weights enter memory when they are first used. Raises ValueError, with what
    was found, for a missing, broken or foreign file.
    """
    directory = base_directory(name_or_dir)
    config = read_config(directory / "config.json")
    with torch.device("meta"):
        model = GPT(config) if isinstance(config, GPTConfig) else Llama(config)
    model.name = str(name_or_dir)
    names = {re.sub(TRUNK, "", their_name(name, model)): name for name in model.state_dict()}
    weights = {}
    for file in files_of_weights(directory):
        for key, tensor in read_tensors(file).items():
            short = re.sub(TRUNK, "", key)
            name = names.get(short, short)
            if not name.endswith(BUFFERS):
                weights[name] = stored(name, tensor)
    tied_head = None if "lm_head.weight" in names else weights.pop("lm_head.weight", None)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # torch names what is missing, unknown or of another shape
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{directory} lacks what its config.json asks for ({reason})") from None
    if tied_head is not None and not torch.equal(tied_head, model.head):
        raise ValueError(f"{directory}: lm_head.weight differs from the embedding, its tie")
    return model


def files_of_weights(directory: Path) -> list[Path]:
    """-> model.safetensors, or its parts. Raises ValueError if there are none."""
    files = [*directory.glob("model.safetensors")] or [*directory.glob("model-*-of-*.safetensors")]
    if not files:
        convert = "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new) of transformers"
        raise ValueError(f"{directory} has no model.safetensors; pytorch_model.bin needs {convert}")
    return files


def read_config(path: Path) -> GPTConfig | LlamaConfig:
    """config.json -> the sizes of its family. Raises ValueError for another architecture."""
    config = {"layer_norm_epsilon": 1e-5, "rms_norm_eps": 1e-6} | read_json(path)
    kind = str(config.get("model_type", "gpt2"))
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type is {kind!r}; only {', '.join(FAMILIES)} is loaded")
    if kind != "gpt2":  # what a Llama's config may leave out
        heads, width = config.get("num_attention_heads"), config.get("hidden_size")
        config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        config["head_dim"] = config.get("head_dim") or width // heads
    sizes = {}
    for key, value in (FAMILIES[kind] | {"quantization_config": [None]}).items():
        found = config.get(key)
        if isinstance(value, list):
            fits, wanted = found in [*value, None], repr(value[0])
        else:
            number = float if "eps" in key else int
            fits, wanted = type(found) is number and 0 < found < 10**7, "a size of a model"
            sizes[value] = found
        if not fits:
            raise ValueError(f"{path}: {key} is {found!r:.99}, and only {wanted} can be loaded")
    if kind == "gpt2":
        if sizes["n_embd"] % sizes["n_head"] > 0:
            raise ValueError(f"{path}: {sizes} do not divide into heads")
        return GPTConfig(**sizes)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"{path}: the rotation {rope!r:.300} is not that of Llama 2 or 3")
    scaling = tuple(rope[key] for key in LLAMA_3) if rope_type == "llama3" else None
    features = {"qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3"}
    features["tied"] = config.get("tie_word_embeddings") is True
    return LlamaConfig(**sizes, rope_theta=theta, rope_scaling=scaling, **features)


def save_base(model: Decoder, directory: str | Path, config: dict[str, Any] | None = None) -> None:
    """Writes model.safetensors, and last its config.json: by default that of a GPT-2."""
    tensors = {their_name(name, model): stored(name, t) for name, t in model.state_dict().items()}
    write_tensors(Path(directory) / "model.safetensors", tensors)
    if config is None:
        end = model.config.vocab_size - 1  # GPT-2 has one token for both ends of a text, its last
        config = {"architectures": ["GPT2LMHeadModel"], "bos_token_id": end, "eos_token_id": end}
        for key, value in GPT2.items():
            config[key] = getattr(model.config, value) if isinstance(value, str) else value[0]
    config = {key: value for key, value in config.items() if key != "torch_dtype"}  # its old name
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    write_json(Path(directory) / "config.json", config)


def fingerprint(model: Decoder) -> str:
    """-> 16 hex digits of the sizes and the weights in bfloat16: its copy in that has the same."""
    digest = hashlib.sha256(repr(model.config).encode())
    for weight in model.state_dict().values():
        digest.update(weight.bfloat16().contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def stored(name: str, weight: Tensor) -> Tensor:
    """A weight of nn.Linear -> of the file, and back: GPT-2's Conv1D stores (in, out)."""
    return weight.transpose(0, -1) if ".c_" in name else weight


def their_name(name: str, model: Decoder) -> str:
    for ours, theirs in NAMES[type(model)].items():
        name = re.sub(ours, theirs, name)
    return name
