"""What a run writes, and what it never replaces."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import files_in, forty, raising, run, write_jsonl

import generate
import train
from command.examples import load_examples
from command.models import load_adapters
from data import encode
from small_base.pretrain import pretrain
from small_base.world import task_examples
from storage.base import load_base
from storage.tokenizers import load_tokenizer

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "base.json", "training.json"}
MODEL = {"config.json", "model.safetensors", "vocab.json", "merges.txt", "training.json"}
SAVED = {
    "prefix": ADAPTER | {"metrics.jsonl"},
    "soft_prompt": ADAPTER | {"metrics.jsonl"},
    "both": {f"{part}/{name}" for part in ("prefix", "soft_prompt") for name in ADAPTER}
    | {"training.json", "metrics.jsonl"},
    "full": MODEL | {"metrics.jsonl"},
}


@pytest.mark.parametrize("method", SAVED)
def test_what_is_saved_gives_what_was_measured(base, tmp_path, method):
    """For each method. The base's own files stay bit for bit what they were."""
    before = files_in(Path(base))
    lr = "0.003" if method == "full" else "0.3"
    record = run(base, "--method", method, "--lr", lr, "--steps", "6", "--out", tmp_path)
    assert files_in(Path(base)) == before and set(files_in(tmp_path)) == SAVED[method]
    assert record["curve"][-1][1] < record["curve"][0][1]
    assert record["percent"] == 100 * record["n_stored"] / record["n_base"]
    model = load_base(tmp_path if method == "full" else base)
    adapters = [] if method == "full" else load_adapters(tmp_path, model)
    test = load_examples("", forty(base), None, 0)["test"]
    scores = train.evaluate(model, adapters, encode(load_tokenizer(base), test), 4)
    assert scores.loss == pytest.approx(record["loss_tuned"], rel=1e-5)
    assert (scores.tokens, scores.exact_match()) == (
        record["tokens_tuned"], record["exact_match_tuned"],
    )  # fmt: skip


def test_training_json_tells_who_trained_what_and_how_well(base, tmp_path):
    """All that the run returns, a line each for people, in both parts of a stack."""
    record = run(base, "--method", "both", "--lr", "0.25", "--out", tmp_path)
    parts = (tmp_path / name / "training.json" for name in ("prefix", "soft_prompt"))
    one, two = (path.read_text(encoding="utf-8") for path in parts)
    assert one == two and '\n  "lr": 0.25,\n' in one
    assert json.loads(one) == json.loads(json.dumps(record))
    settings = {"method": "both", "task": "forty", "data": forty(base), "base_name": base}
    assert record.items() >= (settings | {"steps": 3, "n_virtual": 4, "init": "text"}).items()


def test_metrics_have_validation_only_where_it_was_measured(base, tmp_path):
    """A line of JSON a step. So each curve can be drawn as it is."""
    record = run(base, "--steps", "5", "--eval-every", "2", "--out", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    looks = [line for line in lines if "validation" in line]
    assert [[line["step"], line["validation"]] for line in looks] == json.loads(
        json.dumps(record["curve"])
    )
    assert all({"tokens", "exact_match"} <= set(line) for line in looks)


def test_the_curve_is_drawn_where_matplotlib_is(base, tmp_path, monkeypatch):
    """Without it, a run ends as well."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(base, "--steps", "1", "--out", tmp_path)
    assert not (tmp_path / "curve.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib.figure")
    run(base, "--steps", "1", "--out", tmp_path)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


ENDS = {"report": OSError("No space left"), "show_examples": KeyboardInterrupt()}
ENDS["save_record"] = OSError("No space left")


@pytest.mark.parametrize("where, error", ENDS.items())
def test_what_comes_after_training_cannot_lose_it(base, tmp_path, monkeypatch, where, error):
    """Testing and showing come when all is saved, and the checkpoint is gone."""
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(train, where, raising(error))
        run(base, "--out", tmp_path / "out")
    run(base, "--out", tmp_path / "whole")
    one, two = files_in(tmp_path / "out"), files_in(tmp_path / "whole")
    assert set(one) == set(two) == SAVED["prefix"]
    assert one["adapter_model.safetensors"] == two["adapter_model.safetensors"]


# ------------------------------------------------------------------------------- never replaced


@pytest.mark.parametrize("method", SAVED)
def test_the_same_run_again_replaces_its_own(base, tmp_path, method):
    """The same flags and the same examples, be it by another path. A file of the user's stays."""
    flags = ["--method", method, "--steps", "1", "--out", tmp_path / "out"]
    run(base, *flags)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = files_in(tmp_path / "out")
    shutil.copy(forty(base), tmp_path / "forty.jsonl")
    run(base, *flags, "--data", tmp_path / "forty.jsonl")
    after = files_in(tmp_path / "out")
    assert set(after) == set(before) and after["notes.txt"] == b"mine"
    weights = [name for name in before if name.endswith("safetensors")]
    assert all(after[name] == before[name] for name in weights)


OTHERS = {  # the flags of a second run into the same place: the sentence
    "--lr 0.1": "another run: lr 0.3, not 0.1",
    "--steps 2": "another run: steps 1, not 2",
    "--seed 1": "another run: seed 0, not 1",
    "--method soft_prompt": "another run: method prefix, not soft_prompt",
    "--method full": "another run: method prefix, not full",
    "--method both": "another run: method prefix, not both",
}


def test_nothing_trained_is_replaced_by_a_run_with_other_settings(base, tmp_path, monkeypatch):
    """It gets a sentence before a model is loaded, and every file is as it was."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data", forty(base), "--steps", "1", "--out", "out"]
    run(base, *flags)
    before = files_in(tmp_path)
    monkeypatch.setattr(train, "open_base", None)
    for more, sentence in OTHERS.items():
        sentence = f"out holds {sentence}. It is not overwritten: name another place"
        with pytest.raises(ValueError, match=re.escape(sentence)):
            run(base, *flags, *more.split())
    assert files_in(tmp_path) == before


def test_the_same_path_with_other_contents_is_other_data(base, tmp_path):
    """The examples decide, not the file's name."""
    data = tmp_path / "mine.jsonl"
    shutil.copy(forty(base), data)
    flags = ["--data", data, "--steps", "1", "--out", tmp_path / "out"]
    run(base, *flags)
    write_jsonl(data, task_examples("chat", "train", 40, 0))
    with pytest.raises(ValueError, match="it was trained on other examples. It is not overwritten"):
        run(base, *flags)


def test_an_adapter_is_not_replaced_by_one_of_another_base(base, tmp_path):
    """Though its settings be the same."""
    run(base, "--steps", "1", "--out", tmp_path / "out")
    pretrain(tmp_path / "base", steps=1, sizes=(1, 1, 16, 128))
    before = files_in(tmp_path)
    flags = ["--data", forty(base), "--steps", "1", "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match="out holds another run: .*It is not overwritten"):
        run(str(tmp_path / "base"), *flags)
    assert files_in(tmp_path) == before


def test_a_base_is_never_overwritten(base, tmp_path):
    """Neither by an adapter, nor by a tuned model."""
    shutil.copytree(base, tmp_path / "base")
    before = files_in(tmp_path)
    for method in ("prefix", "full"):
        with pytest.raises(ValueError, match="base holds another run: method pretrain, not "):
            run(base, "--method", method, "--out", tmp_path / "base")
    assert files_in(tmp_path) == before


def test_a_stack_is_not_saved_over_single_adapters(base, tmp_path):
    """--method both saves to two folders, which out/TASK has for each method alone. Nor are two
    adapters taken for a stack that were trained apart."""
    for method in ("prefix", "soft_prompt"):
        run(base, "--steps", "1", "--method", method, "--out", tmp_path / method)
    with pytest.raises(ValueError, match="holds another run: method prefix, not both"):
        run(base, "--steps", "1", "--method", "both", "--out", tmp_path)
    with pytest.raises(ValueError, match="is not the directory that was meant"):
        load_adapters(tmp_path, load_base(base))


def test_an_adapter_without_training_json_is_used_but_not_replaced(base, tmp_path):
    """As PEFT saves them."""
    run(base, "--steps", "1", "--out", tmp_path)
    argv = ["--adapter", str(tmp_path), "--device", "cpu", "--prompt", "name"]
    before = generate.main(argv)
    (tmp_path / "training.json").unlink()
    assert generate.main(argv) == before
    with pytest.raises(ValueError, match="holds adapter_config.json of unknown training"):
        run(base, "--steps", "1", "--out", tmp_path)


def test_a_picture_of_the_users_is_not_replaced(base, tmp_path):
    """Though a run draws one of that name."""
    (tmp_path / "curve.png").write_text("mine")
    with pytest.raises(ValueError, match="holds curve.png of unknown training"):
        run(base, "--steps", "1", "--out", tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_model_loads(
    base, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.TemporaryFile", raising(PermissionError(13, "Permission denied")))
    monkeypatch.setattr(train, "open_base", None)
    with pytest.raises(ValueError, match=r"cannot be written to \(Permission denied\)"):
        run(base, "--out", tmp_path / "new")


def test_a_full_disk_leaves_the_old_files(base, tmp_path, monkeypatch):
    """Each is replaced in one go, or not at all."""
    run(base, "--out", tmp_path)
    before = files_in(tmp_path)
    monkeypatch.setattr("os.fsync", raising(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        run(base, "--out", tmp_path)
    assert files_in(tmp_path) == before
    assert torch.isfinite(load_adapters(tmp_path, load_base(base))[0].start).all()
