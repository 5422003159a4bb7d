"""The small base: a world with the same splits everywhere, and a pretraining that takes care."""

import doctest
import itertools
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from data import IGNORE
from model import GPT, GPTConfig
from small_base import pretrain as pretraining
from small_base import world
from small_base.pretrain import (
    Muon,
    initialise,
    orthogonal,
    packed,
    pretrain,
    read_text,
    train_bpe,
    windows_anywhere,
)
from small_base.world import TASKS, VALUES, Record
from storage.base import load_base
from storage.files import OURS, TRAINING, read_json, write_json
from storage.tokenizers import build_tokenizer, load_tokenizer, ranks_of

ROOT = Path(__file__).parent.parent


def test_the_examples_in_the_docstring_run():
    """What world.py shows is what it does."""
    assert doctest.testmod(world).failed == 0


# -------------------------------------------------------------------------------------------- world


def test_the_split_is_the_same_in_another_process():
    """Arithmetic on the record, never Python's salted hash."""
    code = "import random, small_base.world as world; r = random.Random(1); "
    code += "print([world.random_record(r, 'test') for _ in range(20)])"
    rng = random.Random(1)
    expected = str([world.random_record(rng, "test") for _ in range(20)])
    env = os.environ | {"PYTHONHASHSEED": "1"}  # this process has drawn another
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert other.stdout.strip() == expected


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


def test_the_base_reads_training_records_only_and_no_pair_of_the_other_tiers(monkeypatch):
    """recombined: both forms are known, never as a pair. new: the target form is in no document."""
    sources = set(world.DOCUMENTS)
    rendered = {form for forms in world.DOCUMENTS.values() for form in forms}
    for task in TASKS.values():
        assert task.source in sources
        assert (task.target in world.DOCUMENTS[task.source]) == (task.tier == "elicited")
        assert (task.target in rendered) == (task.tier != "new")
    tiers = Counter(task.tier for task in TASKS.values())
    assert tiers == {"elicited": 4, "recombined": 2, "new": 1}
    assert " ".join(TASKS) == "sentence table sentiment reply chat verdict shifted"
    assert all(len(world.task_examples(task, "test", 3, 0)) == 3 for task in TASKS)
    splits = set()
    monkeypatch.setitem(world.FORMS, "table", lambda r: splits.add(world.split_of(r)) or "x")
    rng = random.Random(0)
    for _ in range(500):
        world.random_document(rng)
    assert splits == {"train"}


def test_a_document_is_a_source_and_one_or_three_of_its_forms():
    """Its first line is the source. Three forms are three times as frequent as one."""
    rng = random.Random(0)
    lengths = Counter(len(world.random_document(rng)) for _ in range(400))
    assert set(lengths) == {2, 4} and 50 < lengths[2] < 150
    for seed in range(40):
        record = world.random_record(random.Random(seed), "train")
        source, *rest = world.random_document(random.Random(seed))
        (form,) = (form for form in world.DOCUMENTS if world.FORMS[form](record) == source)
        forms = {world.FORMS[name](record) for name in world.DOCUMENTS[form]}
        assert len(set(rest)) == len(rest) and set(rest) <= forms


def test_task_examples_depend_on_seed_and_split_alone():
    """Asked for again, they are the same. No other split has them."""
    one, again = (world.task_examples("chat", "test", 5, seed=3) for _ in range(2))
    assert one == again != world.task_examples("chat", "test", 5, seed=4)
    assert not set(one) & set(world.task_examples("chat", "validation", 200, seed=3))


def test_the_new_task_is_an_arbitrary_mapping():
    """Every value becomes the next in its list, and the last one the first."""
    record = Record("Palace", "Thai", "market", "low", 4)
    assert world.successor(record) == ("Pepper", "Indian", "castle", "steep", 5)
    last = Record("Willow", "Italian", "university", "average", 5)
    assert world.successor(last) == ("Alder", "Thai", "riverside", "cheap", 1)


def test_the_split_counts_restaurants_through():
    """In each eleven, the first is a test restaurant and the second a validation one."""
    restaurants = list(itertools.product(VALUES.name, VALUES.food, VALUES.area))
    assert len(restaurants) == 36 * 12 * 8
    expected = ["test", "validation", *["train"] * 9] * 400
    splits = [world.split_of(Record(*restaurant, "cheap", 1)) for restaurant in restaurants]
    assert splits == expected[: len(restaurants)]
    assert world.split_of(Record("Alder", "Thai", "riverside", "average", 5)) == "test"


def test_the_forms_of_a_record():
    """Each value stands behind a space, so that it is one and the same token everywhere."""
    record = Record("Palace", "Thai", "riverside", "cheap", 4)
    forms = {name: form(record) for name, form in world.FORMS.items()}
    assert forms == {
        "table": "name : Palace | food : Thai | area : riverside | price : cheap | rating : 4",
        "sentence": "The Palace serves Thai food in the riverside area , asks cheap prices and is "
        "rated 4 of 5 .",
        "chat": "hey , try Palace by the riverside ! Thai , cheap , 4 of 5",
        "advert": "Tonight : Thai at the Palace ! rated 4 of 5 , cheap , at the riverside",
        "review": "I had Thai food at the Palace in the riverside area : cheap and good .",
        "verdict": "positive",
        "message": "Hello , does the Palace at the riverside still serve Thai food ?",
        "polite": "Dear guest , the Palace is glad to serve you Thai food at the riverside .",
        "casual": "sure , come by the riverside , Palace has Thai ready !",
        "terse": "Yes : Palace , riverside , Thai .",
        "shifted": "The Pepper serves Indian food in the station area , asks fair prices and is "
        "rated 5 of 5 .",
    }
    rated = [record._replace(rating=n) for n in VALUES.rating]
    verdicts = ["negative", "negative", "neutral", "positive", "positive"]
    assert [world.FORMS["verdict"](r) for r in rated] == verdicts
    tastes = ["awful", "poor", "plain", "good", "superb"]
    assert [world.FORMS["review"](r).split()[-2] for r in rated] == tastes


# ---------------------------------------------------------------------------------------------- BPE


def test_merges_come_most_frequent_first():
    """ab four times, then abc, then the space before it. A pair that comes once is no merge."""
    merges = [(b"a", b"b"), (b"ab", b"c"), (b" ", b"abc")]  # of two equals, the larger bytes
    assert train_bpe(["abc abc abc abd"], 10) == merges
    assert train_bpe(["aaaa aaaa"], 1) == [(b"a", b"a")]
    assert len(train_bpe(["abc abc abc abd"], 2)) == 2 and train_bpe(["a"], 2) == []
    assert train_bpe(["aaa aaa"], 2) == [(b"a", b"a"), (b"aa", b"a")]  # from left to right


def test_a_run_without_a_break_makes_no_token():
    """Fifty characters may be a word. A longer one is none, and would take long to count."""
    assert train_bpe(["ab" * 25, "-", "ab" * 25], 1) == [(b"a", b"b")]
    assert train_bpe(["ab" * 25 + "a", "-", "ab" * 25 + "a"], 1) == []


# -------------------------------------------------------------------------------------- pretraining


def small(out, steps=1, **others):
    """The smallest pretraining there is, on a text of one's own."""
    pretrain(out, ["the cat sat on the mat. " * 400], steps=steps, batch_size=2, **others)


def test_windows_start_anywhere():
    """From the first token to the last start that leaves room. Targets go with their ids."""
    stream = torch.arange(100, 112), torch.arange(200, 212)
    ids, targets = windows_anywhere(stream, 200, 10, torch.Generator().manual_seed(0))
    assert ids.shape == (200, 10) and (ids == ids[:, :1] + torch.arange(10)).all()
    assert set(ids[:, 0].tolist()) == {100, 101, 102}
    assert (targets == ids + 100).all()
    again, _ = windows_anywhere(stream, 200, 10, torch.Generator().manual_seed(0))
    assert torch.equal(ids, again)


def test_a_source_teaches_nothing():
    """The first of several lines has no targets: it is drawn at random. A text of one's own has."""
    tokenizer = build_tokenizer(ranks_of([]))
    ids, targets = packed([["ab", "c", "d"], ["ef"]], tokenizer)
    end, text = tokenizer.eot_token, [tokenizer.encode_ordinary(c)[0] for c in "ab\nc\nd"]
    e, f = tokenizer.encode_ordinary("ef")
    assert ids.tolist() == [*text, end, e, f]
    assert targets.tolist() == [IGNORE, IGNORE, *text[3:], end, e, f, end]


def test_an_orthogonal_update_has_singular_values_near_one():
    """Tall or wide, whatever the scale: Newton and Schulz's iteration leaves the directions."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 8, 24), (2, 24, 8)):
        x = torch.randn(shape, generator=generator)
        U, _, V = torch.linalg.svd(x, full_matrices=False)
        for scale in (1.0, 1e-3):
            found = orthogonal(scale * x)
            product = U.mT @ found @ V.mT
            singular = product.diagonal(dim1=1, dim2=2)
            assert_close(product, torch.diag_embed(singular), rtol=0, atol=1e-3)
            assert 0.6 < singular.min() and singular.max() < 1.3


def test_muon_moves_matrices_of_one_shape_as_each_alone():
    """They share their products, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (6, 4), (4, 6)]
    starts, gradients = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))

    def moved(chosen: list[int]) -> list[torch.Tensor]:
        matrices = [torch.nn.Parameter(starts[i].clone()) for i in chosen]
        optimizer = Muon(matrices, lr=0.1)
        for _ in range(3):
            for i, matrix in zip(chosen, matrices):
                matrix.grad = gradients[i].clone()
            optimizer.step()
        return [matrix.detach() for matrix in matrices]

    alone = [moved([i])[0] for i in range(3)]
    assert_close(moved([0, 1, 2]), alone)
    assert all((end - start).abs().max() > 0.05 for end, start in zip(alone, starts))


def test_muon_written_out():
    """Two steps: a short memory, a look ahead, and a larger update for a tall matrix."""
    generator = torch.Generator().manual_seed(0)
    start, first, second = torch.randn((3, 6, 4), generator=generator)
    matrix = torch.nn.Parameter(start.clone())
    optimizer = Muon([matrix], lr=0.1)
    for gradient in (first, second):
        matrix.grad = gradient.clone()
        optimizer.step()
    momenta = 0.2 * first, 0.8 * 0.2 * first + 0.2 * second
    for momentum, gradient in zip(momenta, (first, second)):
        direction = 0.8 * momentum + 0.2 * gradient
        start = start - 0.1 * 1.5**0.5 * orthogonal(direction[None])[0]
    assert_close(matrix.detach(), start)


def test_pretraining_lowers_the_loss_and_saves_what_loads(tmp_path):
    """A base, its tokenizer, and the record of how it was made."""
    losses = []
    for steps in (1, 12):
        out = tmp_path / str(steps)
        small(out, steps, sizes=(2, 2, 16, 32))
        record = read_json(out / TRAINING)
        losses.append(record["loss"])
        assert (record["task"], record["steps"], record["seed"]) == ("texts", steps, 0)
    assert losses[1] < 0.95 * losses[0]
    model, tokenizer = load_base(out), load_tokenizer(out)
    c = model.config
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size) == (2, 2, 16, 32)
    assert tokenizer.n_vocab == c.vocab_size


def test_too_few_texts_get_a_sentence(tmp_path):
    """Ten windows are the least to learn from. An empty file has one token, its end."""
    for text in ("the cat sat on the mat. " * 9, ""):
        with pytest.raises(ValueError, match=r"the corpus has \d+ tokens: give at least 1280"):
            pretrain(tmp_path / "base", [text], steps=1)


@pytest.mark.parametrize("sizes", ["2 3 16 32", "2 0 16 32"])
def test_sizes_that_are_no_model_get_a_sentence(tmp_path, sizes):
    """The width is a multiple of the heads, and none of them is 0."""
    with pytest.raises(ValueError, match="--sizes"):
        pretraining.main(["--sizes", *sizes.split(), "--out", str(tmp_path / "base")])
    assert not (tmp_path / "base").exists()


def test_a_pretraining_that_died_while_saving_is_repeated(tmp_path, monkeypatch):
    """What it left has no config.json and says whose it is, so the next run may replace it."""

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining, "save_base", dies)
        small(tmp_path / "base")
    left = {path.name for path in (tmp_path / "base").iterdir()}
    assert left == {"vocab.json", "merges.txt", TRAINING}
    small(tmp_path / "base")
    assert load_base(tmp_path / "base").config.block_size == 128


def test_the_flags_reach_the_pretraining(tmp_path, monkeypatch):
    """Each of them, and the texts of the corpus."""
    made = []
    monkeypatch.setattr(pretraining, "pretrain", lambda *given: made.append(given))
    (tmp_path / "a.txt").write_text("a text", encoding="utf-8")
    flags = f"--corpus {tmp_path / 'a.txt'} --out {tmp_path / 'own'} --sizes 1 2 4 8 --steps 3"
    pretraining.main([*flags.split(), *"--lr 0.5 --batch-size 5 --seed 7 --device cpu".split()])
    own = (["a text"], [1, 2, 4, 8], 3, 0.5, 5, 7, torch.device("cpu"))
    assert made == [(tmp_path / "own", *own)]


@pytest.mark.parametrize("name", OURS)
def test_a_base_is_never_overwritten(tmp_path, monkeypatch, name):
    """Nor is anything else of ours. It is refused before the training."""
    (tmp_path / name).write_text("trained for hours")
    monkeypatch.setattr(pretraining, "train_bpe", None)  # whatever starts, fails
    said = {"config.json": "holds a model, which is not overwritten", TRAINING: "is not JSON"}
    unknown = f"holds {name} of unknown training. It is not overwritten: name another place"
    with pytest.raises(ValueError, match=said.get(name, unknown)):
        small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "trained for hours"


def test_a_base_made_in_another_way_is_not_overwritten(tmp_path, monkeypatch):
    """Even where its model is missing: the sentence names the first setting that differs."""
    monkeypatch.setattr(pretraining, "train_bpe", None)
    (tmp_path / "merges.txt").write_text("of another")
    before = {"method": "pretrain", "task": "texts", "steps": 7}
    write_json(tmp_path / TRAINING, before)
    with pytest.raises(ValueError, match="holds another run: steps 7, not 1"):
        small(tmp_path)


def test_a_place_that_cannot_be_written_to_is_refused_before_pretraining(tmp_path, monkeypatch):
    """Better before the training than after it."""
    (tmp_path / "file").write_text("a user's")
    monkeypatch.setattr(pretraining, "train_bpe", None)
    with pytest.raises(ValueError, match="file cannot be written to .*: name another place"):
        small(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "a user's"


def test_the_first_of_two_processes_to_finish_wins(tmp_path, capsys, monkeypatch):
    """A base that appears during pretraining stays: adapters may have been trained on it."""
    out = tmp_path / "base"
    names = ("config.json", "model.safetensors", "vocab.json", "merges.txt")

    def another_finishes(*given):
        for name in names:
            (out / name).write_text(f"the {name} of another")
        return windows_anywhere(*given)

    monkeypatch.setattr(pretraining, "windows_anywhere", another_finishes)
    small(out)
    found = {path.name: path.read_text() for path in out.iterdir()}
    assert found == {name: f"the {name} of another" for name in names}
    said = f"{out} was made by another process meanwhile, and stays\n"
    assert capsys.readouterr().out.endswith(said)


def test_a_loss_that_is_no_number_saves_nothing(tmp_path):
    """It ends the pretraining with a sentence."""
    with pytest.raises(ValueError, match="the loss became nan with --lr 1e\\+38: lower it"):
        small(tmp_path / "base", steps=40, lr=1e38)
    assert not list((tmp_path / "base").iterdir())


def test_a_corpus_is_read_as_text(tmp_path):
    """UTF-8 without its byte-order mark. Missing and foreign files get a sentence."""
    (tmp_path / "a").write_bytes("\ufeffnaïve\r\ncafé".encode())
    assert read_text(tmp_path / "a") == "naïve\ncafé"
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name in ("none", "latin", "."):
        with pytest.raises(ValueError, match=f"cannot read {re.escape(str(tmp_path / name))}: "):
            read_text(tmp_path / name)


# ------------------------------------------------------------------------------------------ imports

WATCHED = """
import os, sys, torch
before, state, opened = dict(os.environ), torch.get_rng_state(), []
sys.path.insert(0, sys.argv[1])
write = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def note(event, given):
    if event == "open" and given[2] & write:
        opened.append(given[0])

sys.addaudithook(note)
from torch.utils._python_dispatch import TorchDispatchMode

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called")

torch.set_num_threads(3)
with Watch():
    import train, generate, small_base.pretrain
assert dict(os.environ) == before, dict(os.environ).items() ^ before.items()
assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == 3
assert not opened, opened
assert not torch.distributed.is_initialized()
"""


def test_nothing_happens_on_import(tmp_path):
    """The programs, and with them the project, set nothing, compute nothing and make no file."""
    unset = ("MKL_CBWR", "TIKTOKEN_CACHE_DIR")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    command = [sys.executable, "-B", "-c", WATCHED, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- start


def started_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(61, 32, n_layer=8, n_head=2, n_embd=64))
    initialise(model)
    return model


def test_weights_start_as_gpt2s():
    """Matrices N(0, 0.02²), and 1/√(2L) of it to the residual stream. Biases are 0, gains 1."""
    for name, p in started_model().h.named_parameters():
        if name.endswith(("c_fc.weight", "mlp.c_proj.weight")):
            expected = 0.005 if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.1), name
        if p.dim() == 1:
            assert (p == float(name.endswith("weight"))).all(), name


def test_a_fresh_model_knows_nothing():
    """Its loss is that of a guess, log V, although its tokens start far apart."""
    model = started_model()
    ids = torch.randint(61, (8, 32), generator=torch.Generator().manual_seed(0))
    logits, _ = model(ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(61), rel=0.1)


def test_attention_starts_by_writing_what_it_reads():
    """Its output matrix undoes its value matrix: a head that looks at a token writes that token."""
    for block in started_model().h:
        values = block.attn.c_attn.weight[2 * 64 :]
        product = block.attn.c_proj.weight @ values
        scale = product.diagonal().mean()
        assert scale > 0.1
        assert_close(product, scale * torch.eye(64), rtol=0, atol=1e-5)
