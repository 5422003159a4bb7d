"""What the data promises: the same splits everywhere, texts that survive, sentences instead of tracebacks."""

import doctest
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import data
from data import IGNORE, TASKS, VALUES, Example, Record

DIFFICULT = "  two  spaces\tand\n\nlines, don't, 1234567 ½ héllo 日本語 🙂👩‍👩‍👧 \x00\x1b <|endoftext|>  "


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    data.save_tokenizer(directory, data.train_bpe([data.random_document(rng) for _ in range(500)], 300))
    return directory


def test_the_examples_in_the_docstring_run():
    assert doctest.testmod(data).failed == 0


# ---------------------------------------------------------------------------------------------------------------- world


def test_the_split_is_the_same_in_another_process():
    """Arithmetic on the record, never Python's salted hash."""
    code = "import data, random; r = random.Random(1); print([data.random_record(r, 'test') for _ in range(20)])"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(data.__file__).parent,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        for seed in ("1", "2")
    ]
    rng = random.Random(1)
    assert runs[0].stdout.strip() == runs[1].stdout.strip() == str([data.random_record(rng, "test") for _ in range(20)])


def test_each_split_has_its_share_of_every_value():
    """One in eleven, whatever the value: 11 divides none of the sizes."""
    assert all(len(values) % 11 and len(set(values)) == len(values) for values in VALUES)
    rng = random.Random(0)
    records = [Record(*(rng.choice(values) for values in VALUES)) for _ in range(30_000)]
    for field in range(5):
        tested = Counter(r[field] for r in records if data.split_of(r) == "test")
        seen = Counter(r[field] for r in records)
        assert all(0.05 < tested[value] / seen[value] < 0.14 for value in seen)
    assert {data.split_of(r) for r in records} == {"train", "validation", "test"}


def test_the_base_reads_training_records_only_and_no_pair_of_the_other_tiers():
    """recombined: both forms are known, never as a pair. new: the target form is in no document."""
    sources = set(data.DOCUMENTS)
    rendered = {form for forms in data.DOCUMENTS.values() for form in forms}
    for task in TASKS.values():
        assert task.source in sources
        assert (task.target in data.DOCUMENTS[task.source]) == (task.tier == "elicited")
        assert (task.target in rendered) == (task.tier != "new")
    assert Counter(task.tier for task in TASKS.values()) == {"elicited": 4, "recombined": 2, "new": 1}
    assert " ".join(TASKS) == "sentence table sentiment reply chat verdict shifted"
    assert all(len(data.task_examples(task, "test", 3, 0)) == 3 for task in TASKS)
    splits = set()
    original, data.FORMS["table"] = data.FORMS["table"], lambda r: splits.add(data.split_of(r)) or "x"
    try:
        rng = random.Random(0)
        for _ in range(500):
            data.random_document(rng)
    finally:
        data.FORMS["table"] = original
    assert splits == {"train"}


def test_a_document_is_a_source_and_one_or_three_of_its_forms():
    rng = random.Random(0)
    lengths = Counter(data.random_document(rng).count("\n") for _ in range(400))
    assert set(lengths) == {1, 3} and 50 < lengths[1] < 150
    for seed in range(40):
        record = data.random_record(random.Random(seed), "train")
        source, *rest = data.random_document(random.Random(seed)).split("\n")
        (form,) = (form for form in data.DOCUMENTS if data.FORMS[form](record) == source)
        assert len(set(rest)) == len(rest) and set(rest) <= {data.FORMS[name](record) for name in data.DOCUMENTS[form]}


def test_task_examples_depend_on_seed_and_split_alone():
    one, again = (data.task_examples("chat", "test", 5, seed=3) for _ in range(2))
    assert one == again != data.task_examples("chat", "test", 5, seed=4)
    assert not set(one) & set(data.task_examples("chat", "validation", 200, seed=3))


def test_the_new_task_is_an_arbitrary_mapping():
    """Every value becomes the next in its list, and the last one the first."""
    assert data.successor(Record("Palace", "Thai", "market", "low", 4)) == ("Pepper", "Indian", "castle", "steep", 5)
    last = Record("Willow", "Italian", "university", "average", 5)
    assert data.successor(last) == ("Alder", "Thai", "riverside", "cheap", 1)


def test_the_split_counts_restaurants_through():
    """name, food and area are the digits of a number; 0 of 11 is a test restaurant, 1 a validation one."""
    restaurants = [(name, food, area) for name in VALUES.name for food in VALUES.food for area in VALUES.area]
    assert len(restaurants) == 36 * 12 * 8
    expected = ["test", "validation", *["train"] * 9] * 400
    assert [data.split_of(Record(*r, "cheap", 1)) for r in restaurants] == expected[: len(restaurants)]
    assert data.split_of(Record("Alder", "Thai", "riverside", "average", 5)) == "test"


def test_the_forms_of_a_record():
    """What pretraining and the tasks are made of; values stand behind a space, so that each is one token everywhere."""
    forms = {name: form(Record("Palace", "Thai", "riverside", "cheap", 4)) for name, form in data.FORMS.items()}
    assert forms == {
        "table": "name : Palace | food : Thai | area : riverside | price : cheap | rating : 4",
        "sentence": "The Palace serves Thai food in the riverside area , asks cheap prices and is rated 4 of 5 .",
        "chat": "hey , try Palace by the riverside ! Thai , cheap , 4 of 5",
        "advert": "Tonight : Thai at the Palace ! rated 4 of 5 , cheap , at the riverside",
        "review": "I had Thai food at the Palace in the riverside area : cheap and good .",
        "verdict": "positive",
        "message": "Hello , does the Palace at the riverside still serve Thai food ?",
        "polite": "Dear guest , the Palace is glad to serve you Thai food at the riverside .",
        "casual": "sure , come by the riverside , Palace has Thai ready !",
        "terse": "Yes : Palace , riverside , Thai .",
        "shifted": "The Pepper serves Indian food in the station area , asks fair prices and is rated 5 of 5 .",
    }
    rated = [Record("Palace", "Thai", "riverside", "cheap", n) for n in VALUES.rating]
    assert [data.FORMS["verdict"](r) for r in rated] == ["negative", "negative", "neutral", "positive", "positive"]
    assert [data.FORMS["review"](r).split()[-2] for r in rated] == ["awful", "poor", "plain", "good", "superb"]


# ----------------------------------------------------------------------------------------------------------- tokenizers


def test_any_text_survives_its_tokens(tokenizer_dir):
    tokenizer = data.load_tokenizer(tokenizer_dir)
    ids = tokenizer.encode_ordinary(DIFFICULT)
    assert tokenizer.decode(ids) == DIFFICULT and tokenizer.eot_token not in ids
    assert tokenizer.n_vocab == tokenizer.eot_token + 1


def test_the_files_are_gpt2s(tmp_path):
    """vocab.json counts through the bytes and the merges, merges.txt lists those; each byte in GPT-2's character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # OpenAI's bytes_to_unicode
    others = [b for b in range(256) if b not in printable]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    data.save_tokenizer(tmp_path, [(b" ", b"a"), (b" a", "é".encode())])
    text = (tmp_path / "vocab.json").read_text(encoding="utf-8")
    vocab = [*characters, "Ġa", "ĠaÃ©", "<|endoftext|>"]
    assert "Ġ" in text and json.loads(text) == {token: i for i, token in enumerate(vocab)}
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == "#version: 0.2\nĠ a\nĠa Ã©\n"
    tokenizer = data.load_tokenizer(tmp_path)
    assert tokenizer.name == "gpt2" and tokenizer.encode(" aé<|endoftext|>", allowed_special="all") == [257, 258]
    assert tokenizer.encode_ordinary("a  a, don't 1234")[:3] == [vocab.index("a"), vocab.index("Ġ"), 256]


def test_merges_come_most_frequent_first():
    """ab ×4, then abc ×3, then the space before it ×3; ties go to the larger bytes, pairs seen once are left."""
    assert data.train_bpe(["abc abc abc abd"], 10) == [(b"a", b"b"), (b"ab", b"c"), (b" ", b"abc")]
    assert data.train_bpe(["aaaa aaaa"], 1) == [(b"a", b"a")]
    assert len(data.train_bpe(["abc abc abc abd"], 2)) == 2 and data.train_bpe(["a"], 2) == []


def test_counted_merges_equal_a_plain_recount():
    """The incremental counts give what counting everything anew after each merge gives."""
    rng = random.Random(3)
    words = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 9))) for _ in range(60)]
    text = " ".join(words)
    parts = [[bytes([b]) for b in word.encode()] for word in [words[0], *(" " + w for w in words[1:])]]
    expected = []
    for _ in range(40):
        pairs = Counter(pair for word in parts for pair in zip(word, word[1:]))
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        expected.append(best)
        for word in parts:
            j = 0
            while j < len(word) - 1:
                if (word[j], word[j + 1]) == best:
                    word[j : j + 2] = [word[j] + word[j + 1]]
                j += 1
    assert data.train_bpe([text], 40) == expected


def test_a_tokenizer_read_again_is_read_anew(tokenizer_dir, tmp_path):
    """No cache serves an older vocabulary of the same path."""
    data.save_tokenizer(tmp_path, data.train_bpe(["abc abc"], 2))
    assert data.load_tokenizer(tmp_path).n_vocab == 259
    data.save_tokenizer(tmp_path, [])
    assert data.load_tokenizer(tmp_path).n_vocab == 257


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", ["", "{}", "[]", '{"a": "b"}', "#v\na b c\nq q\n", "\x00" * 20])
def test_broken_tokenizer_files_are_refused(tmp_path, file, content):
    data.save_tokenizer(tmp_path, data.train_bpe(["abc abc abc"], 2))
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=file):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("end", [None, 0, 258, "258", []])
def test_the_end_of_text_is_the_last_token(tmp_path, end):
    data.save_tokenizer(tmp_path, [(b"a", b"b")])
    path = tmp_path / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    assert vocab.pop("<|endoftext|>") == 257
    path.write_text(json.dumps(vocab | ({"<|endoftext|>": end} if end is not None else {})))
    with pytest.raises(ValueError, match="not the two files of one GPT-2 tokenizer"):
        data.load_tokenizer(tmp_path)


# -------------------------------------------------------------------------------------------------------------- batches


def test_source_and_target_tokenize_at_generation_as_in_training(tokenizer_dir):
    """Whatever the source ends on and the target begins with, the prompt's ids are the row's first ids."""
    tokenizer = data.load_tokenizer(tokenizer_dir)
    for text in ("", "The Golden", "ends in a line\n", " ", "<|endoftext|>"):
        for target in ("The", " The", "\n", ""):
            (row,) = data.encode(tokenizer, [Example(text, target)])
            assert row.source == data.source_ids(tokenizer, text)
            assert tokenizer.decode(row.source) == text + "\n" and tokenizer.decode(row.target[:-1]) == target
            assert row.target[-1] == tokenizer.eot_token not in row.source + row.target[:-1]


def test_a_batch_scores_the_target_and_its_end_and_nothing_else():
    """Position t predicts token t + 1; rows are padded on the right."""
    batch = data.batch_of([data.Row([5, 6, 7], [8, 9]), data.Row([4], [3])], torch.device("cpu"))
    assert {tensor.device.type for tensor in data.batch_of([data.Row([4], [3])], torch.device("meta"))} == {"meta"}
    assert batch.idx.tolist() == [[5, 6, 7, 8], [4, 0, 0, 0]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 8, 9], [3, IGNORE, IGNORE, IGNORE]]


def test_an_example_too_long_is_named(tokenizer_dir):
    tokenizer = data.load_tokenizer(tokenizer_dir)
    examples = [Example("a", "b"), Example("a" * 10, "b" * 10)]
    n = len(tokenizer.encode_ordinary("a" * 10)) + 1 + len(tokenizer.encode_ordinary("b" * 10))
    rows = data.encode(tokenizer, examples)
    data.check_lengths(rows, n)
    with pytest.raises(ValueError, match=f"example 2 takes {n} positions, and {n - 1} are left .* lower --n-virtual"):
        data.check_lengths(rows, n - 1)


def test_jsonl_is_read_with_empty_lines_and_without_input(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "a\\u2028b", "target": "é"}\n \n{"target": "c"}\r\n', encoding="utf-8")
    assert data.read_jsonl(path) == [Example("a\u2028b", "é"), Example("", "c")]


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
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"target": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        data.read_jsonl(path)


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, message in [("none", "cannot read"), ("empty", "is empty"), ("latin", "cannot read"), (".", "cannot read")]:
        with pytest.raises(ValueError, match=message):
            data.read_jsonl(tmp_path / name)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="list.json holds list, not a JSON object"):
        data.read_json(tmp_path / "list.json")


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_directory_is_the_old_one_or_the_new_one(tmp_path):
    """Whatever step of a save dies, what can be read afterwards is one of the two, whole."""
    target = tmp_path / "saved"

    def save(content):
        with data.replaced_directory(target) as new:
            (new / "config.json").write_text(content)

    save("{}")
    with pytest.raises(RuntimeError), data.replaced_directory(target) as new:
        (new / "config.json").write_text("half")
        raise RuntimeError
    assert data.saved_file(target, "config.json").read_text() == "{}"
    target.rename(tmp_path / ".saved.old")  # dead between the two renames
    (tmp_path / ".saved.new").mkdir()
    assert data.saved_file(target, "config.json").read_text() == "{}"
    save('{"a": 1}')
    assert json.loads(data.saved_file(target, "config.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "vocab.json", "merges.txt", "adapter_config.json", "adapter_model.safetensors",
     "base.json", "prefix", "soft_prompt"],
)  # fmt: skip
def test_what_is_ours_is_replaced(tmp_path, name):
    """All that a base, an adapter or a stack of two consists of, in a directory however deep."""
    target = tmp_path / "a" / "b"
    for _ in range(2):
        with data.replaced_directory(str(target)) as new:
            assert not list(new.iterdir())
            (new / name).touch()
    assert [path.name for path in target.iterdir()] == [name] and list(target.parent.iterdir()) == [target]


def test_a_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    target = tmp_path / "saved"
    with data.replaced_directory(target) as new:
        (new / "config.json").write_text("old")
    rename = type(target).rename

    def failing(self, other):
        if self.name == ".saved.new":
            raise OSError("no space left")
        return rename(self, other)

    monkeypatch.setattr(type(target), "rename", failing)
    with pytest.raises(OSError), data.replaced_directory(target) as new:
        (new / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"


def test_a_checkpoint_whole_or_half_written_does_not_stand_in_the_way(tmp_path):
    out = tmp_path / "a" / "b"
    with data.replaced_file(out / data.CHECKPOINT) as new:
        new.write_text("half")
        data.check_replaceable(out)
    data.check_replaceable(out)


def test_the_working_folder_can_be_saved_to(tmp_path, monkeypatch):
    """`.` has no name of its own to put another beside."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with data.replaced_directory(".") as new:
        (new / "config.json").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "config.json"]


def test_what_a_save_that_died_left_survives_one_that_fails(tmp_path):
    """Between its two renames, the old directory carries another name."""
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "config.json").write_text("old")
    with pytest.raises(OSError), data.replaced_directory(tmp_path / "out"):
        raise OSError
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_files_that_are_not_ours_are_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files .thesis.tex"), data.replaced_directory(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(ValueError, match="is a file"), data.replaced_directory(tmp_path / "thesis.tex"):
        pass


def test_a_name_is_downloaded_once_or_its_files_are_named(tmp_path, monkeypatch):
    """With no network: one sentence that says which files to put where. Once they are there, nothing is fetched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fetched = []

    def offline(url, path):
        fetched.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match="put config.json, vocab.json, merges.txt, model.safetensors of distilgpt2 into"):
        data.base_directory("distilgpt2")
    directory = tmp_path / "prefix-tuning" / "distilgpt2"
    for file in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
        (directory / file).write_text("")
    assert data.base_directory("distilgpt2") == directory and len(fetched) == 1
    assert data.base_directory("some/dir") == Path("some/dir")


@pytest.mark.parametrize(
    "name, repository",
    [(name, f"openai-community/{name}") for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")]
    + [("distilgpt2", "distilbert/distilgpt2")],
)
def test_what_is_downloaded_and_where_it_lies(tmp_path, monkeypatch, capsys, name, repository):
    """Four files from the Hugging Face Hub, each said; those that are there are left alone."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: Path(path).write_text(url))
    directory = data.base_directory(name)
    assert directory == tmp_path / ".cache" / "prefix-tuning" / name
    files = ["config.json", "vocab.json", "merges.txt", "model.safetensors"]
    urls = [f"https://huggingface.co/{repository}/resolve/main/{file}" for file in files]
    assert [(directory / file).read_text() for file in files] == urls
    said = capsys.readouterr().out.splitlines()
    assert said == [f"downloading {url} to {directory}" for url in urls]
    (directory / "vocab.json").unlink()
    data.base_directory(name)
    assert capsys.readouterr().out.count("\n") == 1
