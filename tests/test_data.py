"""What the data promises: texts survive, only targets are scored, mistakes get a sentence."""

import doctest
import gzip
import json
import os
import random
import re
import threading
from collections import Counter
from itertools import islice

import pytest
import torch

import data
from command.examples import check_lengths, hold_out, read_jsonl
from data import IGNORE, Example, Row, batch_of, encode, shuffled_batches, source_ids
from small_base.pretrain import train_bpe
from small_base.world import random_document
from storage.tokenizers import Encoding, build_tokenizer, ranks_of


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    texts = ["\n".join(random_document(rng)) for _ in range(500)]
    return build_tokenizer(ranks_of(train_bpe(texts, 300)))


def test_the_examples_in_the_docstring_run():
    assert doctest.testmod(data).failed == 0


# -------------------------------------------------------------------------------------------- JSONL


def test_jsonl_is_read_with_empty_lines_and_without_input(tmp_path):
    """Each example knows its file and its line."""
    path = tmp_path / "a.jsonl"
    lines = '{"input": "a\\u2028b", "target": "é"}\n \n{"target": "c"}\r\n'
    path.write_text(lines, encoding="utf-8")
    first, second = read_jsonl(path)
    assert first == Example("a\u2028b", "é", f"{path} line 1")
    assert second == Example("", "c", f"{path} line 3")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    """Windows' editors write one."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"input": "é", "target": "\ufeffb"}\r\n{"target": "c"}'.encode())
    assert [example[:2] for example in read_jsonl(path)] == [("é", "\ufeffb"), ("", "c")]


USER = {"role": "user", "content": "say"}
ANSWER = {"role": "assistant", "content": "the cat"}
SYSTEM = {"role": "system", "content": "short"}


@pytest.mark.parametrize(
    "row, source, target",
    [
        ({"input": "say", "target": "the cat"}, "say", "the cat"),
        ({"prompt": "say", "completion": "the cat"}, "say", "the cat"),
        ({"instruction": "say", "input": "Meadow", "output": "the cat"}, "say\nMeadow", "the cat"),
        ({"output": "the cat", "input": "Meadow", "instruction": "say"}, "say\nMeadow", "the cat"),
        ({"instruction": "say", "input": "", "output": "the cat"}, "say", "the cat"),
        ({"instruction": "say", "output": "the cat"}, "say", "the cat"),
        ({"instruction": "say", "input": None, "output": "the cat"}, "say", "the cat"),
        ({"messages": [USER, ANSWER]}, "say", "the cat"),
        ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER], "the cat"),
        ({"messages": [USER, ANSWER, USER, ANSWER | {"content": "b"}]}, [USER, ANSWER, USER], "b"),
        ({"messages": [ANSWER]}, "", "the cat"),
        ({"messages": [SYSTEM, ANSWER]}, [SYSTEM], "the cat"),
        ({"messages": [USER | {"name": "Ann"}, ANSWER]}, "say", "the cat"),
    ],
)
def test_a_line_is_read_in_the_format_it_has(tmp_path, row, source, target):
    """Inputs, prompts, instructions and conversations; one file may mix them."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"input": "a", "target": "b"}) + "\n" + json.dumps(row) + "\n")
    expected = [Example("a", "b", f"{path} line 1"), Example(source, target, f"{path} line 2")]
    assert read_jsonl(path) == expected


def test_columns_that_are_not_used_are_said_once(tmp_path, capsys):
    """A column `id` is no fault. `say` gets one line a file, without control characters."""
    path, said = tmp_path / "a.jsonl", []
    row = {"input": "a", "target": "b"}
    path.write_text("".join(json.dumps(row | {"id": i, "\x1b": None}) + "\n" for i in range(3)))
    assert [example[:2] for example in read_jsonl(path, say=said.append)] == [("a", "b")] * 3
    assert said == [f"{path}: columns that are not used: '\\x1b', 'id'"]
    read_jsonl(path)
    assert capsys.readouterr().out == said[0] + "\n"
    path.write_text("".join(json.dumps(row | {"x" * 100 + str(i): i}) + "\n" for i in range(1000)))
    read_jsonl(path, say=said.append)
    assert len(said[1]) < 400
    path.write_text(json.dumps(row))
    read_jsonl(path, say=said.append)
    assert len(said) == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"target": "a"', "is not JSON .*: correct it"),
        ("[" * 100_000, "is not JSON"),
        ('{"target": "\\ud800"}', "is not JSON .*surrogate"),
        (json.dumps({"messages": [USER | {"content": "\ud800"}, ANSWER]}), ".*surrogate"),
        ("[1]", r"""needs "input" and "target", or "messages" that end with .* text: \[1\]"""),
        ('{"input": "a"}', """needs "input" and "target", or "messages" that .*: {'input': 'a'}"""),
        ('{"target": 3}', "needs .* 3}"),
        ('{"target": "a", "input": null}', "needs .* None}"),
        ('{"prompt": "a", "target": "b"}', "needs .*'prompt'"),
        ('{"target": "b", "Input": "c"}', "needs .*'Input'"),
        ('{"completion": "b", "id": 1}', "needs .input"),
        ('{"output": "b", "id": 1}', "needs .input"),
        ('{"instruction": 1, "output": "b"}', "needs .input"),
        ('{"instruction": "a", "input": 5, "output": "b"}', "needs .input"),
        ('{"messages": "a"}', "needs .input"),
        ('{"messages": ["a", "b"]}', "needs .input"),
        ('{"messages": null}', "needs .input"),
        (json.dumps({"messages": ["say", ANSWER]}), "needs .input"),
        (json.dumps({"messages": [{"role": "user"}, ANSWER]}), "needs .input"),
        (json.dumps({"messages": [USER | {"content": ["say"]}, ANSWER]}), "needs .input"),
        (json.dumps({"messages": [USER | {"role": 1}, ANSWER]}), "needs .input"),
        (json.dumps({"messages": [USER, ANSWER | {"content": None}]}), "needs .input"),
        (json.dumps({"messages": [USER, ANSWER, USER]}), "needs .input"),  # nobody answers the last
        ('{"messages": []}', "needs .input"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    """By its number, with what is wrong: an input of another name would be trained on as empty."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"target": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"^{path} line 2 {message}"):
        read_jsonl(path)


ROWS = [{"input": 'é, "a"', "target": "b"}, {"input": "c", "target": "d"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'input,target\r\n"é, ""a""",b\r\nc,d\r\n'
SEMICOLONS = 'input;target\r\n"é, ""a""";b\r\nc;d\r\n'  # as Excel writes in many countries


@pytest.mark.parametrize(
    "content, kind",
    [
        (json.dumps(ROWS).encode(), "a JSON array"),
        (b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2).encode(), "a JSON array"),
        (CSV.encode(), "CSV"),
        (CSV.encode("utf-8-sig"), "CSV"),
        (SEMICOLONS.encode("utf-8-sig"), "CSV"),
        (SEMICOLONS.replace(";", "\t").encode(), "CSV"),
        (gzip.compress(LINES.encode(), mtime=0), "gzip"),
    ],
)
def test_another_kind_of_file_gets_python_that_converts_it(tmp_path, monkeypatch, content, kind):
    """Run as it stands, the line writes a file that is read here."""
    path = tmp_path / "it's mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} looks like {kind}. Convert it: ") as refusal:
        read_jsonl(path)
    assert "UTF-8" not in str(refusal.value)
    monkeypatch.chdir(tmp_path)
    exec(str(refusal.value).split("Convert it: ")[1])
    pairs = [tuple(row.values()) for row in ROWS]
    assert [example[:2] for example in read_jsonl("new.jsonl")] == pairs
    with pytest.raises(FileExistsError):  # and it replaces nothing
        exec(str(refusal.value).split("Convert it: ")[1])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PAR1\x15\x04\x15\x10", "looks like Parquet. Convert it: import pyarrow.parquet"),
        (b"PK\x03\x04\x14\x00", "looks like binary data or UTF-16: unpack it"),
        (b"\x28\xb5\x2f\xfd\x04,", "looks like binary data or UTF-16: unpack it"),
        (b"\x00" * 10**7, "looks like binary data or UTF-16: unpack it"),
        (LINES.encode("utf-16"), "looks like binary data or UTF-16: unpack it"),
        ('{"target": "é"}'.encode("latin-1"), "line 1 is not JSON .*: save the file as UTF-8$"),
        (b'{"target": "a"}\n\n{"target": "\xff"}', "line 3 is .*: save the file as UTF-8$"),
        (b'{"target": "a"}\n{"target": \n', r"line 2 is not JSON .*: correct it$"),
    ],
)
def test_utf_8_is_advised_where_the_encoding_is_the_cause(tmp_path, content, message):
    """A binary file is none, however it is saved."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_jsonl(path)
    assert len(str(refusal.value)) < 500
    assert "UTF-8" not in str(refusal.value) or "UTF" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_read_once(tmp_path):
    """`--data <(head …)` is one: what is looked at first is not lost."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    lines = b'{"target": "a"}\n{"target": "b"}\n'
    threading.Thread(target=path.write_bytes, args=[lines], daemon=True).start()
    assert [example.target for example in read_jsonl(path)] == ["a", "b"]


def test_missing_and_empty_files_are_refused(tmp_path):
    """A directory is none either."""
    (tmp_path / "empty").write_text(" \n")
    for name, message in [("none", "cannot read"), ("empty", "is empty"), (".", "cannot read")]:
        with pytest.raises(ValueError, match=message):
            read_jsonl(tmp_path / name)


def test_a_tenth_is_held_out():
    """Rounded up, at random by the seed, and no example is lost or in both parts."""
    examples = [Example(f"q {i}", str(i), f"line {i}") for i in range(21)]
    held_out, rest = hold_out(examples, seed=3)
    assert len(held_out) == 3 and sorted(held_out + rest) == sorted(examples)
    assert (held_out, rest) == hold_out(examples, seed=3) != hold_out(examples, seed=4)
    assert held_out != examples[:3] and examples[0].where == "line 0"  # the list is as it was


TALKS = [[SYSTEM, USER | {"content": str(i)}] for i in range(12)]


@pytest.mark.parametrize("inputs", [[f"q {i}" for i in range(12)], TALKS], ids=["texts", "talks"])
def test_equal_inputs_stay_on_one_side(inputs):
    """Of 12 inputs with 20 answers each, two are held out with all their answers."""
    examples = [Example(source, f"{i}") for i in range(20) for source in inputs]
    for seed in range(5):
        parts = hold_out(examples, seed)
        counts = [Counter(json.dumps(example.input) for example in part) for part in parts]
        assert [len(part) for part in counts] == [2, 10] and not counts[0].keys() & counts[1].keys()
        assert {*counts[0].values(), *counts[1].values()} == {20}


def test_one_input_is_split_by_its_targets():
    """Texts without an input have none but these. What is there once cannot be split."""
    examples = [Example("", f"text {i % 20}", f"line {i}") for i in range(40)]
    held_out, rest = hold_out(examples, seed=3)
    assert len(held_out) == 4 and not {e.target for e in held_out} & {e.target for e in rest}
    with pytest.raises(ValueError, match="^line 0 is the only example: give others, or --val-data"):
        hold_out([examples[0], examples[20]], seed=3)


# ------------------------------------------------------------------------------------------ batches


def test_source_and_target_tokenize_at_generation_as_in_training(tokenizer):
    """Whatever the source ends on, the prompt's ids are the row's first ids."""
    for text in ("", "The Golden", "ends in a line\n", " ", "<|endoftext|>"):
        for target in ("The", " The", "\n", "", "a<|endoftext|>b"):
            (row,) = encode(tokenizer, [Example(text, target)])
            assert row.source == source_ids(tokenizer, text)
            assert tokenizer.decode(row.source) == text + "\n"
            assert tokenizer.decode(row.target[:-1]) == target
            assert row.target[-1] == tokenizer.eot_token


@pytest.fixture(scope="module")
def chat_tokenizer():
    """Bytes and five added tokens, among them the end of text."""
    names = ["<|endoftext|>", "<think>", "</think>", "<|im_start|>", "<|im_end|>"]
    special = {name: 256 + i for i, name in enumerate(names)}
    return Encoding({bytes([b]): b for b in range(256)}, special, end=256)


def test_added_tokens_in_a_text_become_their_ids(chat_tokenizer):
    """In inputs and in targets, as transformers does."""
    example = Example("<|im_start|>0", "<think>yes</think> no<|endoftext|>")
    (row,) = encode(chat_tokenizer, [example])
    assert row.source == [259, *b"0\n"] == source_ids(chat_tokenizer, "<|im_start|>0")
    assert row.target == [257, *b"yes", 258, *b" no", 256, 256]


def chat(messages: list[dict[str, str]]) -> str:
    turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def test_a_template_writes_the_source(chat_tokenizer):
    """Its markers become special tokens, and no line break follows. A text is a user's."""
    text, talk = Example("say", "ok"), Example([SYSTEM, USER], "ok")
    start, end = [259], [260, *b"\n"]
    user, answer = [*start, *b"user\nsay", *end], [*start, *b"assistant\n"]
    rows = encode(chat_tokenizer, [text, talk], chat)
    assert rows[0] == Row(user + answer, [*b"ok", 256])
    assert rows[1] == Row([*start, *b"system\nshort", *end, *user, *answer], [*b"ok", 256])
    for row, example in zip(rows, (text, talk)):
        assert row.source == source_ids(chat_tokenizer, example.input, chat)


def test_a_conversation_needs_a_template(tokenizer):
    """Without one nobody knows how its turns are written."""
    examples = [Example("say", "ok"), Example([SYSTEM, USER], "ok", "my.jsonl line 2")]
    sentence = "^my.jsonl line 2 has 2 messages before its answer: give --chat$"
    with pytest.raises(ValueError, match=sentence):
        encode(tokenizer, examples)


def test_a_batch_scores_the_target_and_its_end_and_nothing_else():
    """Position t predicts token t + 1; rows are padded on the right."""
    batch = batch_of([Row([5, 6, 7], [8, 9]), Row([4], [3])], torch.device("cpu"))
    elsewhere = batch_of([Row([4], [3])], torch.device("meta"))
    assert {tensor.device.type for tensor in elsewhere} == {"meta"}
    assert batch.idx.tolist() == [[5, 6, 7, 8], [4, 0, 0, 0]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 8, 9], [3, IGNORE, IGNORE, IGNORE]]


def first(n, rows, batch_size, seed):
    batches = islice(shuffled_batches(rows, batch_size, seed), n)
    return [[row.source[0] for row in batch] for batch in batches]


def test_each_step_has_its_rows():
    """Every row comes once, in a new order, then once more in another; the seed decides it all."""
    rows = [Row([i], [i]) for i in range(12)]
    steps = first(6, rows, 4, seed=1)
    assert [len(step) for step in steps] == [4] * 6
    seen = sum(steps, [])
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:] and seen[:12] != sorted(seen[:12])
    assert steps == first(6, rows, 4, seed=1) != first(6, rows, 4, seed=2)
    assert steps[:2] == [[2, 9, 1, 4], [10, 3, 6, 5]]  # as ever: old runs can be repeated
    twice = sum(first(5, rows[:10], 4, seed=1), [])
    assert sorted(twice) == sorted(2 * list(range(10)))  # what is left over is not lost
    assert [len(batch) for batch in first(2, rows, 25, seed=1)] == [25, 25]  # more than the rows


def test_a_batch_has_rows_of_like_length():
    """The rows of ten batches, sorted by length, make ten batches in random order: less padding."""
    rows = [Row([i] * (1 + i % 20), [i] * (1 + i // 20)) for i in range(200)]
    lengths = {i: row.n_read for i, row in enumerate(rows)}
    steps = [[lengths[i] for i in batch] for batch in first(20, rows, 10, seed=1)]
    for ten in (steps[:10], steps[10:]):
        assert sum(sorted(ten), []) == sorted(sum(ten, [])) and ten != sorted(ten)


# ------------------------------------------------------------------------------------------ lengths


def test_rows_that_do_not_fit_are_counted_and_the_longest_is_named(tokenizer, tmp_path):
    """By its line in the file; the last token is predicted, never read."""
    path = tmp_path / "a.jsonl"
    texts = ["a", "a" * 40, "b", "a" * 60, "c", "a" * 50, *"defghijk"]
    path.write_text("".join(f'\n{{"input": "{text}", "target": "t"}}\n' for text in texts))
    _, examples = hold_out(read_jsonl(path), seed=0)
    rows = encode(tokenizer, examples)
    lengths = [row.n_read for row in rows]
    second, longest = sorted(lengths)[-2:]
    assert "a" * 60 in [example.input for example in examples[1:]] and len(examples) == 12
    check_lengths(examples, rows, longest, 0)
    too_long = f"1 of 12 examples are too long: the longest, {path} line 8, takes {longest} tokens"
    with pytest.raises(ValueError, match="^" + re.escape(too_long)):
        check_lengths(examples, rows, longest - 1, 0)
    two = f"^2 of 12 .* takes {longest} .* reads {second + 1}, 2 of them virtual: "
    with pytest.raises(ValueError, match=two):
        check_lengths(examples, rows, second + 1, 2)
    with pytest.raises(ValueError, match="the longest, an example of the task, takes"):
        check_lengths([Example("a", "b")], [Row([1, 2], [3, 4])], 2, 0)


@pytest.mark.parametrize(
    "block_size, n_virtual, advice",
    [
        (20, 11, "shorten it or train with a lower --n-virtual"),
        (11, 2, "shorten it or train with a lower --n-virtual"),
        (10, 1, "shorten it or leave it out"),  # an adapter has one at least
        (9, 5, "shorten it or leave it out"),
        (9, 0, "shorten it or leave it out"),
    ],
)
def test_the_advice_helps(block_size, n_virtual, advice):
    """To lower --n-virtual is advised where it would do. The row has 10 positions."""
    examples, rows = [Example("", "", "my.jsonl line 1")], [Row([1] * 6, [2] * 5)]
    sentence = f"takes 10 tokens, .* {block_size}, {n_virtual} of them virtual: {advice}$"
    with pytest.raises(ValueError, match=sentence):
        check_lengths(examples, rows, block_size, n_virtual)
