"""A tokenizer on disk: GPT-2's vocab.json and merges.txt, made into a tiktoken.Encoding."""

import json
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from storage.base import base_directory
from storage.files import read_json, replace_file, saved_file

END_OF_TEXT = "<|endoftext|>"
# GPT-2's alphabet: each byte has a printable character, and printable bytes come first (byte 0 is written Ā)
BYTES = sorted(range(256), key=lambda b: (not chr(b).isprintable() or b == ord(" "), b))
CHARACTER = {b: chr(b) if chr(b).isprintable() and b != ord(" ") else chr(256 + i - 188) for i, b in enumerate(BYTES)}
BYTE = {character: b for b, character in CHARACTER.items()}


def ranks_of(merges: list[tuple[bytes, bytes]]) -> dict[bytes, int]:
    """Merges -> the id of each token, in GPT-2's order: 256 bytes, then the merges as they came."""
    return {token: i for i, token in enumerate([bytes([b]) for b in BYTES] + [a + b for a, b in merges])}


def build_tokenizer(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """Ids of the byte strings -> the tokenizer, with the end of text as its last token."""
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def save_tokenizer(directory: str | Path, merges: list[tuple[bytes, bytes]]) -> None:
    """Writes vocab.json and merges.txt as GPT-2 has them."""

    def readable(token: bytes) -> str:
        return "".join(CHARACTER[b] for b in token)

    vocab = {readable(token): i for token, i in ranks_of(merges).items()}
    vocab[END_OF_TEXT] = len(vocab)
    replace_file(Path(directory) / "vocab.json", json.dumps(vocab, ensure_ascii=False).encode())
    lines = ["#version: 0.2"] + [f"{readable(a)} {readable(b)}" for a, b in merges]
    replace_file(Path(directory) / "merges.txt", ("\n".join(lines) + "\n").encode())


def load_tokenizer(name_or_dir: str | Path) -> tiktoken.Encoding:
    """A base's directory or name -> the tokenizer of its vocab.json and merges.txt. Raises ValueError if they do not fit."""
    directory = base_directory(name_or_dir)
    vocab, merges = saved_file(directory, "vocab.json"), saved_file(directory, "merges.txt")

    def token(characters: str) -> bytes:
        return bytes(BYTE[character] for character in characters)

    found = read_json(vocab)
    try:
        pairs = [line.split(" ") for line in merges.read_text(encoding="utf-8").split("\n")[1:] if line]
        ranks = ranks_of([(token(a), token(b)) for a, b in pairs])
        if found.pop(END_OF_TEXT) != len(ranks) or {token(name): i for name, i in found.items()} != ranks:
            raise ValueError
        if len(ranks) != 256 + len(pairs):  # two merges make one token
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"{vocab} and {merges} are not the two files of one GPT-2 tokenizer: copy both again") from None
    size = read_json(saved_file(directory, "config.json")).get("vocab_size")
    if type(size) is not int or len(ranks) >= size:
        sizes = f"a tokenizer of {len(ranks) + 1} tokens, a model of {size}"
        raise ValueError(f"{directory}: {sizes}: copy the files of one model again")
    return build_tokenizer(ranks)


def copy_tokenizer(name_or_dir: str | Path, directory: Path) -> None:
    """Puts the tokenizer of a base beside another model."""
    for name in ("vocab.json", "merges.txt"):
        replace_file(directory / name, saved_file(base_directory(name_or_dir), name).read_bytes())
