"""A tokenizer on disk, made into a tiktoken.Encoding: GPT-2's vocab.json and merges.txt, or a newer model's tokenizer.json.

Whatever a model calls its end of text, here it is `tokenizer.eot_token`.
"""

import json
import unicodedata
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from storage.hub import base_directory
from storage.files import read_json, replace_file, saved_file

END_OF_TEXT = "<|endoftext|>"
# GPT-2's alphabet: each byte has a printable character, and printable bytes come first (byte 0 is written Ā)
BYTES = sorted(range(256), key=lambda b: (not chr(b).isprintable() or b == ord(" "), b))
CHARACTER = {b: chr(b) if chr(b).isprintable() and b != ord(" ") else chr(256 + i - 188) for i, b in enumerate(BYTES)}
BYTE = {character: b for b, character in CHARACTER.items()}
# SmolLM2's: GPT-2's of 2019, with every digit alone, and spaces before it
ONE_DIGIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


class Encoding(tiktoken.Encoding):
    """tiktoken's, for vocabularies that lack some bytes (it would panic), and models that compose accents first."""

    compose = False

    def encode_ordinary(self, text: str) -> list[int]:
        if lacking := set(text.encode(errors="replace")) - self.known_bytes:
            raise ValueError(f"the vocabulary lacks the byte {min(lacking):#x}, which is in {text!r:.60}: leave it out")
        return super().encode_ordinary(unicodedata.normalize("NFC", text) if self.compose else text)


def token_bytes(token: str) -> bytes:
    return bytes(BYTE[character] for character in token)


def ranks_of(merges: list[tuple[bytes, bytes]]) -> dict[bytes, int]:
    """Merges -> the id of each token, in GPT-2's order: 256 bytes, then the merges as they came."""
    return {token: i for i, token in enumerate([bytes([b]) for b in BYTES] + [a + b for a, b in merges])}


def build_tokenizer(ranks: dict[bytes, int], pattern: str = r50k_pat_str, special: dict[str, int] | None = None) -> Encoding:
    """Ids of the byte strings -> the tokenizer; by default GPT-2's, with the end of text as its last token."""
    special = {END_OF_TEXT: len(ranks)} if special is None else special
    tokenizer = Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    tokenizer.known_bytes = {token[0] for token in ranks if len(token) == 1}
    return tokenizer


def save_tokenizer(directory: str | Path, merges: list[tuple[bytes, bytes]]) -> None:
    """Writes vocab.json and merges.txt as GPT-2 has them."""

    def readable(token: bytes) -> str:
        return "".join(CHARACTER[b] for b in token)

    vocab = {readable(token): i for token, i in ranks_of(merges).items()}
    vocab[END_OF_TEXT] = len(vocab)
    replace_file(Path(directory) / "vocab.json", json.dumps(vocab, ensure_ascii=False).encode())
    lines = ["#version: 0.2"] + [f"{readable(a)} {readable(b)}" for a, b in merges]
    replace_file(Path(directory) / "merges.txt", ("\n".join(lines) + "\n").encode())


def load_tokenizer(name_or_dir: str | Path) -> Encoding:
    """A base's directory or name -> its tokenizer. Raises ValueError if its files do not fit together, or the model."""
    directory = base_directory(name_or_dir)
    config = read_json(saved_file(directory, "config.json"))
    gpt2 = config.get("model_type", "gpt2") == "gpt2"
    tokenizer = read_two_files(directory) if gpt2 else read_tokenizer_json(directory, config.get("eos_token_id"))
    size = config.get("vocab_size")
    if type(size) is not int or tokenizer.n_vocab > size:
        sizes = f"a tokenizer of {tokenizer.n_vocab} tokens, a model of {size}"
        raise ValueError(f"{directory}: {sizes}: copy the files of one model again")
    return tokenizer


def read_two_files(directory: Path) -> Encoding:
    vocab, merges = saved_file(directory, "vocab.json"), saved_file(directory, "merges.txt")
    found = read_json(vocab)
    try:
        pairs = [line.split(" ") for line in merges.read_text(encoding="utf-8").split("\n")[1:] if line]
        ranks = ranks_of([(token_bytes(a), token_bytes(b)) for a, b in pairs])
        whole = found.pop(END_OF_TEXT) == len(ranks) == 256 + len(pairs)  # fewer ranks, if two merges make one token
        if not whole or {token_bytes(name): i for name, i in found.items()} != ranks:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"{vocab} and {merges} are not the two files of one GPT-2 tokenizer: copy both again") from None
    return build_tokenizer(ranks)


def read_tokenizer_json(directory: Path, end: Any) -> Encoding:
    """tokenizer.json and the config's end of text, of which the first counts where there are several -> the tokenizer."""
    path = saved_file(directory, "tokenizer.json")
    found = read_json(path)
    try:
        special = {token["content"]: token["id"] for token in found["added_tokens"]}
        ranks = {token_bytes(name): i for name, i in found["model"]["vocab"].items() if name not in special}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in found["model"]["merges"]]
        made = [ranks[token_bytes(a) + token_bytes(b)] for a, b in merges]
        pattern = split_pattern(found["pre_tokenizer"])
        end = end[0] if isinstance(end, list) else end
        (name,) = (name for name, i in special.items() if i == end)
        ids = [*ranks.values(), *special.values()]
        if len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ValueError("two tokens of one id, or an id that is none")  # tiktoken would panic
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no byte-level BPE whose end of text is {end} ({error!r:.80})") from None
    if made != sorted(made) or pattern is None or (found.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        kinds = {key: found.get(key) for key in ("normalizer", "pre_tokenizer")}
        raise ValueError(f"{path} splits texts in a way that is not known here: {str(kinds)[:300]}")
    special = {f"{other} " if other == END_OF_TEXT else other: i for other, i in special.items() if other != name}
    tokenizer = build_tokenizer(ranks, pattern, special | {END_OF_TEXT: end})
    tokenizer.compose = bool(found.get("normalizer"))
    return tokenizer


def split_pattern(found: dict[str, Any]) -> str | None:
    """A pre_tokenizer -> its splits as one pattern, or None for a kind that is not known."""
    steps = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    if not byte_level.items() <= steps[-1].items():
        return None
    if steps[-1].get("use_regex", True):  # GPT-2's own pattern, perhaps behind a split of digits
        digits = [step.get("individual_digits") if step["type"] == "Digits" else None for step in steps[:-1]]
        return {(): r50k_pat_str, (True,): ONE_DIGIT}.get(tuple(digits))
    (split,) = steps[:-1]
    return split["pattern"]["Regex"] if split["type"] == "Split" and split["behavior"] == "Isolated" else None


def copy_tokenizer(name_or_dir: str | Path, directory: Path) -> None:
    """Puts the tokenizer of a base beside another model."""
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        if (path := base_directory(name_or_dir) / name).exists():
            replace_file(directory / name, path.read_bytes())
