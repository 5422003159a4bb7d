"""What the small base promises: a world whose splits are the same everywhere, and a pretraining that overwrites nothing."""

import doctest
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from small_base import pretrain as pretraining
from small_base import world
from small_base.pretrain import initialise, pretrain, read_text, train_bpe, windows_anywhere
from small_base.world import TASKS, VALUES, Record
from storage.base import load_base
from storage.files import OURS

ROOT = Path(__file__).parent.parent


def test_the_examples_in_the_docstring_run():
    assert doctest.testmod(world).failed == 0


# ---------------------------------------------------------------------------------------------------------------- world


def test_the_split_is_the_same_in_another_process():
    """Arithmetic on the record, never Python's salted hash."""
    code = "import random, small_base.world as world; r = random.Random(1); "
    code += "print([world.random_record(r, 'test') for _ in range(20)])"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        for seed in ("1", "2")
    ]
    rng = random.Random(1)
    assert runs[0].stdout.strip() == runs[1].stdout.strip() == str([world.random_record(rng, "test") for _ in range(20)])


def test_each_split_has_its_share_of_every_value():
    """One in eleven, whatever the value: 11 divides none of the sizes."""
    assert all(len(values) % 11 and len(set(values)) == len(values) for values in VALUES)
    rng = random.Random(0)
    records = [Record(*(rng.choice(values) for values in VALUES)) for _ in range(30_000)]
    for field in range(5):
        tested = Counter(r[field] for r in records if world.split_of(r) == "test")
        seen = Counter(r[field] for r in records)
        assert all(0.05 < tested[value] / seen[value] < 0.14 for value in seen)
    assert {world.split_of(r) for r in records} == {"train", "validation", "test"}


def test_the_base_reads_training_records_only_and_no_pair_of_the_other_tiers():
    """recombined: both forms are known, never as a pair. new: the target form is in no document."""
    sources = set(world.DOCUMENTS)
    rendered = {form for forms in world.DOCUMENTS.values() for form in forms}
    for task in TASKS.values():
        assert task.source in sources
        assert (task.target in world.DOCUMENTS[task.source]) == (task.tier == "elicited")
        assert (task.target in rendered) == (task.tier != "new")
    assert Counter(task.tier for task in TASKS.values()) == {"elicited": 4, "recombined": 2, "new": 1}
    assert " ".join(TASKS) == "sentence table sentiment reply chat verdict shifted"
    assert all(len(world.task_examples(task, "test", 3, 0)) == 3 for task in TASKS)
    splits = set()
    original, world.FORMS["table"] = world.FORMS["table"], lambda r: splits.add(world.split_of(r)) or "x"
    try:
        rng = random.Random(0)
        for _ in range(500):
            world.random_document(rng)
    finally:
        world.FORMS["table"] = original
    assert splits == {"train"}


def test_a_document_is_a_source_and_one_or_three_of_its_forms():
    rng = random.Random(0)
    lengths = Counter(world.random_document(rng).count("\n") for _ in range(400))
    assert set(lengths) == {1, 3} and 50 < lengths[1] < 150
    for seed in range(40):
        record = world.random_record(random.Random(seed), "train")
        source, *rest = world.random_document(random.Random(seed)).split("\n")
        (form,) = (form for form in world.DOCUMENTS if world.FORMS[form](record) == source)
        assert len(set(rest)) == len(rest) and set(rest) <= {world.FORMS[name](record) for name in world.DOCUMENTS[form]}


def test_task_examples_depend_on_seed_and_split_alone():
    one, again = (world.task_examples("chat", "test", 5, seed=3) for _ in range(2))
    assert one == again != world.task_examples("chat", "test", 5, seed=4)
    assert not set(one) & set(world.task_examples("chat", "validation", 200, seed=3))


def test_the_new_task_is_an_arbitrary_mapping():
    """Every value becomes the next in its list, and the last one the first."""
    assert world.successor(Record("Palace", "Thai", "market", "low", 4)) == ("Pepper", "Indian", "castle", "steep", 5)
    last = Record("Willow", "Italian", "university", "average", 5)
    assert world.successor(last) == ("Alder", "Thai", "riverside", "cheap", 1)


def test_the_split_counts_restaurants_through():
    """name, food and area are the digits of a number; 0 of 11 is a test restaurant, 1 a validation one."""
    restaurants = [(name, food, area) for name in VALUES.name for food in VALUES.food for area in VALUES.area]
    assert len(restaurants) == 36 * 12 * 8
    expected = ["test", "validation", *["train"] * 9] * 400
    assert [world.split_of(Record(*r, "cheap", 1)) for r in restaurants] == expected[: len(restaurants)]
    assert world.split_of(Record("Alder", "Thai", "riverside", "average", 5)) == "test"


def test_the_forms_of_a_record():
    """What pretraining and the tasks are made of; values stand behind a space, so that each is one token everywhere."""
    forms = {name: form(Record("Palace", "Thai", "riverside", "cheap", 4)) for name, form in world.FORMS.items()}
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
    assert [world.FORMS["verdict"](r) for r in rated] == ["negative", "negative", "neutral", "positive", "positive"]
    assert [world.FORMS["review"](r).split()[-2] for r in rated] == ["awful", "poor", "plain", "good", "superb"]


# ------------------------------------------------------------------------------------------------------------------ BPE


def test_merges_come_most_frequent_first():
    """ab ×4, then abc ×3, then the space before it ×3; ties go to the larger bytes, pairs seen once are left."""
    assert train_bpe(["abc abc abc abd"], 10) == [(b"a", b"b"), (b"ab", b"c"), (b" ", b"abc")]
    assert train_bpe(["aaaa aaaa"], 1) == [(b"a", b"a")]
    assert len(train_bpe(["abc abc abc abd"], 2)) == 2 and train_bpe(["a"], 2) == []


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
    assert train_bpe([text], 40) == expected


def test_a_run_without_a_break_makes_no_token():
    """Fifty characters may be a word. A longer one, such as a page without spaces, would be revisited by nearly every merge."""
    assert train_bpe(["ab" * 25, "-", "ab" * 25], 1) == [(b"a", b"b")]
    assert train_bpe(["ab" * 25 + "a", "-", "ab" * 25 + "a"], 1) == []


# ---------------------------------------------------------------------------------------------------------- pretraining


def small(out, steps=1, **others):
    """The smallest pretraining there is, on a text of one's own."""
    pretrain(out, ["the cat sat on the mat. " * 400], steps, 0.02, 2, 0, torch.device("cpu"), **others)


def test_windows_start_anywhere():
    """From the first token to the last start that leaves room; each is a piece of the stream, and the generator decides."""
    stream = torch.arange(100, 112)
    found = windows_anywhere(stream, 200, 10, torch.Generator().manual_seed(0))
    assert found.shape == (200, 10) and (found == found[:, :1] + torch.arange(10)).all()
    assert set(found[:, 0].tolist()) == {100, 101, 102}
    assert torch.equal(found, windows_anywhere(stream, 200, 10, torch.Generator().manual_seed(0)))


def test_a_pretraining_that_died_while_saving_is_repeated(tmp_path, monkeypatch):
    """What it left has no config.json, and says whose it is: no model is lost, and the next run is not in its way."""
    documents, recipe = ["the cat sat on the mat"] * 400, (2, 0.01, 2, 0, torch.device("cpu"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining, "save_base", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        pretraining.pretrain(tmp_path / "base", documents, *recipe)
    assert (tmp_path / "base" / "vocab.json").exists() and not (tmp_path / "base" / "config.json").exists()
    pretraining.pretrain(tmp_path / "base", documents, *recipe)
    assert load_base(tmp_path / "base").config.block_size == 128


@pytest.mark.parametrize("name", OURS)
def test_a_base_is_never_overwritten(tmp_path, monkeypatch, name):
    """Nor anything else of ours: a base, an adapter, or a part of one is refused before training."""
    (tmp_path / name).write_text("trained for hours")
    monkeypatch.setattr(pretraining, "train_bpe", None)  # whatever starts, fails
    said = {"config.json": "holds a model already, and a base is not overwritten", "training.json": "is not JSON"}
    with pytest.raises(ValueError, match=said.get(name, f"holds {name} of unknown training, which is not overwritten: name another")):
        small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "trained for hours"


def test_a_place_that_cannot_be_written_to_is_refused_before_pretraining(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a user's")
    monkeypatch.setattr(pretraining, "train_bpe", None)
    with pytest.raises(ValueError, match="file cannot be written to .*: name another place"):
        small(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "a user's"


def test_the_first_of_two_processes_to_finish_wins(tmp_path, capsys, monkeypatch):
    """A base that appears during pretraining stays byte for byte: adapters may have been trained on it already."""
    out = tmp_path / "base"
    names = ("config.json", "model.safetensors", "vocab.json", "merges.txt")

    def another_finishes(*given):
        for name in names:
            (out / name).write_text(f"the {name} of another")
        return windows_anywhere(*given)

    monkeypatch.setattr(pretraining, "windows_anywhere", another_finishes)
    small(out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: f"the {name} of another" for name in names}
    assert capsys.readouterr().out.endswith(f"{out} was made by another process meanwhile, and stays\n")


def test_a_loss_that_is_no_number_saves_nothing(tmp_path):
    with pytest.raises(ValueError, match="the loss became nan with --lr 1e\\+38: lower it. Nothing was saved"):
        pretrain(tmp_path / "base", ["the cat sat on the mat. " * 400], 40, 1e38, 2, 0, torch.device("cpu"))
    assert not list((tmp_path / "base").iterdir())


def test_a_corpus_is_read_as_text(tmp_path):
    """UTF-8, its byte-order mark left out; missing, empty and foreign files get a sentence."""
    (tmp_path / "a").write_bytes("\ufeffnaïve\r\ncafé".encode())
    assert read_text(tmp_path / "a") == "naïve\ncafé"
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, message in [("none", "cannot read"), ("empty", "is empty"), ("latin", "cannot read"), (".", "cannot read")]:
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / name)


# -------------------------------------------------------------------------------------------------------------- imports

WATCHED = """
import os, sys, torch
before, state, opened = dict(os.environ), torch.get_rng_state(), []
sys.path.insert(0, sys.argv[1])
write = os.O_WRONLY | os.O_RDWR | os.O_CREAT
sys.addaudithook(lambda event, given: event == "open" and given[2] & write and opened.append(given[0]))
from torch.utils._python_dispatch import TorchDispatchMode

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called")

torch.set_num_threads(3)
with Watch():
    import train
assert dict(os.environ) == before, dict(os.environ).items() ^ before.items()
assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == 3
assert not opened, opened
assert not torch.distributed.is_initialized()
"""


def test_nothing_happens_on_import(tmp_path):
    """train.py, and with it all of the project, sets no variable, calls no function of torch and makes no file."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MKL_CBWR", "TIKTOKEN_CACHE_DIR")}
    command = [sys.executable, "-B", "-c", WATCHED, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_a_model_starts_as_gpt2_starts_but_for_its_tokens():
    """N(0, 0.02²), what is added to the residual stream 1/√(2L) of it, tokens 0.4; biases zero, gains one."""
    torch.manual_seed(0)
    initialise(model := GPT(GPTConfig(61, 32, n_layer=8, n_head=2, n_embd=64)))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.4 if "wte" in name else 0.005 if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.1), name
        else:
            assert (p == float(name.endswith("weight"))).all(), name
