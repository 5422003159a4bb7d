"""From examples to batches: JSONL in, rows of ids, padded tensors out. Knows a tokenizer and no model.

>>> import tiktoken, torch
>>> letters = tiktoken.Encoding("bytes", pat_str=".|\\n", mergeable_ranks={bytes([b]): b for b in range(256)},
...                             special_tokens={"<|endoftext|>": 256})
>>> (row,) = encode(letters, [Example(input="ab", target="c")])
>>> row                                        # the source up to the line break, the target up to the end of text
Row(source=[97, 98, 10], target=[99, 256])
>>> batch_of([row], torch.device("cpu"))       # position t predicts token t + 1, and only the target is scored
Batch(idx=tensor([[97, 98, 10, 99]]), targets=tensor([[-100, -100,   99,  256]]))
"""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from torch import Tensor

IGNORE = -100  # the target at positions that are not scored; cross_entropy's default
LONGEST_LINE = 10**6  # characters, more than any context here holds


class Example(NamedTuple):
    """What the model is given, and what it is to answer."""

    input: str
    target: str
    where: str = ""  # its file and line, for messages


def read_jsonl(path: str | Path) -> list[Example]:
    """One object a line, {"input": …, "target": …} -> examples. Raises ValueError that names the line at fault."""
    examples, number = [], 0
    try:
        with open(path, encoding="utf-8-sig") as file:  # a byte-order mark is no part of the text
            while line := file.readline(LONGEST_LINE):
                number += 1
                if line.strip():
                    examples.append(read_line(line, f"{path} line {number}"))
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}, about line {number + 1}: {error}: save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not examples:
        raise ValueError(f'{path} is empty: give an object a line, {{"input": …, "target": …}}')
    return examples


def read_line(line: str, where: str) -> Example:
    """A line of JSONL -> an example. Raises ValueError for anything but the two keys, or a value that is no text."""
    if len(line) == LONGEST_LINE:
        raise ValueError(f"{where} has {LONGEST_LINE:,} characters or more: shorten it")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from None
    if not isinstance(found, dict) or "target" not in found:
        raise ValueError(f'{where} is not an object with a "target": {line[:60].strip()}')
    unknown = [key for key in found if key not in ("input", "target")]
    if unknown:
        raise ValueError(f'{where} has the key "{unknown[0]}": name the two texts "input" and "target"')
    example = Example(found.get("input", ""), found["target"], where)
    for key, value in zip(("input", "target"), example):
        if not isinstance(value, str):
            raise ValueError(f'{where}: "{key}" is {value!r:.60}, not a string')
        if value != value.encode(errors="replace").decode():
            raise ValueError(f'{where}: "{key}" holds half of a surrogate pair, which is no character')
    return example


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


def check_lengths(examples: list[Example], rows: list[Row], block_size: int, n_virtual: int) -> None:
    """Raises ValueError if rows do not fit: how many, which is the longest, and what helps."""
    lengths = [len(row.source) + len(row.target) - 1 for row in rows]  # the last token is predicted, never read
    too_long = sum(n_virtual + length > block_size for length in lengths)
    if too_long:
        longest = max(lengths)
        where = examples[lengths.index(longest)].where or "an example of the task"
        counts = f"{too_long} of {len(rows)} examples are too long: the longest, {where}, takes {longest} tokens"
        room = f"the base reads {block_size}, {n_virtual} of them virtual"
        advice = "shorten it or lower --n-virtual" if longest < block_size and n_virtual else "shorten it or leave it out"
        raise ValueError(f"{counts}, and {room}: {advice}")


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


def shuffled_batches(rows: list[Row], batch_size: int, seed: int) -> Iterator[list[Row]]:
    """-> batches without end: every row comes once in a random order, then once more in another. The seed decides it all.

    A batch has rows of like length, for less padding: those of ten batches are sorted, and then the batches shuffled.
    """
    rng, queue = random.Random(seed), []
    while True:
        queue += rng.sample(rows, len(rows))
        while n := min(10, len(queue) // batch_size) * batch_size:
            some = sorted(queue[:n], key=lambda row: len(row.source) + len(row.target))
            yield from rng.sample([some[i : i + batch_size] for i in range(0, n, batch_size)], n // batch_size)
            del queue[:n]


def hold_out(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """-> a random tenth of the examples, rounded up, and the others. Raises ValueError if there are none."""
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    n = math.ceil(len(shuffled) / 10)
    if n == len(shuffled):
        raise ValueError(f"{examples[0].where} is the only example, and a tenth is held out: give more, or --val-data")
    return shuffled[:n], shuffled[n:]
