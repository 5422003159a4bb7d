"""A tokenizer on disk, made into a tiktoken.Encoding, and the chat template beside it."""

import json
import re
import unicodedata
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiktoken_ext.openai_public import r50k_pat_str

from storage.files import read_json, replace_file, saved_file
from storage.hub import TOKENIZER, base_directory

END_OF_TEXT = "<|endoftext|>"
# GPT-2's alphabet: a character for each byte, itself if it is printable; those come first
BYTES = sorted(range(256), key=lambda b: (not chr(b).isprintable() or b == ord(" "), b))
CHARACTER = {b: chr(b if i < 188 else 256 + i - 188) for i, b in enumerate(BYTES)}
BYTE = {ord(character): b for b, character in CHARACTER.items()}
# SmolLM2's splits: GPT-2's of 2019, with every digit alone, and spaces before it
ONE_DIGIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


class Encoding(tiktoken.Encoding):
    """tiktoken's, with added tokens, accents and gaps treated as Hugging Face's tokenizers do."""

    eot_token = 0  # the model's end of text, whatever it is called

    def __init__(
        self, ranks: dict[bytes, int], added: dict[str, int], end: int,
        pattern: str = r50k_pat_str, compose: bool = False,
    ):  # fmt: skip
        super().__init__("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
        self.eot_token, self.compose = end, compose
        self.known_ids = {*ranks.values(), *added.values()}
        self.known_bytes = {token[0] for token in ranks if len(token) == 1}
        longer_first = sorted(added, reverse=True)  # <a><b> before <a>
        self.added = re.compile(f"({'|'.join(map(re.escape, longer_first))})")

    def encode(self, text: str, *, allowed_special: str = "all") -> list[int]:
        """A text -> its ids. An added token in it, such as <think>, is the one id that it is."""
        ids = []
        for i, piece in enumerate(self.added.split(text)):  # every second piece is an added token
            ids += [self._special_tokens[piece]] if i % 2 else self.encode_ordinary(piece)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """A text -> its ids, with no added token among them."""
        text = unicodedata.normalize("NFC", text) if self.compose else text
        lacking = set(text.encode(errors="replace")) - self.known_bytes
        if lacking:  # tiktoken would panic
            where = f"the byte {min(lacking):#x}, which is in {text!r:.60}"
            raise ValueError(f"the vocabulary lacks {where}: leave it out")
        return super().encode_ordinary(text)

    def decode(self, tokens: list[int], errors: str = "replace") -> str:
        """Ids -> their text. An id that means nothing, as in a gap, decodes to nothing."""
        return super().decode([i for i in tokens if i in self.known_ids], errors)


def build_tokenizer(ranks: dict[bytes, int]) -> Encoding:
    """Ids of byte strings -> a tokenizer as GPT-2's, with the end of text as its last token."""
    return Encoding(ranks, {END_OF_TEXT: len(ranks)}, len(ranks))


def ranks_of(merges: list[tuple[bytes, bytes]]) -> dict[bytes, int]:
    """Merges -> the id of each token, in GPT-2's order: 256 bytes, then the merges as they came."""
    tokens = [bytes([b]) for b in BYTES] + [a + b for a, b in merges]
    return {token: i for i, token in enumerate(tokens)}


def token_bytes(token: str) -> bytes:
    """A token in GPT-2's alphabet -> the bytes that it stands for."""
    return token.translate(BYTE).encode("latin-1")


def token_text(token: bytes) -> str:
    return token.decode("latin-1").translate(CHARACTER)


def save_tokenizer(directory: str | Path, merges: list[tuple[bytes, bytes]]) -> None:
    """Writes vocab.json and merges.txt as GPT-2 has them."""
    vocab = {token_text(token): i for token, i in ranks_of(merges).items()}
    vocab[END_OF_TEXT] = len(vocab)
    replace_file(Path(directory) / "vocab.json", json.dumps(vocab, ensure_ascii=False).encode())
    lines = ["#version: 0.2"] + [f"{token_text(a)} {token_text(b)}" for a, b in merges]
    replace_file(Path(directory) / "merges.txt", ("\n".join(lines) + "\n").encode())


def copy_tokenizer(name_or_dir: str | Path, directory: Path) -> None:
    """Puts the tokenizer of a base, and what goes with it, beside another model."""
    for name in TOKENIZER:
        path = base_directory(name_or_dir) / name
        if path.exists():
            replace_file(directory / name, path.read_bytes())


def load_tokenizer(name_or_dir: str | Path) -> Encoding:
    """A base -> its tokenizer: tokenizer.json decides, else GPT-2's vocab.json and merges.txt.

    Raises ValueError if it is of another kind, or its files do not fit together, or the model.
    """
    directory = base_directory(name_or_dir)
    config, path = read_json(directory / "config.json"), directory / "tokenizer.json"
    found = read_json(path) if path.exists() else read_two_files(directory)
    said = [config.get("eos_token_id"), tokenizer_config(directory).get("eos_token"), END_OF_TEXT]
    end = next(each for each in said if each is not None)
    end = end[0] if isinstance(end, list) and end else end  # the first of several
    try:
        return read_tokenizer(found, end, config["vocab_size"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"its tokenizer cannot be used ({error!r:.300})"
        remedy = "give files that fit together, like those of GPT-2, SmolLM2, Llama 3 or Qwen"
        raise ValueError(f"{directory}: {reason}: {remedy}") from None


def read_two_files(directory: Path) -> dict[str, Any]:
    """GPT-2's vocab.json and merges.txt -> what its tokenizer.json would say."""
    vocab = read_json(directory / "vocab.json")
    merges = saved_file(directory / "merges.txt").read_text(encoding="utf-8", errors="replace")
    return {
        "model": {"vocab": vocab, "merges": [line for line in merges.split("\n")[1:] if line]},
        "added_tokens": [{"content": END_OF_TEXT, "id": vocab.get(END_OF_TEXT)}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    }


def read_tokenizer(found: dict[str, Any], end: int | str, n_vocab: int) -> Encoding:
    """A tokenizer.json, the token that ends a text, and the model's size -> the same for tiktoken.

    Raises if it is no byte-level BPE, or splits texts in a way that is not known here.
    """
    model, normalizer = found["model"], found.get("normalizer")
    added = {token["content"]: token["id"] for token in found["added_tokens"]}
    ranks = {token_bytes(t): i for t, i in model["vocab"].items() if t not in added}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made = [ranks.get(token_bytes(a + b)) for a, b in pairs]
    if None in made or made != sorted(made):  # tiktoken merges in the order of the ids
        raise ValueError("its merges do not make its tokens in the order of their ids")
    ids = [*ranks.values(), *added.values()]
    if len({*ids} & {*range(n_vocab)}) < len(ids):
        raise ValueError(f"its {len(ids)} tokens have not {len(ids)} ids of the model's {n_vocab}")
    end = added.get(end) if isinstance(end, str) else end
    if end not in added.values():
        none = f"eos_token_id is {end!r:.99}, none of its added tokens"
        raise ValueError(f"{none}: put the id that ends a text into config.json")
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"its normalizer is {normalizer}")
    match found["pre_tokenizer"].get("pretokenizers", [found["pre_tokenizer"]]):
        case [{"type": "ByteLevel", "add_prefix_space": False}]:
            pattern = r50k_pat_str
        case [{"type": "Digits"}, {"type": "ByteLevel", "add_prefix_space": False}]:
            pattern = ONE_DIGIT
        case [{"type": "Split", "pattern": {"Regex": own}}, {"type": "ByteLevel"}]:
            pattern = own
        case other:
            raise ValueError(f"its pre_tokenizer is {other}")
    return Encoding(ranks, added, end, pattern, compose=normalizer is not None)


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """-> tokenizer_config.json, where there is one; a token with flags becomes its text."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, dict):
            config[key] = value.get("content")
    return config


def load_chat_template(name_or_dir: str | Path) -> Callable[[list[dict[str, Any]]], str]:
    """A base -> a function: messages, {"role": …, "content": …} each -> the text up to the answer.

    Raises ValueError if there is no template; the function does if the template fails.
    """
    directory = base_directory(name_or_dir)
    config, path = tokenizer_config(directory), directory / "chat_template.jinja"
    template = config.get("chat_template")
    if path.exists():
        template = path.read_text(encoding="utf-8", errors="replace")
    for named in template if isinstance(template, list) else []:  # several, by name
        if isinstance(named, dict) and named.get("name") == "default":
            template = named.get("template")
    if not isinstance(template, str):
        raise ValueError(f"{directory} has no chat template: give an instruct model, or no --chat")
    tokens = {key: text for key, text in config.items() if key.endswith("_token") and text}

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"],
        loader=jinja2.DictLoader({"chat": template}),  # which compiles it once
    )  # fmt: skip
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception, "tools": None, "documents": None}
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            chat = environment.get_template("chat")
            text = chat.render(messages=messages, add_generation_prompt=True, **tokens)
            return text or raise_exception("it writes nothing")
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"the chat template of {directory} fails ({error!r:.200})") from None

    return render
