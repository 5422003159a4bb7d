"""What the model promises: its cache is a faithful past, and its logits are GPT-2's."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import BLOCK, C, D, H, L, V, random_ids, random_model
from torch import Tensor, nn
from torch.testing import assert_close

from llama import LlamaConfig, frequencies
from model import GPT, Block, GPTConfig, attend, causal_mask, stacked_past_kv
from prefix import Prefix
from soft_prompt import SoftPrompt


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def float64_mask(T: int, S: int) -> Tensor:
    return causal_mask(T, S, torch.float64, torch.device("cpu"))


# ---------------------------------------------------------------------------------------- attention


@pytest.mark.ex1
def test_the_mask_lets_a_query_see_the_past_and_itself():
    """Three queries behind a past of two: 0 where a query may look, else minus infinity."""
    no = -math.inf
    expected = [[0, 0, 0, no, no], [0, 0, 0, 0, no], [0, 0, 0, 0, 0]]
    for dtype in (torch.float32, torch.bfloat16):
        mask = causal_mask(3, 5, dtype, torch.device("cpu"))
        assert mask.tolist() == expected and mask.dtype == dtype


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·k / √D) v of one row and head, query by query: (T, D), (S, D), (S, D) -> (T, D)."""
    P, outputs = len(k) - len(q), []
    for t in range(len(q)):
        scores = (k[: P + t + 1] @ q[t] / math.sqrt(q.size(1))).exp()  # one for each key it may see
        outputs.append(scores @ v[: P + t + 1] / scores.sum())
    return torch.stack(outputs)


# Up to 255 queries the weights are formed; beyond, one kernel does it all
@pytest.mark.ex2
@pytest.mark.parametrize("T, S", [(1, 5), (2, 5), (5, 5), (255, 257), (256, 258)])
def test_attention_equals_a_softmax_written_out(T, S):
    """In values and gradients, for short texts and long ones: an absolute oracle.

    Relations alone would not do: a wrong scale passes them all.
    """
    parts = [noise(1, H, n, D, seed=seed) for seed, n in enumerate((T, S, S))]
    mask, upstream, results = float64_mask(T, S), noise(1, H, T, D, seed=3), []
    for attention in (lambda q, k, v: attend(q, k, v, mask), naive_of_all):
        q, k, v = (part.clone().requires_grad_() for part in parts)
        y = attention(q, k, v)
        y.backward(upstream)
        results.append((y.detach(), q.grad, k.grad, v.grad))
    assert_close(*results)


def naive_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = [[naive(q[b, h], k[b, h], v[b, h]) for h in range(H)] for b in range(len(q))]
    return torch.stack([torch.stack(heads) for heads in rows])


@pytest.mark.ex2
@pytest.mark.parametrize("T", [1, 3, 5, 300])
def test_attention_in_bfloat16_is_the_same_attention(T):
    """Short or long, it equals that in float64 to bfloat16's 8 bits, gradients included."""
    S = max(T, 5)
    parts = [noise(2, H, n, D, seed=seed).bfloat16() for seed, n in enumerate((T, S, S))]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        qkv = [part.to(dtype, copy=True).requires_grad_() for part in parts]
        y = attend(*qkv, causal_mask(T, S, dtype, torch.device("cpu")))
        y.square().sum().backward()
        results.append([y.detach().double(), *(part.grad.double() for part in qkv)])
    for got, expected in zip(*results):
        assert_close(got, expected, rtol=0, atol=0.02 * expected.abs().max().item())


@pytest.mark.ex3
def test_gpt2_splits_into_queries_keys_and_values(gpt2):
    """c_attn gives all queries, then all keys, then all values; each holds its heads one by one."""
    x, (past_k, past_v) = noise(1, 3, C), noise(2, 1, H, 2, D, seed=1)
    attention = gpt2.h[0].attn
    y, (keys, values) = attention(x, float64_mask(3, 5), (past_k, past_v))
    q, k, v = attention.c_attn(x)[0].split(C, dim=1)
    heads = []
    for h in range(H):
        part = slice(h * D, (h + 1) * D)
        assert_close(keys[0, h], torch.cat([past_k[0, h], k[:, part]]))
        assert_close(values[0, h], torch.cat([past_v[0, h], v[:, part]]))
        heads.append(naive(q[:, part], keys[0, h], values[0, h]))
    assert_close(y[0], attention.c_proj(torch.cat(heads, dim=1)))


def test_a_llama_turns_queries_and_keys_and_shares_keys_among_heads():
    """A pair of a head is a complex number, turned by its position. Two heads share their keys."""
    attention, P, T = random_model(family="llama").h[0].attn, 2, 3
    x, (past_k, past_v) = noise(1, T, C), noise(2, 1, H, P, D, seed=1)
    y, (keys, values) = attention(x, float64_mask(T, P + T), (past_k, past_v))
    angles = torch.arange(P, P + T)[:, None] * 100.0 ** (-torch.arange(0, D, 2) / D)

    def turned(head: Tensor) -> Tensor:
        pairs = torch.complex(head[:, : D // 2], head[:, D // 2 :]) * (1j * angles).exp()
        return torch.cat([pairs.real, pairs.imag], dim=1)

    q, k, v = attention.q_proj(x)[0], attention.k_proj(x)[0], attention.v_proj(x)[0]
    for h in range(H):
        part = slice(h * D, (h + 1) * D)
        new = torch.cat([past_k[0, h], turned(k[:, part])])
        assert_close(keys[0, h], new, rtol=1e-6, atol=1e-6)  # angles are in float32
        assert_close(values[0, h], torch.cat([past_v[0, h], v[:, part]]))
    own = [turned(head) for head in q.split(D, dim=1)]  # 2 · H of them
    heads = [naive(q_h, keys[0, i // 2], values[0, i // 2]) for i, q_h in enumerate(own)]
    assert_close(y[0], attention.o_proj(torch.cat(heads, dim=1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("T", [9, 300])
def test_a_whole_model_attends_as_written_out(model, T):
    """Behind a past, on both families: the naive softmax in place of `attend` changes nothing."""
    model.config = replace(model.config, block_size=512)
    if isinstance(model, GPT):
        model.wpe.weight.data = 0.3 * noise(512, C)
    past_kv = model(random_ids(1, 5, seed=1))[1]
    logits, _ = model(random_ids(1, T), past_kv)

    def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        shares = q.split(T, dim=2)  # of the heads that share keys, one after the other
        return torch.cat([naive_of_all(share, k, v) for share in shares], dim=2)

    for block in model.h:
        block.attn.attend = written_out
    assert_close(model(random_ids(1, T), past_kv)[0], logits)


def test_whoever_replaces_attend_sees_the_weights(model):
    """Each layer attends through its own attribute. What comes by is all that there is to see."""
    idx, past_kv, seen = random_ids(2, 4), model(random_ids(1, 3, seed=1))[1], []
    expected, _ = model(idx, past_kv)

    def noted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = (q @ k.mT / math.sqrt(D) + mask).softmax(dim=-1)
        seen.append(weights.unflatten(2, (-1, 4)).flatten(1, 2))  # heads that share keys, apart
        return attend(q, k, v, mask)

    for block in model.h:
        block.attn.attend = noted
    assert_close(model(idx, past_kv)[0], expected)
    weights = torch.stack(seen)
    assert weights.shape == (L, 2, model.config.n_head, 4, 7)
    assert_close(weights.sum(dim=-1), torch.ones(L, 2, model.config.n_head, 4).double())
    assert (weights[..., torch.arange(4)[:, None] + 3 < torch.arange(7)] == 0).all()
    assert (weights[..., torch.arange(4)[:, None] + 3 >= torch.arange(7)] > 0).all()


def test_all_layers_share_one_mask(model, monkeypatch):
    """It is made once a pass and handed down, however many layers there are."""
    made, masks = [], []
    monkeypatch.setattr("model.causal_mask", lambda *what: made.append(what) or causal_mask(*what))

    def noted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        masks.append(mask)
        return attend(q, k, v, mask)

    for block in model.h:
        block.attn.attend = noted
    model(random_ids(1, 11), model(random_ids(1, 3, seed=1))[1])
    assert len(masks) == 2 * L and [what[:2] for what in made] == [(3, 3), (11, 14)]
    queries_per_key = model.config.n_head // model.kv_shape(1)[3]
    assert_close(masks[-1], float64_mask(11, 14).repeat(queries_per_key, 1))


# ---------------------------------------------------------------------------------------- the model


@pytest.mark.ex3
@pytest.mark.parametrize("cut", range(1, 9))
def test_reading_in_two_parts_equals_reading_at_once(model, cut):
    """Cached equals uncached, wherever the text is cut, in logits and in the cache itself."""
    idx = random_ids(2, 9)
    whole, whole_cache = model(idx)
    _, past = model(idx[:, :cut])
    rest, cache = model(idx[:, cut:], past_kv=past)
    assert_close(rest, whole[:, cut:])
    assert_close(cache, whole_cache)


@pytest.mark.ex3
def test_a_past_of_batch_one_serves_every_row(model):
    """A batch-1 cache is broadcast: the same as a copy of it for each row."""
    _, past = model(random_ids(1, 4))
    copies = [(k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1)) for k, v in past]
    idx = random_ids(3, 5, seed=1)
    assert_close(model(idx, past)[0], model(idx, copies)[0])


@pytest.mark.ex3
def test_each_row_is_read_by_itself(model):
    """No row sees another, nor what stands behind: right padding shows nowhere."""
    a, b = random_ids(1, 6), random_ids(1, 4, seed=1)
    padded = torch.cat([b, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    logits, _ = model(torch.cat([a, padded]))
    assert_close(logits[:1], model(a)[0])
    assert_close(logits[1:, :4], model(b)[0])


def test_the_logits_are_gpt2s():
    """Embeddings, pre-norm blocks with tanh-GELU, a last norm and the tied head, written out."""
    model = GPT(GPTConfig(V, BLOCK, L, H, C, layer_norm_epsilon=0.1)).double()
    model.load_state_dict(random_model().state_dict())

    def norm(x, part):
        centred = x - x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, correction=0)
        return centred / (variance + 0.1).sqrt() * part.weight + part.bias

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    ids = random_ids(2, 5)
    x = model.wte.weight[ids] + model.wpe.weight[:5]
    for block in model.h:
        x = x + block.attn(norm(x, block.ln_1), float64_mask(5, 5), None)[0]
        x = x + block.mlp.c_proj(gelu(block.mlp.c_fc(norm(x, block.ln_2))))
    assert_close(model(ids)[0], norm(x, model.ln_f) @ model.wte.weight.T)


def test_a_block_is_handed_its_parts():
    """x + attention(norm(x)), then x + mlp(norm(x)): whatever norm, attention and MLP they are."""

    class Attention(nn.Module):
        def forward(self, x, mask, past):
            return x * mask, (past, x)

    double, triple, square = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    for part, factor in ((double, 2.0), (triple, 3.0), (square, 7.0)):
        nn.init.constant_(part.weight, factor)
        nn.init.zeros_(part.bias)
    block = Block(double, Attention(), triple, square)
    y, (past, normed) = block(torch.ones(1, 1, 1), torch.tensor(5.0), "past")
    assert y.item() == (1 + 2 * 5) + 7 * 3 * (1 + 2 * 5)
    assert past == "past" and normed.item() == 2


def test_a_forward_pass_makes_what_it_needs_on_the_device_of_the_model(model):
    """Mask, positions and new tokens are where the weights are, whatever torch's default is."""
    idx = random_ids(2, 5)
    expected, tokens = model(idx)[0], model.generate(idx, 4)
    with torch.device("meta"):
        assert_close(model(idx)[0], expected)
        assert model.generate(idx, 4).tolist() == tokens.tolist()


def test_new_tokens_stand_behind_the_past(gpt2):
    """Position embeddings go on where the past ends."""
    _, past = gpt2(random_ids(1, 4))
    moved = random_model()
    moved.wpe.weight.data[:4] = 7.0  # positions 0 … 3 are the past's, already read
    idx = random_ids(1, 3, seed=1)
    assert_close(moved(idx, past)[0], gpt2(idx, past)[0])
    moved.wpe.weight.data[4, 0] += 1.0
    assert not torch.allclose(moved(idx, past)[0], gpt2(idx, past)[0])


def test_the_head_is_the_embedding(model):
    """Logits are products with token embeddings, which a position may have by itself."""
    idx = random_ids(2, 5)
    hidden, _ = model.forward_embeddings(model.wte(idx))
    assert model.head is model.wte.weight
    assert_close(model(idx)[0], hidden @ model.wte.weight.T)
    assert_close(hidden[:, -1] @ model.head.T, model(idx)[0][:, -1])


def test_llama_3_slows_the_pairs_that_turn_seldom():
    """With a first context of 64: pairs of 4 rounds in it stay, those of 1 turn 8 times slower."""
    plain = LlamaConfig(V, BLOCK, L, H, H, C, C, 16, 100.0, 1e-5)
    before = frequencies(plain, torch.device("cpu"))
    slowed = replace(plain, rope_scaling=(8.0, 1.0, 4.0, 64))
    expected = []
    for turns in before.tolist():
        rounds = 64 * turns / (2 * math.pi)
        kept = min(1, max(0, (rounds - 1) / 3))
        expected.append(kept * turns + (1 - kept) * turns / 8)
    assert_close(frequencies(slowed, torch.device("cpu")), torch.tensor(expected))
    assert expected[0] == before[0] and expected[-1] == before[-1] / 8


def test_a_context_too_long_is_refused_in_one_sentence(model):
    """The sentence counts both parts, and a context just full is read."""
    _, past = model(random_ids(1, 5))
    message = r"5 virtual or past \+ 28 new positions > block_size 32: shorten the input or lower"
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 28), past)
    assert model(random_ids(1, 27), past)[0].shape == (1, 27, V)


def test_a_frozen_model_lets_gradients_through(model):
    """It has none of its own, and passes them on to its input and to its past."""
    x = noise(1, 3, C).requires_grad_()
    past = [tuple(t.detach().requires_grad_() for t in kv) for kv in model(random_ids(1, 2))[1]]
    model.forward_embeddings(x, past)[0].sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert x.grad.abs().sum() > 0
    assert all(t.grad.abs().sum() > 0 for kv in past for t in kv)


def test_a_stack_is_computed_from_its_foremost_adapter_on(model):
    """Each adapter is given the cache of those before it; no adapters are no past."""
    prefix, prompt = Prefix(noise(3, L, 2, H, D)), SoftPrompt(noise(2, C, seed=1))
    expected = prompt.past_kv(model, prefix.past_kv(model))
    assert_close(stacked_past_kv([prefix, prompt], model), expected)
    assert stacked_past_kv([], model) is None


# --------------------------------------------------------------------------------------- generation


@pytest.mark.ex4
@pytest.mark.parametrize("with_past", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_generation_equals_reading_everything_anew(model, with_past, temperature):
    """The cache changes the cost of a token and nothing else, greedy or sampled."""
    past = model(random_ids(1, 3, seed=2))[1] if with_past else None
    idx = random_ids(30, 4)
    got = model.generate(idx, 10, past, temperature, generator=seeded())
    generator = seeded()
    for _ in range(10):
        logits = model(idx, past)[0][:, -1].float()
        drawn = torch.multinomial(torch.softmax(logits / 2.0, dim=-1), 1, generator=generator)
        new = drawn if temperature else logits.argmax(dim=-1, keepdim=True)
        idx = torch.cat([idx, new], dim=1)
    assert got.tolist() == idx.tolist()


@pytest.mark.ex4
@pytest.mark.parametrize("T, n", [(4, 1), (4, 10), (1, 5)])
@pytest.mark.parametrize("with_past", [False, True])
def test_generation_reads_each_position_once(model, monkeypatch, with_past, T, n):
    """T tokens of prompt, then each new one but the last: T + n - 1 positions."""
    past = model(random_ids(1, 3, seed=2))[1] if with_past else None
    read, forward_embeddings = [], model.forward_embeddings

    def counted(x, past_kv=None):
        read.append(x.size(1))
        return forward_embeddings(x, past_kv)

    monkeypatch.setattr(model, "forward_embeddings", counted)
    model.generate(random_ids(2, T), n, past)
    counts = f"{sum(read)} positions were read, {T + n - 1} suffice: is the cache handed on?"
    assert read == [T] + [1] * (n - 1), counts


@pytest.mark.ex4
def test_generation_leaves_the_past_as_it_was(model):
    """A cache can serve again: nothing is written into it."""
    past = model(random_ids(1, 3))[1]
    before = [tuple(t.clone() for t in kv) for kv in past]
    model.generate(random_ids(1, 4), 5, past)
    assert_close(past, before, rtol=0, atol=0)


@pytest.mark.ex4
def test_what_was_generated_can_be_trained_on(model):
    """Nothing is recorded for gradients while it is made, yet it is a tensor like any other."""
    model.requires_grad_(True)
    ids = model.generate(random_ids(1, 4), 5, model(random_ids(1, 3))[1])
    model(ids)[0].sum().backward()
    assert model.wte.weight.grad is not None


@pytest.mark.ex4
def test_a_row_that_has_stopped_is_filled_with_the_stop_token(model):
    """Each row ends at its own stop token, and the batch when all have."""
    idx = random_ids(4, 3)
    free = model.generate(idx, 12, temperature=2.0, generator=seeded())  # left alone, a row goes on
    stop = free[0, 5].item()
    got = model.generate(idx, 12, temperature=2.0, stop_token=stop, generator=seeded())
    ends = []
    for row, unstopped in zip(got.tolist(), free.tolist()):
        new = unstopped[3:]
        end = new.index(stop) + 1 if stop in new else len(new)
        ends.append(end)
        width = got.size(1) - 3
        assert row[3:] == (new[:end] + [stop] * 12)[:width]
    assert got.size(1) == 3 + max(ends)
    alone = model.generate(idx[:1], 12)[0].tolist()
    stopped = model.generate(idx[:1], 12, stop_token=alone[5])[0].tolist()
    assert stopped == alone[: 3 + alone[3:].index(alone[5]) + 1]


def test_the_context_may_be_filled_to_its_last_position(model):
    """The last token is predicted, not read: T + new may be block_size + 1, and no more."""
    assert model.generate(random_ids(1, 30), 3).shape == (1, BLOCK + 1)
    with pytest.raises(ValueError, match=r"32 virtual or past \+ 1 new positions > block_size 32"):
        model.generate(random_ids(1, 30), 4)


@pytest.mark.ex4
def test_sampling_follows_the_softmax(model):
    """4,000 draws lie within five standard errors of softmax(logits / temperature).

    Top-k cuts the rest.
    """
    idx = random_ids(1, 4).repeat(4000, 1)
    logits = model(idx[:1])[0][0, -1]
    for top_k in (None, 3, V + 1):
        drawn = model.generate(idx, 1, temperature=2.0, top_k=top_k, generator=seeded())[:, -1]
        allowed = logits
        if top_k == 3:
            allowed = logits.masked_fill(logits < logits.topk(3).values[-1], -math.inf)
        p = torch.softmax(allowed / 2.0, dim=0)
        frequency = torch.bincount(drawn, minlength=V) / 4000
        assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-12).all()


def test_sampling_is_in_float32(model):
    """Whatever the dtype of the base: the draws are those of its logits, cast first."""
    idx = random_ids(1, 4).repeat(500, 1)
    got = model.bfloat16().generate(idx, 1, temperature=1.0, generator=seeded())[:, -1:]
    hidden, _ = model.forward_embeddings(model.wte(idx))
    p = torch.softmax((hidden[:, -1] @ model.head.T).float(), dim=-1)
    assert got.tolist() == torch.multinomial(p, 1, generator=seeded()).tolist()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_refuses_logits_that_are_no_numbers(model, value, temperature):
    """A base that overflows its dtype gets a sentence. Its answers would look like any others."""
    model.wte.weight[7, 0] = value
    message = "an unsaved model overflows in torch.float64: give --dtype float32"
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[1, 2]]), 3, temperature=temperature)
