"""A base on disk, in Hugging Face's layout: config.json and model.safetensors, for GPT-2 and the Llama family."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import Llama, LlamaConfig
from model import GPT, Decoder, GPTConfig
from storage.files import read_json, read_tensors, saved_file, write_json, write_tensors
from storage.hub import WEIGHTS, base_directory, shards

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that weights may have; for float8, torch has no sum
FAMILIES = {"gpt2": "GPT-2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # what config.json calls them, and people
TRUNK = re.compile(r"^(transformer|model)\.")  # where a weight's name begins, unless its writer left that out

# Our sizes under the names of config.json; what it says of every model here: of a foreign one, what differs is refused by
# name; and our weights under the names of model.safetensors.
GPT2_SIZES = dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd")
GPT2_SIZES |= dict(layer_norm_epsilon="layer_norm_epsilon")
GPT2_SAME = dict(model_type="gpt2", activation_function="gelu_new", n_inner=None, tie_word_embeddings=True)
GPT2_SAME |= dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
LLAMA_SIZES = dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers")
LLAMA_SIZES |= dict(n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size")
LLAMA_SIZES |= dict(n_inner="intermediate_size", head_dim="head_dim", rms_norm_eps="rms_norm_eps")
LLAMA_SAME = dict(hidden_act="silu", mlp_bias=False, attention_bias=False, use_sliding_window=False, partial_rotary_factor=1.0)
GPT2_WEIGHTS = {r"^": "transformer."}
LLAMA_WEIGHTS = {r"^wte": "model.embed_tokens", r"^h\.": "model.layers.", r"^ln_f": "model.norm", r"\.attn\.": ".self_attn."}
LLAMA_WEIGHTS |= {r"\.ln_1": ".input_layernorm", r"\.ln_2": ".post_attention_layernorm"}


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
    names, weights = {TRUNK.sub("", their_name(name, model)): name for name in model.state_dict()}, {}
    for file in shards(directory):
        for key, tensor in read_tensors(saved_file(directory, file)).items():
            if not key.endswith((".attn.bias", ".attn.masked_bias", ".inv_freq")):  # buffers of old
                name = names.get(TRUNK.sub("", key), key)
                weights[name] = stored(name, tensor)
    tied_head = None if "lm_head.weight" in names else weights.pop("lm_head.weight", None)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # torch names what is missing, unknown or of another shape
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{directory} does not hold the weights that its config.json asks for ({reason})") from None
    if tied_head is not None and not torch.equal(tied_head, model.head):
        raise ValueError(f"{directory}: lm_head.weight differs from the embedding, and config.json says that the head is tied")
    for name, weight in weights.items():
        if weight.dtype not in FLOATS or not weight.isfinite().all():
            raise ValueError(f"{directory}: {name} holds numbers that are not finite {weight.dtype}: save or download it again")
    return model


def save_base(model: Decoder, directory: str | Path, config: dict[str, Any] | None = None) -> None:
    """Writes model.safetensors, and last the config.json without which no one loads it: that of a GPT-2, or the one given."""
    directory, dtype = Path(directory), str(model.dtype).removeprefix("torch.")
    tensors = {their_name(name, model): stored(name, tensor) for name, tensor in model.state_dict().items()}
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
    if config is None:
        sizes = {theirs: getattr(model.config, ours) for ours, theirs in GPT2_SIZES.items()}
        end = model.config.vocab_size - 1  # GPT-2's last token is the end of text, and serves as the beginning too
        config = {"architectures": ["GPT2LMHeadModel"], "bos_token_id": end, "eos_token_id": end} | GPT2_SAME | sizes
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
    for ours, theirs in (GPT2_WEIGHTS if isinstance(model, GPT) else LLAMA_WEIGHTS).items():
        name = re.sub(ours, theirs, name)
    return name


def read_config(directory: Path) -> GPTConfig | LlamaConfig:
    """config.json -> the sizes of its family. Raises ValueError for what is not this architecture, or no size."""
    path = saved_file(directory, "config.json")
    found = {"layer_norm_epsilon": 1e-5, "rms_norm_eps": 1e-6} | read_json(path)
    kind = found.get("model_type", "gpt2")
    if kind not in list(FAMILIES):  # it may be anything, hashable or not
        raise ValueError(f"{path}: model_type is {kind!r}; only {', '.join(FAMILIES)} can be loaded")
    gpt2, family = kind == "gpt2", FAMILIES[kind]
    names, same = (GPT2_SIZES, GPT2_SAME) if gpt2 else (LLAMA_SIZES, LLAMA_SAME)
    heads, width = found.get("num_attention_heads"), found.get("hidden_size")
    if type(heads) is type(width) is int and heads > 0:  # what a Llama's config may leave out
        found["num_key_value_heads"] = found.get("num_key_value_heads") or heads
        found["head_dim"] = found.get("head_dim") or width // heads
    sizes: dict[str, Any] = {ours: found.get(theirs) for ours, theirs in names.items()}
    right = [type(n) is (float if "eps" in ours else int) and 0 < n < 10**7 for ours, n in sizes.items()]
    if not all(right) or sizes["n_layer"] > 1000:
        raise ValueError(f"{path}: { {theirs: found.get(theirs) for theirs in names.values()} } are not a {family}'s")
    if sizes["n_embd"] % sizes["n_head"] if gpt2 else sizes["n_head"] % sizes["n_kv_head"] or sizes["head_dim"] % 2:
        raise ValueError(f"{path}: {sizes} do not divide into heads of one width, an even one where it is turned")
    in_other_words = {"activation_function": "gelu_pytorch_tanh", "n_inner": 4 * sizes["n_embd"]}
    for key, ours in same.items():
        if found.get(key, ours) not in (ours, in_other_words.get(key, ours)):
            raise ValueError(f"{path}: {key} is {found[key]!r}; this {family} has {ours!r}")
    if gpt2:
        return GPTConfig(**sizes)
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    theta, scaling = rope.get("rope_theta", found.get("rope_theta", 10000.0)), None
    if (turning := rope.get("rope_type", rope.get("type", "default"))) == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = tuple(map(rope.get, keys))
    if turning not in ("default", "llama3") or not all(type(n) in (int, float) and n > 0 for n in (theta, *(scaling or ()))):
        raise ValueError(f"{path}: the rotation {rope or theta!r} is not known here, only the default and that of Llama 3")
    qwen = {"qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3", "tied": found.get("tie_word_embeddings") is True}
    return LlamaConfig(**sizes, rope_theta=theta, rope_scaling=scaling, **qwen)
