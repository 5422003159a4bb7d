"""From examples to batches: texts become rows of ids, rows become padded tensors.

An example has an input and a target. The ids of the input are a row's source.

>>> ranks, special = {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256}
>>> letters = Encoding("a", pat_str=".|\\n", mergeable_ranks=ranks, special_tokens=special)
>>> encode(letters, [Example(input="ab", target="c")])  # with a line break and the end of text
[Row(source=[97, 98, 10], target=[99, 256])]
>>> batch_of([Row([97, 98, 10], [99, 256])], torch.device("cpu"))  # only the target is scored
Batch(idx=tensor([[97, 98, 10, 99]]), targets=tensor([[-100, -100,   99,  256]]))
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from tiktoken import Encoding
from torch import Tensor

IGNORE = -100  # the target at positions that are not scored; cross_entropy's default
Messages = list[dict[str, str]]  # a conversation, {"role": …, "content": …} per turn
Template = Callable[[Messages], str] | None  # writes a conversation as its model knows it


class Example(NamedTuple):
    input: str | Messages  # what the model is given
    target: str  # what it is to answer
    where: str = ""  # its file and line, for error messages


class Row(NamedTuple):
    source: list[int]  # the ids of the input; without a template a line break ends them
    target: list[int]  # up to and with the end of text

    @property
    def n_read(self) -> int:
        """-> the positions that the model reads: all tokens but the last, which it predicts."""
        return len(self.source) + len(self.target) - 1


class Batch(NamedTuple):
    idx: Tensor  # (B, T) ids, padded on the right, where causal attention never looks
    targets: Tensor  # (B, T) the next id at positions that predict the target, IGNORE elsewhere


class Scores(NamedTuple):
    """What an evaluation says of rows."""

    loss: float  # nats per target token
    tokens: float  # percentage of the target tokens that are the likeliest there
    exact: list[bool]  # for each row, whether the greedy answer is its target

    def exact_match(self) -> float:
        """-> the percentage of exact answers."""
        return 100 * sum(self.exact) / len(self.exact)


def source_ids(tokenizer: Encoding, given: str | Messages, template: Template = None) -> list[int]:
    """An input -> its ids: a text and a line break, or a conversation as the template writes it.

    It is encoded without the target, so a prompt has the very ids that it had in training. In one
    text with the target, a token might span the border.
    """
    if template is None:
        return tokenizer.encode(given, allowed_special="all") + tokenizer.encode("\n")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return tokenizer.encode(template(messages), allowed_special="all")


def encode(tokenizer: Encoding, examples: list[Example], template: Template = None) -> list[Row]:
    """Examples -> rows. Added tokens in a text become their ids, as in HF transformers."""
    rows = []
    for given, target, where in examples:
        if template is None and not isinstance(given, str):
            raise ValueError(f"{where} has {len(given)} messages before its answer: give --chat")
        answer = tokenizer.encode(target, allowed_special="all") + [tokenizer.eot_token]
        rows.append(Row(source_ids(tokenizer, given, template), answer))
    return rows


def batch_of(rows: list[Row], device: torch.device) -> Batch:
    """Rows -> a batch; position t of a row predicts its token t + 1."""
    T = max(row.n_read for row in rows)
    idx = torch.zeros(len(rows), T, dtype=torch.long)
    targets = torch.full((len(rows), T), IGNORE)
    for b, row in enumerate(rows):
        source, target, end = row.source, row.target, row.n_read
        idx[b, :end] = torch.tensor(source + target[:-1])
        targets[b, len(source) - 1 : end] = torch.tensor(target)
    return Batch(idx.to(device), targets.to(device))


def shuffled_batches(rows: list[Row], batch_size: int, seed: int) -> Iterator[list[Row]]:
    """Rows -> batches without end: all rows in a random order, then in another, by the seed.

    Up to ten batches at a time are sorted by length and cut anew: rows of like length pad less.
    """
    rng, queue = random.Random(seed), []
    while True:
        queue += rng.sample(rows, len(rows))
        while len(queue) >= batch_size:
            n = min(10, len(queue) // batch_size) * batch_size  # the rows of up to ten batches
            by_length = sorted(queue[:n], key=lambda row: row.n_read)
            batches = [by_length[i : i + batch_size] for i in range(0, n, batch_size)]
            yield from rng.sample(batches, len(batches))
            del queue[:n]
