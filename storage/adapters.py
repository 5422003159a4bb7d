"""An adapter on disk: a PEFT directory of adapter_config.json and adapter_model.safetensors.

base.json beside them is ours: PEFT does not know on which weights an adapter was trained.
"""

from pathlib import Path

import torch
from torch import Tensor

from model import Decoder
from prefix import Prefix
from soft_prompt import SoftPrompt
from storage.base import FLOATS, fingerprint
from storage.files import read_json, read_tensors, write_json, write_tensors

KINDS = {"PREFIX_TUNING": Prefix, "CARTRIDGE": Prefix, "PROMPT_TUNING": SoftPrompt}  # peft_type
CHECKED = {"task_type": "CAUSAL_LM", "num_transformer_submodules": 1, "modules_to_save": None}
COMMON = {"auto_mapping": None, "inference_mode": True, "peft_version": "0.21.2", "revision": None}
PREFIX = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "init_weights": None}
PROMPT = {  # with another init, PEFT would ask for a text before it loads the vectors
    "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None,
    "tokenizer_name_or_path": None, "tokenizer_kwargs": None,
}  # fmt: skip
SIZES = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")


def stored_rows(adapter: Prefix | SoftPrompt) -> Tensor:
    """-> (P, width) what PEFT keeps of an adapter: keys and values, an MLP baked in, or vectors."""
    return adapter.kv().flatten(1) if isinstance(adapter, Prefix) else adapter.vectors


def save_adapter(
    adapter: Prefix | SoftPrompt, directory: str | Path, model: Decoder | None = None
) -> None:
    """Writes a PEFT directory, and the fingerprint of the base if given. An MLP is baked in."""
    directory, rows = Path(directory), stored_rows(adapter)
    if isinstance(adapter, Prefix):
        P, L, _, H, D = adapter.start.shape
        config = PREFIX | dict(zip(SIZES, (P, L, H, H * D))) | {"encoder_hidden_size": H * D}
    else:
        L, H = (model.config.n_layer, model.config.n_head) if model else (None, None)
        config = PROMPT | dict(zip(SIZES, (len(rows), L, H, rows.size(1))))
    tensors = {"prompt_embeddings": rows.float().cpu()}
    write_tensors(directory / "adapter_model.safetensors", tensors)
    if model is None:
        (directory / "base.json").unlink(missing_ok=True)
    else:
        base = {"base": model.name, "fingerprint": fingerprint(model)}
        base["fingerprint_float16"] = fingerprint(model, torch.float16)
        write_json(directory / "base.json", base)
    config |= CHECKED | COMMON | {"base_model_name_or_path": model.name if model else None}
    write_json(directory / "adapter_config.json", config, sort_keys=True)  # the last: now it loads


def load_adapter(directory: str | Path, model: Decoder | None = None) -> Prefix | SoftPrompt:
    """A PEFT directory -> what it holds. Raises ValueError for another kind, file or base."""
    directory = Path(directory)
    config = read_json(directory / "adapter_config.json")
    kind = config.get("peft_type")
    if kind not in list(KINDS):  # a list, for it may be anything
        raise ValueError(f"{directory} is a {kind!r:.99}: only {', '.join(KINDS)} can be loaded")
    for key, value in CHECKED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{directory}: {key} is {config[key]!r:.99}, only {value!r} is loaded")
    path = directory / "adapter_model.safetensors"
    rows = read_tensors(path).get("prompt_embeddings")
    P, L, H, C = (config.get(key) for key in SIZES)
    try:
        rows = rows.view((P, L, 2, H, C // H) if KINDS[kind] is Prefix else (P, C))
    except (ArithmeticError, AttributeError, RuntimeError, TypeError):
        sizes = dict(zip(SIZES, (P, L, H, C)))
        raise ValueError(f"{path} has no prompt_embeddings of {sizes}: save it again") from None
    if model:
        needed = model.kv_shape(P) if KINDS[kind] is Prefix else (P, model.config.n_embd)
        if rows.shape != needed or P > model.config.block_size:  # unread: they may claim gigabytes
            needs = f"{model.name} needs {needed}, at most {model.config.block_size} of them"
            raise ValueError(f"{directory} has rows {(*rows.shape,)}, and {needs}: give its base")
    if rows.numel() == 0 or rows.dtype not in FLOATS or not rows.isfinite().all():
        raise ValueError(f"{path} holds no rows of finite numbers: train or save it again")
    if model and (directory / "base.json").exists():  # PEFT's own have none
        base = read_json(directory / "base.json")
        known = (base.get("fingerprint"), base.get("fingerprint_float16"))
        if fingerprint(model) not in known and fingerprint(model, torch.float16) not in known:
            was = f"{directory} was trained on {base.get('base')} (fingerprint {known[0]})"
            raise ValueError(f"{was}, not on {model.name}: give that base, or train again")
    return KINDS[kind](rows)
