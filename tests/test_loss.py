"""The loss and the evaluation: only targets count, however rows are cut into batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids
from torch import Tensor
from torch.testing import assert_close

from command.answers import check_frozen
from data import IGNORE, Batch, Row, batch_of
from model import GPT, KVCache
from prefix import Prefix
from soft_prompt import SoftPrompt
from train import evaluate, loss_of, target_hidden


def random_rows(n: int) -> list[Row]:
    """-> sources of 1 to 7 tokens, and targets of 1 to 5."""
    return [
        Row(random_ids(1 + i % 7, seed=i).tolist(), random_ids(1 + i % 5, seed=99 + i).tolist())
        for i in range(n)
    ]


def summed_loss(model: GPT, batch: Batch, past_kv: KVCache | None) -> Tensor:
    """The plain way: the logits of every position, and those without a target ignored."""
    logits, _ = model(batch.idx, past_kv)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")


@pytest.mark.ex11
def test_the_loss_is_the_mean_over_target_positions(model):
    """Projecting only those equals projecting all and ignoring the rest; behind a past, too."""
    batch = batch_of([Row([1, 2, 3], [4, 5]), Row([6], [7, 8, 9]), Row([5, 4], [3])], model.device)
    short = batch_of([Row([1], [4, 5]), Row([6], [7])], model.device)  # as from empty inputs
    past = model(random_ids(1, 4))[1]
    for batch, past_kv in ((batch, None), (batch, past), (short, past)):
        hidden, targets = target_hidden(model, batch, past_kv)
        all_logits, _ = model(batch.idx, past_kv)
        expected = F.cross_entropy(all_logits.flatten(0, 1), batch.targets.flatten())
        assert_close(F.cross_entropy(hidden @ model.head.T, targets), expected)


@pytest.mark.ex11
@pytest.mark.parametrize("kind", [Prefix, SoftPrompt])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_its_gradients_are_those_of_all_logits(model, kind, dtype):
    """Of the adapter, and of each weight of the model, to the digits of float32."""
    rows = random_rows(40)
    batch, adapter, results = batch_of(rows, model.device), kind.text(model, random_ids(4)), []
    assert int((batch.targets != IGNORE).sum()) == sum(len(row.target) for row in rows)
    same = copy.deepcopy(model).to(dtype)
    for one, loss in ((model, summed_loss), (same, lambda *given: 1000 * loss_of(*given, 1000))):
        weights = [*adapter.parameters(), *one.requires_grad_(True).parameters()]
        value = loss(one, batch, adapter.past_kv(one))
        results.append([value, *torch.autograd.grad(value, weights)])
    for expected, got in zip(*results):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", [Prefix, SoftPrompt])
def test_bfloat16_computes_the_same_to_five_percent(gpt2, kind):
    """The loss and the gradient. The adapter's own numbers keep their dtype."""
    batch = batch_of([Row([1, 2, 3], [4, 5]), Row([6], [7, 8, 9])], gpt2.device)
    adapter, results = kind.text(gpt2, random_ids(4)), []
    for same in (gpt2, copy.deepcopy(gpt2).bfloat16()):
        loss = loss_of(same, batch, adapter.past_kv(same), 5)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(adapter.parameters()))])
    for expected, got in zip(*results):
        assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    assert results[1][1].dtype == torch.float64


@pytest.mark.ex12
def test_exact_match_is_what_generation_would_give(model):
    """One forward pass tells which rows greedy decoding gets right, in the order of the rows."""
    rows = random_rows(12)
    for i in (1, 4, 7):  # three rows that are right: the target is what the model says
        said = model.generate(torch.tensor([rows[i].source]), 3)[0, -3:].tolist()
        rows[i] = Row(rows[i].source, said)
    exact = evaluate(model, [], rows, batch_size=5).exact
    for row, right in zip(rows, exact):
        answer = model.generate(torch.tensor([row.source]), len(row.target))
        assert right == (answer[0, len(row.source) :].tolist() == row.target)
    assert 3 <= sum(exact) < 12


@pytest.mark.ex12
def test_the_loss_of_an_evaluation_is_that_of_training(model):
    """However the rows are cut into batches, and behind an adapter. Tokens weigh alike."""
    rows, prefix = random_rows(7), Prefix.text(model, random_ids(3))
    n_targets = sum(len(row.target) for row in rows)
    batch = batch_of(rows, model.device)
    expected = summed_loss(model, batch, prefix.past_kv(model)).item() / n_targets
    for batch_size in (1, 3, 7, 8):
        loss = evaluate(model, [prefix], rows, batch_size).loss
        assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.ex12
def test_the_share_of_right_tokens_shows_a_form_that_is_learnt(model):
    """It counts target tokens that are the likeliest behind the target so far, not rows."""
    rows, n_right = random_rows(9), 0
    first = model(torch.tensor([rows[3].source]))[0][0, -1].argmax().item()
    rows[3] = Row(rows[3].source, [first, (first + 1) % 61, *rows[3].target])  # partly right
    for source, target in rows:
        likeliest = model(torch.tensor([source + target[:-1]]))[0][0].argmax(dim=-1).tolist()
        n_right += sum(a == b for a, b in zip(likeliest[len(source) - 1 :], target))
    scores = evaluate(model, [], rows, batch_size=4)
    assert scores.tokens == pytest.approx(100 * n_right / sum(len(row.target) for row in rows))
    assert scores.exact_match() == 100 * sum(scores.exact) / 9 < scores.tokens


def test_a_base_that_overflows_is_named(gpt2):
    """In float16 numbers end at 65504. In float32 the same base has a loss."""
    gpt2.h[1].mlp.c_fc.weight.data *= 1e4
    rows = random_rows(5)
    check_frozen(evaluate(gpt2.float(), [], rows, 2), gpt2)
    sentence = r"overflows in torch.float16: its loss is (nan|inf) before any step; give --dtype f"
    with pytest.raises(ValueError, match=sentence):
        check_frozen(evaluate(gpt2.half(), [], rows, 2), gpt2)
