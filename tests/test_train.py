"""What a run promises: the base stays what it was, the same seed gives the same numbers, bad input a sentence."""

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import V, random_ids, write_jsonl
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import data
import train
from model import GPT, GPTConfig
from prefix import Prefix
from soft_prompt import SoftPrompt


def run(base, *flags, out=None, steps=3):
    """main on those forty examples, unless flags name others."""
    common = ["--base", base, "--device", "cpu", "--steps", str(steps), "--batch-size", "4"]
    common += [] if "--data" in flags or "--task" in flags else ["--data", str(Path(base).parent / "forty.jsonl")]
    return train.main([*common, *map(str, flags), *(["--out", str(out)] if out else [])])


def rows_of(base, task="sentence", n=8):
    return data.encode(data.load_tokenizer(base), data.task_examples(task, "train", n, 0))


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.ex11
def test_the_loss_is_the_mean_over_target_positions(model):
    """Projecting only those positions equals projecting all and ignoring the rest; behind a past, and from the first on, too."""
    batch = data.batch_of([data.Row([1, 2, 3], [4, 5]), data.Row([6], [7, 8, 9]), data.Row([5, 4], [3])], model.device)
    short = data.batch_of([data.Row([1], [4, 5]), data.Row([6], [7])], model.device)  # as from empty inputs
    past = model(random_ids(1, 4))[1]
    for batch, past_kv in ((batch, None), (batch, past), (short, past)):
        hidden, targets = train.target_hidden(model, batch, past_kv)
        all_logits, _ = model(batch.idx, past_kv)
        expected = torch.nn.functional.cross_entropy(all_logits.float().flatten(0, 1), batch.targets.flatten())
        assert_close(torch.nn.functional.cross_entropy(model.unembed(hidden).float(), targets), expected)


@pytest.mark.parametrize("positions", [1, 2, 5, 1000])
def test_the_loss_in_parts_equals_the_loss_at_once(model, monkeypatch, positions):
    """However few positions have their logits made at a time: the value, and the gradients of adapter and model."""
    monkeypatch.setattr(train, "LOGITS_AT_ONCE", positions * V + 1)
    rows = [data.Row([1, 2, 3], [4, 5]), data.Row([6], [7, 8, 9]), data.Row([5, 4], [3])]
    batch, prefix = data.batch_of(rows, model.device), Prefix.text(model, random_ids(3))
    weights = [*prefix.parameters(), *model.requires_grad_(True).parameters()]
    logits, _ = model(batch.idx, prefix.past_kv(model))
    expected = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="sum") / 10
    gradients = torch.autograd.grad(expected, weights)
    hidden, targets = train.target_hidden(model, batch, prefix.past_kv(model))
    logits, ids = next(train.logits_in_parts(model, hidden, targets))
    assert len(ids) == min(positions, 6) and logits.shape == (len(ids), V) and logits.dtype == torch.float32
    assert_close(train.backward(model, hidden, targets, n_targets=10), expected.detach())
    for weight, gradient in zip(weights, gradients):
        assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-7)
    loss, exact = train.evaluate(model, [prefix], rows, batch_size=3)
    monkeypatch.undo()
    assert train.evaluate(model, [prefix], rows, batch_size=3) == (pytest.approx(loss, rel=1e-6), exact)


@pytest.mark.parametrize("kind", [Prefix, SoftPrompt])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision_computes_the_same(model, kind, dtype, tolerance):
    """Loss, and gradient relative to its largest number: in float32 as in float64 to 1e-5, in bfloat16 to 5 %."""
    batch = data.batch_of([data.Row([1, 2, 3], [4, 5]), data.Row([6], [7, 8, 9])], model.device)
    adapter, losses, gradients = kind.text(model, random_ids(4)), [], []
    for same in (model, copy.deepcopy(model).to(dtype)):
        adapter.zero_grad()
        hidden, targets = train.target_hidden(same, batch, adapter.past_kv(same))
        losses.append(train.backward(same, hidden, targets, len(targets)).item())
        gradients.append(next(adapter.parameters()).grad)
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert (gradients[1] - gradients[0]).abs().max() < tolerance * gradients[0].abs().max()


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


def test_every_row_comes_once_before_any_comes_again():
    args = train.parse(["--steps", "5", "--batch-size", "4", "--seed", "1"])
    rows = [data.Row([i], [i]) for i in range(10)]
    seen = [row.source[0] for batch in train.shuffled_batches(rows, args) for row in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("method", ["prefix", "soft_prompt", "both", "full", "none"])
def test_a_run_of_each_method(base, tmp_path, capsys, method):
    """Every number that main promises; the base bit for bit what it was; what was saved gives what was measured."""
    before = {path.name: path.read_bytes() for path in Path(base).iterdir()}
    result = run(base, "--method", method, out=tmp_path / "out", steps=6)
    assert {path.name: path.read_bytes() for path in Path(base).iterdir()} == before
    assert set(result) >= {
        "method", "task", "n_trainable", "n_stored", "n_base", "percent", "loss_frozen", "loss_init", "loss",
        "exact_match_frozen", "exact_match", "seconds_pretrain", "seconds_train", "out", "curve",
    }  # fmt: skip
    low, high = {"prefix": (0.1, 1), "soft_prompt": (0.01, 0.1), "both": (0.1, 1), "full": (100, 100), "none": (0, 0)}[method]
    assert low <= result["percent"] <= high and result["percent"] == 100 * result["n_stored"] / result["n_base"]
    assert (result["loss"] < result["loss_init"]) == (method != "none")
    shown = capsys.readouterr().out
    assert shown.count("expected") == 3 and ("step    6/6" in shown) == (method != "none")

    model = GPT.from_pretrained(tmp_path / "out" if method == "full" else base).freeze()
    adapters = train.load_adapters(str(tmp_path / "out"), model) if method in ("prefix", "soft_prompt", "both") else []
    _, examples = train.load_examples(train.parse(["--data", str(Path(base).parent / "forty.jsonl")]))
    test = data.encode(data.load_tokenizer(base), examples["test"])
    assert train.evaluate(model, adapters, test, 4)[0] == pytest.approx(result["loss"], rel=1e-5)


def test_two_runs_with_one_seed_give_the_same_numbers(base, tmp_path):
    results = [run(base, "--seed", seed, "--init", "random", out=tmp_path / "a") for seed in (3, 3, 4)]
    for result in results:
        del result["seconds_train"]
    assert results[0] == results[1] != results[2]


def test_tuning_written_out(base, monkeypatch):
    """AdamW (Loshchilov & Hutter 2019) without decay, on the mean loss of each batch, at a rate that rises and falls."""
    model, rows = GPT.from_pretrained(base).freeze(), rows_of(base, n=6)
    prompt = SoftPrompt.text(model, torch.arange(3))
    x = prompt.vectors.detach().clone().requires_grad_()
    args = train.parse(["--steps", "12", "--lr", "0.05", "--batch-size", "4", "--eval-every", "5", "--out", "unused"])
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, batch_rows in enumerate(train.shuffled_batches(rows, args), start=1):
        batch = data.batch_of(batch_rows, model.device)
        _, past_kv = model.forward_embeddings(x[None])
        loss = torch.nn.functional.cross_entropy(model(batch.idx, past_kv)[0].flatten(0, 1), batch.targets.flatten())
        (g,) = torch.autograd.grad(loss, x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.05 * min(t / 10, (12 - t + 1) / 12)
        x = (x - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)).detach().requires_grad_()
    sizes, hidden = [], train.target_hidden
    monkeypatch.setattr(train, "target_hidden", lambda *given: sizes.append(len(given[1].idx)) or hidden(*given))
    run = train.Run("sentence", model, data.load_tokenizer(base), [prompt], {}, {"train": rows, "validation": rows})
    curve = train.tune(run, args)
    assert_close(prompt.vectors.data, x.data, rtol=1e-3, atol=1e-4)
    assert [step for step, _ in curve] == [0, 5, 10, 12] and set(sizes) == {4, 2}  # six rows are looked at in two parts
    assert curve[-1][1] == train.evaluate(model, [prompt], rows, 4)[0] < curve[0][1]


def test_training_moves_the_adapters_and_nothing_else(base):
    """After training, the base is bit for bit what it was, in memory too; every number of a stack has moved."""
    model = GPT.from_pretrained(base).freeze()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    adapters = [Prefix.random(model, 2), SoftPrompt.random(model, 2)]
    start = [p.detach().clone() for a in adapters for p in a.parameters()]
    rows = {"train": rows_of(base), "validation": rows_of(base)}
    args = train.parse(["--steps", "2", "--lr", "0.01", "--out", "unused"])
    train.tune(train.Run("sentence", model, data.load_tokenizer(base), adapters, {}, rows), args)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all((p != q).all() for p, q in zip((p for a in adapters for p in a.parameters()), start))


def test_the_default_start_is_the_end_of_a_training_example(base):
    """And a stack starts as one text: its first half in the prefix, its second in the prompt."""
    model, tokenizer = GPT.from_pretrained(base).freeze(), data.load_tokenizer(base)
    rows = rows_of(base)
    text = torch.tensor((rows[0].source + rows[0].target)[-6:])
    assert text[-1] == tokenizer.eot_token
    adapters = train.new_adapters(train.parse(["--method", "both", "--n-virtual", "3"]), model, tokenizer, rows)
    assert_close(train.stacked_past_kv(adapters, model), model(text[None])[1])
    args = train.parse(["--method", "soft_prompt", "--n-virtual", "5", "--init-text", "Thai food"])
    (prompt,) = train.new_adapters(args, model, tokenizer, rows)
    assert_close(prompt.vectors.data, model.wte.weight[(tokenizer.encode_ordinary("Thai food") * 5)[:5]])
    args = train.parse(["--method", "soft_prompt", "--init", "vocab", "--n-virtual", "3"])
    (prompt,) = train.new_adapters(args, model, tokenizer, rows)
    seen = {i for row in rows for i in row.source + row.target}
    assert set(prompt.nearest_tokens(model).flatten().tolist()) <= seen


@pytest.mark.parametrize("flags", [["--init", "zero", "--mid-dim", "4"], ["--init", "random", "--dtype", "bfloat16"]])
def test_a_prefix_from_other_starts(base, tmp_path, flags):
    result = run(base, *flags, out=tmp_path / "out", steps=5)
    assert result["loss"] < result["loss_init"] and result["n_stored"] == 8 * 1024
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"].dtype == torch.float32


def test_what_a_run_says_is_what_it_returns(base, tmp_path, capsys):
    got = run(base, out=tmp_path / "out", steps=2)
    said = capsys.readouterr().out
    assert f"start    validation loss {got['curve'][0][1]:.3f}, before the first step\n" in said
    assert re.search(rf"step    2/2  loss \d\.\d\d\d  validation {got['curve'][-1][1]:.3f}  .* tokens/s", said)
    assert f"test     frozen  loss {got['loss_frozen']:.3f}  exact match {got['exact_match_frozen']:5.1f} %\n" in said
    assert f"         tuned   loss {got['loss']:.3f}  exact match {got['exact_match']:5.1f} %\n" in said
    assert said.endswith(f'use it with: python train.py --base {base} --adapter {tmp_path}/out --prompt "…"\n')


def test_one_thread_and_two_agree_to_rounding(base, tmp_path):
    one = run(base, out=tmp_path / "one", steps=5)
    torch.set_num_threads(2)
    two = run(base, out=tmp_path / "two", steps=5)
    torch.set_num_threads(1)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    numbers = [load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"] for name in ("one", "two")]
    assert_close(*numbers, rtol=1e-3, atol=1e-3)


def test_the_embedded_tasks_have_test_data_of_their_own():
    """train, validation and test examples of a task share no record; a run is scored on the last."""
    name, examples = train.load_examples(train.parse(["--task", "reply", "--seed", "2"]))
    assert name == "reply" and [len(examples[split]) for split in ("train", "validation", "test")] == [1000, 200, 500]
    assert not set(examples["test"]) & {*examples["train"], *examples["validation"]}


def test_own_data_and_prompting_the_result(base, tmp_path, capsys):
    """JSONL in, a seeded tenth held out; what is saved completes a prompt as the adapter in memory would."""
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [data.Example(f"q {i}", "Thai food") for i in range(20)])
    result = run(base, "--data", path, out=tmp_path / "out", steps=10)
    assert result["task"] == "mine" and result["loss"] < result["loss_init"]
    capsys.readouterr()
    completed = train.main(["--base", base, "--device", "cpu", "--adapter", str(tmp_path / "out"), "--prompt", "q 99"])
    model, tokenizer = GPT.from_pretrained(base), data.load_tokenizer(base)
    source = data.source_ids(tokenizer, "q 99")
    (expected,) = train.answers(model, [Prefix.load(tmp_path / "out", model)], tokenizer, [source], limit=256)
    assert completed["completion"] == expected and capsys.readouterr().out == expected + "\n"
    assert train.main(["--base", base, "--device", "cpu", "--prompt", "q 99"])["completion"] != expected
    _, held_out = train.load_examples(train.parse(["--data", str(path)]))
    assert len(held_out["train"]) == 18 and len(held_out["validation"]) == 2
    assert not {e.input for e in held_out["train"]} & {e.input for e in held_out["validation"]}
    _, given = train.load_examples(train.parse(["--data", str(path), "--val-data", str(path)]))
    assert len(given["train"]) == len(given["validation"]) == 20


def test_predictions_are_what_each_source_gives_alone(base, tmp_path):
    """--predict: a line for each test example, in order; sources of all lengths, none touched by its neighbours."""
    run(base, "--predict", tmp_path / "p.jsonl", out=tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(list(line) == ["input", "target", "prediction"] for line in lines)
    model, tokenizer = GPT.from_pretrained(base), data.load_tokenizer(base)
    adapter = [Prefix.load(tmp_path / "out", model)]
    texts = [line["input"] for line in lines] + ["a", "Thai food", "b"]
    sources = [data.source_ids(tokenizer, text) for text in texts]
    limit = 2 * max(len(tokenizer.encode_ordinary(line["target"])) + 1 for line in lines)
    alone = [train.answers(model, adapter, tokenizer, [source], limit)[0] for source in sources]
    assert train.answers(model, adapter, tokenizer, sources, limit) == alone
    bytes_only = data.build_tokenizer(data.ranks_of([]))  # a model may know more ids than its tokenizer: they are no text
    assert isinstance(train.answers(model, [], bytes_only, [[5, 6]], 20)[0], str)
    assert [line["prediction"] for line in lines] == alone[:4]


def test_a_base_from_ones_own_text(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 400)
    out = tmp_path / "base"
    flags = ["--corpus", str(tmp_path / "a.txt"), "--steps", "60", "--batch-size", "4", "--out", str(out), "--device", "cpu"]
    train.main(["--method", "pretrain", *flags])
    model, tokenizer = GPT.from_pretrained(out), data.load_tokenizer(out)
    ids = torch.tensor([tokenizer.encode_ordinary("the cat sat")])
    assert tokenizer.decode(model.generate(ids, 2)[0].tolist()) == "the cat sat on the"


def test_a_corpus_too_small_to_learn_from(tmp_path, monkeypatch):
    """Ten windows of 129 tokens are the least; here a token is a byte, and one more ends the text."""
    monkeypatch.setattr(data, "train_bpe", lambda *_, n_merges: [])
    flags = ["--method", "pretrain", "--corpus", str(tmp_path / "a"), "--steps", "1", "--batch-size", "1", "--device", "cpu"]
    (tmp_path / "a").write_text("b" * 1288)
    with pytest.raises(ValueError, match="^the corpus has 1289 tokens; give at least 1290 to learn from"):
        train.main([*flags, "--out", str(tmp_path / "base")])
    (tmp_path / "a").write_text("b" * 1289)
    train.main([*flags, "--out", str(tmp_path / "base")])


def test_pretraining_written_out(tmp_path, monkeypatch, capsys):
    """Which texts, windows that start anywhere, two optimizers, and their rates: up in 30 steps, down in the last 30 %."""
    rates, LambdaLR = [], torch.optim.lr_scheduler.LambdaLR
    monkeypatch.setattr(torch.optim.lr_scheduler, "LambdaLR", lambda *given: rates.append(given[1]) or LambdaLR(*given))
    flags = ["--method", "pretrain", "--steps", "3", "--batch-size", "8", "--seed", "5", "--lr", "0.1"]
    shown, show = [], train.Progress.show
    monkeypatch.setattr(train.Progress, "show", lambda self, *given: shown.append(given[:2]) or show(self, *given))
    args = train.parse([*flags, "--out", str(tmp_path / "base")])
    train.pretrain(args.out, args, torch.device("cpu"))
    assert shown == [(1, 8 * 128), (2, 8 * 128), (3, 8 * 128)]
    assert re.search(r"step    3/3  loss \d\.\d\d\d  .* tokens/s", capsys.readouterr().out)
    got, tokenizer, rng = GPT.from_pretrained(args.out), data.load_tokenizer(args.out), random.Random(5)
    texts = [data.random_document(rng) for _ in range(48)]
    stream = torch.tensor([i for text in texts for i in [*tokenizer.encode_ordinary(text), tokenizer.eot_token]])
    torch.manual_seed(5)
    model = GPT(GPTConfig(tokenizer.n_vocab))
    torch.nn.init.normal_(model.wte.weight, std=0.4)
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
        torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for optimizer, lr in ((muon, 0.1), (adam, 3e-3)):
            optimizer.param_groups[0]["lr"] = lr * (step + 1) / 30
            optimizer.step()
    for weight, expected in zip(got.parameters(), model.parameters()):
        assert_close(weight, expected.data, rtol=1e-5, atol=1e-5)
    args.steps = 100
    expected = [(i + 1) / 30 for i in range(30)] + [1] * 41 + [i / 30 for i in range(29, 0, -1)]
    assert [rates[0](step) for step in range(100)] == [rates[1](step) for step in range(100)] == pytest.approx(expected)
    with pytest.raises(ValueError, match="the loss became nan with --lr 1e\\+30: lower it"):
        train.main([*flags, "--lr", "1e30", "--device", "cpu", "--out", str(tmp_path / "none")])


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_says_how_fast_and_how_long(monkeypatch, capsys, terminal):
    """A quarter of a second and 50 tokens a step, from step 10 on: a line every tenth, or one refreshed every fifth step."""
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    progress = train.Progress(10, 51)
    for step in range(11, 52):
        clock.now += 0.25
        progress.show(step, 50, "loss 1.0")
    line = "step {:4}/51  loss 1.0     200 tokens/s  {:3.0f} s left"
    steps = [*range(15, 51, 5), 51] if terminal else [*range(12, 51, 6), 51]
    lines = [line.format(step, (51 - step) / 4) for step in steps]
    assert capsys.readouterr().out == ("".join("\r" + line for line in lines) if terminal else "\n".join(lines)) + "\n"


def test_the_base_saw_every_position(base):
    """Windows start anywhere in the packed stream, so a text shifted by a prefix is a text at home."""
    model, rows = GPT.from_pretrained(base).freeze(), rows_of(base, n=40)
    torch.manual_seed(0)
    untrained = GPT(model.config).wpe.weight
    assert ((model.wpe.weight - untrained).norm(dim=1) > 0.1).all()
    here, _ = train.evaluate(model, [], rows, 40)
    document = torch.tensor((rows[0].source + rows[0].target)[-20:])
    shifted, _ = train.evaluate(model, [Prefix.text(model, document)], rows, 40)
    assert shifted < 1.3 * here


def test_two_processes_train_the_adapter_that_one_does(base, tmp_path):
    """torchrun: each takes half of each batch, gradients are summed; one of them writes and talks."""
    whole = run(base, "--mid-dim", "4", out=tmp_path / "one", steps=4)
    flags = ["--base", base, "--device", "cpu", "--steps", "4", "--batch-size", "4", "--mid-dim", "4", "--save-every", "1"]
    flags += ["--data", str(Path(base).parent / "forty.jsonl"), "--out", str(tmp_path / "two")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", train.__file__]
    done = subprocess.run([*torchrun, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1 and f"tuned   loss {whole['loss']:.3f}" in done.stdout
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"] for name in ("one", "two"))
    assert_close(one, two, rtol=1e-3, atol=1e-5)
    done = subprocess.run([*torchrun, *flags, "--batch-size", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "--batch-size 1 for 2 processes" in done.stderr


def test_what_the_second_of_two_processes_does(base, tmp_path, monkeypatch):
    """It takes every second row, hands in its loss and the gradients of what is trained, and saves nothing."""
    handed_in, batches, target_hidden = [], [], train.target_hidden
    two = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2, all_reduce=handed_in.append)
    monkeypatch.setattr(train, "dist", two)
    monkeypatch.setattr(train, "target_hidden", lambda *given: batches.append(given[1]) or target_hidden(*given))
    model, rows = GPT.from_pretrained(base).freeze(), rows_of(base, n=6)
    prefix = Prefix.random(model, 3).reparametrise(2)
    args = train.parse(["--steps", "2", "--batch-size", "4", "--save-every", "1", "--out", str(tmp_path / "out")])
    run = train.Run("sentence", model, data.load_tokenizer(base), [prefix], {}, {"train": rows, "validation": []})
    monkeypatch.setattr(train, "evaluate", lambda *_: (1.0, []))
    train.tune(run, args)
    parts = [data.batch_of(step[1::2], model.device) for step in train.shuffled_batches(rows, args)]
    assert [batch.idx.tolist() for batch in batches] == [part.idx.tolist() for part in parts]
    shapes = [(), *(p.shape for p in prefix.parameters() if p.requires_grad)]
    assert [tensor.shape for tensor in handed_in] == 2 * shapes
    assert not args.out.exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in Linux's /proc")
def test_a_process_that_dies_ends_the_run_of_all(base, tmp_path):
    """With an error, not with a wait for ever; the last checkpoint stays."""
    flags = ["--base", base, "--device", "cpu", "--steps", "20000", "--batch-size", "4", "--save-every", "5"]
    flags += ["--eval-every", "10000", "--data", str(Path(base).parent / "forty.jsonl"), "--out", str(tmp_path / "out")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", train.__file__]
    process = subprocess.Popen([*torchrun, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / data.CHECKPOINT).exists():
        assert process.poll() is None
    _, second = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [data.CHECKPOINT]


# ----------------------------------------------------------------------------------------- starting from what was saved


@pytest.mark.parametrize("method", ["prefix", "soft_prompt", "both"])
def test_training_goes_on_from_another_tasks_adapter(base, tmp_path, method):
    """--init DIR: the numbers trained on one task are where the next one starts; a stack from a stack."""
    first = run(base, "--method", method, out=tmp_path / "first")
    again = run(base, "--method", method, "--init", tmp_path / "first", out=tmp_path / "again")
    assert again["loss_init"] == first["curve"][-1][1]  # it starts where the other ended
    assert again["n_stored"] == first["n_stored"]
    other = "soft_prompt" if method == "prefix" else "prefix"
    with pytest.raises(ValueError, match=f"--init {tmp_path}/first holds a .*, and --method {other} trains a "):
        run(base, "--method", other, "--init", tmp_path / "first")


# ------------------------------------------------------------------------------------------------------------- resuming


def stopped_run(base, out, monkeypatch, *flags, after: int):
    """A run of seven steps that a Ctrl-C meets within a step."""
    hidden, steps = train.target_hidden, []

    def interrupted(model, batch, past_kv):
        if torch.is_grad_enabled():
            steps.append(batch)
            if len(steps) == after:
                signal.raise_signal(signal.SIGINT)
        return hidden(model, batch, past_kv)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=f"stopped after step {after}; .* --resume"):
        patch.setattr(train, "target_hidden", interrupted)
        run(base, *flags, out=out, steps=7)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C is what it was


def test_ctrl_c_in_the_last_step_lets_the_run_end(base, tmp_path, monkeypatch):
    hidden, steps = train.target_hidden, []

    def interrupted(*given):
        steps.extend([1] * torch.is_grad_enabled())
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
            steps.append("once")
        return hidden(*given)

    monkeypatch.setattr(train, "target_hidden", interrupted)
    assert len(run(base, out=tmp_path / "out", steps=3)["curve"]) == 4
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_second_ctrl_c_acts_at_once():
    """The first is noted, for the step at hand to end; afterwards, all is as it was."""
    with pytest.raises(KeyboardInterrupt), train.postponed_interrupt() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert len(interrupts) == 1
        signal.raise_signal(signal.SIGINT)
    assert len(interrupts) == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "flags",
    [["--method", "prefix"], ["--mid-dim", "4"], ["--method", "soft_prompt"], ["--method", "both"], ["--method", "full"]],
)
def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(base, tmp_path, monkeypatch, capsys, flags):
    """Numbers, MLP, optimizer, step and order of the examples; the curve, too. Nothing is left of the checkpoint."""
    flags = [*flags, "--eval-every", "2"]
    whole = run(base, *flags, out=tmp_path / "whole", steps=7)
    stopped_run(base, tmp_path / "parts", monkeypatch, *flags, after=4)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [data.CHECKPOINT]
    capsys.readouterr()
    resumed = run(base, *flags, "--resume", out=tmp_path / "parts", steps=7)
    assert "\nresuming after step 4\n" in capsys.readouterr().out
    for result in (whole, resumed):
        del result["seconds_train"], result["out"]
    assert resumed == whole and [step for step, _ in whole["curve"]] == [0, 2, 4, 6, 7]
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert files and all((tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes() for file in files)
    assert len(list((tmp_path / "parts").rglob("*"))) == len(list((tmp_path / "whole").rglob("*")))


def test_checkpoints_are_written_every_so_many_steps(base, tmp_path, monkeypatch):
    """Each replaces the last one in one go: a save that fails leaves the old one whole, and no debris."""
    steps, save_file = [], train.save_file

    def failing(tensors, path, metadata):
        steps.append(json.loads(metadata["step"]))
        save_file(tensors, path, metadata)
        if len(steps) == 3:
            raise OSError("No space left on device")

    monkeypatch.setattr(train, "save_file", failing)
    with pytest.raises(OSError, match="No space"):
        run(base, "--save-every", "2", out=tmp_path / "out", steps=9)
    assert steps == [2, 4, 6] and [path.name for path in (tmp_path / "out").iterdir()] == [data.CHECKPOINT]
    monkeypatch.undo()
    whole = run(base, out=tmp_path / "whole", steps=9)
    assert run(base, "--resume", out=tmp_path / "out", steps=9)["loss"] == whole["loss"]
    assert run(base, "--resume", out=tmp_path / "new", steps=9)["loss"] == whole["loss"]  # nothing to resume: from the start


def test_a_checkpoint_of_another_run_is_not_taken(base, tmp_path, monkeypatch):
    """Nor overwritten: what was trained is lost by nobody's forgetting of a flag."""
    stopped_run(base, tmp_path / "out", monkeypatch, after=2)
    file = tmp_path / "out" / data.CHECKPOINT
    before = file.read_bytes()
    with pytest.raises(ValueError, match="stopped after step 2: add --resume to go on, or delete it"):
        run(base, out=tmp_path / "out", steps=7)
    for flags, message in [
        (["--lr", "0.5"], "lr 0.3, not 0.5"),
        (["--seed", "1"], "seed 0, not 1"),
        (["--task", "chat"], "examples .*, not .*"),
        (["--n-virtual", "2"], "n_virtual 8, not 2"),
    ]:
        with pytest.raises(ValueError, match=f"is of a run with {message}: repeat its flags, or delete it"):
            run(base, *flags, "--resume", out=tmp_path / "out", steps=7)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="is of a run with base .*, not of the twin: repeat"):
        patch.setattr(GPT, "fingerprint", lambda model: "of the twin")
        run(base, "--resume", out=tmp_path / "out", steps=7)
    assert file.read_bytes() == before
    file.write_bytes(before[:-9])
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        run(base, "--resume", out=tmp_path / "out", steps=7)
    for metadata in (None, {"step": "2"}, {"step": "two"}, {"step": "[" * 10**5}):
        save_file({"x": torch.zeros(1)}, file, metadata=metadata)
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            run(base, "--resume", out=tmp_path / "out", steps=7)


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


# ------------------------------------------------------------------------------------------------------------ bad input


def test_another_base_is_refused_and_both_are_named(base, tmp_path):
    run(base, out=tmp_path / "prefix", steps=1)
    other = GPT.from_pretrained(base)
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
    model = GPT.from_pretrained(base)
    Prefix.zero(model, 8).save(tmp_path / "a", model)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        train.load_adapters(str(tmp_path / "a"), model)[0].past_kv(model)


def test_broken_adapter_weights_are_refused(base, tmp_path):
    model = GPT.from_pretrained(base)
    SoftPrompt.random(model, 4).save(tmp_path / "a", model)
    path = tmp_path / "a" / "adapter_model.safetensors"
    for tensors in [
        {"lora_A": torch.zeros(4, 128)},
        {"prompt_embeddings": torch.zeros(4, 128, 1)},
        {"prompt_embeddings": torch.full((4, 128), torch.nan)},
        {"prompt_embeddings": torch.zeros(4, 128, dtype=torch.int32)},
    ]:
        save_file(tensors, path)
        with pytest.raises(ValueError, match="prompt_embeddings"):
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
        (["--lr", "1e39"], "--lr 1e\\+39: give a positive number"),
        (["--base", ""], "vocab.json does not exist"),
        (["--device", "cpu:x"], "--device cpu:x .* is not there"),
        (["--n-virtual", "128"], "example 1 takes .* positions, and 0 are left"),
        (["--n-virtual", "129"], "129 new positions > block_size 128: .* lower --n-virtual"),
        (["--method", "soft_prompt", "--init", "random", "--n-virtual", "129"], "129 new positions > block_size 128"),
        (["--n-virtual", "100"], "example 1 takes .* positions, and 28 are left"),
        (["--steps", "0"], "--steps 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "0"], "--lr 0"),
        (["--device", "cuda:77"], "--device cuda:77 .* is not there"),
        (["--device", "toaster"], "--device toaster .* is not there"),
        (["--base", "nowhere"], "nowhere"),
        (["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--init", "nowhere"], "nowhere/adapter_config.json does not exist"),
        (["--init", "nowhere", "--n-virtual", "3"], "--n-virtual 3 with --init nowhere: a trained adapter keeps its length"),
        (["--init", "zero", "--init-text", "x"], "--init-text 'x' with --init zero"),
        (["--init-text", ""], "--init-text '' with --init text: .* needs a text"),
        (["--adapter", "x"], "needs a --prompt"),
        (["--adapter", "x", "--prompt", "y"], "x/adapter_config.json does not exist"),
        (["--prompt", "word " * 200], "block_size 128"),
        (["--method", "full", "--dtype", "bfloat16"], "--method full with --dtype bfloat16: it needs float32"),
        (["--method", "soft_prompt", "--mid-dim", "4"], "--mid-dim goes with a prefix"),
        (["--corpus", "x"], "--corpus goes with --method pretrain"),
    ],
)
def test_bad_flags_get_a_sentence(base, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(base, *flags)
    assert not list(tmp_path.iterdir())


def test_a_learning_rate_too_high_stops_the_run_and_keeps_the_last_adapter(base, tmp_path):
    run(base, out=tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="the loss became nan with --lr 1e\\+38: lower it"):
        run(base, "--lr", "1e38", "--method", "soft_prompt", out=tmp_path / "out", steps=10)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


def test_a_loss_that_is_no_number_ends_the_run_wherever_it_shows(base, tmp_path, monkeypatch):
    """On training data, though the validation loss looks well; and on validation data alone."""
    for validation, lr in ((1.0, 1e38), (float("nan"), 0.1)):
        monkeypatch.setattr(train, "evaluate", lambda *_, loss=validation: (loss, [True]))
        with pytest.raises(train.Diverged, match="the loss became nan"):
            run(base, "--lr", lr, out=tmp_path / "out", steps=10)


def command(base, *flags, **how) -> subprocess.Popen:
    """train.py as a user starts it, on the forty examples."""
    common = ["--base", base, "--device", "cpu", "--batch-size", "2", "--data", str(Path(base).parent / "forty.jsonl")]
    return subprocess.Popen(
        [sys.executable, train.__file__, *common, *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how,
    )  # fmt: skip


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(base, tmp_path):
    process = command(base, "--steps", "20000", "--eval-every", "10000", "--save-every", "5", "--out", tmp_path / "out")
    while not (tmp_path / "out" / data.CHECKPOINT).exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said and "--resume goes on from there" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == [data.CHECKPOINT]


@pytest.mark.parametrize("flags", [["--out", "here/new/adapter"], ["--out", "elsewhere", "--predict", "here/predictions.jsonl"]])
def test_a_folder_that_cannot_be_written_to_is_refused_before_training(base, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(os, "access", lambda folder, mode: mode != os.W_OK or folder != tmp_path / "here")
    monkeypatch.setattr(train, "tune", None)
    with pytest.raises(ValueError, match=f"^{tmp_path}/here cannot be written to, so .* cannot be saved there: name another"):
        run(base, *flags)
    assert {path.name for path in tmp_path.rglob("*")} == {"here"}


def test_a_full_disk_gets_a_sentence_and_the_old_files_stay(base, tmp_path):
    """Files of more than 20 kB cannot be written here: the adapter needs 33 kB, its checkpoint three times that."""
    resource = pytest.importorskip("resource")
    run(base, out=tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    for flags in (["--steps", "2"], ["--steps", "3", "--save-every", "2"]):
        process = command(base, *flags, "--out", tmp_path / "out", preexec_fn=limit)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2 and len(said.splitlines()) == 1 and "File too large" in said
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
        assert {path.name for path in tmp_path.iterdir()} == {"out"}
        assert {path.name for path in (tmp_path / "out").iterdir()} <= data.OUR_FILES


def test_the_command_ends_with_status_2_and_one_line():
    """No traceback; the same for what argparse finds."""
    for flags in (["--task", "haiku"], ["--steps", "many"]):
        done = subprocess.run([sys.executable, train.__file__, "--base", "nowhere", *flags], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "error:" in done.stderr.splitlines()[-1]
