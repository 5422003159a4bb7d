"""What the data promises: texts that survive, targets that alone are scored, sentences instead of tracebacks."""

import doctest
import json
import random
import re
from itertools import islice

import pytest
import torch

import data
from data import (
    IGNORE, LONGEST_LINE, Example, Row, batch_of, check_lengths, encode, hold_out, read_jsonl, shuffled_batches, source_ids,
)  # fmt: skip
from small_base.pretrain import train_bpe
from small_base.world import random_document
from storage.tokenizers import build_tokenizer, ranks_of


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return build_tokenizer(ranks_of(train_bpe([random_document(rng) for _ in range(500)], 300)))


def test_the_examples_in_the_docstring_run():
    assert doctest.testmod(data).failed == 0


# ---------------------------------------------------------------------------------------------------------------- JSONL


def test_jsonl_is_read_with_empty_lines_and_without_input(tmp_path):
    """Each example knows its file and its line."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "a\\u2028b", "target": "é"}\n \n{"target": "c"}\r\n', encoding="utf-8")
    assert read_jsonl(path) == [Example("a\u2028b", "é", f"{path} line 1"), Example("", "c", f"{path} line 3")]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    """Windows' editors write one."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"input": "é", "target": "\ufeffb"}\r\n{"target": "c"}'.encode())
    assert [example[:2] for example in read_jsonl(path)] == [("é", "\ufeffb"), ("", "c")]


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1]", "line 2 is not an object"),
        ('{"input": "a"}', 'line 2 is not an object with a "target"'),
        ('{"target": 3}', 'line 2: "target" is 3, not a string'),
        ('{"target": "a", "input": null}', 'line 2: "input" is None, not a string'),
        ('{"target": "a"', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"target": "\\ud800"}', "line 2.*surrogate"),
        ('{"prompt": "a", "target": "b"}', 'line 2 has the key "prompt": name the two texts "input" and "target"'),
        ('{"input": "a", "target": "b", "Input": "c"}', 'line 2 has the key "Input"'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    """By its number, with what is wrong: an unknown key would else mean training on empty inputs."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"target": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)


@pytest.mark.parametrize("separator", [b"", b"\n"])
def test_a_line_of_a_million_characters_is_refused_unread(tmp_path, separator):
    """One sentence, without reading what comes after: here, bytes that are no text, far behind."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"target": "fine"}\n{"target": "' + b"x" * LONGEST_LINE + separator + b"x" * 10**5 + b"\xff")
    with pytest.raises(ValueError, match="line 2 has 1,000,000 characters or more: shorten it"):
        read_jsonl(path)
    line = json.dumps({"target": "x" * (LONGEST_LINE - 20)})
    path.write_text(line)
    assert len(line) < LONGEST_LINE and len(read_jsonl(path)) == 1


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, message in [("none", "cannot read"), ("empty", "is empty"), ("latin", "cannot read"), (".", "cannot read")]:
        with pytest.raises(ValueError, match=message):
            read_jsonl(tmp_path / name)


def test_a_tenth_is_held_out(tmp_path):
    """Rounded up, at random by the seed, and no example is lost or in both parts; of one example there is no tenth."""
    examples = [Example("", str(i), f"line {i}") for i in range(21)]
    held_out, rest = hold_out(examples, seed=3)
    assert len(held_out) == 3 and sorted(held_out + rest) == sorted(examples)
    assert (held_out, rest) == hold_out(examples, seed=3) != hold_out(examples, seed=4)
    assert held_out != examples[:3] and examples[0].where == "line 0"  # the list given stays in order
    with pytest.raises(ValueError, match="line 7 is the only example, and a tenth is held out: give more, or --val-data"):
        hold_out(examples[7:8], seed=3)


# -------------------------------------------------------------------------------------------------------------- batches


def test_source_and_target_tokenize_at_generation_as_in_training(tokenizer):
    """Whatever the source ends on and the target begins with, the prompt's ids are the row's first ids."""
    for text in ("", "The Golden", "ends in a line\n", " ", "<|endoftext|>"):
        for target in ("The", " The", "\n", ""):
            (row,) = encode(tokenizer, [Example(text, target)])
            assert row.source == source_ids(tokenizer, text)
            assert tokenizer.decode(row.source) == text + "\n" and tokenizer.decode(row.target[:-1]) == target
            assert row.target[-1] == tokenizer.eot_token not in row.source + row.target[:-1]


def test_a_batch_scores_the_target_and_its_end_and_nothing_else():
    """Position t predicts token t + 1; rows are padded on the right."""
    batch = batch_of([Row([5, 6, 7], [8, 9]), Row([4], [3])], torch.device("cpu"))
    assert {tensor.device.type for tensor in batch_of([Row([4], [3])], torch.device("meta"))} == {"meta"}
    assert batch.idx.tolist() == [[5, 6, 7, 8], [4, 0, 0, 0]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 8, 9], [3, IGNORE, IGNORE, IGNORE]]


def first(n, rows, batch_size, seed):
    return [[row.source[0] for row in batch] for batch in islice(shuffled_batches(rows, batch_size, seed), n)]


def test_each_step_has_its_rows():
    """Every row comes once, in a new order, then once more in another; the seed decides it all."""
    rows = [Row([i], [i]) for i in range(12)]
    steps = first(6, rows, 4, seed=1)
    assert [len(step) for step in steps] == [4] * 6
    seen = sum(steps, [])
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:] and seen[:12] != sorted(seen[:12])
    assert steps == first(6, rows, 4, seed=1) != first(6, rows, 4, seed=2)
    assert sorted(sum(first(5, rows[:10], 4, seed=1), [])) == sorted(2 * list(range(10)))  # what is left over is not lost
    assert [len(batch) for batch in first(2, rows, 25, seed=1)] == [25, 25]  # more than there are rows


def test_a_batch_has_rows_of_like_length():
    """The rows of ten batches, sorted by length, make ten batches in random order: a pad is a token's work for nothing."""
    rows = [Row([i] * (1 + i % 20), [i] * (1 + i // 20)) for i in range(200)]
    lengths = {i: len(row.source) + len(row.target) for i, row in enumerate(rows)}
    steps = [[lengths[i] for i in batch] for batch in first(20, rows, 10, seed=1)]
    for ten in (steps[:10], steps[10:]):
        assert sum(sorted(ten), []) == sorted(sum(ten, [])) and ten != sorted(ten)


# -------------------------------------------------------------------------------------------------------------- lengths


def test_rows_that_do_not_fit_are_counted_and_the_longest_is_named(tokenizer, tmp_path):
    """By its line in the file, whatever the shuffle did since; the last token is predicted, never read."""
    path = tmp_path / "a.jsonl"
    texts = ["a", "a" * 40, "b", "a" * 60, "c", "a" * 50, *"defghijk"]
    path.write_text("".join(f'\n{{"input": "{text}", "target": "t"}}\n' for text in texts))
    _, examples = hold_out(read_jsonl(path), seed=0)
    rows = encode(tokenizer, examples)
    lengths = [len(row.source + row.target) - 1 for row in rows]
    second, longest = sorted(lengths)[-2:]
    assert "a" * 60 in [example.input for example in examples[1:]] and len(examples) == 12
    check_lengths(examples, rows, longest, 0)
    too_long = f"1 of 12 examples are too long: the longest, {path} line 8, takes {longest} tokens"
    with pytest.raises(ValueError, match="^" + re.escape(too_long)):
        check_lengths(examples, rows, longest - 1, 0)
    with pytest.raises(ValueError, match=f"^2 of 12 .* takes {longest} .* reads {second + 1}, 2 of them virtual: "):
        check_lengths(examples, rows, second + 1, 2)
    with pytest.raises(ValueError, match="the longest, an example of the task, takes"):
        check_lengths([Example("a", "b")], [Row([1, 2], [3, 4])], 2, 0)


@pytest.mark.parametrize(
    "block_size, n_virtual, advice",
    [
        (20, 11, "shorten it or lower --n-virtual"),
        (11, 2, "shorten it or lower --n-virtual"),
        (10, 1, "shorten it or leave it out"),  # an adapter has one at least
        (9, 5, "shorten it or leave it out"),
        (9, 0, "shorten it or leave it out"),
    ],
)
def test_the_advice_helps(block_size, n_virtual, advice):
    """Lowering --n-virtual is advised where a smaller one would do, and nowhere else. The row has 10 positions."""
    examples, rows = [Example("", "", "my.jsonl line 1")], [Row([1] * 6, [2] * 5)]
    with pytest.raises(ValueError, match=f"takes 10 tokens, .* {block_size}, {n_virtual} of them virtual: {advice}$"):
        check_lengths(examples, rows, block_size, n_virtual)
