"""Text in, batches out: files, tokenizers, the restaurant world, its tasks, JSONL. Knows no model.

The small base lives in a world of restaurants, after E2E, the benchmark of the prefix-tuning paper. A record can be
written in many forms, and the base learns to read one form and to write others:

>>> record = Record("Palace", "Thai", "riverside", "cheap", 4)
>>> FORMS["table"](record)
'name : Palace | food : Thai | area : riverside | price : cheap | rating : 4'
>>> FORMS["sentence"](record)
'The Palace serves Thai food in the riverside area , asks cheap prices and is rated 4 of 5 .'

No document ever says which form it wants. So the frozen base can do many things and does not know which one is asked;
an adapter tells it. A task is a pair of forms:

>>> TASKS["sentiment"]
Task(tier='elicited', source='review', target='verdict')
>>> task_example(TASKS["sentiment"], record)
Example(input='I had Thai food at the Palace in the riverside area : cheap and good .', target='positive')
"""

import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import regex
import tiktoken
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------- files

CHECKPOINT = "checkpoint.safetensors"
OUR_FILES = {"config.json", "model.safetensors", "vocab.json", "merges.txt"} | {
    "adapter_config.json", "adapter_model.safetensors", "base.json", "prefix", "soft_prompt", CHECKPOINT, f".{CHECKPOINT}.new",
}  # fmt: skip
HUB = "https://huggingface.co/{repo}/resolve/main/{file}"
HUB_REPOS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_REPOS["distilgpt2"] = "distilbert/distilgpt2"


@contextmanager
def replaced_directory(directory: str | Path) -> Iterator[Path]:
    """Yields an empty directory to write into, which takes the place of `directory` when the block ends without error.

    Whenever the process dies, the old directory or the new one is there whole: at worst the old one still carries its
    temporary name, which `saved_file` undoes. Raises ValueError rather than remove files that are not ours.
    """
    directory = Path(directory).resolve()
    check_replaceable(directory)
    new, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("new", "old"))
    for left_over in (new, old):  # by a process that died while saving
        shutil.rmtree(left_over, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
    finally:
        restore(directory)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which takes the place of `path` in one go when the block ends without error."""
    new = path.with_name(f".{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises ValueError if `path` could not be made: better before hours of training than after them."""
    folder = next((folder for folder in path.resolve().parents if folder.exists()), path)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to, so {path.name} cannot be saved there: name another place")


def check_replaceable(directory: Path) -> None:
    """Raises ValueError if `directory` cannot be saved to, or files that this project did not write would be removed."""
    check_writable(directory)
    restore(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: name a directory to save to")
    foreign = sorted({path.name for path in directory.iterdir()} - OUR_FILES) if directory.exists() else []
    if foreign:
        raise ValueError(f"{directory} holds other files ({foreign[0]}, …): name a new or empty directory to save to")


def restore(directory: Path) -> None:
    """If a save died between its two renames, puts the old directory back."""
    directory = directory.resolve()  # "." has no name
    old = directory.with_name(f".{directory.name}.old")
    if old.exists() and not directory.exists():
        old.rename(directory)


def saved_file(directory: Path, name: str) -> Path:
    """-> the path of a file in a saved directory. Raises ValueError if there is none."""
    restore(directory)
    path = directory / name
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {directory} is not the directory that was meant, or is not complete")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object -> dict. Raises ValueError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested a thousandfold
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not a JSON object")
    return found


def base_directory(name_or_dir: str | Path) -> Path:
    """A directory -> itself; one of OpenAI's names -> the folder that its files were downloaded to, once."""
    if str(name_or_dir) not in HUB_REPOS:
        return Path(name_or_dir)
    directory = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prefix-tuning" / str(name_or_dir)
    files = ["config.json", "vocab.json", "merges.txt", "model.safetensors"]
    for file in files:
        if not (directory / file).exists():
            url = HUB.format(repo=HUB_REPOS[str(name_or_dir)], file=file)
            print(f"downloading {url} to {directory}")
            try:
                directory.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(directory / file))  # to a temporary name, then renamed
            except OSError as error:
                raise ValueError(
                    f"cannot download {url} ({error}): put {', '.join(files)} of {name_or_dir} into {directory}"
                ) from None
    return directory


# ----------------------------------------------------------------------------------------------------------- tokenizers

END_OF_TEXT = "<|endoftext|>"
# GPT-2's alphabet: each byte has a printable character, and printable bytes come first (byte 0 is written Ā)
BYTES = sorted(range(256), key=lambda b: (not chr(b).isprintable() or b == ord(" "), b))
CHARACTER = {b: chr(b) if chr(b).isprintable() and b != ord(" ") else chr(256 + i - 188) for i, b in enumerate(BYTES)}
os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken would cache a vocabulary by its path, and serve it after a change


def train_bpe(texts: Iterable[str], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Texts -> up to n_merges pairs of byte strings, the most frequent neighbours first (Sennrich et al. 2016).

    Words are GPT-2's (its splitting pattern), counted once each, and a merge revisits only the words that hold it.
    """
    counts = Counter(word for text in texts for word in regex.findall(r50k_pat_str, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    pairs, where = Counter(), defaultdict(set)

    def count(i: int, sign: int) -> None:
        parts, n = words[i]
        for pair in zip(parts, parts[1:]):
            pairs[pair] += sign * n
            where[pair].add(i)

    for i in range(len(words)):
        count(i, +1)
    merges = []
    while pairs and len(merges) < n_merges:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        for i in where[best].copy():
            count(i, -1)
            parts, j = words[i][0], 0
            while j < len(parts) - 1:
                if (parts[j], parts[j + 1]) == best:
                    parts[j : j + 2] = [parts[j] + parts[j + 1]]
                j += 1
            count(i, +1)
    return merges


def ranks_of(merges: list[tuple[bytes, bytes]]) -> dict[bytes, int]:
    """Merges -> the id of each token, in GPT-2's order: 256 bytes, then the merges as they came."""
    return {token: i for i, token in enumerate([bytes([b]) for b in BYTES] + [a + b for a, b in merges])}


def build_tokenizer(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """Ids of the byte strings -> the tokenizer, with the end of text as its last token."""
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def save_tokenizer(directory: Path, merges: list[tuple[bytes, bytes]]) -> None:
    """Writes vocab.json and merges.txt as GPT-2 has them."""

    def readable(token: bytes) -> str:
        return "".join(CHARACTER[b] for b in token)

    vocab = {readable(token): i for token, i in ranks_of(merges).items()}
    vocab[END_OF_TEXT] = len(vocab)
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2"] + [f"{readable(a)} {readable(b)}" for a, b in merges]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_tokenizer(name_or_dir: str | Path) -> tiktoken.Encoding:
    """A base's directory or name -> the tokenizer of its vocab.json and merges.txt."""
    directory = base_directory(name_or_dir)
    vocab, merges = saved_file(directory, "vocab.json"), saved_file(directory, "merges.txt")
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(vocab))
        if read_json(vocab)[END_OF_TEXT] != len(ranks):
            raise ValueError
        return build_tokenizer(ranks)
    except (AssertionError, AttributeError, KeyError, RecursionError, ValueError):
        raise ValueError(f"{vocab} and {merges} are not the two files of one GPT-2 tokenizer: copy both again") from None


# ------------------------------------------------------------------------------------------------- the restaurant world


class Record(NamedTuple):
    """One restaurant."""

    name: str
    food: str
    area: str
    price: str
    rating: int


VALUES = Record(
    "Alder Amber Anchor Basil Beacon Cedar Clover Comet Coral Dragon Ember Falcon Ginger Hazel Indigo Jasmine Juniper Lantern "
    "Laurel Maple Meadow Nectar Olive Opal Orchid Palace Pepper Quince Raven Saffron Sorrel Thistle Tiger Umber Violet "
    "Willow".split(),
    "Thai Indian French Greek Turkish Polish Korean Spanish Mexican English Chinese Italian".split(),
    "riverside station harbour market castle museum park university".split(),
    "cheap fair moderate high low steep modest average".split(),
    [1, 2, 3, 4, 5],
)
TASTE = {1: "awful", 2: "poor", 3: "plain", 4: "good", 5: "superb"}
VERDICT = {1: "negative", 2: "negative", 3: "neutral", 4: "positive", 5: "positive"}


def successor(r: Record) -> Record:
    """-> the record whose every value is the next one in its list: an arbitrary mapping that no document holds."""
    return Record(*(values[(values.index(value) + 1) % len(values)] for values, value in zip(VALUES, r)))


# Values stand in mid-line behind a space, so that each is one and the same token wherever it is copied from or to.
FORMS: dict[str, Callable[[Record], str]] = {
    "table": lambda r: f"name : {r.name} | food : {r.food} | area : {r.area} | price : {r.price} | rating : {r.rating}",
    "sentence": lambda r: f"The {r.name} serves {r.food} food in the {r.area} area , asks {r.price} prices and is rated {r.rating} of 5 .",
    "chat": lambda r: f"hey , try {r.name} by the {r.area} ! {r.food} , {r.price} , {r.rating} of 5",
    "advert": lambda r: f"Tonight : {r.food} at the {r.name} ! rated {r.rating} of 5 , {r.price} , at the {r.area}",
    "review": lambda r: f"I had {r.food} food at the {r.name} in the {r.area} area : {r.price} and {TASTE[r.rating]} .",
    "verdict": lambda r: VERDICT[r.rating],
    "message": lambda r: f"Hello , does the {r.name} at the {r.area} still serve {r.food} food ?",
    "polite": lambda r: f"Dear guest , the {r.name} is glad to serve you {r.food} food at the {r.area} .",
    "casual": lambda r: f"sure , come by the {r.area} , {r.name} has {r.food} ready !",
    "terse": lambda r: f"Yes : {r.name} , {r.area} , {r.food} .",
    "shifted": lambda r: FORMS["sentence"](successor(r)),
}  # fmt: skip

# What pretraining documents hold: a source, and the forms that may follow it.
DOCUMENTS = {
    "table": ["sentence", "chat", "advert"],
    "sentence": ["table", "chat", "advert"],
    "review": ["table", "sentence", "advert", "verdict"],
    "message": ["polite", "casual", "terse"],
}


class Task(NamedTuple):
    """elicited: a pair of forms that documents hold. recombined: both forms, never as a pair. new: never the target."""

    tier: str
    source: str
    target: str


TASKS = {
    "sentence": Task("elicited", "table", "sentence"),
    "table": Task("elicited", "sentence", "table"),
    "sentiment": Task("elicited", "review", "verdict"),
    "reply": Task("elicited", "message", "polite"),
    "chat": Task("recombined", "review", "chat"),
    "verdict": Task("recombined", "table", "verdict"),
    "shifted": Task("new", "table", "shifted"),
}


class Example(NamedTuple):
    """What the model is given, and what it is to answer."""

    input: str
    target: str


def task_example(task: Task, record: Record) -> Example:
    return Example(FORMS[task.source](record), FORMS[task.target](record))


def split_of(record: Record) -> str:
    """-> "test" or "validation", one restaurant in eleven each, or "train".

    By name, food and area, which every source states: so no test input ever equals a training input. Restaurants are
    numbered through, and since 11 divides none of the sizes in VALUES, each value has its fair share in each split.
    """
    number = 0
    for values, value in zip(VALUES[:3], record):
        number = number * len(values) + values.index(value)
    return {0: "test", 1: "validation"}.get(number % 11, "train")


def random_record(rng: random.Random, split: str) -> Record:
    while True:
        record = Record(*(rng.choice(values) for values in VALUES))
        if split_of(record) == split:
            return record


def random_document(rng: random.Random) -> str:
    """-> a training record's source and one or three of its forms, a line each: a value that comes several times is what
    teaches a model to copy."""
    record = random_record(rng, "train")
    source = rng.choice(list(DOCUMENTS))
    forms = rng.sample(DOCUMENTS[source], rng.choice([1, 3, 3, 3]))
    return "\n".join(FORMS[form](record) for form in [source, *forms])


def task_examples(name: str, split: str, n: int, seed: int) -> list[Example]:
    """-> n examples of a task on random records of one split."""
    rng = random.Random(f"{split} {seed}")
    return [task_example(TASKS[name], random_record(rng, split)) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------- users' own texts


def read_text(path: str | Path) -> str:
    """A UTF-8 file -> its text. Raises ValueError if it is missing, empty or in another encoding."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def read_jsonl(path: str | Path) -> list[Example]:
    """One object a line, {"input": …, "target": …} -> examples. Raises ValueError that names the line at fault."""
    examples = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON ({error})") from None
        if not isinstance(found, dict) or "target" not in found:
            raise ValueError(f'{path} line {number} is not an object with a "target": {line[:60]}')
        example = Example(found.get("input", ""), found["target"])
        for key, value in zip(Example._fields, example):
            if not isinstance(value, str):
                raise ValueError(f'{path} line {number}: "{key}" is {value!r}, not a string')
            if value != value.encode(errors="replace").decode():
                raise ValueError(f'{path} line {number}: "{key}" holds half of a surrogate pair, which is no character')
        examples.append(example)
    return examples


# -------------------------------------------------------------------------------------------------------------- batches

IGNORE = -100  # the target at positions that are not scored; cross_entropy's default


class Row(NamedTuple):
    """An example in ids: the source up to and with the line break, the target up to and with the end of text."""

    source: list[int]
    target: list[int]


class Batch(NamedTuple):
    idx: Tensor  # (B, T) ids, padded on the right, where causal attention never looks
    targets: Tensor  # (B, T) the next id at positions that predict the target, IGNORE elsewhere


def source_ids(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """A text -> its ids and a line break. Special tokens in it are text like any other.

    Source and target are tokenized apart, so that a prompt at generation has the very ids that it had in training.
    """
    return tokenizer.encode_ordinary(text) + tokenizer.encode_ordinary("\n")


def encode(tokenizer: tiktoken.Encoding, examples: list[Example]) -> list[Row]:
    """Examples -> rows."""
    return [
        Row(source_ids(tokenizer, example.input), tokenizer.encode_ordinary(example.target) + [tokenizer.eot_token])
        for example in examples
    ]


def check_lengths(rows: list[Row], limit: int) -> None:
    """Raises ValueError, with its number, for a row that does not fit into `limit` positions."""
    for number, row in enumerate(rows, start=1):
        positions = len(row.source) + len(row.target) - 1  # the last token is predicted, never read
        if positions > limit:
            raise ValueError(
                f"example {number} takes {positions} positions, and {limit} are left beside the virtual tokens: "
                "shorten it or lower --n-virtual"
            )


def batch_of(rows: list[Row], device: torch.device) -> Batch:
    """Rows -> a batch; position t of a row predicts its token t + 1."""
    T = max(len(row.source) + len(row.target) for row in rows) - 1
    idx = torch.zeros(len(rows), T, dtype=torch.long)
    targets = torch.full((len(rows), T), IGNORE)
    for b, (source, target) in enumerate(rows):
        end = len(source) + len(target) - 1
        idx[b, :end] = torch.tensor(source + target[:-1])
        targets[b, len(source) - 1 : end] = torch.tensor(target)
    return Batch(idx.to(device), targets.to(device))
