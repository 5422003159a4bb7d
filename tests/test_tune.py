"""Tuning: the steps, what ends them, the search of a learning rate, and several processes."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import files_in, forty, random_ids, run, train_argv, without_lr
from safetensors.torch import load_file
from torch.testing import assert_close

import command.process
import train
from command.examples import load_examples
from command.models import new_adapters
from data import Row, batch_of, encode, shuffled_batches
from prefix import Prefix
from small_base.world import task_examples
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter
from storage.base import load_base
from storage.checkpoints import Checkpoint, looks_since_best
from storage.tokenizers import load_tokenizer
from train import Diverged, Plan, evaluate, find_rate, search_rate, tune


def rows_of(base: str, n: int = 8) -> dict[str, list[Row]]:
    rows = encode(load_tokenizer(base), task_examples("sentence", "train", n, 0))
    return {"train": rows, "validation": rows}


def plan(steps: int, lr: float = 0.1, **others) -> Plan:
    return Plan(**{"steps": steps, "lr": lr, "batch_size": 4, "seed": 0, "eval_every": 99} | others)


def frozen(base: str):
    return load_base(base).requires_grad_(False)


# ----------------------------------------------------------------------------------------- steps


def test_tuning_written_out(base):
    """AdamW (Loshchilov & Hutter 2019) without decay, at a rate that rises and falls."""
    model, rows = frozen(base), rows_of(base, 6)
    prompt = SoftPrompt.text(model, torch.arange(3))
    x = prompt.vectors.detach().clone().requires_grad_()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, step_rows in enumerate(islice(shuffled_batches(rows["train"], 4, 7), 12), start=1):
        batch = batch_of(step_rows, model.device)
        _, past_kv = model.forward_embeddings(x[None])
        logits, _ = model(batch.idx, past_kv)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        (g,) = torch.autograd.grad(loss, x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.05 * min(t / 10, (12 - t + 1) / 12)
        change = rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        x = (x - change).detach().requires_grad_()
    metrics = tune(model, [prompt], rows, plan(12, lr=0.05, seed=7, eval_every=5))
    assert_close(prompt.vectors.data, x.data, rtol=1e-3, atol=1e-4)
    assert [entry["step"] for entry in metrics] == list(range(13))
    looks = [entry for entry in metrics if "validation" in entry]
    assert [entry["step"] for entry in looks] == [0, 5, 10, 12]
    last = evaluate(model, [prompt], rows["validation"], 4)
    assert looks[-1]["validation"] == pytest.approx(last.loss, rel=1e-6)
    assert looks[-1]["validation"] < looks[0]["validation"]
    assert (looks[-1]["tokens"], looks[-1]["exact_match"]) == (last.tokens, last.exact_match())


def test_training_moves_the_adapters_and_nothing_else(base):
    """The base is bit for bit what it was. Every number of a stack has moved."""
    model = frozen(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = torch.nn.ModuleList([Prefix.random(model, 2), SoftPrompt.random(model, 2)])
    start = [p.detach().clone() for p in adapters.parameters()]
    tune(model, list(adapters), rows_of(base), plan(2, lr=0.01))
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all((p != q).all() for p, q in zip(adapters.parameters(), start))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_micro_batch_is_exact(model, size, monkeypatch):
    """Losses are sums over targets, so parts of a batch add up to the gradient of all of it.

    No more rows go through the model at once, when it is evaluated either.
    """
    sources = [random_ids(1 + i, seed=i).tolist() for i in range(5)]
    rows = [Row(source, random_ids(6 - len(source)).tolist()) for source in sources]
    gradients, sizes, target_hidden = [], [], train.target_hidden

    def counted(model, batch, past_kv) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(batch.idx))
        return target_hidden(model, batch, past_kv)

    monkeypatch.setattr(train, "target_hidden", counted)
    for micro_batch in (None, size):
        prefix = Prefix.text(model, random_ids(3))
        steps = plan(1, batch_size=5, micro_batch=micro_batch)
        tune(model, [prefix], {"train": rows, "validation": rows}, steps)
        gradients.append(prefix.start.grad)
    assert_close(*gradients, rtol=1e-12, atol=1e-12)
    parts = [*5 // size * [size], *[5 % size] * (5 % size > 0)]
    assert sizes == [5, 5, 5, *parts, *parts, *parts]  # a look, a step, a look


def test_the_same_seed_gives_the_same_numbers(base, tmp_path):
    """And another seed others."""
    flags = ["--init", "random", "--out"]
    curves = [run(base, "--seed", seed, *flags, tmp_path / str(seed))["curve"] for seed in (3, 4)]
    assert run(base, "--seed", 3, *flags, tmp_path / "3")["curve"] == curves[0] != curves[1]


# ---------------------------------------------------------------------------------------- starts


def test_the_default_start_is_the_end_of_a_training_example(base):
    """A stack starts as one text: its first half in the prefix, its second in the prompt."""
    model, tokenizer, rows = frozen(base), load_tokenizer(base), rows_of(base)["train"]
    text = torch.tensor((rows[0].source + rows[0].target)[-6:])
    assert text[-1] == tokenizer.eot_token
    adapters = new_adapters([Prefix, SoftPrompt], model, tokenizer, rows, 3, "text")
    assert_close(train.stacked_past_kv(adapters, model), model(text[None])[1])


def test_a_start_may_be_a_text_or_words_of_the_task(base):
    """A short text is repeated. Words are drawn by the seed."""
    model, tokenizer, rows = frozen(base), load_tokenizer(base), rows_of(base)["train"]

    def vectors(*how, **seed) -> torch.Tensor:
        (prompt,) = new_adapters([SoftPrompt], model, tokenizer, rows, 5, *how, **seed)
        return prompt.vectors.data

    ids = (tokenizer.encode("Thai food") * 5)[:5]
    assert_close(vectors("text", "Thai food"), model.wte.weight[ids], rtol=0, atol=0)
    seen = sorted({i for row in rows for i in row.source + row.target})
    equal = vectors("vocab", seed=1)[:, None] == model.wte.weight[seen]  # (P, tokens, C)
    assert equal.all(dim=2).any(dim=1).all()
    assert (vectors("vocab", seed=1) != vectors("vocab", seed=2)).any()


@pytest.mark.parametrize("method", ["prefix", "both"])
def test_training_goes_on_from_another_adapter(base, tmp_path, method):
    """--init DIR: the new run starts with the loss that the other one ended with."""
    first = run(base, "--method", method, "--out", tmp_path / "1")
    flags = ["--method", method, "--init", tmp_path / "1", "--out", tmp_path / "2"]
    again = run(base, *flags)
    assert again["curve"][0][1] == pytest.approx(first["curve"][-1][1], rel=1e-6)
    with pytest.raises(ValueError, match="--init .* holds .*, and --method trains SoftPrompt$"):
        run(base, "--method", "soft_prompt", *flags[2:4], "--out", tmp_path / "3")


@pytest.mark.parametrize("flags", [["--init", "zero", "--mid-dim", "4"], ["--dtype", "bfloat16"]])
def test_a_prefix_learns_from_other_starts(base, tmp_path, flags):
    """Through an MLP, or before a base in bfloat16. It is stored in float32 all the same."""
    record = run(base, *flags, "--steps", "5", "--out", tmp_path)
    assert record["curve"][-1][1] < record["curve"][0][1]
    (stored,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert stored.dtype == torch.float32 and stored.numel() == record["n_stored"] == 8 * 1024


# ------------------------------------------------------------------------------------------ ends


def test_a_training_ends_when_it_is_done(base):
    """`is_done` sees the metrics behind each look."""
    model, seen = frozen(base), []

    def is_done(metrics) -> bool:
        seen.append(metrics[-1]["step"])
        return metrics[-1]["step"] == 4

    metrics = tune(
        model, [Prefix.random(model, 2)], rows_of(base), plan(9, eval_every=2), None, is_done
    )
    assert seen == [0, 2, 4] and metrics[-1]["step"] == 4


def scripted(monkeypatch, losses: list[float]) -> None:
    """Lets each evaluation say the next of these losses."""
    script = iter(losses)
    monkeypatch.setattr(train, "evaluate", lambda *_: train.Scores(next(script), 0.0, [False] * 9))


def test_patience_counts_looks_without_a_new_best():
    """Step 0 does not count: its loss is the base's."""
    losses = [0.1, 0.9, 0.5, 0.7, 0.5]
    metrics = [{"step": i, "validation": loss} for i, loss in enumerate(losses)]
    since = [looks_since_best(metrics[: i + 1]) for i in range(5)]
    assert since == [0, 0, 0, 1, 2]
    assert looks_since_best([*metrics, {"step": 5, "loss": 0.1}]) == 2  # no look


def test_patience_ends_a_training_and_saves_the_best(base, tmp_path, monkeypatch):
    """Two looks after the best, at step 2. The file of the best is gone in the end."""
    kept, save = [], Checkpoint.save

    def keep(self, trainee, *others) -> None:
        kept.append({name: tensor.clone() for name, tensor in trainee.state_dict().items()})
        save(self, trainee, *others)

    monkeypatch.setattr(Checkpoint, "save", keep)
    scripted(monkeypatch, [2.0, 1.0, 0.9, 0.5, 0.7, 0.6, 0.4])  # frozen, steps 0 to 4, the test
    flags = ["--steps", "9", "--eval-every", "1", "--patience", "2", "--out", tmp_path]
    record = run(base, *flags)
    assert [step for step, _ in record["curve"]] == [0, 1, 2, 3, 4]
    assert record["loss_tuned"] == 0.4
    (saved,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert_close(saved.flatten(), kept[1]["0.start"].flatten(), rtol=0, atol=0)
    assert not list(tmp_path.glob("*best*"))


@pytest.mark.parametrize("lr, validation", [(1e38, 1.0), (0.1, math.nan), (0.1, math.inf)])
def test_a_loss_that_is_no_number_ends_the_run(base, tmp_path, monkeypatch, lr, validation):
    """On training data, or on validation data alone. Nothing of it is left in a new run's way."""
    scripted(monkeypatch, [1.0, 1.0, 1.0] + 9 * [validation])
    sentence = f"the loss became (nan|inf) with --lr {lr:g}: lower it".replace("+", ".")
    with pytest.raises(Diverged, match=sentence):
        run(base, "--lr", lr, "--steps", "9", "--eval-every", "1", "--film", "--out", tmp_path)
    assert not files_in(tmp_path)


def test_what_is_evaluated(base, tmp_path, monkeypatch):
    """The frozen base on the test rows, each look on the validation rows, and the test in the end.

    One's own validation examples are the test, too.
    """
    examples = load_examples("", forty(base), None, 0)
    assert examples["test"] is examples["validation"] and len(examples["train"]) == 36
    calls = []

    def counted(model, adapters, rows, batch_size):
        calls.append((bool(adapters), len(rows)))
        return evaluate(model, adapters, rows, batch_size)

    monkeypatch.setattr(train, "evaluate", counted)
    record = run(base, "--steps", "4", "--eval-every", "2", "--out", tmp_path / "own")
    assert calls == [(False, 4), *4 * [(True, 4)]]  # frozen, steps 0, 2, 4, the test
    assert record["loss_tuned"] == record["curve"][-1][1]
    calls.clear()
    run(base, "--task", "chat", "--steps", "1", "--batch-size", "50", "--out", tmp_path / "task")
    assert calls == [(False, 300), (True, 100), (True, 100), (True, 300)]


# ------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize(
    "best, tried",
    [
        (0.03, [0.01, 0.03, 0.09]),
        (0.01, [0.0033, 0.01, 0.03, 0.09]),
        (0.001, [0.00037, 0.0011, 0.0033, 0.01, 0.03, 0.09]),
        (0.3, [0.01, 0.03, 0.09, 0.27, 0.81]),
    ],
)
def test_rates_lie_a_factor_of_three_apart_and_go_on_beyond_an_edge(best, tried):
    """As long as the edge is the best of all."""
    losses = search_rate(0.03, lambda rate: 1 + abs(math.log(rate / best)))
    assert sorted(losses) == tried


def test_an_edge_that_is_better_by_a_hair_is_not_followed():
    """A hundredth of the loss is noise. A rate that diverged has an infinite loss."""
    assert len(search_rate(0.03, lambda rate: 2.0 if rate > 0.02 else 1.99)) == 3
    losses = search_rate(0.03, lambda rate: math.inf if rate > 0.02 else 1.0)
    assert sorted(losses) == [0.0033, 0.01, 0.03, 0.09]
    assert len(search_rate(0.03, lambda rate: math.inf)) == 3


@pytest.mark.parametrize("full", [False, True])
def test_each_trial_of_a_rate_begins_anew(base, full, capsys):
    """A fifth of the steps each. What was trained in one does not reach the next, or the base."""
    model, rows = load_base(base).requires_grad_(full), rows_of(base)
    before = copy.deepcopy(model.state_dict())

    def begin() -> list[torch.nn.Module]:
        return [] if full else [Prefix.text(model, torch.arange(3))]

    losses = find_rate(begin, model, rows, plan(7, lr=1e-3))
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    for rate, loss in losses.items():
        trained = copy.deepcopy(model)
        metrics = tune(trained, [] if full else begin(), rows, plan(2, lr=rate))
        assert loss == metrics[-1]["validation"]
    assert math.inf in find_rate(begin, model, rows, plan(20, lr=3e37)).values()  # it diverged
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("rate     three or more trainings of 2 steps")
    assert said[1] == f"rate     0.00033: validation loss {losses[0.00033]:.3f}"


def test_without_lr_a_search_runs_and_its_table_is_stored(base, tmp_path, capsys):
    """The training itself takes the best rate of it. In a pipe each trial is one line."""
    record = train.main(without_lr(train_argv(base, "--steps", "5", "--out", tmp_path)))
    stored = json.loads((tmp_path / "training.json").read_text())
    rates = {float(rate): loss for rate, loss in stored["rates"].items()}
    assert {0.01, 0.03, 0.09} <= set(rates)
    assert record["lr_used"] == stored["lr_used"] == min(rates, key=rates.get)
    assert stored["lr"] is None  # as the flags said
    said = capsys.readouterr().out
    assert said.count("\nrate  ") == 1 + len(rates) and said.count("\nstep  ") == 5


def test_a_given_rate_and_the_small_base_need_no_search(base, tmp_path, monkeypatch):
    """The recipes' rates were chosen on out/base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "find_rate", None)
    Path("out").mkdir()
    Path("out/base").symlink_to(base)
    assert run(base, "--lr", "0.2")["lr_used"] == 0.2
    argv = ["--data", forty(base), "--steps", "1", "--device", "cpu", "--method", "soft_prompt"]
    assert train.main(argv)["lr_used"] == 0.1


# ------------------------------------------------------------------------------------- progress


def shown(monkeypatch, capsys, terminal: bool, first: int, steps: int, **how) -> list[str]:
    """A run of steps of a sixteenth of a second and 50 tokens -> all that it prints."""
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(command.process, "time", clock)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    progress = command.process.Progress(first, steps, **how)
    for step in range(first + 1, steps + 1):
        clock.now += 0.0625
        progress.show(50, {"step": step, "loss": 1.0})
    return re.findall(r"\r?[^\r\n]+\n?", capsys.readouterr().out)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_says_how_fast_and_how_long(monkeypatch, capsys, terminal):
    """In a pipe a line each fifth of the steps; on a terminal one line, refreshed in place."""
    steps = range(11, 52) if terminal else [11, 22, 33, 44, 51]
    line = "step {:4}/51  loss 1.000     800 tokens/s  {:3.0f} s left"
    lines = [line.format(step, (51 - step) / 16) for step in steps]
    expected = [f"\r{line}" for line in lines] if terminal else [f"{line}\n" for line in lines]
    expected[-1] = expected[-1].rstrip("\n") + "\n"
    assert shown(monkeypatch, capsys, terminal, 10, 51) == expected
    quiet = shown(monkeypatch, capsys, terminal, 10, 51, quiet=True)
    assert quiet == (expected if terminal else [])  # as in the search of a rate


# ----------------------------------------------------------------------------- several processes


def torchrun(base: str, *flags: object) -> list[str]:
    """-> the command of two processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [sys.executable, "-m", *launcher, train.__file__, *train_argv(base, *flags)]


def test_what_the_second_of_two_processes_does(base, tmp_path, monkeypatch):
    """It takes every second row, hands in loss and gradients, and saves nothing.

    Progress counts the tokens of both processes.
    """
    handed_in, batches, read, loss_of = [], [], [], train.loss_of
    two = {"is_initialized": lambda: True, "get_rank": lambda: 1, "get_world_size": lambda: 2}
    monkeypatch.setattr(
        command.process, "dist", SimpleNamespace(**two, all_reduce=handed_in.append)
    )
    monkeypatch.setattr(
        train, "loss_of", lambda *given: batches.append(given[1]) or loss_of(*given)
    )
    progress = SimpleNamespace(show=lambda n_tokens, _: read.append(n_tokens))
    monkeypatch.setattr(train, "Progress", lambda *_, **__: progress)
    model, rows = frozen(base), rows_of(base, 6)
    prefix = Prefix.random(model, 3).reparametrise(2)
    checkpoint = Checkpoint(tmp_path, {}, False, False)
    tune(model, [prefix], rows, plan(2, eval_every=1), checkpoint)
    steps = list(islice(shuffled_batches(rows["train"], 4, 0), 2))
    assert read == [sum(row.n_read for row in step) for step in steps]
    parts = [batch_of(step[1::2], model.device).idx.tolist() for step in steps]
    assert [batch.idx.tolist() for batch in batches] == parts
    shapes = [(), *(p.shape for p in prefix.parameters() if p.requires_grad)]
    assert [tensor.shape for tensor in handed_in] == 2 * shapes
    assert not files_in(tmp_path)


def test_each_process_needs_an_example(monkeypatch):
    """Of a batch; how large its parts are does not matter."""
    monkeypatch.setattr(command.process, "this_process", lambda: (1, 2))
    assert command.process.start_process(2) == (1, 2)
    with pytest.raises(ValueError, match="2 processes need an example each: raise --batch-size"):
        command.process.start_process(1)


@pytest.mark.slow
def test_two_processes_train_the_adapter_that_one_does(base, tmp_path):
    """One of them writes and talks."""
    flags = ["--mid-dim", "4", "--steps", "4", "--micro-batch", "1", "--out"]
    done = subprocess.run(
        torchrun(base, *flags, tmp_path / "two"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    record = run(base, *flags, tmp_path / "one")
    assert done.stdout.count("saved to") == done.stdout.count("step    4/4") == 1
    assert f"tuned   loss {record['loss_tuned']:.3f}" in done.stdout
    one, two = (load_adapter(tmp_path / name).start for name in ("one", "two"))
    assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert set(files_in(tmp_path / "two")) == set(files_in(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_process_that_dies_ends_the_run_of_all(base, tmp_path):
    """With an error, not with a wait for ever. The last checkpoint stays."""
    argv = torchrun(base, "--steps", "20000", "--eval-every", "5", "--out", tmp_path)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = "checkpoint.pt"
    while not (tmp_path / checkpoint).exists():
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert [name for name in files_in(tmp_path) if not name.endswith(".new")] == [checkpoint]
