"""Examples by the words of the command line: of a task, or of a user's JSONL, checked and split."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import Example, Messages, Row
from small_base.world import task_examples

WRITE = 'import csv, gzip, json; open("new.jsonl", "x").writelines(json.dumps(r) + "\\n" for r in '
CSV = 'CSV. Convert it: {}csv.DictReader(open({!r}, encoding="utf-8-sig")'
OTHER_FILES = {  # how a file begins: what it looks like, and the Python that makes JSONL of it
    rb"(\xef\xbb\xbf)?\s*\[": 'a JSON array. Convert it: {}json.load(open({!r}, "rb")))',
    rb"\x1f\x8b": "gzip. Convert it: {}map(json.loads, gzip.open({!r})))",
    rb"PAR1": "Parquet. Convert it: import pyarrow.parquet as p; {}p.read_table({!r}).to_pylist())",
    rb"[^\n]*[\0-\x06]": "binary data or UTF-16: unpack it, or save it as UTF-8",
    rb"[^{\n]*;": CSV + ', delimiter=";"))',
    rb"[^{\n]*\t": CSV + ', delimiter="\\t"))',
    rb"[^{\n]*,": CSV + "))",
}


def load_examples(
    task: str, path: str | None, val_path: str | None, seed: int
) -> dict[str, list[Example]]:
    """-> train, validation and test examples, of an embedded task or a user's own.

    One's own validation examples are the test examples too: what was chosen by them is to be
    tested on another file, with generate.py.
    """
    if path is None:
        sizes = {"train": 1000, "validation": 100, "test": 300}
        return {split: task_examples(task, split, n, seed) for split, n in sizes.items()}
    train = read_jsonl(path)
    held_out, train = hold_out(train, seed) if val_path is None else (read_jsonl(val_path), train)
    return {"train": train, "validation": held_out, "test": held_out}


def hold_out(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """-> the examples of a random tenth of the inputs, rounded up, and the others.

    Where all have the same input, or none, it is a tenth of the targets.
    """
    keys = [repr(example.input) for example in examples]
    if len(set(keys)) == 1:
        keys = [example.target for example in examples]
    distinct = list(dict.fromkeys(keys))  # each once, in their order
    if len(distinct) == 1:
        raise ValueError(f"{examples[0].where} is the only example: give others, or --val-data")
    held_out = set(random.Random(seed).sample(distinct, (len(distinct) + 9) // 10))
    pairs = list(zip(examples, keys))
    known = [example for example, key in pairs if key not in held_out]
    return [example for example, key in pairs if key in held_out], known


def check_lengths(examples: list[Example], rows: list[Row], block_size: int, P: int) -> None:
    """Raises ValueError if rows do not fit: how many, which is the longest, and what helps."""
    lengths = [row.n_read for row in rows]
    too_long = sum(P + length > block_size for length in lengths)
    if too_long:
        longest = max(lengths)
        where = examples[lengths.index(longest)].where or "an example of the task"
        counts = f"{too_long} of {len(rows)} examples are too long: the longest, {where}, takes"
        room = f"{longest} tokens, and the base reads {block_size}, {P} of them virtual"
        advice = "train with a lower --n-virtual" if longest < block_size and P else "leave it out"
        raise ValueError(f"{counts} {room}: shorten it or {advice}")


def read_jsonl(path: str | Path, say: Callable[[str], None] = print) -> list[Example]:
    """JSONL -> examples, one a line. `say` gets a sentence if columns are not used."""
    examples, unused = [], set()
    try:
        with open(path, "rb") as file:
            for beginning, kind in OTHER_FILES.items():
                if re.match(beginning, file.peek()):  # peek, for a pipe can be read only once
                    raise ValueError(f"{path} looks like {kind.format(WRITE, str(path))}")
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path} line {number}"
                    given, target, others = parts_of(read_line(line, where), where)
                    examples.append(Example(given, target, where))
                    unused.update(others)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not examples:
        raise ValueError(f'{path} is empty: give an object a line, {{"input": …, "target": …}}')
    if unused:
        say(f"{path}: columns that are not used: {str(sorted(unused))[1:-1]:.200}")
    return examples


def read_line(line: bytes, where: str) -> Any:
    """-> what a line of JSON says."""
    try:
        row = json.loads(line.decode("utf-8-sig"))  # a byte-order mark is no part of the text
        json.dumps(row, ensure_ascii=False).encode()  # nor is half of a surrogate pair a character
    except (ValueError, RecursionError) as error:
        advice = "save the file as UTF-8" if type(error) is UnicodeDecodeError else "correct it"
        raise ValueError(f"{where} is not JSON ({error}): {advice}") from None
    return row


def parts_of(row: Any, where: str) -> tuple[str | Messages, str, dict[str, Any]]:
    """An object in one of five formats -> its input, its target, and what it holds besides."""
    match row:
        case {"input": str(text), "target": str(target), **others}:
            return text, target, others
        case {"prompt": str(text), "completion": str(target), **others}:
            return text, target, others
        case {"instruction": str(text), "output": str(target), **others}:
            more = others.pop("input", None) or ""
            if isinstance(more, str):
                return f"{text}\n{more}" if more else text, target, others
        case {"messages": [*turns, {"role": "assistant", "content": str(target)}], **others}:
            if all(map(is_turn, turns)):
                alone = [turn["role"] for turn in turns] == ["user"]
                return turns[0]["content"] if alone else turns or "", target, others
        case {"target": str(target), **others}:
            if not others:  # or an input of another name would be taken for none
                return "", target, others
    formats = '"input" and "target", or "messages" that end with the assistant\'s text'
    raise ValueError(f"{where} needs {formats}: {row!s:.70}")


def is_turn(turn: Any) -> bool:
    return type(turn) is dict and type(turn.get("role")) is type(turn.get("content")) is str
