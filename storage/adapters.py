"""An adapter on disk: a PEFT directory of adapter_config.json and adapter_model.safetensors.

base.json beside them is ours: PEFT does not know on which weights an adapter was trained.
"""

from pathlib import Path

from torch import Tensor

from model import Decoder
from prefix import Prefix
from soft_prompt import SoftPrompt
from storage.base import fingerprint
from storage.files import read_json, read_tensors, write_json, write_tensors

KINDS = {"PREFIX_TUNING": Prefix, "CARTRIDGE": Prefix, "PROMPT_TUNING": SoftPrompt}  # peft_type
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
        kind, sizes = "PREFIX_TUNING", (P, L, H, H * D)
    else:
        L, H = (model.config.n_layer, model.config.n_head) if model else (None, None)
        kind, sizes = "PROMPT_TUNING", (len(rows), L, H, rows.size(1))
    config = {"peft_type": kind, "task_type": "CAUSAL_LM", "inference_mode": True}
    config |= dict(zip(SIZES, sizes)) | {"base_model_name_or_path": model.name if model else None}
    tensors = {"prompt_embeddings": rows.float().cpu()}
    write_tensors(directory / "adapter_model.safetensors", tensors)
    if model is None:
        (directory / "base.json").unlink(missing_ok=True)
    else:
        base = {"base": model.name, "fingerprint": fingerprint(model)}
        write_json(directory / "base.json", base)
    write_json(directory / "adapter_config.json", config, sort_keys=True)  # the last: now it loads


def load_adapter(directory: str | Path, model: Decoder | None = None) -> Prefix | SoftPrompt:
    """A PEFT directory -> what it holds. Raises ValueError for another kind, file or base."""
    directory = Path(directory)
    config = read_json(directory / "adapter_config.json")
    kind, task = str(config.get("peft_type")), config.get("task_type")
    if kind not in KINDS or task != "CAUSAL_LM":
        what = f"{directory} is a {kind:.99} for the task {task!r:.99}"
        raise ValueError(f"{what}: only {', '.join(KINDS)} for 'CAUSAL_LM' can be loaded")
    path = directory / "adapter_model.safetensors"
    tensors = read_tensors(path)
    sizes = {key: config.get(key) for key in SIZES}
    P, L, H, C = sizes.values()
    try:
        shape = (P, L, 2, H, C // H) if KINDS[kind] is Prefix else (P, C)
        adapter = KINDS[kind](tensors["prompt_embeddings"].view(shape))
    except (ArithmeticError, LookupError, RuntimeError, TypeError):
        raise ValueError(f"{path} has no prompt_embeddings of {sizes}: save it again") from None
    if not stored_rows(adapter).isfinite().all():
        raise ValueError(f"{path} holds numbers that are not finite: train it again")
    if model and (directory / "base.json").exists():  # PEFT's own have none
        base = read_json(directory / "base.json")
        known, found = base.get("fingerprint"), fingerprint(model)
        if found != known:
            was = f"{directory} was trained on {base.get('base')} (fingerprint {known})"
            this = f"not on this {model.name} ({found})"
            raise ValueError(f"{was}, {this}: give that base, or train again")
    return adapter
