"""What a run promises: the base stays what it was, the same seed gives the same numbers, nothing trained is lost."""

import copy
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids, write_jsonl
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import command.adapters as command_adapters
import command.process as command_process
import data
import small_base.pretrain
import storage.hub
import train
from model import GPT, GPTConfig, KVCache
from prefix import Prefix
from small_base.pretrain import initialise
from small_base.world import random_document, task_examples
from soft_prompt import SoftPrompt
from storage.base import load_base
from storage.checkpoints import Checkpoint
from storage.files import read_tensors
from storage.tokenizers import build_tokenizer, load_tokenizer, ranks_of

CHECKPOINT = "checkpoint.safetensors"


def run(base, *flags, out=None, steps=3):
    """main on those forty examples, unless flags name others."""
    common = ["--device", "cpu", "--steps", str(steps), "--batch-size", "4"] + ["--base", base] * ("pretrain" not in flags)
    common += [] if {"--data", "--task", "pretrain"} & set(flags) else ["--data", str(Path(base).parent / "forty.jsonl")]
    return train.main([*common, *map(str, flags), *(["--out", str(out)] if out else [])])


def prompted(base, *flags) -> str:
    """-> the completion of a prompt."""
    (completion,) = train.main(["--base", base, "--device", "cpu", *map(str, flags)])["completions"]
    return completion


def rows_of(base, task="sentence", n=8):
    return data.encode(load_tokenizer(base), task_examples(task, "train", n, 0))


def plan(steps, lr=0.1, batch_size=4, seed=0, eval_every=100, save_every=100, patience=None) -> train.Plan:
    return train.Plan(steps, lr, batch_size, seed, eval_every, save_every, patience)


def files_in(folder: Path) -> dict[str, bytes]:
    """-> what its files hold, those of metrics left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.stem != "metrics")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------------------- the loss


def loss_on_all_logits(model: GPT, batch: data.Batch, past_kv: KVCache | None) -> Tensor:
    """The sum over targets in the plain way: every position's logits are made, and those without a target ignored."""
    logits, _ = model(batch.idx, past_kv)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")


@pytest.mark.ex11
def test_the_loss_is_the_mean_over_target_positions(model):
    """Projecting only those positions equals projecting all and ignoring the rest; behind a past, and from the first on, too."""
    batch = data.batch_of([data.Row([1, 2, 3], [4, 5]), data.Row([6], [7, 8, 9]), data.Row([5, 4], [3])], model.device)
    short = data.batch_of([data.Row([1], [4, 5]), data.Row([6], [7])], model.device)  # as from empty inputs
    past = model(random_ids(1, 4))[1]
    for batch, past_kv in ((batch, None), (batch, past), (short, past)):
        hidden, targets = train.target_hidden(model, batch, past_kv)
        all_logits, _ = model(batch.idx, past_kv)
        expected = F.cross_entropy(all_logits.flatten(0, 1), batch.targets.flatten())
        assert_close(F.cross_entropy(hidden @ model.head.T, targets), expected)


@pytest.mark.ex11
@pytest.mark.parametrize("kind", [Prefix, SoftPrompt])
@pytest.mark.parametrize("n_rows", [3, 90], ids=["6 targets", "531 targets"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_loss_is_cross_entropys_on_all_logits(model, kind, n_rows, dtype, tolerance):
    """In value, and in the gradients of the adapter and of each weight of the model; of several chunks of targets, too."""
    rows = [data.Row(random_ids(1 + i % 7, seed=i).tolist(), random_ids(1 + i % 11, seed=99 + i).tolist()) for i in range(n_rows)]
    batch, adapter, found = data.batch_of(rows, model.device), kind.text(model, random_ids(4)), []
    assert int((batch.targets != data.IGNORE).sum()) == sum(len(row.target) for row in rows)
    for same in (model, copy.deepcopy(model).to(dtype)):
        weights = [*adapter.parameters(), *same.requires_grad_(True).parameters()]
        past_kv = adapter.past_kv(same)
        loss = loss_on_all_logits(same, batch, past_kv) / 1000 if same is model else train.loss_of(same, batch, past_kv, 1000)
        found.append([loss, *torch.autograd.grad(loss, weights)])
    for expected, got in zip(*found):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", [Prefix, SoftPrompt])
def test_bfloat16_computes_the_same_to_five_percent(gpt2, kind):
    """The loss, and the adapter's gradient relative to its largest number."""
    batch = data.batch_of([data.Row([1, 2, 3], [4, 5]), data.Row([6], [7, 8, 9])], gpt2.device)
    adapter, found = kind.text(gpt2, random_ids(4)), []
    for same in (gpt2, copy.deepcopy(gpt2).bfloat16()):
        loss = train.loss_of(same, batch, adapter.past_kv(same), 5)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(adapter.parameters()))])
    for expected, got in zip(*found):
        assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    assert found[1][1].dtype == torch.float64  # of the adapter, whose numbers stay as they were


@pytest.mark.ex12
def test_exact_match_is_what_generation_would_give(model):
    """One forward pass tells which rows greedy decoding gets right, its stop included; the loss weighs tokens alike."""
    rows = [data.Row(random_ids(i + 1, seed=i).tolist(), random_ids(i % 3 + 1, seed=50 + i).tolist()) for i in range(12)]
    for i in (1, 4, 7):  # three rows that are right: let the target be what the model says
        said = model.generate(torch.tensor([rows[i].source]), 3)[0, -3:].tolist()
        rows[i] = data.Row(rows[i].source, said)
    loss, exact = train.evaluate(model, [], rows, batch_size=5)
    generated = [model.generate(torch.tensor([row.source]), len(row.target))[0, len(row.source) :].tolist() for row in rows]
    assert exact == [got == row.target for got, row in zip(generated, rows)] and 3 <= sum(exact) < 12
    one_by_one = [(train.evaluate(model, [], [row], 1)[0], len(row.target)) for row in rows]
    assert loss == pytest.approx(sum(value * n for value, n in one_by_one) / sum(n for _, n in one_by_one), rel=1e-5)


@pytest.mark.ex12
def test_the_loss_of_an_evaluation_is_that_of_training(model):
    """However the rows are cut into batches, and behind an adapter."""
    rows = [data.Row(random_ids(i + 1, seed=i).tolist(), random_ids(i % 3 + 1, seed=50 + i).tolist()) for i in range(7)]
    batch, prefix, n = data.batch_of(rows, model.device), Prefix.text(model, random_ids(3)), sum(len(row.target) for row in rows)
    expected = (loss_on_all_logits(model, batch, prefix.past_kv(model)) / n).item()
    for batch_size in (1, 3, 7, 8):
        assert train.evaluate(model, [prefix], rows, batch_size)[0] == pytest.approx(expected, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("method", ["prefix", "soft_prompt", "both", "full", "none"])
def test_a_run_of_each_method(base, tmp_path, capsys, method):
    """Every number that main promises; the base's files bit for bit what they were; what was saved gives what was measured."""
    before = files_in(Path(base))
    result = run(base, "--method", method, out=tmp_path / "out", steps=6)
    assert files_in(Path(base)) == before
    assert set(result) >= {
        "method", "task", "data", "base", "out", "steps", "lr", "n_trainable", "n_stored", "n_base", "percent", "loss_frozen",
        "loss", "exact_match_frozen", "exact_match", "curve",
    }  # fmt: skip
    low, high = {"prefix": (0.1, 1), "soft_prompt": (0.01, 0.1), "both": (0.1, 1), "full": (100, 100), "none": (0, 0)}[method]
    assert low <= result["percent"] <= high and result["percent"] == 100 * result["n_stored"] / result["n_base"]
    assert (result["loss"] < result["curve"][0][1]) == (method != "none")
    shown = capsys.readouterr().out
    assert shown.count("expected") == 3 and ("step    6/6" in shown) == (method != "none")

    model = load_base(tmp_path / "out" if method == "full" else base).freeze()
    adapters = train.load_adapters(str(tmp_path / "out"), model) if method in ("prefix", "soft_prompt", "both") else []
    examples = train.load_examples("", str(Path(base).parent / "forty.jsonl"), None, 0)
    test = data.encode(load_tokenizer(base), examples["test"])
    assert train.evaluate(model, adapters, test, 4)[0] == pytest.approx(result["loss"], rel=1e-5)


def test_two_runs_with_one_seed_give_the_same_numbers(base, tmp_path):
    results = [run(base, "--seed", seed, "--init", "random", out=tmp_path / "a") for seed in (3, 3, 4)]
    assert results[0] == results[1] != results[2]


def test_tuning_written_out(base, monkeypatch):
    """AdamW (Loshchilov & Hutter 2019) without decay, on the mean loss of each batch, at a rate that rises and falls."""
    model, rows = load_base(base).freeze(), rows_of(base, n=6)
    prompt = SoftPrompt.text(model, torch.arange(3))
    x = prompt.vectors.detach().clone().requires_grad_()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, batch_rows in enumerate(islice(data.shuffled_batches(rows, 4, 7), 12), start=1):
        batch = data.batch_of(batch_rows, model.device)
        _, past_kv = model.forward_embeddings(x[None])
        loss = F.cross_entropy(model(batch.idx, past_kv)[0].flatten(0, 1), batch.targets.flatten())
        (g,) = torch.autograd.grad(loss, x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.05 * min(t / 10, (12 - t + 1) / 12)
        x = (x - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)).detach().requires_grad_()
    sizes, hidden = [], train.target_hidden
    monkeypatch.setattr(train, "target_hidden", lambda *given: sizes.append(len(given[1].idx)) or hidden(*given))
    curve = train.tune(model, [prompt], {"train": rows, "validation": rows}, plan(12, lr=0.05, seed=7, eval_every=5))
    assert_close(prompt.vectors.data, x.data, rtol=1e-3, atol=1e-4)
    assert [step for step, _ in curve] == [0, 5, 10, 12] and set(sizes) == {4, 2}  # six rows are looked at in two parts
    assert curve[-1][1] < curve[0][1] and curve[-1][1] == pytest.approx(train.evaluate(model, [prompt], rows, 4)[0], rel=1e-6)


def test_training_moves_the_adapters_and_nothing_else(base):
    """After training, the base is bit for bit what it was, in memory too; every number of a stack has moved."""
    model = load_base(base).freeze()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapters = [Prefix.random(model, 2), SoftPrompt.random(model, 2)]
    start = [p.detach().clone() for a in adapters for p in a.parameters()]
    train.tune(model, adapters, {"train": rows_of(base), "validation": rows_of(base)}, plan(2, lr=0.01))
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all((p != q).all() for p, q in zip((p for a in adapters for p in a.parameters()), start))


def test_the_default_start_is_the_end_of_a_training_example(base):
    """And a stack starts as one text: its first half in the prefix, its second in the prompt."""
    model, tokenizer, rows = load_base(base).freeze(), load_tokenizer(base), rows_of(base)
    text = torch.tensor((rows[0].source + rows[0].target)[-6:])
    assert text[-1] == tokenizer.eot_token
    adapters = train.new_adapters((Prefix, SoftPrompt), model, tokenizer, rows, 3, "text")
    assert_close(train.stacked_past_kv(adapters, model), model(text[None])[1])
    (prompt,) = train.new_adapters((SoftPrompt,), model, tokenizer, rows, 5, "text", "Thai food")
    assert_close(prompt.vectors.data, model.wte.weight[(tokenizer.encode_ordinary("Thai food") * 5)[:5]], rtol=0, atol=0)
    (prompt,) = train.new_adapters((SoftPrompt,), model, tokenizer, rows, 3, "vocab", seed=1)
    seen = {i for row in rows for i in row.source + row.target}
    assert set(prompt.nearest_tokens(model).flatten().tolist()) <= seen
    (other,) = train.new_adapters((SoftPrompt,), model, tokenizer, rows, 3, "vocab", seed=2)
    assert (prompt.vectors != other.vectors).any()


@pytest.mark.parametrize("flags", [["--init", "zero", "--mid-dim", "4"], ["--init", "random", "--dtype", "bfloat16"]])
def test_a_prefix_from_other_starts(base, tmp_path, flags):
    result = run(base, *flags, out=tmp_path / "out", steps=5)
    assert result["loss"] < result["curve"][0][1] and result["n_stored"] == 8 * 1024
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"].dtype == torch.float32


def test_what_a_run_says_is_what_it_returns(base, tmp_path, capsys):
    got = run(base, out=tmp_path / "out", steps=2)
    said = capsys.readouterr().out
    assert f"start    validation loss {got['curve'][0][1]:.3f}, before the first step\n" in said
    assert re.search(rf"step    2/2  loss \d\.\d\d\d  validation {got['curve'][-1][1]:.3f}  .* tokens/s", said)
    assert f"test     frozen  loss {got['loss_frozen']:.3f}  exact match {got['exact_match_frozen']:5.1f} %\n" in said
    assert f"         tuned   loss {got['loss']:.3f}  exact match {got['exact_match']:5.1f} %\n" in said
    assert f'use it with: python train.py --base {base} --adapter {tmp_path / "out"} --prompt "…"\n' in said


def test_training_json_tells_who_trained_what_and_how_well(base, tmp_path):
    """Its settings, curve and losses, a line each for a person to read; it lies beside base.json, in both parts of a stack."""
    got = run(base, "--method", "both", "--lr", "0.25", "--seed", "5", out=tmp_path / "out", steps=2)
    texts = [(tmp_path / "out" / name / "training.json").read_text(encoding="utf-8") for name in train.STACK]
    assert texts[0] == texts[1] and '\n  "lr": 0.25,\n' in texts[0]
    told = json.loads(texts[0])
    expected = {"method": "both", "task": "forty", "base": base, "lr": 0.25, "steps": 2, "seed": 5, "n_virtual": 4, "init": "text"}
    assert {key: told[key] for key in expected} == expected
    assert told["data"] == str(Path(base).parent / "forty.jsonl") and told["dtype"] == "float32"
    assert {key: told[key] for key in got} == got | {"curve": [list(point) for point in got["curve"]]}
    assert all((tmp_path / "out" / name / "base.json").exists() for name in train.STACK)


def test_an_adapter_without_training_json_is_used_as_before(base, tmp_path):
    """As those saved by earlier versions, or by PEFT, are; but not trained over."""
    run(base, out=tmp_path / "out", steps=2)
    flags = ["--adapter", tmp_path / "out", "--prompt", "name : Palace"]
    completion = prompted(base, *flags)
    (tmp_path / "out" / "training.json").unlink()
    assert prompted(base, *flags) == completion
    with pytest.raises(ValueError, match="holds adapter_config.json of unknown training, which is not overwritten"):
        run(base, out=tmp_path / "out")


def test_one_thread_and_two_agree_to_rounding(base, tmp_path):
    threads, results = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(run(base, out=tmp_path / str(n), steps=5))
    torch.set_num_threads(threads)
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
    numbers = [load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"] for name in ("1", "2")]
    assert_close(*numbers, rtol=1e-3, atol=1e-3)


def test_the_embedded_tasks_have_test_data_of_their_own():
    """train, validation and test examples of a task share no record; a run is scored on the last."""
    examples = train.load_examples("reply", None, None, seed=2)
    assert [len(examples[split]) for split in ("train", "validation", "test")] == [1000, 200, 500]
    assert not set(examples["test"]) & {*examples["train"], *examples["validation"]}
    assert examples["test"] == task_examples("reply", "test", 500, 2)


def test_own_data_and_prompting_the_result(base, tmp_path, capsys):
    """JSONL in, a seeded tenth held out; what is saved completes a prompt as the adapter in memory would."""
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [data.Example(f"q {i}", "Thai food") for i in range(20)])
    result = run(base, "--data", path, out=tmp_path / "out", steps=10)
    assert result["task"] == "mine" and result["loss"] < result["curve"][0][1]
    capsys.readouterr()
    completed = prompted(base, "--adapter", tmp_path / "out", "--prompt", "q 99")
    model, tokenizer = load_base(base), load_tokenizer(base)
    source = data.source_ids(tokenizer, "q 99")
    (expected,) = train.answers(model, [Prefix.load(tmp_path / "out", model)], tokenizer, [source], limit=256)
    assert completed == expected and capsys.readouterr().out == expected + "\n"
    assert prompted(base, "--prompt", "q 99") != expected
    held_out = train.load_examples("", str(path), None, 0)
    assert len(held_out["train"]) == 18 and len(held_out["validation"]) == 2 and held_out["test"] == held_out["validation"]
    assert not {e.input for e in held_out["train"]} & {e.input for e in held_out["validation"]}
    assert train.load_examples("", str(path), None, 1)["test"] != held_out["test"]
    given = train.load_examples("", str(path), str(path), 0)
    assert len(given["train"]) == len(given["validation"]) == 20


def test_predictions_are_what_each_source_gives_alone(base, tmp_path):
    """--predict: a line for each test example, in order; sources of all lengths, none touched by its neighbours."""
    run(base, "--predict", tmp_path / "p.jsonl", out=tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(list(line) == ["input", "target", "prediction"] for line in lines)
    model, tokenizer = load_base(base), load_tokenizer(base)
    texts = [line["input"] for line in lines] + ["a", "Thai food", "b"]
    sources = [data.source_ids(tokenizer, text) for text in texts]
    limit = 2 * max(len(tokenizer.encode_ordinary(line["target"])) + 1 for line in lines)
    adapter = [Prefix.load(tmp_path / "out", model)]
    assert [line["prediction"] for line in lines] == train.answers(model, adapter, tokenizer, sources[:4], limit)
    model.double()  # so that no two tokens are equally likely to rounding
    alone = [train.answers(model, adapter, tokenizer, [source], limit)[0] for source in sources]
    assert train.answers(model, adapter, tokenizer, sources, limit) == alone
    bytes_only = build_tokenizer(ranks_of([]))  # a model may know more ids than its tokenizer: they are no text
    assert isinstance(train.answers(model, [], bytes_only, [[5, 6]], 20)[0], str)


def test_sampling_a_completion(base):
    """The seed decides it, another one decides otherwise; the likeliest token alone is what greedy decoding takes."""
    flags = ["--prompt", "name : Palace", "--temperature", "1.5"]
    sampled = {seed: prompted(base, *flags, "--seed", seed) for seed in (0, 1, 2)}
    assert len(set(sampled.values())) == 3 and prompted(base, *flags) == sampled[0]
    greedy = prompted(base, "--prompt", "name : Palace")
    assert prompted(base, *flags, "--top-k", "1") == greedy
    assert all(prompted(base, *flags[:2], "--temperature", nearly) == greedy for nearly in ("0", "1e-40", "1e-6"))
    assert prompted(base, *flags, "--top-k", "5") not in (greedy, sampled[0])


def test_a_byte_of_a_prompt_that_is_no_character_counts_as_the_replacement(base):
    """A shell hands it over as half of a surrogate pair."""
    assert prompted(base, "--prompt", "a\udcffb") == prompted(base, "--prompt", "a\ufffdb")


def test_every_adapter_flag_counts(base, tmp_path, monkeypatch):
    """Two flags with one adapter each are one flag with two, the foremost first."""
    model, used = load_base(base), []
    Prefix.random(model, 2).save(tmp_path / "a", model)
    SoftPrompt.random(model, 3).save(tmp_path / "b", model)
    monkeypatch.setattr(train, "answers", lambda model, adapters, *_, **__: used.append([type(a) for a in adapters]) or ["x"])
    prompted(base, "--adapter", tmp_path / "a", "--adapter", tmp_path / "b", "--prompt", "x")
    prompted(base, "--adapter", tmp_path / "b", tmp_path / "a", "--prompt", "x")
    assert used == [[Prefix, SoftPrompt], [SoftPrompt, Prefix]]


# ------------------------------------------------------------------------------------------------------- at the desk


def test_a_saved_adapter_is_evaluated_on_a_file_without_training(base, tmp_path, capsys):
    """All of the file, with and without the adapter, and every prediction; the adapter's own files are not touched."""
    trained = run(base, out=tmp_path / "out")
    before = files_in(tmp_path / "out")
    write_jsonl(tmp_path / "new.jsonl", task_examples("sentence", "test", 7, 0))
    capsys.readouterr()
    flags = ["--base", base, "--device", "cpu", "--adapter", str(tmp_path / "out"), "--data", str(tmp_path / "new.jsonl")]
    found = train.main([*flags, "--predict", str(tmp_path / "p.jsonl")])
    model, tokenizer = load_base(base), load_tokenizer(base)
    rows = data.encode(tokenizer, task_examples("sentence", "test", 7, 0))
    adapters = [Prefix.load(tmp_path / "out", model)]
    for key, some in (("loss_frozen", []), ("loss", adapters)):
        assert found[key] == pytest.approx(train.evaluate(model, some, rows, 3)[0], rel=1e-5)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 7 and files_in(tmp_path / "out") == before
    assert f"tuned   loss {found['loss']:.3f}" in capsys.readouterr().out
    own = train.main([*flags[:-2], "--task", "sentence"])  # and on the test data of a task
    assert own["loss"] != found["loss"] and trained["loss"] != own["loss"]


def test_the_frozen_base_answers_beside_the_tuned_one(base, tmp_path, capsys):
    """For each example shown; where the base itself is tuned or nothing is, there is no other one to ask."""
    run(base, out=tmp_path / "out")
    shown = capsys.readouterr().out.split("\nsource   ")[1:]
    model, tokenizer = load_base(base).freeze(), load_tokenizer(base)
    for block in shown:
        lines = block.rstrip("\n").split("\n")
        (frozen,) = train.answers(model, [], tokenizer, [data.source_ids(tokenizer, lines[0])], 100)
        said = "\n".join([lines[3].removeprefix("frozen   "), *(line[9:] for line in lines[4:])])
        assert frozen.startswith(said) and lines[3].startswith("frozen   ")
    assert len(shown) == 3
    run(base, "--method", "none")
    assert "frozen   \n" not in (printed := capsys.readouterr().out) and printed.count("\nfrozen   ") == 1  # the loss


@pytest.mark.parametrize("terminal", [False, True])
def test_prompts_may_come_from_stdin(base, monkeypatch, capsys, terminal):
    """Every line is one: read at once from a pipe, one by one in a dialogue; the answers are those that each has alone."""
    lines = ["name : Palace", "I had Thai food", "a"]
    expected = [prompted(base, "--prompt", line) for line in lines]
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal, raising=False)
    batches, answers = [], train.answers
    monkeypatch.setattr(train, "answers", lambda *given, **how: batches.append(len(given[3])) or answers(*given, **how))
    found = train.main(["--base", base, "--device", "cpu", "--prompt", "-"])["completions"]
    assert found == expected and batches == ([1, 1, 1] if terminal else [3])
    assert capsys.readouterr().out.endswith("".join(text + "\n" for text in expected))


def test_adapters_exported_are_one_prefix(base, tmp_path):
    """For PEFT, which has no stack: the cache of both is what the prefix holds, and it gives the same logits."""
    run(base, "--method", "both", out=tmp_path / "out")
    flags = ["--base", base, "--device", "cpu", "--adapter", str(tmp_path / "out")]
    train.main([*flags, "--export", str(tmp_path / "one")])
    model = load_base(base).freeze()
    stack, (one,) = train.load_adapters(tmp_path / "out", model), train.load_adapters(tmp_path / "one", model)
    assert isinstance(one, Prefix) and len(one.start) == 8
    for got, expected in zip(one.past_kv(model), train.stacked_past_kv(stack, model)):
        assert_close(got, expected, rtol=0, atol=0)
    train.main([*flags, "--export", str(tmp_path / "one")])  # again: it is the same
    run(base, "--method", "soft_prompt", out=tmp_path / "other")
    with pytest.raises(ValueError, match="holds export trained for .*/out .* which is not overwritten"):
        train.main([*flags[:-1], str(tmp_path / "other"), "--export", str(tmp_path / "one")])
    with pytest.raises(ValueError, match="holds both trained for forty .* which is not overwritten"):
        train.main([*flags, "--export", str(tmp_path / "out" / "prefix")])


def test_patience_ends_a_training_and_keeps_the_best(base, tmp_path, monkeypatch):
    """After so many looks without a lower validation loss; what is saved is what had the lowest, --resume or not."""
    losses = dict(zip(range(0, 13, 2), [1.0, 0.9, 0.5, 0.7, 0.6, 0.8, 0.1]))
    monkeypatch.setattr(train, "evaluate", lambda model, adapters, rows, B, e=train.evaluate: (next(looks), e(model, adapters, rows, B)[1]))
    model, rows = load_base(base).freeze(), {split: rows_of(base) for split in ("train", "validation")}

    def tuned(name, patience):
        nonlocal looks
        looks = iter(losses.values())
        prompt = SoftPrompt.text(model, torch.arange(3))
        checkpoint = Checkpoint(tmp_path / name / CHECKPOINT, {}, False)
        (tmp_path / name).mkdir()
        kept = []
        monkeypatch.setattr(Checkpoint, "keep", lambda *given, keep=Checkpoint.keep: kept.append(prompt.vectors.detach().clone()) or keep(*given))
        curve = train.tune(model, [prompt], rows, plan(12, eval_every=2, save_every=100, patience=patience), checkpoint)
        return curve, prompt, checkpoint, kept

    looks = iter(())
    curve, prompt, checkpoint, kept = tuned("patient", 3)
    assert [step for step, _ in curve] == [0, 2, 4, 6, 8, 10] and len(kept) == 10
    torch.nn.ModuleList([prompt]).load_state_dict(read_tensors(checkpoint.best))
    assert_close(prompt.vectors.data, kept[3], rtol=0, atol=0)
    checkpoint.end()
    assert [path.name for path in (tmp_path / "patient").iterdir()] == ["metrics.jsonl"]
    assert [step for step, _ in tuned("unlimited", None)[0]] == list(losses)


def test_the_best_survives_an_interruption(base, tmp_path, monkeypatch):
    """It is a file beside the checkpoint: stopped after step 5, a run goes back to the numbers of step 3, and not to its last."""
    model, rows = load_base(base).freeze(), {split: rows_of(base) for split in ("train", "validation")}
    losses = [1.0, 0.9, 0.8, 0.5, 0.7, 0.6, 0.8]  # at steps 0 to 6

    def tuned(name: str, losses: list[float], resume: bool) -> tuple[Tensor, Tensor]:
        prompt, looks = SoftPrompt.text(model, torch.arange(3)), iter(losses)
        monkeypatch.setattr(train, "evaluate", lambda *_: (next(looks), []))
        checkpoint = Checkpoint(tmp_path / name / CHECKPOINT, {}, resume)
        train.tune(model, [prompt], rows, plan(6, eval_every=1, save_every=1, patience=5), checkpoint)
        last = prompt.vectors.detach().clone()
        torch.nn.ModuleList([prompt]).load_state_dict(read_tensors(checkpoint.best))
        return prompt.vectors.data, last

    best, last = tuned("whole", losses, resume=False)
    with pytest.raises(KeyboardInterrupt), mock.patch.object(Checkpoint, "save", interrupted_at(5, Checkpoint.save)):
        tuned("halves", losses, resume=False)
    assert_close(tuned("halves", losses[6:], resume=True), (best, last), rtol=0, atol=0)
    assert (best != last).any()


def test_a_run_with_patience_resumes_and_tidies_up(base, tmp_path):
    """It ends with the same numbers, and the file of the best is gone."""
    flags = ["--steps", "6", "--eval-every", "1", "--save-every", "1", "--patience", "5", "--lr", "0.5"]
    run(base, *flags, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt), mock.patch.object(Checkpoint, "save", interrupted_at(5, Checkpoint.save)):
        run(base, *flags, out=tmp_path / "halves")
    run(base, *flags, "--resume", out=tmp_path / "halves")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert_close(one, two, rtol=0, atol=0)
    assert not list(tmp_path.rglob("best.safetensors"))


def interrupted_at(step, save):
    def saved(self, trainee, optimizer, at, curve):
        save(self, trainee, optimizer, at, curve)
        if at == step:
            raise KeyboardInterrupt
    return saved


def test_metrics_are_lines_of_json(base, tmp_path):
    """One a step, beside the adapter; a run that was resumed has the very lines of one that was not."""
    flags = ["--steps", "6", "--eval-every", "2", "--save-every", "2"]
    with pytest.raises(KeyboardInterrupt), mock.patch.object(Checkpoint, "save", interrupted_at(4, Checkpoint.save)):
        run(base, *flags, out=tmp_path / "out")
    found = run(base, *flags, "--resume", out=tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and all(line["loss"] > 0 for line in lines)
    assert [line["validation"] for line in lines[1::2]] == [loss for _, loss in found["curve"][1:]]
    run(base, *flags, out=tmp_path / "whole")
    before = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert before == (tmp_path / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(train.Diverged):  # what belongs to the adapter stays beside it
        run(base, *flags, "--lr", "1e30", out=tmp_path / "whole")
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == before


def test_sizes_of_a_base_that_is_pretrained(tmp_path):
    """Layers, heads, width, context, in this order."""
    flags = ["--method", "pretrain", "--steps", "2", "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / "base")]
    train.main([*flags, "--sizes", "3", "2", "32", "64"])
    config = load_base(tmp_path / "base").config
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (3, 2, 32, 64)
    with pytest.raises(ValueError, match=r"--sizes \[3, 5, 32, 64\]: give 1 or more of each, and a width that is a multiple"):
        train.main([*flags, "--sizes", "3", "5", "32", "64"])


# ---------------------------------------------------------------------------------------------------------- pretraining


def test_a_base_from_ones_own_text(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 400)
    out = tmp_path / "base"
    flags = ["--corpus", str(tmp_path / "a.txt"), "--steps", "60", "--batch-size", "4", "--out", str(out), "--device", "cpu"]
    train.main(["--method", "pretrain", *flags])
    model, tokenizer = load_base(out), load_tokenizer(out)
    ids = torch.tensor([tokenizer.encode_ordinary("the cat sat")])
    assert tokenizer.decode(model.generate(ids, 2)[0].tolist()) == "the cat sat on the"


def test_a_corpus_too_small_to_learn_from(tmp_path, monkeypatch):
    """Ten windows of 129 tokens are the least; here a token is a byte, and one more ends the text."""
    monkeypatch.setattr(small_base.pretrain, "train_bpe", lambda *_, n_merges: [])
    flags = ["--method", "pretrain", "--corpus", str(tmp_path / "a"), "--steps", "1", "--batch-size", "1", "--device", "cpu"]
    (tmp_path / "a").write_text("b" * 1288)
    with pytest.raises(ValueError, match="^the corpus has 1289 tokens; give at least 1290 to learn from"):
        train.main([*flags, "--out", str(tmp_path / "base")])
    (tmp_path / "a").write_text("b" * 1289)
    train.main([*flags, "--out", str(tmp_path / "base")])


def test_pretraining_written_out(tmp_path, monkeypatch, capsys):
    """Which texts, windows that start anywhere, two optimizers, and their rates in the first steps."""
    shown, show = [], command_process.Progress.show
    monkeypatch.setattr(command_process.Progress, "show", lambda self, *given, **loss: shown.append(given) or show(self, *given, **loss))
    train.pretrain(tmp_path / "base", [], 3, 0.1, batch_size=8, seed=5, device=torch.device("cpu"))
    assert shown == [(1, 8 * 128), (2, 8 * 128), (3, 8 * 128)]
    assert re.search(r"step    3/3  loss \d\.\d\d\d  .* tokens/s", capsys.readouterr().out)
    got, tokenizer, rng = load_base(tmp_path / "base"), load_tokenizer(tmp_path / "base"), random.Random(5)
    texts = [random_document(rng) for _ in range(48)]
    stream = torch.tensor([i for text in texts for i in [*tokenizer.encode_ordinary(text), tokenizer.eot_token]])
    torch.manual_seed(5)
    model = GPT(GPTConfig(tokenizer.n_vocab))
    initialise(model)
    model.ln_f.weight.data.fill_(0.1)
    matrices = [p for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2]
    muon = torch.optim.Muon(matrices, weight_decay=0.1)
    rest = [p for name, p in model.named_parameters() if not (name.startswith("h.") and p.dim() == 2)]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(5)
    for step in range(3):
        starts = torch.randint(len(stream) - 128, (8, 1), generator=generator)
        tokens = stream[starts + torch.arange(129)]
        model.zero_grad()
        F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for optimizer, lr in ((muon, 0.1), (adam, 3e-3)):
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 30, (3 - step) / 0.9)
            optimizer.step()
    for weight, expected in zip(got.parameters(), model.parameters()):
        assert_close(weight, expected.data, rtol=1e-5, atol=1e-5)


def test_pretraining_rates_rise_stay_and_fall(tmp_path, monkeypatch):
    """Up in 30 steps, down in the last 30 %, both optimizers alike."""
    rates = [], []

    def recorder(i: int) -> SimpleNamespace:
        group = {}
        return SimpleNamespace(param_groups=[group], step=lambda: rates[i].append(group["lr"]))

    monkeypatch.setattr(small_base.pretrain, "optimizers_of", lambda *_: [(recorder(0), 1.0), (recorder(1), 2.0)])
    monkeypatch.setattr(small_base.pretrain, "GPTConfig", lambda V: GPTConfig(V, 8, 1, 1, 4))
    train.pretrain(tmp_path / "base", [], 100, 0.1, batch_size=1, seed=0, device=torch.device("cpu"))
    expected = [(i + 1) / 30 for i in range(30)] + [1] * 41 + [i / 30 for i in range(29, 0, -1)]
    assert rates[0] == pytest.approx(expected) and rates[1] == pytest.approx([2 * rate for rate in expected])


def test_pretraining_that_diverges_saves_nothing(tmp_path):
    flags = ["--method", "pretrain", "--steps", "3", "--batch-size", "8", "--device", "cpu", "--out", str(tmp_path / "none")]
    with pytest.raises(ValueError, match="the loss became nan with --lr 1e\\+30: lower it. Nothing was saved"):
        train.main([*flags, "--lr", "1e30"])
    assert not list((tmp_path / "none").iterdir())


def test_the_first_run_makes_the_base_and_the_next_one_finds_it(tmp_path, monkeypatch, capsys):
    """In out/base, the same one whatever the run's own flags are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.RECIPES, "pretrain", train.RECIPES["pretrain"]._replace(steps=2))
    small = ["--steps", "1", "--device", "cpu", "--batch-size", "2", "--task", "sentiment"]
    train.main([*small, "--seed", "3", "--lr", "0.1", "--base", "out/base"])
    made = files_in(tmp_path / "out" / "base")
    assert set(made) == {"config.json", "model.safetensors", "vocab.json", "merges.txt", "training.json"}
    assert "pretraining the small base, once, into out" in capsys.readouterr().out
    train.main([*small, "--method", "soft_prompt"])
    assert "pretraining" not in capsys.readouterr().out and files_in(tmp_path / "out" / "base") == made


def test_the_base_saw_every_position(base):
    """Windows start anywhere in the packed stream, so a text shifted by a prefix is a text at home."""
    model, rows = load_base(base).freeze(), rows_of(base, n=40)
    torch.manual_seed(0)
    untrained = GPT(model.config).wpe.weight
    assert ((model.wpe.weight - untrained).norm(dim=1) > 0.1).all()
    here, _ = train.evaluate(model, [], rows, 40)
    document = torch.tensor((rows[0].source + rows[0].target)[-20:])
    shifted, _ = train.evaluate(model, [Prefix.text(model, document)], rows, 40)
    assert shifted < 1.3 * here


# ------------------------------------------------------------------------------------------------------------- progress


def shown_by(monkeypatch, capsys, terminal: bool, first: int, steps: int, seconds: float) -> list[tuple[float, str]]:
    """A run of steps of so many seconds and 50 tokens each -> what it prints, and when."""
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(command_process, "time", clock)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    progress, printed = command_process.Progress(first, steps), []
    for step in range(first + 1, steps + 1):
        clock.now += seconds
        progress.show(step, 50, loss=1.0)
        if text := capsys.readouterr().out:
            printed.append((clock.now - 100, text))
    return printed


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_says_how_fast_and_how_long(monkeypatch, capsys, terminal):
    """A sixteenth of a second a step, from step 10 on: a line every tenth, or one refreshed every third step."""
    printed = shown_by(monkeypatch, capsys, terminal, 10, 51, 0.0625)
    line = "step {:4}/51  loss 1.000     800 tokens/s  {:3.0f} s left"
    steps = [*range(13, 51, 3), 51] if terminal else [*range(12, 51, 6), 51]
    lines = [line.format(step, (51 - step) / 16) for step in steps]
    lines = ["\r" + line for line in lines[:-1]] + ["\r" + lines[-1] + "\n"] if terminal else [line + "\n" for line in lines]
    assert [text for _, text in printed] == lines


@pytest.mark.parametrize("seconds", [0.01, 0.4, 1, 2.4, 3, 4.9])
def test_no_silence_longer_than_five_seconds(monkeypatch, capsys, seconds):
    """However slow the steps are, the first line comes within five seconds, and so does each after it."""
    times = [at for at, _ in shown_by(monkeypatch, capsys, False, 0, 1000, seconds)]
    assert max(b - a for a, b in zip([0, *times], times)) <= 5 and times[-1] == pytest.approx(1000 * seconds)


def test_steps_slower_than_that_have_a_line_each(monkeypatch, capsys):
    assert [at for at, _ in shown_by(monkeypatch, capsys, False, 0, 30, 7)] == list(range(7, 211, 7))


@pytest.mark.parametrize("seconds", [0.01, 0.04])
def test_a_quick_run_has_ten_lines(monkeypatch, capsys, seconds):
    assert len(shown_by(monkeypatch, capsys, False, 0, 1000, seconds)) == 10


# -------------------------------------------------------------------------------------------------- several processes


def torchrun(base, *flags) -> list[str]:
    """The command of two processes, on the forty examples."""
    common = ["--base", base, "--device", "cpu", "--data", Path(base).parent / "forty.jsonl", *flags]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", train.__file__, *map(str, common)]


def test_two_processes_train_the_adapter_that_one_does(base, tmp_path):
    """torchrun: each takes half of each batch, gradients are summed; one of them writes and talks."""
    flags = ["--mid-dim", "4", "--save-every", "1"]
    command = torchrun(base, *flags, "--batch-size", "4", "--steps", "4", "--out", tmp_path / "two")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    whole = run(base, *flags, out=tmp_path / "one", steps=4)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert said.count("saved to") == said.count("step    4/4") == 1 and f"tuned   loss {whole['loss']:.3f}" in said
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"] for name in ("one", "two"))
    assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert set(files_in(tmp_path / "two")) == set(files_in(tmp_path / "one"))


def test_each_process_needs_an_example(base, monkeypatch):
    monkeypatch.setattr(train, "start_process", lambda: (1, 2))
    with pytest.raises(ValueError, match="--batch-size 1 for 2 processes: give each an example at least"):
        run(base, "--batch-size", "1")


def test_what_the_second_of_two_processes_does(base, tmp_path, monkeypatch):
    """It takes every second row, hands in its loss and the gradients of what is trained, and saves nothing."""
    handed_in, batches, target_hidden = [], [], train.target_hidden
    two = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2, all_reduce=handed_in.append)
    monkeypatch.setattr(command_process, "dist", two)
    monkeypatch.setattr(train, "target_hidden", lambda *given: batches.append(given[1]) or target_hidden(*given))
    model, rows = load_base(base).freeze(), rows_of(base, n=6)
    prefix = Prefix.random(model, 3).reparametrise(2)
    monkeypatch.setattr(train, "evaluate", lambda *_: (1.0, []))
    checkpoint = Checkpoint(tmp_path / "out" / CHECKPOINT, {}, False)
    train.tune(model, [prefix], {"train": rows, "validation": []}, plan(2, save_every=1), checkpoint)
    parts = [data.batch_of(step[1::2], model.device) for step in islice(data.shuffled_batches(rows, 4, 0), 2)]
    assert [batch.idx.tolist() for batch in batches] == [part.idx.tolist() for part in parts]
    shapes = [(), *(p.shape for p in prefix.parameters() if p.requires_grad)]
    assert [tensor.shape for tensor in handed_in] == 2 * shapes
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in Linux's /proc")
def test_a_process_that_dies_ends_the_run_of_all(base, tmp_path):
    """With an error, not with a wait for ever; the last checkpoint stays."""
    flags = ["--steps", "20000", "--batch-size", "4", "--save-every", "5", "--eval-every", "10000", "--out", tmp_path / "out"]
    process = subprocess.Popen(torchrun(base, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / CHECKPOINT).exists():
        assert process.poll() is None
    _, second = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert [name for name in files_in(tmp_path / "out") if not name.endswith(".new")] == [CHECKPOINT]


# ----------------------------------------------------------------------------------------- starting from what was saved


@pytest.mark.parametrize("method", ["prefix", "soft_prompt", "both"])
def test_training_goes_on_from_another_tasks_adapter(base, tmp_path, method):
    """--init DIR: the numbers trained on one task are where the next one starts; a stack from a stack."""
    first = run(base, "--method", method, out=tmp_path / "first")
    again = run(base, "--method", method, "--init", tmp_path / "first", out=tmp_path / "again")
    assert again["curve"][0][1] == pytest.approx(first["curve"][-1][1], rel=1e-6)  # it starts where the other ended
    assert again["n_stored"] == first["n_stored"]
    other = "soft_prompt" if method == "prefix" else "prefix"
    with pytest.raises(ValueError, match=f"--init {tmp_path}/first holds a .*, and --method trains a (Prefix|SoftPrompt)$"):
        run(base, "--method", other, "--init", tmp_path / "first", out=tmp_path / "other")
    with pytest.raises(ValueError, match="holds a .*, and --method trains no adapter$"):
        run(base, "--method", "full", "--init", tmp_path / "first", out=tmp_path / "other")


def test_the_readmes_python_runs(base, tmp_path, monkeypatch):
    """And what it saves acts as what it was made of."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/base").symlink_to(base)
    for method in ("prefix", "soft_prompt"):
        train.main(["--method", method, "--steps", "1", "--device", "cpu", "--batch-size", "2"])
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    names = {}
    exec(readme.split("```python\n")[1].split("```")[0], names)
    idx, model = torch.tensor([[5, 6, 7]]), names["model"]
    for cache, saved in [(names["prompt"].past_kv(model), "as_prefix"), (names["stack"], "stack_as_prefix")]:
        kept = Prefix.load(Path("out/sentence") / saved, model)
        assert_close(model(idx, kept.past_kv(model))[0], model(idx, cache)[0])
    assert names["mixed"][0][0].size(0) == 2


# ------------------------------------------------------------------------------------------------------------- resuming


def stopped_run(base, out, monkeypatch, *flags, after: int):
    """A run of seven steps that Ctrl-C ends within the step behind these."""
    hidden, steps = train.target_hidden, []

    def interrupted(*given):
        steps.extend([1] * torch.is_grad_enabled())
        if len(steps) > after:
            raise KeyboardInterrupt
        return hidden(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "target_hidden", interrupted)
        run(base, *flags, out=out, steps=7)


@pytest.mark.parametrize(
    "flags",
    [["--method", "prefix"], ["--mid-dim", "4"], ["--method", "soft_prompt"], ["--method", "both"], ["--method", "full"]],
)
def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(base, tmp_path, monkeypatch, capsys, flags):
    """Numbers, MLP, optimizer, step and order of the examples; the curve, too. Nothing is left of the checkpoint, and a
    file that a killed writer left is nobody's business."""
    flags = [*flags, "--eval-every", "2"]
    whole = run(base, *flags, out=tmp_path / "whole", steps=7)
    stopped_run(base, tmp_path / "parts", monkeypatch, *flags, after=4)
    assert set(files_in(tmp_path / "parts")) == {CHECKPOINT}
    (tmp_path / "parts" / ".0123abcd.new").write_bytes(b"half of someth")
    capsys.readouterr()
    resumed = run(base, *flags, "--resume", out=tmp_path / "parts", steps=7)
    assert f"start    validation loss {whole['curve'][2][1]:.3f}, resuming after step 4\n" in capsys.readouterr().out
    for result in (whole, resumed):
        del result["out"]
    assert resumed == whole and [step for step, _ in whole["curve"]] == [0, 2, 4, 6, 7]
    one, two = files_in(tmp_path / "whole"), files_in(tmp_path / "parts")
    assert two.pop(".0123abcd.new") == b"half of someth"
    for files in (one, two):
        for name in [name for name in files if name.endswith("training.json")]:
            told = json.loads(files[name])
            del told["out"]
            files[name] = told
    assert one == two and any(name.endswith("safetensors") for name in one)


def test_checkpoints_are_written_every_so_many_steps(base, tmp_path, monkeypatch):
    """Each replaces the last one in one go: a save that fails leaves the old one whole, and no debris."""
    steps, fsync = [], os.fsync

    def failing(file: int) -> None:
        fsync(file)
        steps.append(1)
        if len(steps) == 3:
            raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        run(base, "--save-every", "2", out=tmp_path / "out", steps=9)
    assert set(files_in(tmp_path / "out")) == {CHECKPOINT}
    with safe_open(tmp_path / "out" / CHECKPOINT, "pt") as opened:
        assert opened.metadata()["step"] == "4"
    monkeypatch.undo()
    whole = run(base, out=tmp_path / "whole", steps=9)
    assert run(base, "--resume", out=tmp_path / "out", steps=9)["loss"] == whole["loss"]
    assert run(base, "--resume", out=tmp_path / "new", steps=9)["loss"] == whole["loss"]  # nothing to resume: from the start


@pytest.mark.parametrize("flags, expected", [([], [10, 20, 30, 40, 50, 60, 70, 80, 90]), (["--save-every", "45"], [45, 90])])
def test_a_tenth_of_the_steps_is_the_most_that_ctrl_c_costs(base, tmp_path, monkeypatch, flags, expected):
    """Unless --save-every says otherwise; at the end, the adapter itself is saved, and no checkpoint."""
    saved = []
    monkeypatch.setattr(Checkpoint, "save", lambda self, trainee, optimizer, step, curve: saved.append(step))
    run(base, *flags, "--method", "soft_prompt", "--n-virtual", "1", out=tmp_path / "out", steps=100)
    assert saved == expected and not (tmp_path / "out" / CHECKPOINT).exists()


def test_a_checkpoint_of_another_run_is_not_taken(base, tmp_path, monkeypatch):
    """Nor overwritten: what was trained is lost by nobody's forgetting of a flag."""
    stopped_run(base, tmp_path / "out", monkeypatch, after=2)
    file = tmp_path / "out" / CHECKPOINT
    before = file.read_bytes()
    with pytest.raises(ValueError, match="stopped after step 2: add --resume to go on, or delete it"):
        run(base, out=tmp_path / "out", steps=7)
    for flags, message in [
        (["--lr", "0.5"], "lr 0.3, not 0.5"),
        (["--seed", "1"], "seed 0, not 1"),
        (["--task", "chat"], "examples .*, not .*"),
        (["--n-virtual", "2"], "n_virtual 8, not 2"),
        (["--method", "soft_prompt"], "method prefix, not soft_prompt"),
    ]:
        with pytest.raises(ValueError, match=f"is of a run with {message}: repeat its flags, or delete it"):
            run(base, *flags, "--resume", out=tmp_path / "out", steps=7)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="is of a run with base .*, not of the twin: repeat"):
        patch.setattr(train, "fingerprint", lambda model: "of the twin")
        run(base, "--resume", out=tmp_path / "out", steps=7)
    assert files_in(tmp_path / "out") == {CHECKPOINT: before}
    file.write_bytes(before[:-9])
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        run(base, "--resume", out=tmp_path / "out", steps=7)
    for metadata in (None, {"step": "2"}, {"step": "two"}, {"step": "[" * 10**5}):
        save_file({"x": torch.zeros(1)}, file, metadata=metadata)
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            run(base, "--resume", out=tmp_path / "out", steps=7)


# ---------------------------------------------------------------------------------------------- what is trained is kept


def raising(error: BaseException):
    def function(*_, **__):
        raise error

    return function


def after_training(monkeypatch, change) -> None:
    """As soon as the training itself is over, calls `change`."""
    tune = train.tune

    def tuned(*given):
        curve = tune(*given)
        change()
        return curve

    monkeypatch.setattr(train, "tune", tuned)


@pytest.mark.parametrize("where", ["evaluate", "show", "answers", "replace_file"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device"), MemoryError()], ids=lambda e: type(e).__name__)
def test_what_comes_after_training_cannot_lose_it(base, tmp_path, monkeypatch, where, error):
    """Whether testing, showing or predicting is interrupted or fails: the adapter and its settings are saved already."""
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        after_training(patch, lambda: patch.setattr(train, where, raising(error)))
        run(base, "--predict", tmp_path / "p.jsonl", out=tmp_path / "out")
    whole = run(base, out=tmp_path / "whole")
    assert set(files_in(tmp_path / "out")) == set(files_in(tmp_path / "whole")) and not (tmp_path / "p.jsonl").exists()
    assert files_in(tmp_path / "out")["adapter_model.safetensors"] == files_in(tmp_path / "whole")["adapter_model.safetensors"]
    assert json.loads((tmp_path / "out" / "training.json").read_text())["curve"] == [list(point) for point in whole["curve"]]


@pytest.mark.parametrize("method", ["both", "full"])
def test_each_method_saves_before_it_tests(base, tmp_path, monkeypatch, method):
    with pytest.raises(KeyboardInterrupt):
        after_training(monkeypatch, lambda: monkeypatch.setattr(train, "evaluate", raising(KeyboardInterrupt())))
        run(base, "--method", method, out=tmp_path / "out")
    assert prompted(*([str(tmp_path / "out")] if method == "full" else [base, "--adapter", tmp_path / "out"]), "--prompt", "x")
    assert not (tmp_path / "out" / CHECKPOINT).exists()


def test_a_console_that_fails_leaves_no_checkpoint_of_what_is_saved(base, tmp_path, monkeypatch):
    """First the adapter is written, then its checkpoint removed, and only then is anything said of it."""

    def say(text: str) -> None:
        if text.startswith("saved to"):
            raise OSError("Input/output error")

    monkeypatch.setattr(command_adapters, "say", say)
    with pytest.raises(OSError, match="Input/output error"):
        run(base, "--save-every", "1", out=tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").exists() and not (tmp_path / "out" / CHECKPOINT).exists()


PREDICT = {
    "a folder": ("folder", "holds no predictions, and is not overwritten"),
    "--out itself": ("out", "holds no predictions, and is not overwritten"),
    "--data": ("mine.jsonl", "holds no predictions, and is not overwritten"),
    "nothing": ("", "holds no predictions, and is not overwritten"),
    "a file of another program": ("notes.txt", "holds no predictions, and is not overwritten"),
    "a device": ("/dev/null", "holds no predictions, and is not overwritten"),
    "below a file": ("mine.jsonl/p.jsonl", "mine.jsonl cannot be written to"),
}


@pytest.mark.parametrize("place, message", PREDICT.values(), ids=PREDICT)
def test_predictions_go_only_where_nothing_is_lost(base, tmp_path, monkeypatch, place, message):
    """--predict is looked at before training; only what is not there, or holds predictions, is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    shutil.copy(Path(base).parent / "forty.jsonl", "mine.jsonl")
    before = files_in(tmp_path)
    monkeypatch.setattr(train, "tune", None)
    with pytest.raises(ValueError, match=message):
        run(base, "--data", "mine.jsonl", "--predict", place, out="out")
    assert files_in(tmp_path) == before


def test_predictions_beside_the_adapter(base, tmp_path):
    """Inside --out they lie well, and a second run replaces them; but they never take the name of a file of the adapter."""
    first = run(base, "--predict", tmp_path / "out" / "p.jsonl", out=tmp_path / "out")
    again = run(base, "--predict", tmp_path / "out" / "p.jsonl", out=tmp_path / "out")
    assert again["loss"] == first["loss"] and len((tmp_path / "out" / "p.jsonl").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="holds no predictions, and is not overwritten"):
        run(base, "--predict", tmp_path / "new" / "adapter_config.json", out=tmp_path / "new")
    assert prompted(base, "--adapter", tmp_path / "new", "--prompt", "x") == prompted(base, "--adapter", tmp_path / "out", "--prompt", "x")


@pytest.mark.parametrize("flags", [["--out", "here/new/adapter"], ["--out", "elsewhere", "--predict", "here/predictions.jsonl"]])
def test_a_folder_that_cannot_be_written_to_is_refused_before_training(base, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "new" / "adapter").mkdir(parents=True)
    touch = Path.touch

    def refused(path: Path, *given, **named) -> None:
        if "here" in path.parts:
            raise PermissionError(13, "Permission denied")
        touch(path, *given, **named)

    monkeypatch.setattr(Path, "touch", refused)
    monkeypatch.setattr(train, "tune", None)
    with pytest.raises(ValueError, match="^here.* cannot be written to \\(Permission denied\\): name another place"):
        run(base, *flags)
    assert not files_in(tmp_path)


def refused(base, folder: Path, message: str, *flags, out=None) -> None:
    """The run ends in a sentence before it trains, and every file is as it was."""
    before = files_in(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(train, "tune", None)
        patch.setattr(small_base.pretrain, "train_bpe", None)
        run(base, *flags, out=out)
    assert files_in(folder) == before


def test_a_base_is_never_overwritten(base, tmp_path):
    """Neither by an adapter, nor by a tuned model, nor by another base."""
    shutil.copytree(base, tmp_path / "base")
    for flags in (["prefix"], ["soft_prompt"], ["full"]):
        refused(base, tmp_path, "holds pretrain trained for the restaurant world, which is not overwritten", "--method", *flags, out=tmp_path / "base")
    flags = ["--method", "pretrain", "--device", "cpu", "--out", str(tmp_path / "base")]
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="holds a model already, and a base is not overwritten: name another --out"):
        train.main(flags)
    assert files_in(tmp_path) == before


def test_an_adapter_is_never_overwritten_by_another_training(base, tmp_path):
    """Of another method, task, data or base, or by a base; files of a user's own beside it do not matter."""
    run(base, out=tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    shutil.copytree(base, tmp_path / "base")
    shutil.copy(Path(base).parent / "forty.jsonl", tmp_path / "forty.jsonl")
    who = "out holds prefix trained for forty \\(.*forty.jsonl\\) on .*, which is not overwritten: name another --out"
    for flags in (["--method", "soft_prompt"], ["--method", "full"], ["--task", "chat"], ["--data", tmp_path / "forty.jsonl"]):
        refused(base, tmp_path, who, *flags, out=tmp_path / "out")
    refused(str(tmp_path / "base"), tmp_path, who, "--data", Path(base).parent / "forty.jsonl", out=tmp_path / "out")
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="holds prefix trained for forty .*, which is not overwritten"):
        train.main(["--method", "pretrain", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert files_in(tmp_path) == before
    run(base, "--lr", "0.1", "--seed", "1", out=tmp_path / "out")  # the same training, with other settings
    after = files_in(tmp_path)
    assert after.keys() == before.keys() and after["out/notes.txt"] == b"mine"
    assert after["out/adapter_model.safetensors"] != before["out/adapter_model.safetensors"]


def test_a_stack_is_not_saved_over_two_single_adapters(base, tmp_path):
    """--method both saves to two folders of the names that out/TASK has for each method alone."""
    for method in train.STACK:
        run(base, "--method", method, out=tmp_path / method)
    refused(base, tmp_path, "prefix holds prefix trained for forty .* which is not overwritten", "--method", "both", out=tmp_path)


def test_a_stack_and_an_adapter_do_not_share_a_folder(base, tmp_path):
    """For which of them would --adapter FOLDER be?"""
    run(base, out=tmp_path / "one")
    refused(base, tmp_path, "one holds prefix trained", "--method", "both", out=tmp_path / "one")


def test_two_files_of_one_name_do_not_share_a_folder(base, tmp_path, monkeypatch):
    """a/train.jsonl and b/train.jsonl both go to out/train by default: the second is told so."""
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        shutil.copy(Path(base).parent / "forty.jsonl", f"{folder}/train.jsonl")
    run(base, "--data", "a/train.jsonl")
    refused(base, tmp_path, "out/train/prefix holds prefix trained for train \\(.*a/train.jsonl\\)", "--data", "b/train.jsonl")
    run(base, "--data", tmp_path / "a" / "train.jsonl")  # the same one, by another path


# ------------------------------------------------------------------------------------------------------------- consoles


def command(base, *flags) -> list[str]:
    """train.py as a user starts it, on the forty examples."""
    common = ["--base", base, "--device", "cpu", "--batch-size", "2", *flags]
    common += [] if "--data" in flags else ["--data", Path(base).parent / "forty.jsonl"]
    return [sys.executable, train.__file__, *map(str, common)]


def started(base, *flags, env: dict[str, str] | None = None, **how) -> subprocess.Popen:
    """On one thread: several that share a busy core wait for each other more than they work."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(command(base, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, **how)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_cannot_show_a_character_shows_another(base, tmp_path, encoding):
    """And the run ends well: with an emoji in data and prompt, and the … of its own sentences."""
    write_jsonl(tmp_path / "mine.jsonl", [data.Example("say 🙂", "→ 🙂")] * 4)
    flags = ["--data", tmp_path / "mine.jsonl", "--steps", "2", "--out", tmp_path / "out"]
    process = started(base, *flags, env={"PYTHONIOENCODING": encoding})
    said, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")
    assert "source   say ?\nexpected ? ?\n" in said.decode(encoding).replace("\r\n", "\n")
    assert Prefix.load(tmp_path / "out", load_base(base)).n_stored() == 8 * 1024


def test_a_reader_that_leaves_does_not_end_the_run(base, tmp_path):
    """`| head -1` closes the pipe after the first line; training goes on, and saves."""
    process = started(base, "--steps", "3", "--out", tmp_path / "out")
    assert process.stdout.readline().startswith(b"base     ")
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=120) == 0
    process.stderr.close()
    assert "loss" in json.loads((tmp_path / "out" / "training.json").read_text())


@pytest.mark.skipif(not shutil.which("sh"), reason="closes its output in a POSIX shell")
def test_a_run_without_any_output_saves(base, tmp_path):
    """As >&- starts it."""
    flags = ["--steps", "2", "--out", tmp_path / "out", "--predict", tmp_path / "p.jsonl"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command(base, *flags)], stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "loss" in json.loads((tmp_path / "out" / "training.json").read_text()) and (tmp_path / "p.jsonl").exists()


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\b\r\x7f"
RAW = set("\x1b\x07\x9b\b\r\x7f")


def test_a_strangers_control_characters_are_not_printed(base, tmp_path, monkeypatch, capsys):
    """From data, completions and base names: they could rewrite the screen, or more."""
    write_jsonl(tmp_path / "mine.jsonl", [data.Example(f"a{ESCAPES}", f"b{ESCAPES}")] * 4)
    run(base, "--data", tmp_path / "mine.jsonl", out=tmp_path / "out", steps=1)
    monkeypatch.setattr(train, "answers", lambda *_, **__: [f"c{ESCAPES}\td\n"])
    completion = prompted(base, "--prompt", "x")
    said = capsys.readouterr().out
    assert not RAW & set(said) and "source   a�" in said and said.endswith("\td\n\n")
    assert completion == f"c{ESCAPES}\td\n"  # to a program, they are what they are


def sentence_of(capsys, action) -> str:
    """-> the one line that a command ends with, at status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command_process.run_command(action)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    return said


def test_a_strangers_control_characters_are_not_in_messages_either(base, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"target": "x", "' + json.dumps(ESCAPES)[1:-1] + '": 1}\n' + "x" * 10**5)
    said = sentence_of(capsys, lambda: run(base, "--data", tmp_path / "bad.jsonl", out=tmp_path / "out"))
    assert 'line 1 has the key "' in said and not RAW & set(said)
    assert len(sentence_of(capsys, raising(ValueError("x" * 10**5)))) < 1100


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_does_not_suffice_gets_a_sentence(base, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(train, "tune", raising(error))
    said = sentence_of(capsys, lambda: run(base, out=tmp_path / "out"))
    assert "error: the memory does not suffice: lower --batch-size or --n-virtual, or give --dtype bfloat16" in said


@pytest.mark.parametrize("mistake", ["mat1 and mat2 shapes cannot be multiplied", "CUDA error: an illegal memory access was encountered"])
def test_a_mistake_of_ours_stays_a_traceback(base, tmp_path, monkeypatch, mistake):
    """A RuntimeError about anything but a lack of memory is nothing that a user could mend."""
    monkeypatch.setattr(train, "tune", raising(RuntimeError(mistake)))
    with pytest.raises(RuntimeError, match=mistake):
        command_process.run_command(lambda: run(base, out=tmp_path / "out"))


@pytest.mark.skipif(os.name != "posix", reason="no Ctrl-C can be sent to one process")
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(base, tmp_path):
    flags = ["--steps", "20000", "--eval-every", "10000", "--save-every", "5", "--out", tmp_path / "out"]
    # what a shell starts in the background ignores Ctrl-C, and hands that down
    process = started(base, *flags, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (tmp_path / "out" / CHECKPOINT).exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said and "--resume goes on from its last checkpoint, if one is left" in said
    assert set(files_in(tmp_path / "out")) == {CHECKPOINT}


def test_a_full_disk_gets_a_sentence_and_the_old_files_stay(base, tmp_path):
    """Files of more than 20 kB cannot be written here: the adapter needs 33 kB, its checkpoint three times that."""
    resource = pytest.importorskip("resource")
    run(base, out=tmp_path / "out")
    before = files_in(tmp_path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    both = [started(base, *flags, "--out", tmp_path / "out", text=True, preexec_fn=limit) for flags in (["--steps", "1"], ["--steps", "3"])]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2 and len(said.splitlines()) == 1 and "File too large" in said
    after = files_in(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if not name.endswith("training.json"))


def test_the_command_ends_with_status_2_and_one_line():
    """No traceback; the same for what argparse finds."""
    everywhere = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for process in [
        subprocess.Popen([sys.executable, train.__file__, "--base", "nowhere", *flags], **everywhere)
        for flags in (["--task", "haiku"], ["--steps", "many"], ["--steps", "0"])
    ]:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2 and "Traceback" not in said and "error:" in said.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_another_base_is_refused_and_both_are_named(base, tmp_path):
    run(base, out=tmp_path / "prefix", steps=1)
    other = load_base(base)
    other.ln_f.bias.data[0] += 1
    other.name = "another"
    with pytest.raises(ValueError, match=f"trained on {base} .*, not on another"):
        Prefix.load(tmp_path / "prefix", other)
    assert Prefix.load(tmp_path / "prefix").n_stored() == 8 * 1024
    (tmp_path / "prefix" / "base.json").unlink()  # as in PEFT's own: any base of that shape
    Prefix.load(tmp_path / "prefix", other).past_kv(other)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "LORA"}, "LORA"),
        ({"peft_type": None}, "None"),
        ({"peft_type": ["x"]}, "x"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
        ({"num_virtual_tokens": 7}, "8 rows, its adapter_config.json 7"),
        ({"num_layers": 3}, "num_layers 3"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": 3}, "num_attention_heads 3"),
        ({"num_attention_heads": 8}, "needs"),
        ({"token_dim": "128"}, "token_dim 128"),
    ],
)
def test_a_foreign_adapter_is_refused_by_name(base, tmp_path, changes, message):
    model = load_base(base)
    Prefix.zero(model, 8).save(tmp_path / "a", model)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        train.load_adapters(str(tmp_path / "a"), model)[0].past_kv(model)


def test_broken_adapter_weights_are_refused(base, tmp_path):
    model = load_base(base)
    SoftPrompt.random(model, 4).save(tmp_path / "a", model)
    path = tmp_path / "a" / "adapter_model.safetensors"
    for tensors in [
        {"lora_A": torch.zeros(4, 128)},
        {"prompt_embeddings": torch.zeros(4, 128, 1)},
        {"prompt_embeddings": torch.zeros(0, 128)},
        {"prompt_embeddings": torch.full((4, 128), torch.nan)},
        {"prompt_embeddings": torch.zeros(4, 128, dtype=torch.int32)},
    ]:
        save_file(tensors, path)
        with pytest.raises(ValueError, match="prompt_embeddings|not finite"):
            SoftPrompt.load(tmp_path / "a", model)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        SoftPrompt.load(tmp_path / "a", model)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n-virtual", "0"], "--n-virtual 0: give 1 to 100000"),
        (["--mid-dim", "10001"], "--mid-dim 10001: give 1 to 10000"),
        (["--seed", "-1"], "--seed -1: give 0 to "),
        (["--seed", str(2**63)], "--seed 9223372036854775808: give 0 to "),
        (["--lr", "1e39"], "--lr 1e\\+39: give 1e-30 to 1e\\+38"),
        (["--base", ""], "config.json does not exist: . is not the directory"),
        (["--device", "cpu:x"], "--device cpu:x is not there"),
        (["--n-virtual", "128"], "36 of 36 examples are too long: .* the base reads 128, 128 of them virtual: .* lower --n-virtual"),
        (["--n-virtual", "129"], "129 new positions > block_size 128: .* lower --n-virtual"),
        (["--method", "soft_prompt", "--init", "random", "--n-virtual", "129"], "129 new positions > block_size 128"),
        (["--n-virtual", "100"], "36 of 36 examples are too long: the longest, .*forty.jsonl line \\d+, takes \\d+ tokens"),
        (["--steps", "0"], "--steps 0"),
        (["--eval-every", "0"], "--eval-every 0"),
        (["--save-every", "0"], "--save-every 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "0"], "--lr 0"),
        (["--device", "cuda:77"], "--device cuda:77 is not there"),
        (["--device", "toaster"], "--device toaster is not there"),
        (["--base", "nowhere"], "nowhere"),
        (["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--data", ""], "cannot read : No such file"),
        (["--data", "", "--task", "chat"], "--task is an embedded task, and --data your own: give one of them"),
        (["--data", "x.jsonl", "--task", "chat"], "--task is an embedded task, and --data your own: give one of them"),
        (["--task", "chat", "--val-data", "x.jsonl"], "--val-data goes with --data"),
        (["--task", "chat", "--val-data", ""], "--val-data goes with --data"),
        (["--val-data", ""], "cannot read : No such file"),
        (["--val-data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--temperature", "1"], "--temperature and --top-k sample the completion of a --prompt: give one"),
        (["--top-k", "3"], "--temperature and --top-k sample the completion of a --prompt: give one"),
        (["--top-k", "3", "--prompt", "x"], "--top-k samples, and needs a --temperature above 0"),
        (["--top-k", "3", "--temperature", "0", "--prompt", "x"], "--top-k samples, and needs a --temperature above 0"),
        (["--top-k", "0", "--temperature", "1", "--prompt", "x"], "--top-k 0: give 1 to "),
        (["--temperature", "-1", "--prompt", "x"], "--temperature -1.0: give 0 to "),
        (["--temperature", "nan", "--prompt", "x"], "--temperature nan: give 0 to "),
        (["--init", "nowhere"], "nowhere/adapter_config.json does not exist"),
        (["--init", "nowhere", "--n-virtual", "3"], "--n-virtual with --init nowhere: a trained adapter keeps its length"),
        (["--init", "zero", "--init-text", "x"], "--init-text goes with --init text, not zero"),
        (["--init-text", ""], "--init-text is empty: give a text"),
        (["--adapter", "x"], "x/adapter_config.json does not exist"),
        (["--export", "x"], "--export saves an --adapter for PEFT: give one"),
        (["--export", "x", "--adapter", "y", "--prompt", "z"], "--export saves, and --prompt completes: give one of them"),
        (["--adapter", "x", "--resume"], "--adapter is used as it is; to train on, use --init"),
        (["--adapter", "x", "--val-data", "y"], "--adapter is evaluated on --data"),
        (["--prompt", "x", "--predict", "y"], "--predict writes what an evaluation answers, and --prompt is none"),
        (["--sizes", "1", "1", "8", "8"], "--sizes goes with --method pretrain, not prefix"),
        (["--method", "pretrain", "--sizes", "1", "0", "8", "8"], r"--sizes \[1, 0, 8, 8\]: give 1 or more of each"),
        (["--patience", "0"], "--patience 0: give 1 to"),
        (["--method", "none", "--patience", "3"], "--patience ends the tuning of an adapter or a model: --method none has none"),
        (
            ["--method", "pretrain", "--data", "x.jsonl", "--resume", "--n-virtual", "3"],
            "--method pretrain makes a base of a --corpus, and takes no --data, --n-virtual, --resume",
        ),
        (["--adapter", "x", "--prompt", "y"], "x/adapter_config.json does not exist"),
        (["--prompt", "word " * 200], "block_size 128"),
        (["--method", "full", "--dtype", "bfloat16"], "--method full needs --dtype float32"),
        (["--method", "soft_prompt", "--mid-dim", "4"], "--mid-dim goes with a prefix"),
        (["--corpus", "x"], "--corpus goes with --method pretrain"),
    ],
)
def test_bad_flags_get_a_sentence(base, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(base, *flags)
    assert not list(tmp_path.iterdir())


def test_the_help_names_each_methods_defaults(capsys):
    """As the recipes have them; a method that has none is left out."""
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--n-virtual P virtual tokens an adapter (default: prefix 8, soft_prompt 6, both 4)" in said
    assert "optimizer steps (default: prefix 150, soft_prompt 150, both 150, full 150, pretrain 350)" in said
    assert "peak learning rate (default: prefix 0.3, soft_prompt 0.1, both 0.3, full 0.0015, pretrain 0.02)" in said
    assert train.__doc__.splitlines()[0] in said and "distilgpt2 (default: out/base)" in said


def test_missing_data_is_reported_before_a_base_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "pretrain", None)
    for flags in (["--data", "nowhere.jsonl"], ["--method", "pretrain", "--corpus", "nowhere.jsonl"]):
        with pytest.raises(ValueError, match="cannot read nowhere.jsonl"):
            train.main([*flags, "--device", "cpu"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--out", "--data", "--val-data", "--base", "--adapter", "--init", "--predict", "--corpus"])
def test_a_path_that_leads_round_in_a_circle_gets_a_sentence(base, tmp_path, monkeypatch, capsys, flag):
    """A symbolic link to itself, and a folder behind one."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    monkeypatch.setattr(train, "tune", None)
    for path in (tmp_path / "loop", tmp_path / "loop" / "x")[flag == "--predict" :]:
        flags = [flag, path, *{"--adapter": ["--prompt", "x"], "--corpus": ["--method", "pretrain"]}.get(flag, [])]
        assert "loop" in sentence_of(capsys, lambda: run(base, *flags, out=None if flag == "--out" else tmp_path / "out"))


def test_predictions_replace_a_link_to_itself(base, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    run(base, "--predict", tmp_path / "loop", out=tmp_path / "out")
    assert len((tmp_path / "loop").read_text().splitlines()) == 4


def test_without_a_home_nor_a_network_gpt2_gets_a_sentence(tmp_path, monkeypatch, capsys):
    pwd = pytest.importorskip("pwd")
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", raising(KeyError("no such user")))
    monkeypatch.setattr(storage.hub, "HUB", (tmp_path / "missing").as_uri() + "/{repo}/{file}")
    said = sentence_of(capsys, lambda: train.main(["--base", "gpt2", "--device", "cpu", "--task", "chat"]))
    assert "gpt2 is no directory here, and cannot be downloaded" in said and "gpt2 into ~" in said


def test_a_learning_rate_too_high_stops_the_run_and_keeps_the_last_adapter(base, tmp_path):
    run(base, out=tmp_path / "out")
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="the loss became nan with --lr 1e\\+38: lower it"):
        run(base, "--lr", "1e38", out=tmp_path / "out", steps=2)
    after = files_in(tmp_path)
    assert {name: after[name] for name in before} == before and set(after) <= {*before, f"out/{CHECKPOINT}"}


def test_a_loss_that_is_no_number_ends_the_run_wherever_it_shows(base, tmp_path, monkeypatch):
    """On training data, though the validation loss looks well; and on validation data alone."""
    for i, (validation, lr) in enumerate([(1.0, 1e38), (math.nan, 0.1)]):
        monkeypatch.setattr(train, "evaluate", lambda *_, loss=validation: (loss, [True]))
        with pytest.raises(train.Diverged, match="the loss became nan"):
            run(base, "--lr", lr, out=tmp_path / str(i), steps=10)
