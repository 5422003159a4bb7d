"""A run that was interrupted goes on where it was. Nothing else is taken for it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import files_in, forty, interrupted, raising, run, train_argv, without_lr

import train
from storage.checkpoints import Checkpoint
from storage.files import read_tensors

FILE = "checkpoint.pt"
EVERY = ["--steps", "6", "--eval-every", "2"]


@pytest.mark.parametrize(
    "flags",
    [["--mid-dim", "4"], ["--method", "both", "--film"], ["--method", "full"], ["--patience", "2"]],
    ids=" ".join,
)
def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(base, tmp_path, flags):
    """Numbers, MLP, optimizer and order of the examples; metrics, record and film, too."""
    flags = [*EVERY, *flags]
    whole = run(base, *flags, "--out", tmp_path / "whole")
    interrupted(4, train_argv(base, *flags, "--out", tmp_path / "parts"))
    assert FILE in files_in(tmp_path / "parts")
    resumed = run(base, *flags, "--resume", "--out", tmp_path / "parts")
    assert resumed | {"out": ""} == whole | {"out": ""}
    one, two = files_in(tmp_path / "whole"), files_in(tmp_path / "parts")
    for files in (one, two):
        for name in files:
            files[name] = re.sub(rb'"out": .*', b"", files[name])
    assert one == two and any(name.endswith("safetensors") for name in one)
    films = [name for name in one if name.endswith("film.safetensors")]
    assert len(films) == (2 if "--film" in flags else 0)


def test_the_best_survives_an_interruption(base, tmp_path, monkeypatch):
    """It lies in the checkpoint, and is what the resumed run saves."""
    losses = iter([9.0, 9.0, 0.5, 0.7, 9.0, 0.6, 0.4])  # frozen, steps 0, 2, 4; frozen, 6, the test
    scores = (train.Scores(loss, 0.0, [False] * 9) for loss in losses)
    monkeypatch.setattr(train, "evaluate", lambda *_: next(scores))
    flags = [*EVERY, "--patience", "5", "--out", tmp_path]
    interrupted(4, train_argv(base, *flags))
    best = torch.load(tmp_path / FILE)["best"]["0.start"]
    record = run(base, *flags, "--resume")
    saved = read_tensors(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert record["loss_tuned"] == 0.4 and torch.equal(saved.view_as(best), best)


def test_a_resumed_run_does_not_search_a_rate_again(base, tmp_path, monkeypatch):
    """Its rate and the table of the search come with the checkpoint."""
    searched = {0.01: 3.0, 0.03: 1.5, 0.09: 2.0}
    argv = without_lr(train_argv(base, *EVERY, "--out", tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(train, "find_rate", lambda *_: searched)
        interrupted(2, argv)
    monkeypatch.setattr(train, "find_rate", None)
    assert train.main([*argv, "--resume"])["lr_used"] == 0.03
    stored = json.loads((tmp_path / "training.json").read_text())["rates"]
    assert {float(rate): loss for rate, loss in stored.items()} == searched


def test_a_checkpoint_is_written_at_each_look(base, tmp_path, monkeypatch):
    """By default each tenth of the steps, so that is the most that Ctrl-C costs."""
    steps = []
    monkeypatch.setattr(Checkpoint, "save", lambda *given: steps.append(given[3][-1]["step"]))
    run(base, "--steps", "23", "--method", "soft_prompt", "--n-virtual", "1", "--out", tmp_path)
    assert steps == [3, 6, 9, 12, 15, 18, 21, 23] and FILE not in files_in(tmp_path)


def test_a_save_that_fails_leaves_the_last_checkpoint_whole(base, tmp_path, monkeypatch):
    """And no debris."""
    writes, fsync = [], os.fsync
    full = raising(OSError("No space left on device"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", lambda file: full() if writes else writes.append(fsync(file)))
        run(base, *EVERY, "--out", tmp_path)
    assert set(files_in(tmp_path)) == {FILE}
    assert Checkpoint(tmp_path, {}, True, False).metrics[-1]["step"] == 2


REFUSED = {  # flags behind those of the interrupted run: the sentence
    "": "stopped after step 2: add --resume to go on, or delete it",
    "--resume --out elsewhere": "does not exist, so there is nothing to resume: leave --resume out",
    "--resume --lr 0.5": "is of another run: lr 0.3, not 0.5: repeat its flags, or delete it",
    "--resume --seed 1": "is of another run: seed 0, not 1",
    "--resume --method full": "is of another run: method prefix, not full",
    "--resume --chat": "is of another run: chat False, not True",
    "--resume --film": "is of another run: film None, not True",
    "--resume --data changed/forty.jsonl": "is of another run: it was trained on other examples",
}


def test_only_the_run_itself_is_resumed(base, tmp_path, monkeypatch):
    """Anything else gets a sentence, before a model is loaded. The checkpoint stays."""
    monkeypatch.chdir(tmp_path)
    lines = Path(forty(base)).read_text().splitlines(keepends=True)
    Path("changed").mkdir()
    Path("changed/forty.jsonl").write_text("".join(lines[1:]))
    flags = [*EVERY, "--data", forty(base), "--out", "out"]
    interrupted(2, train_argv(base, *flags))
    before = files_in(Path("out"))
    monkeypatch.setattr(train, "open_base", None)
    for more, sentence in REFUSED.items():
        with pytest.raises(ValueError, match=re.escape(sentence)):
            run(base, *flags, *more.split())
    assert files_in(Path("out")) == before and not Path("elsewhere").exists()


def test_a_run_is_not_resumed_on_another_base(base, tmp_path):
    """Its fingerprint tells, not its name."""
    interrupted(2, train_argv(base, *EVERY, "--out", tmp_path / "out"))
    shutil.copytree(base, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    flags = ["--data", forty(base), *EVERY, "--out", tmp_path / "out", "--resume"]
    with pytest.raises(ValueError, match="is of another run: base .*, not .*: repeat its flags"):
        run(str(tmp_path / "base"), *flags)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="no Ctrl-C can be sent to one process")
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(base, tmp_path):
    """With status 130 and no traceback."""
    argv = train_argv(base, "--steps", "20000", "--eval-every", "5", "--out", tmp_path)
    process = subprocess.Popen(
        [sys.executable, train.__file__, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (tmp_path / FILE).exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said
    assert "interrupted: --resume goes on from the last checkpoint, if there is one" in said
    assert set(files_in(tmp_path)) == {FILE}
