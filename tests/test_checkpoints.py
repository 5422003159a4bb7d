"""A checkpoint comes back to the last bit, or is refused with one sentence and stays."""

import io
import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from soft_prompt import SoftPrompt
from storage.checkpoints import Checkpoint, looks_since_best

SETTINGS = {"method": "prefix", "lr": 0.3}


def trained(steps: int = 3):
    """-> a trainee of two layers, the first one frozen, its optimizer after steps, and metrics."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(2, 3).requires_grad_(False), torch.nn.Linear(3, 5)
    trainee = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=0.1)
    metrics = [{"step": 0, "lr": 0.3, "validation": 2.5}]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        trainee(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
        metrics.append({"step": step, "loss": 1.0 / step, "validation": 2.0 / step})
    return trainee, optimizer, metrics


@pytest.fixture
def file(tmp_path):
    """A checkpoint after three steps."""
    checkpoint = Checkpoint(tmp_path / "out", SETTINGS, resume=False, keep_best=False)
    checkpoint.save(*trained())
    return checkpoint.file


def load(file: Path, resume: bool = True, settings=SETTINGS):
    trainee, optimizer, _ = trained(0)
    checkpoint = Checkpoint(file.parent, settings, resume, keep_best=False)
    return checkpoint.restore(trainee, optimizer), trainee, optimizer


def test_a_checkpoint_comes_back_bit_for_bit(file):
    """Numbers, averages and metrics; what is frozen has no averages."""
    metrics, trainee, optimizer = load(file)
    before, optimizer_before, metrics_before = trained()
    assert metrics == metrics_before
    assert_close(trainee.state_dict(), before.state_dict(), rtol=0, atol=0)
    found, expected = optimizer.state_dict(), optimizer_before.state_dict()
    assert set(found["state"]) == {2, 3} and found["param_groups"] == expected["param_groups"]
    for i, averages in expected["state"].items():
        assert_close(found["state"][i], averages, rtol=0, atol=0)
    assert [path.name for path in file.parent.iterdir()] == ["checkpoint.pt"]


def test_without_a_checkpoint_there_are_no_metrics_and_nothing_to_resume(tmp_path):
    """A new run begins at step 0. --resume without a checkpoint is refused, not begun anew."""
    none = tmp_path / "checkpoint.pt"
    assert load(none, resume=False)[0] == []
    with pytest.raises(ValueError, match="does not exist, so there is nothing to resume"):
        load(none)


def test_a_checkpoint_that_is_not_to_be_resumed_is_not_lost(file):
    """Nor one of another run: it is refused with what differs, and stays."""
    before = file.read_bytes()
    with pytest.raises(ValueError, match="of a run stopped after step 3: add --resume to go on"):
        load(file, resume=False)
    for other, differs in (({"lr": 0.5}, "lr 0.3, not 0.5"), ({"seed": 1}, "seed None, not 1")):
        with pytest.raises(ValueError, match=f"{differs}: repeat its flags, or delete it"):
            load(file, settings=SETTINGS | other)
    assert file.read_bytes() == before


def test_the_best_numbers_come_back(tmp_path):
    """With keep_best, those of the lowest validation loss, from the file too. Step 0 counts not."""
    trainee, optimizer, metrics = trained()
    best = {name: tensor.clone() for name, tensor in trainee.state_dict().items()}
    worse = {"step": 4, "loss": 1.0, "validation": 9.0}
    checkpoint = Checkpoint(tmp_path, SETTINGS, resume=False, keep_best=True)
    checkpoint.save(trainee, optimizer, metrics)
    with torch.no_grad():
        trainee[1].weight += 1
    checkpoint.save(trainee, optimizer, [*metrics, worse])
    assert looks_since_best([*metrics, worse]) == 1
    for resumed in (checkpoint, Checkpoint(tmp_path, SETTINGS, resume=True, keep_best=True)):
        trainee, _, _ = trained(0)
        resumed.restore_best(trainee)
        assert_close(trainee.state_dict(), best, rtol=0, atol=0)


def test_a_film_has_the_adapter_of_each_look(tmp_path):
    """A resumed run goes on with it, a new one begins anew at step 0."""
    adapters = torch.nn.ModuleList([SoftPrompt(torch.zeros(2, 3))])
    optimizer = torch.optim.AdamW(adapters.parameters())
    for resume, step in ((False, 2), (True, 4), (False, 6)):
        if not resume:
            (tmp_path / "checkpoint.pt").unlink(missing_ok=True)
        checkpoint = Checkpoint(tmp_path, SETTINGS, resume, False, keep_film=True)
        metrics = checkpoint.restore(adapters, optimizer) or [{"step": 0, "lr": 0.3}]
        torch.nn.init.constant_(adapters[0].vectors, step)
        checkpoint.save(adapters, optimizer, [*metrics, {"step": step, "loss": 1.0}])
        film = {name: frame.unique().tolist() for name, [frame] in checkpoint.film.items()}
        assert film == {
            2: {"0": [0], "2": [2]}, 4: {"0": [0], "2": [2], "4": [4]}, 6: {"0": [4], "6": [6]}
        }[step]  # fmt: skip


class Code:
    """What a pickle may hold that does harm where it is loaded."""

    def __reduce__(self):
        return os.abort, ()


def pickled(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


BROKEN = {
    "empty": lambda whole: b"",
    "cut short": lambda whole: whole[:-9],
    "a few bytes": lambda whole: whole[:5],
    "text": lambda whole: b"[" * 10**5,
    "code": lambda whole: pickled(Code()),
    "another program's": lambda whole: pickled({"model": torch.zeros(2)}),
    "another program's list": lambda whole: pickled([3]),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_what_is_not_a_whole_checkpoint_gets_one_sentence(file, change):
    """Broken, or made by another program. It stays, and nothing in it is run."""
    broken = change(file.read_bytes())
    assert broken != file.read_bytes()
    file.write_bytes(broken)
    sentence = "is not a whole checkpoint .*: name another --out, or delete it"
    with pytest.raises(ValueError, match=sentence):
        load(file)
    assert file.read_bytes() == broken
