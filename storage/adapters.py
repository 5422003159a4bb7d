"""An adapter on disk: a PEFT directory of adapter_config.json and one tensor in adapter_model.safetensors.

base.json beside them is ours: PEFT does not know on which weights an adapter was trained, and takes any base.
"""

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from model import Decoder
from storage.base import FLOATS, fingerprint
from storage.files import read_json, read_tensors, saved_file, write_json, write_tensors

# What PEFT writes besides the sizes. A prefix's MLP is baked in; a prompt's init, which PEFT runs before it loads the vectors,
# would need a text if it were not "RANDOM".
CHECKED = {"task_type": "CAUSAL_LM", "num_transformer_submodules": 1, "modules_to_save": None}
COMMON = CHECKED | {"auto_mapping": None, "inference_mode": True, "peft_version": "0.21.2", "revision": None}
OWN = {"PREFIX_TUNING": {"prefix_projection": False, "init_weights": None}, "PROMPT_TUNING": {"prompt_tuning_init": "RANDOM"}}
OWN["PROMPT_TUNING"] |= dict.fromkeys(("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"))


def write_adapter(directory: str | Path, peft_type: str, rows: Tensor, model: Decoder | None, sizes: dict[str, Any]) -> None:
    """(P, width) rows and PEFT's sizes of their kind -> a PEFT directory; the config, which makes it loadable, comes last."""
    directory = Path(directory)
    config = {"peft_type": peft_type, "base_model_name_or_path": model.name if model else None, "num_virtual_tokens": len(rows)}
    write_tensors(directory / "adapter_model.safetensors", {"prompt_embeddings": rows.float().cpu()})
    if model:
        write_json(directory / "base.json", {"base": model.name, "fingerprint": fingerprint(model)})
    else:
        (directory / "base.json").unlink(missing_ok=True)
    write_json(directory / "adapter_config.json", config | COMMON | OWN[peft_type] | sizes, sort_keys=True)


def adapter_kind(directory: Path, kinds: Iterable[str]) -> str:
    """-> the peft_type of an adapter. Raises ValueError if it is none of those known."""
    kind = str(read_json(saved_file(directory, "adapter_config.json")).get("peft_type"))
    if kind not in kinds:
        raise ValueError(f"{directory} is an adapter of type {kind}: only {' and '.join(kinds)} can be loaded")
    return kind


def read_adapter(directory: str | Path, peft_type: str, model: Decoder | None) -> tuple[Tensor, dict[str, Any]]:
    """A PEFT directory -> (P, width) rows and its config. Raises ValueError for another kind, file or base."""
    directory = Path(directory)
    config = read_json(saved_file(directory, "adapter_config.json"))
    for key, value in (CHECKED | {"peft_type": peft_type}).items():
        if config.get(key, value) != value:
            raise ValueError(f"{directory}: {key} is {config[key]!r}; only {value!r} can be loaded here")
    path = saved_file(directory, "adapter_model.safetensors")
    rows = read_tensors(path).get("prompt_embeddings")
    if rows is None or rows.dim() != 2 or len(rows) == 0 or rows.dtype not in FLOATS:
        raise ValueError(f"{path} holds no prompt_embeddings that are rows of numbers: train or save it again")
    if config.get("num_virtual_tokens") != len(rows):
        raise ValueError(f"{path} has {len(rows)} rows, its adapter_config.json {config.get('num_virtual_tokens')}")
    if model:
        width = prod(model.kv_shape(1)) if peft_type == "PREFIX_TUNING" else model.config.n_embd
        if rows.size(1) != width or len(rows) > model.config.block_size:  # before its numbers are read: there may be billions
            fits = f"{model.name} needs rows of {width}, at most {model.config.block_size}"
            raise ValueError(f"{directory} has {len(rows)} rows of {rows.size(1)} numbers, and {fits}: give the base it is for")
    if not rows.isfinite().all():
        raise ValueError(f"{path} holds numbers that are not finite: train or save it again")
    if model and (directory / "base.json").exists():
        base = read_json(directory / "base.json")
        if base.get("fingerprint") != (here := fingerprint(model)):
            bases = f"{base.get('base')} (fingerprint {base.get('fingerprint')}), not on {model.name} ({here})"
            raise ValueError(f"{directory} was trained on {bases}: give that base, or train again")
    return rows, config
