"""What grades the exercises, beside the tests of each file: likely mistakes, each with a sentence.

Sentences come first, torch's numbers after them. tests/test_exercises.py hands in wrong solutions,
and looks for the sentence.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blank import EXERCISES
from conftest import C, D, H, L, random_ids, random_model
from torch import Tensor
from torch.testing import assert_close

from data import IGNORE, Row, batch_of
from model import attend, causal_mask, rows_of
from prefix import Prefix
from soft_prompt import SoftPrompt
from train import Scores, evaluate, target_hidden


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(got: Any, expected: Any, hint: str) -> None:
    __tracebackhide__ = True
    assert_close(got, expected, msg=lambda numbers: f"{hint}\n\n{numbers}")


def shaped(got: Tensor, shape: tuple[int, ...], hint: str) -> None:
    if tuple(got.shape) != shape:
        pytest.fail(f"{hint}\n\nYours is {tuple(got.shape)}, and should be {shape}.", pytrace=False)


def not_like(got: Tensor, mistakes: dict[str, Tensor]) -> None:
    """Fails with the name of the mistake whose result this is."""
    for hint, mistake in mistakes.items():
        if got.shape == mistake.shape and torch.allclose(got, mistake):
            pytest.fail(hint, pytrace=False)


def attempt(hint: str, function: Callable, *given: Any) -> Any:
    """-> what the function returns. If it raises: the sentence, and then the student's line."""
    raised = None
    try:
        got = function(*given)
    except NotImplementedError:
        raise
    except Exception as error:
        raised = error  # told below, or torch's words would come first
    if raised:
        files = {exercise.file for exercise in EXERCISES.values()}
        frames = traceback.extract_tb(raised.__traceback__)
        lines = [frame for frame in frames if Path(frame.filename).name in files]
        where = f"\n\n{lines[0].filename}, line {lines[0].lineno}: {lines[0].line}" if lines else ""
        pytest.fail(f"{hint}{where}\n\n{type(raised).__name__}: {raised}", pytrace=False)
    if got is None:
        pytest.fail("It returns nothing: is the return missing?", pytrace=False)
    return got


@pytest.fixture
def model(gpt2):
    """The exercises are on GPT-2; the tests of each file have the Llama, too."""
    return gpt2


@pytest.mark.ex1
def test_mistakes_in_the_mask():
    """Behind a past of three, the first of two queries sees all keys but the last, which is new."""
    what = (2, 5, torch.float64, torch.device("cpu"))
    mask = attempt("causal_mask takes T, S, a dtype and a device.", causal_mask, *what)
    hint = "The mask has a row for each of T queries, and a column for each of S keys."
    shaped(mask, (2, 5), hint)
    hint = "The mask is added to scores, so it has their dtype: True and False would add 1 and 0."
    assert mask.dtype == torch.float64, hint
    hint = "0 · ∞ is not a number: begin with torch.full, not with a product."
    assert not mask.isnan().any(), hint
    hint = "0 is where a query may look, -∞ where it may not: is it the other way round?"
    assert mask[0, 0] == 0, hint
    hint = "The mask of a past? The last query sees every key: the triangle ends lower right."
    assert (mask[1] == 0).all(), hint
    hint = "The first query sees the past and itself: off by one, or no triangle?"
    assert (mask[0, :4] == 0).all() and mask[0, 4] != 0, hint
    hint = "Where a query may not look, the mask is -∞: only that makes a share of 0."
    assert mask[0, 4] == -torch.inf, hint


@pytest.mark.ex2
def test_mistakes_in_attention():
    """Two queries behind a past of three, each mistake written out."""
    q, k, v = random(1, H, 2, D), 3 * random(1, H, 5, D, seed=1), random(1, H, 5, D, seed=2)
    late = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    mask = torch.zeros(2, 5, dtype=torch.float64).masked_fill(late, -torch.inf)
    hint = "attend takes q of (B, H, T, D), k and v of (B, H, S, D), and a mask of (T, S)."
    y = attempt(hint, attend, q, k, v, mask)
    shaped(y, (1, H, 2, D), "attend returns (B, H, T, D): the weights, (B, H, T, S), times v.")
    raw = q @ k.transpose(2, 3)  # (B, H, T, S)
    scores = raw / D**0.5
    upper_left = torch.ones(2, 5, dtype=torch.bool).triu(1)
    not_like(y.nan_to_num(), {
        "The mask is not used: a query sees the keys behind it.": scores.softmax(dim=-1) @ v,
        "The mask that is given knows the past. is_causal=True would put the triangle elsewhere.":
            scores.masked_fill(upper_left, -torch.inf).softmax(dim=-1) @ v,
        "The mask is added. Subtracted, it shows each query what it may not see.":
            ((scores - mask).softmax(dim=-1) @ v).nan_to_num(),
        "The mask is added before the softmax. After it, weights no longer sum to 1.":
            ((scores.softmax(dim=-1) + mask) @ v).nan_to_num(),
        "Weights that are cut after the softmax no longer sum to 1: add the mask before it.":
            scores.softmax(dim=-1).masked_fill(late, 0) @ v,
        "The scores are not divided by √D.": (raw + mask).softmax(dim=-1) @ v,
        "The scores are divided by D, and should be by √D.": (raw / D + mask).softmax(dim=-1) @ v,
        "The scores are multiplied by √D, and should be divided by it.":
            (raw * D**0.5 + mask).softmax(dim=-1) @ v,
        "√D, and D is the width of a head: the last axis of q.":
            (raw / H**0.5 + mask).softmax(dim=-1) @ v,
        "The softmax goes over the keys, the last axis.": (scores + mask).softmax(dim=-2) @ v,
    })  # fmt: skip
    hint = "softmax(q·kᵀ / √D + mask) v: which part is missing?"
    same(y, (scores + mask).softmax(dim=-1) @ v, hint)


@pytest.mark.ex3
def test_mistakes_in_attention_with_a_past(model):
    """Three new positions behind a past of two: what comes out, and the keys and values."""
    attention, x = model.h[0].attn, random(1, 3, C)
    mask = causal_mask(3, 5, x.dtype, x.device)
    past = (random(1, H, 2, D, seed=1), random(1, H, 2, D, seed=2))
    hint = "Heads: (B, T, C) becomes (B, H, T, D) for attend, and (B, T, C) behind it."
    whole = attempt(hint, attention.forward, x, mask, past)
    hint = "forward returns two things: what was attended to, and (keys, values)."
    assert isinstance(whole, tuple) and len(whole) == 2, hint
    y, kv = whole
    parts = attention.c_attn(x).split(C, dim=2)
    q, k, v = (part.view(1, 3, H, D).transpose(1, 2) for part in parts)
    for name, new, old, got in zip(("keys", "values"), (k, v), past, kv):
        hint = f"The {name} that come out are those of past and new positions, (B, H, S, D)."
        shaped(got, (1, H, 5, D), hint)
        hint = f"The past goes in front of the new {name}, not behind them."
        not_like(got, {hint: torch.cat([new, old], dim=2)})
        hint = f"The past goes in front, as it is: are its {name} among the values, or changed?"
        same(got[:, :, :2], old, hint)
        for other, part in {"queries": q, "keys": k, "values": v}.items():
            hint = f"The {name} are the {other}: c_attn makes queries, keys, values, in this order."
            if other != name:
                not_like(got[:, :, 2:], {hint: part})
        hint = f"The {name} of heads and positions are mixed up: view as (B, T, H, D), then swap "
        hint += "T and H."
        same(got[:, :, 2:], new, hint)
    seen, project = attend(q, *kv, mask), attention.c_proj
    alone = attend(q, k, v, causal_mask(3, 3, x.dtype, x.device))
    blind = attend(q, *kv, torch.zeros(3, 5, dtype=x.dtype))
    not_like(y, {
        "The queries do not look at the past: give attend all keys and values.":
            project(alone.transpose(1, 2).flatten(2)),
        "The mask is not handed on to attend.": project(blind.transpose(1, 2).flatten(2)),
        "c_proj is missing.": seen.transpose(1, 2).flatten(2),
        "Heads and positions are mixed up at the end: swap H and T back before they are joined.":
            project(seen.reshape(1, 3, C)),
    })  # fmt: skip
    hint = "attend, then swap H and T back, join the heads, and c_proj."
    same(y, project(seen.transpose(1, 2).flatten(2)), hint)
    hint = "Without a past, past is None, and nothing goes in front: append_past knows that."
    attempt(hint, attention.forward, x, mask[:, 2:], None)


@pytest.mark.ex4
@pytest.mark.parametrize("P", [0, 3])
def test_mistakes_in_generation(model, P):
    """With no past and behind one of three positions: what is read, and what comes out."""
    T, n, idx, read = 4, 4, random_ids(2, 4), []
    past = model(random_ids(1, P, seed=2))[1] if P else None

    def anew(past) -> Tensor:
        ids = idx
        for _ in range(n):
            ids = torch.cat([ids, model(ids, past)[0][:, -1:].argmax(dim=-1)], dim=1)
        return ids

    hook = model.h[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].size(1)))
    hint = "generate reads the prompt behind past_kv, then the new tokens; forward_embeddings "
    hint += "wants vectors, self.wte of ids."
    got = attempt(hint, model.generate, idx, n, past)
    hook.remove()
    shaped(got, (2, T + n), "generate returns the prompt and all new tokens, (B, T + new).")
    if P:
        not_like(got, {"past_kv is not used: read the prompt behind it.": anew(None)})
    hint = "Not the likeliest: do you take over the cache that each step returns, read only what "
    hint += "is new, use the last position?"
    same(got, anew(past), hint)
    hint = f"{sum(read)} positions were read: is there no cache? Read the prompt once, then each "
    hint += f"new token once, but not the last: T + n - 1 = {T + n - 1}."
    assert sum(read) == T + n - 1, hint


@pytest.mark.ex4
def test_mistakes_in_sampling(model):
    """Two rows, with a generator of the same seed, written out without a cache."""
    idx = random_ids(2, 3)

    def anew(factor: float = 0.5, top_k: int = 61) -> Tensor:
        ids, generator = idx, torch.Generator().manual_seed(0)
        for _ in range(8):
            logits = factor * model(ids)[0][:, -1].float()
            lowest = logits.sort().values[:, -top_k, None]
            p = logits.masked_fill(logits < lowest, -torch.inf).softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
        return ids

    def sampled(**how: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return model.generate(idx, 8, temperature=2.0, generator=generator, **how)

    hint = "Above temperature 0, one token a row is drawn by torch.multinomial."
    not_like(attempt(hint, sampled), {
        "The temperature is not used: above 0, a token is drawn.": model.generate(idx, 8),
        "The logits are divided by the temperature, not multiplied.": anew(2.0),
    })  # fmt: skip
    hint = "Draw over the whole vocabulary: torch.multinomial of the softmax of logits / "
    hint += "temperature, with the generator."
    same(sampled(), anew(), hint)
    got = attempt("With a top_k, too.", lambda: sampled(top_k=3))
    not_like(got, {"top_k is not used: the logits of all others become minus infinity.": anew()})
    hint = "With top_k, the logits of all but the k likeliest become minus infinity."
    same(got, anew(top_k=3), hint)
    attempt("top_k may be more than there are tokens: min(top_k, V).", lambda: sampled(top_k=99))


@pytest.mark.ex4
def test_mistakes_at_the_stop_token(model):
    """Sampled, so that a row that goes on after its stop would show."""
    idx = random_ids(6, 3)

    def sampled(stop: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return model.generate(idx, 12, temperature=2.0, stop_token=stop, generator=generator)

    free = sampled()
    stop = free[0, 5].item()
    got = attempt("With a stop_token, too.", sampled, stop)
    for row, unstopped in zip(got[:, 3:].tolist(), free[:, 3:].tolist()):
        end = unstopped.index(stop) + 1 if stop in unstopped else len(unstopped)
        hint = "A row that has stopped goes on: once done, it stays done, filled with the stop "
        hint += "token."
        assert set(row[end:]) <= {stop}, hint
        hint = "A stop in one row changes what stands before it, or another row."
        assert row[:end] == unstopped[:end][: len(row)], hint
    ends = [row.index(stop) + 1 if stop in row else 12 for row in free[:, 3:].tolist()]
    hint = "The loop goes on until every row is done, not until one is."
    assert got.size(1) == 3 + max(ends), hint
    stopped = model.generate(idx[:1], 12, stop_token=model.generate(idx[:1], 1)[0, -1].item())
    assert stopped.size(1) == 4, "When every row is done, the loop ends."


@pytest.mark.ex5
def test_mistakes_in_a_past_for_each_row(model):
    """Two texts of one length are the pasts of two rows, each of which reads its own."""
    texts, idx = random_ids(2, 4, seed=1), random_ids(2, 2)
    caches = [model(text[None])[1] for text in texts]
    hint = "caches is a list of N caches, each a list of L pairs (k, v) of batch 1."
    cache = attempt(hint, rows_of, caches)
    is_list = isinstance(cache, list) and len(cache) == L
    hint = "One cache comes out: a list with a pair for each layer, not one for each cache."
    assert is_list, hint
    is_pair = all(len(pair) == 2 for pair in cache)
    assert is_pair, "Each layer has two tensors: join keys with keys, and values with values."
    hint = "Each row has its own past, so the caches are joined along the batch: (N, H, P, D)."
    shaped(cache[0][0], (2, H, 4, D), hint)
    for layer, pair in enumerate(cache):
        rows = [torch.cat([part[layer][i] for part in caches]) for i in (0, 1)]
        not_like(pair[0], {"k and v swapped? Keys come first.": rows[1]})
        not_like(pair[0], {"The rows are in another order than the caches.": rows[0].flip(0)})
        same(list(pair), rows, "Each layer has the keys and values of that layer, row by row.")
    apart = [model(idx[i : i + 1], caches[i])[0] for i in range(2)]
    same(model(idx, cache)[0], torch.cat(apart), "Each row reads its own past, and no other.")
    hint = "Pasts of several lengths cannot be rows of one batch: raise a ValueError."
    try:
        rows_of([caches[0], model(texts[:1, :3])[1]])
    except NotImplementedError:
        raise
    except Exception as error:
        raised = type(error)
    else:
        raised = None
    assert raised is ValueError, hint


def random_prefix(P: int = 3, seed: int = 1) -> Prefix:
    return Prefix(random(P, L, 2, H, D, seed=seed))


@pytest.mark.ex6
def test_mistakes_in_the_cache_of_a_prefix(model):
    prefix = random_prefix()
    cache = attempt("past_kv takes self.kv() apart, (P, L, 2, H, D).", prefix.past_kv, model)
    assert len(cache) == L, "The cache is a list with a pair (keys, values) for each layer."
    for layer, pair in enumerate(cache):
        for part, (name, got) in enumerate(zip(("keys", "values"), pair)):
            shaped(got, (1, H, 3, D), f"The {name} of a layer are (1, H, P, D).")
            kv = [numbers.transpose(0, 1)[None] for numbers in prefix.start[:, layer].unbind(1)]
            expected, other = kv[part], kv[1 - part]
            not_like(got, {"k and v swapped? Keys are at 0 of the third axis, values at 1.": other})
            hint = "Axes are mixed up: permute (P, L, 2, H, D), for view and reshape only cut the "
            hint += "numbers anew."
            same(got, expected, hint)
    hint = "No gradient reaches the prefix: detach and .data cut it off."
    assert all(t.requires_grad for kv in cache for t in kv), hint


@pytest.mark.ex6
def test_the_cache_of_a_prefix_comes_through_its_mlp(model):
    """Any MLP will do: one that gives ones and keeps its gradient."""
    prefix = random_prefix()
    prefix.inputs = torch.nn.Parameter(torch.ones_like(prefix.start))
    prefix.mlp = torch.nn.Identity()
    (k, _), *_ = prefix.past_kv(model)
    start = prefix.start[:, 0, 0].transpose(0, 1)[None]
    hint = "The numbers are those of self.start: with self.kv() they come through the MLP, which "
    hint += "never trains otherwise."
    not_like(k, {hint: start})
    same(k, 1 + start, "The numbers of the cache are self.kv().")


@pytest.mark.ex6
def test_mistakes_behind_another_past(model):
    """A past of one row and of two; a base in bfloat16."""
    front, prefix = random_prefix(2, seed=2), random_prefix()
    for B in (1, 2):
        past = [tuple(t.expand(B, -1, -1, -1) for t in kv) for kv in front.past_kv(model)]
        hint = "A past of B rows: append_past puts it in front, and serves each of its rows."
        cache = attempt(hint, prefix.past_kv, model, past)
        hint = "Still a pair a layer: join its tensors along the positions, not the two lists."
        assert len(cache) == L, hint
        for (k, v), old, own in zip(cache, past, prefix.past_kv(model)):
            not_like(k[:1], {"The past in front is lost.": own[0]})
            behind = torch.cat([own[0], old[0][:1]], dim=2)
            hint = "The past that is given goes in front, and the prefix behind it."
            not_like(k[:1], {hint: behind})
            for got, a, b in zip((k, v), old, own):
                expected = torch.cat([a, b.expand(B, -1, -1, -1)], dim=2)
                same(got, expected, "The past in front, the prefix behind it, for every row.")
    (k, _), *_ = prefix.past_kv(random_model().bfloat16())
    assert k.dtype == torch.bfloat16, "The cache has the dtype of the model: cast it."


@pytest.mark.ex7
def test_mistakes_in_a_prefix_from_text(model):
    text, idx = random_ids(5, seed=1), random_ids(1, 4)
    hint = "The model wants a batch, one row of P ids, and from_cache wants the cache, the second "
    hint += "thing that it returns."
    prefix = attempt(hint, Prefix.text, model, text)
    hint = "text returns a Prefix, which from_cache makes of the cache, and not the cache itself."
    assert isinstance(prefix, Prefix), hint
    hint = "A prefix is (P, L, 2, H, D), from the cache of one row of P ids, and not P rows of one."
    shaped(prefix.start, (5, L, 2, H, D), hint)
    one_by_one = [model(i[None, None])[1] for i in text]
    caches = [torch.stack([torch.stack(kv) for kv in cache]) for cache in one_by_one]
    apart = torch.stack(caches)[:, :, :, 0, :, 0]  # (P, L, 2, H, D)
    hint = "Each token was read alone: read the text at once, so that tokens see what stands "
    hint += "before them."
    not_like(prefix.start, {hint: apart})
    both = model(torch.cat([text, idx[0]])[None])[0][:, 5:]
    hint = "A prefix of a text acts as that text, all of it, in its order."
    same(model(idx, prefix.past_kv(model))[0], both, hint)


@pytest.mark.ex8
def test_mistakes_in_the_mlp(model):
    plain, prefix = random_prefix(), random_prefix()
    through = attempt("reparametrise takes the width of the MLP.", prefix.reparametrise, 10)
    assert through is prefix, "reparametrise returns the prefix itself: return self."
    trained = {name for name, p in through.named_parameters() if p.requires_grad}
    hint = "The start is held fixed: close it to gradients, for only the MLP is to train."
    assert "start" not in trained, hint
    assert "inputs" in trained, "The inputs are trained, too: make them an nn.Parameter."
    shaped(through.inputs, (3, C), "The inputs are a row of C numbers for each virtual token.")
    kinds = [type(part).__name__ for part in through.mlp]
    hint = f"The MLP is a layer, a tanh, and a layer: it is {', '.join(kinds)}."
    assert kinds == ["Linear", "Tanh", "Linear"], hint
    widths = [tuple(part.weight.shape) for part in (through.mlp[0], through.mlp[2])]
    hint = "The MLP goes from C to mid_dim, and from there to L·2·C."
    assert widths == [(10, C), (L * 2 * C, 10)], hint
    like_start = {p.dtype for p in through.parameters()} == {plain.start.dtype}
    assert like_start, "All parameters have the dtype, and the device, of self.start."
    same(through.start, plain.start, "The start stays what it is: the MLP's output is added to it.")
    hint = "At first the MLP changes nothing: zero weight and bias of its last layer."
    same(through.kv(), plain.kv(), hint)
    hint = "The inputs are drawn from N(0, 1): equal rows would stay equal."
    assert through.inputs.std() > 0.5, hint
    through.kv().sum().backward()
    learns = through.mlp[2].weight.grad.abs().sum() > 0
    hint = "The MLP gets no gradient: its first layer must not be zero, nor its output cut off."
    assert learns, hint


@pytest.mark.ex9
def test_mistakes_in_baking():
    through = random_prefix().reparametrise(10)
    torch.nn.init.normal_(through.mlp[2].weight, generator=torch.Generator().manual_seed(0))
    start, kv = through.start.detach().clone(), through.kv().detach()
    baked = attempt("bake makes a Prefix of numbers.", through.bake)
    assert isinstance(baked, Prefix), "bake returns a Prefix, not its numbers."
    hint = "bake makes a new prefix, and leaves this one as it is."
    assert baked is not through and through.mlp is not None, hint
    same(through.start, start, hint)
    assert baked.mlp is None, "The baked prefix has no MLP: its numbers are what the MLP gave."
    not_like(baked.start, {"The MLP is lost: bake self.kv(), and not self.start.": start})
    same(baked.start, kv, "The baked numbers are self.kv().")
    hint = "The baked numbers are a parameter of their own."
    assert baked.start.requires_grad and baked.start.is_leaf, hint


def random_prompt(P: int = 3) -> SoftPrompt:
    return SoftPrompt(random(P, C, seed=1))


@pytest.mark.ex10
def test_mistakes_in_the_cache_of_a_soft_prompt(model):
    prompt = random_prompt()
    hint = "Vectors go into model.forward_embeddings, a batch of one: (1, P, C)."
    cache = attempt(hint, prompt.past_kv, model)
    a_cache = isinstance(cache, list) and len(cache) == L
    hint = "past_kv returns the cache alone: forward_embeddings returns hidden states, and the "
    hint += "cache."
    assert a_cache, hint
    hint = "Without a past in front, the vectors are one row, (1, P, C)."
    shaped(cache[0][0], (1, H, 3, D), hint)
    twice = model.forward_embeddings(prompt.vectors[None] + model.wpe.weight[:3])[1]
    hint = "Positions are put in twice: forward_embeddings adds them."
    not_like(cache[0][0], {hint: twice[0][0]})
    hint = "The vectors go through the model in place of embeddings."
    same(cache, model.forward_embeddings(prompt.vectors[None])[1], hint)
    hint = "No gradient reaches the vectors: detach, .data or no_grad cuts it off, and training "
    hint += "learns nothing."
    assert all(t.requires_grad for kv in cache for t in kv), hint
    hint = "The vectors are cast to the dtype of the model."
    (k, _), *_ = attempt(hint, prompt.past_kv, random_model().bfloat16())
    assert k.dtype == torch.bfloat16, hint


@pytest.mark.ex10
def test_mistakes_of_a_prompt_behind_another_past(model):
    """A past of one row and of two: in front of the vectors, in every layer."""
    prompt, text = random_prompt(), random_ids(2, seed=3)
    for B in (1, 2):
        past = [tuple(t.expand(B, -1, -1, -1) for t in kv) for kv in model(text[None])[1]]
        hint = "Behind a past of B rows, the cache has B rows, too."
        cache = attempt(hint, prompt.past_kv, model, past)
        shaped(cache[0][0][:, :, -3:], (B, H, 3, D), hint)
        alone = prompt.past_kv(model)
        not_like(cache[0][0], {"The past in front is lost: hand it to the model.": alone[0][0]})
        vectors = torch.cat([model.wte(text), prompt.vectors]).expand(B, -1, -1)
        expected = model.forward_embeddings(vectors)[1]
        moved = torch.cat([past[1][0], alone[1][0].expand(B, -1, -1, -1)], dim=2)
        hint = "The vectors do not see the past: run the model behind it, do not only put it in "
        hint += "front."
        not_like(cache[1][0], {hint: moved})
        same(cache, expected, "The vectors are read behind the past, which stays in front of them.")


@pytest.mark.ex11
def test_mistakes_at_target_positions(model):
    rows = [Row([1, 2, 3], [4, 5]), Row([6], [7, 8, 9]), Row([5, 4], [3])]
    batch, past = batch_of(rows, model.device), model(random_ids(1, 4))[1]
    hint = "model.forward_embeddings reads vectors, model.wte of the ids, and gives (B, T, C); "
    hint += "then choose among (B, T)."
    got = attempt(hint, target_hidden, model, batch, past)
    hint = "target_hidden returns two things: hidden states, and targets."
    assert isinstance(got, tuple) and len(got) == 2, hint
    hidden, targets = got
    hint = "Every position was picked: only those whose target is not IGNORE are scored."
    assert len(targets) != batch.targets.numel(), hint
    hint = "A position that is not scored was picked: take those whose target is not IGNORE."
    assert not (targets == IGNORE).any(), hint
    hint = "The targets are those of batch.targets, in its order: a batch is shifted already, so "
    hint += "do not shift it again."
    same(targets, torch.tensor([4, 5, 7, 8, 9, 3]), hint)
    shaped(hidden, (6, C), "Hidden states, not logits: (N, C), one for each target.")
    everywhere = model.forward_embeddings(model.wte(batch.idx), past)[0]
    where = [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 1)]
    alone = model.forward_embeddings(model.wte(batch.idx))[0]
    without = torch.stack([alone[at] for at in where])
    not_like(hidden, {"The past is not used: read the batch behind past_kv.": without})
    hint = "Each target's hidden state stands where its target stands."
    same(hidden, torch.stack([everywhere[at] for at in where]), hint)


@pytest.mark.ex12
def test_mistakes_in_exact_match(model):
    """Rows in no order of length: some right altogether, some at their first or last token only."""

    def said(source: list[int], n: int) -> list[int]:
        ids = list(source)
        for _ in range(n):
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        return ids[len(source) :]

    def other(token: int) -> int:
        return (token + 1) % 61

    a, b, c = said([1, 2, 3, 4], 3), said([5], 2), said([6, 7], 1)
    rows = [Row([1, 2, 3, 4], a), Row([5], [b[0], other(b[1])]), Row([6, 7], c)]
    first_wrong = other(said([8, 9, 10], 1)[0])
    rows.append(Row([8, 9, 10], [first_wrong, other(said([8, 9, 10, first_wrong], 1)[0])]))
    first_wrong = other(said([11], 1)[0])
    rows.append(Row([11], [first_wrong, *said([11, first_wrong], 1)]))
    hint = "evaluate returns Scores: the loss, the share of right tokens, and whether each row is "
    hint += "right."
    scores = attempt(hint, evaluate, model, [], rows, 2)
    assert isinstance(scores, Scores), hint
    loss, tokens, exact = scores
    answers = isinstance(exact, list) and len(exact) == 5
    hint = "exact has one answer a row: not one a position, not their mean, the last chunk "
    hint += "included."
    assert answers, hint
    right = [True, False, True, False, False]
    order = sorted(range(5), key=lambda i: len(rows[i].source) + len(rows[i].target))
    hint = "The answers are in the order that the rows were sorted to: give them back in the order "
    hint += "they came in."
    assert exact != [right[i] for i in order], hint
    hint = "A row is right if all of its positions are, not if"
    assert exact[1:2] != [True], f"{hint} one of them is: the last is wrong here."
    assert exact[4:] != [True], f"{hint} the last of them is: the first is wrong here."
    assert any(exact), "No row is right: are positions counted whose target is IGNORE?"
    hint = "A row is right if, at each of its target positions, the likeliest token is the target."
    assert exact == right, f"{hint} You have {exact}."
    one_by_one = [evaluate(model, [], [row], 1).loss for row in rows]
    n = [len(row.target) for row in rows]
    hint = "The loss is a sum over tokens, divided once: a mean of means weighs short rows too "
    hint += "much."
    expected = sum(value * k for value, k in zip(one_by_one, n)) / sum(n)
    assert loss == pytest.approx(expected, rel=1e-5), hint
    hint = "tokens is the share of right tokens among all target tokens, in percent."
    assert tokens == pytest.approx(100 * (3 + 1 + 1 + 0 + 1) / sum(n)), hint
    prefix = random_prefix()
    hint = "The adapters are not used: their cache is the past of every batch."
    assert evaluate(model, [prefix], rows, 2).loss != pytest.approx(loss, rel=1e-3), hint
