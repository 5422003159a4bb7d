"""From examples to batches: JSONL in, rows of ids, padded tensors out. Knows a tokenizer, no model.

>>> ranks, special = {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256}
>>> letters = Encoding("a", pat_str=".|\\n", mergeable_ranks=ranks, special_tokens=special)
>>> encode(letters, [Example(input="ab", target="c")])  # with a line break and the end of text
[Row(source=[97, 98, 10], target=[99, 256])]
>>> batch_of([Row([97, 98, 10], [99, 256])], torch.device("cpu"))  # only the target is scored
Batch(idx=tensor([[97, 98, 10, 99]]), targets=tensor([[-100, -100,   99,  256]]))
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tiktoken import Encoding
from torch import Tensor

IGNORE = -100  # the target at positions that are not scored; cross_entropy's default
TO = 'import csv, gzip, json; open("new.jsonl", "x").writelines(json.dumps(r) + "\\n" for r in '
OTHER_FILES = {  # how a file begins: what it looks like, and the Python that makes JSONL of it
    rb"(\xef\xbb\xbf)?\s*\[": 'a JSON array. Convert it: {}json.load(open({!r}, "rb")))',
    rb"\x1f\x8b": "gzip. Convert it: {}map(json.loads, gzip.open({!r})))",
    rb"PAR1": "Parquet. Convert it: import pyarrow.parquet as p; {}p.read_table({!r}).to_pylist())",
    rb"[^\n]*[\0-\x06]": "binary data or UTF-16: unpack it, or save it as UTF-8",
    rb"[^{\n]*,": 'CSV. Convert it: {}csv.DictReader(open({!r}, encoding="utf-8-sig")))',
}
Messages = list[dict[str, str]]  # a conversation, {"role": …, "content": …} a turn
Template = Callable[[Messages], str] | None  # writes a conversation as its model knows it


class Example(NamedTuple):
    input: str | Messages  # what the model is given
    target: str  # what it is to answer
    where: str = ""  # its file and line, for error messages


class Row(NamedTuple):
    source: list[int]  # the ids of the input; without a template a line break ends them
    target: list[int]  # up to and with the end of text


class Batch(NamedTuple):
    idx: Tensor  # (B, T) ids, padded on the right, where causal attention never looks
    targets: Tensor  # (B, T) the next id at positions that predict the target, IGNORE elsewhere


def read_jsonl(path: str | Path, say: Callable[[str], None] = print) -> list[Example]:
    """JSONL -> examples, one a line. `say` gets a sentence if columns are not used."""
    examples, unused = [], set()
    try:
        with open(path, "rb") as file:
            for beginning, kind in OTHER_FILES.items():
                if re.match(beginning, file.peek()):  # peek, for a pipe can be read only once
                    raise ValueError(f"{path} looks like {kind.format(TO, str(path))}")
            for number, line in enumerate(file, start=1):
                if line.strip():
                    examples.append(read_line(line, f"{path} line {number}", unused))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not examples:
        raise ValueError(f'{path} is empty: give an object a line, {{"input": …, "target": …}}')
    if unused:
        say(f"{path}: columns that are not used: {str(sorted(unused))[1:-1]:.200}")
    return examples


def read_line(line: bytes, where: str, unused: set[str]) -> Example:
    """A line in one of five formats -> its example. A line break joins instruction and input."""
    try:
        row = json.loads(line.decode("utf-8-sig"))  # a byte-order mark is no part of the text
        json.dumps(row, ensure_ascii=False).encode()  # nor is half of a surrogate pair a character
    except (ValueError, RecursionError) as error:
        advice = "save the file as UTF-8" if type(error) is UnicodeDecodeError else "correct it"
        raise ValueError(f"{where} is not JSON ({error}): {advice}") from None
    match row:  # fmt: off
        case {"input": str(source), "target": str(target), **others}: pass
        case {"prompt": str(source), "completion": str(target), **others}: pass
        case {"instruction": str(first), "input": str(second), "output": str(target), **others}:
            source = f"{first}\n{second}" if second else first
        case {"instruction": str(source), "output": str(target), **others}: pass
        case {"messages": [*turns, {"role": "assistant", "content": str(target)}], **others} if all(
            type(t) is dict and type(t.get("role")) is type(t.get("content")) is str for t in turns
        ):
            source = turns[0]["content"] if [t["role"] for t in turns] == ["user"] else turns or ""
        case {"target": str(target), **others} if not others: source = ""
        case _:
            raise ValueError(f'{where} needs an "input" and "target", or "messages": {row!s:.70}')
    unused.update(others)
    return Example(source, target, where)


def source_ids(tokenizer: Encoding, source: str | Messages, template: Template = None) -> list[int]:
    """A text and a line break, or a conversation as the template writes it -> ids."""
    if template is None:  # apart from the target, so a prompt has the very ids it had in training
        return tokenizer.encode(source, allowed_special="all") + tokenizer.encode("\n")
    messages = [{"role": "user", "content": source}] if isinstance(source, str) else source
    return tokenizer.encode(template(messages), allowed_special="all")


def encode(tokenizer: Encoding, examples: list[Example], template: Template = None) -> list[Row]:
    """Examples -> rows. Added tokens in a text become their ids, as in transformers."""
    rows = []
    for source, target, where in examples:
        if template is None and not isinstance(source, str):
            raise ValueError(f"{where} has {len(source)} messages before its answer: give --chat")
        answer = tokenizer.encode(target, allowed_special="all") + [tokenizer.eot_token]
        rows.append(Row(source_ids(tokenizer, source, template), answer))
    return rows


def check_lengths(examples: list[Example], rows: list[Row], block_size: int, P: int) -> None:
    """Raises ValueError if rows do not fit: how many, which is the longest, and what helps."""
    lengths = [len(row.source + row.target) - 1 for row in rows]  # the last is predicted, not read
    too_long = sum(P + length > block_size for length in lengths)
    if too_long:
        longest = max(lengths)
        where = examples[lengths.index(longest)].where or "an example of the task"
        counts = f"{too_long} of {len(rows)} examples are too long: the longest, {where}, takes"
        room = f"{longest} tokens, and the base reads {block_size}, {P} of them virtual"
        advice = "lower --n-virtual" if longest < block_size and P else "leave it out"
        raise ValueError(f"{counts} {room}: shorten it or {advice}")


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
    """Rows -> batches without end: all rows in a random order, then in another, by the seed."""
    rng, queue = random.Random(seed), []
    while True:
        queue += rng.sample(rows, len(rows))
        while len(queue) >= batch_size:
            n = min(10, len(queue) // batch_size) * batch_size  # the rows of ten batches or fewer
            window = sorted(queue[:n], key=lambda row: len(row.source + row.target))  # pads less
            batches = [window[i : i + batch_size] for i in range(0, n, batch_size)]
            yield from rng.sample(batches, len(batches))
            del queue[:n]


def hold_out(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """-> the examples of a random tenth of the inputs, rounded up, and the others."""
    inputs = list(dict.fromkeys(repr(example.input) for example in examples))  # each once
    if len(inputs) == 1:
        raise ValueError(f"{examples[0].where} has the only input: give more, or --val-data")
    held_out = set(random.Random(seed).sample(inputs, (len(inputs) + 9) // 10))
    known = [example for example in examples if repr(example.input) not in held_out]
    return [example for example in examples if repr(example.input) in held_out], known
