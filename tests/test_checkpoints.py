"""A checkpoint comes back to the last bit, or is refused with one sentence and stays."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from storage.checkpoints import Checkpoint, looks_since_best

SETTINGS = {"method": "prefix", "lr": 0.3}
NOT_WHOLE = "is not a whole checkpoint: delete it to start anew"


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
    assert [path.name for path in file.parent.iterdir()] == ["checkpoint.safetensors"]


def test_without_a_checkpoint_there_are_no_metrics_and_nothing_to_resume(tmp_path):
    """A new run begins at step 0. --resume without a checkpoint is refused, not begun anew."""
    none = tmp_path / "checkpoint.safetensors"
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
    """With keep_best, those of the lowest validation loss; step 0 does not count."""
    trainee, optimizer, metrics = trained()
    checkpoint = Checkpoint(tmp_path, SETTINGS, resume=False, keep_best=True)
    checkpoint.save(trainee, optimizer, metrics)
    best = {name: tensor.clone() for name, tensor in trainee.state_dict().items()}
    with torch.no_grad():
        trainee[1].weight += 1
    worse = {"step": 4, "loss": 1.0, "validation": 9.0}
    checkpoint.save(trainee, optimizer, [*metrics, worse])
    assert looks_since_best([*metrics, worse]) == 1
    assert checkpoint.restore_best(trainee, [*metrics, worse]) == metrics[-1]
    assert_close(trainee.state_dict(), best, rtol=0, atol=0)


METADATA = [
    {"settings": "null"}, {"settings": "3"}, {"settings": None}, {"metrics": "null"},
    {"metrics": "[3]"}, {"metrics": None}, {"metrics": '["step", "loss"]'}, {"metrics": "[{}]"},
    {"metrics": "[" * 10**5}, {"metrics": "{"}, {"metrics": "{}"},
    {"metrics": '[{"step": 0, "lr": 0.3}]'},
    {"metrics": '[{"step": 0, "lr": 0.3}, {"step": -1}]'},
    {"metrics": '[{"step": 0, "lr": "a"}, {"step": 3}]'},
    {"metrics": '[{"step": 0, "lr": 0.3}, {"step": "two"}]'},
    {"metrics": '[{"step": 0, "lr": 0.3, "validation": 1}, {"step": 2}]'},
]  # fmt: skip


@pytest.mark.parametrize("changes", METADATA, ids=lambda changes: str(changes)[:40])
def test_crafted_metadata_gets_one_sentence(file, changes):
    """Whatever stands where metrics and settings belong; also a step that the numbers are not of."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() | changes
    kept = {key: value for key, value in metadata.items() if value is not None}
    save_file(load_file(file), file, kept)
    with pytest.raises(ValueError, match=NOT_WHOLE):
        load(file)


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


TENSORS = {
    "none": lambda t: {},
    "no weight": without("1.weight"),
    "no average": without("2/exp_avg"),
    "no step": without("3/step"),
    "weight turned": lambda t: t | {"1.weight": t["1.weight"].T.contiguous()},
    "weight cut": lambda t: t | {"1.weight": t["1.weight"][:2]},
    "average turned": lambda t: t | {"2/exp_avg": t["2/exp_avg"].T.contiguous()},
    "average cut": lambda t: t | {"2/exp_avg_sq": t["2/exp_avg_sq"][:2]},
    "three steps": lambda t: t | {"2/step": torch.ones(3)},
    "before the first step": lambda t: t | {"2/step": torch.tensor(-1.0)},
    "averages of what is frozen": lambda t: t | {"0/exp_avg": torch.ones(3, 2)},
    "one too many": lambda t: t | {"other": torch.ones(3)},
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_crafted_tensors_get_one_sentence(file, change):
    """Missing, unknown, or of another shape than what is trained."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata)
    with pytest.raises(ValueError, match=NOT_WHOLE):
        load(file)


def test_a_checkpoint_cut_short_gets_one_sentence(file):
    content = file.read_bytes()
    for part in (content[:-9], content[:5], b"", b"[" * 10**5):
        file.write_bytes(part)
        with pytest.raises(ValueError, match=NOT_WHOLE):
            load(file)
