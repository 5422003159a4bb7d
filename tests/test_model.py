"""What the model promises: its cache is a faithful past, and its logits are GPT-2's."""

import math

import pytest
import torch
from conftest import BLOCK, C, D, H, L, V, random_ids, random_model
from torch.testing import assert_close

from model import GPT, GPTConfig, attend, causal_mask, score_mask


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
    """No row of a batch sees another, so right padding of one never shows in another, nor in what stands before it."""
    a, b = random_ids(1, 6), random_ids(1, 4, seed=1)
    padded = torch.cat([b, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    logits, _ = model(torch.cat([a, padded]))
    assert_close(logits[:1], model(a)[0])
    assert_close(logits[1:, :4], model(b)[0])


@pytest.mark.ex2
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-7), (torch.bfloat16, 2e-2)])
def test_the_last_positions_attend_to_themselves_and_what_is_before(dtype, tolerance):
    """Two of five positions ask: the first sees four keys, the second all; in either way that attention is computed."""
    q, k, v = (torch.randn(3, H, n, D, generator=seeded(seed)).to(dtype) for seed, n in enumerate((2, 5, 5)))
    y = attend(q, k, v)
    for i, seen in enumerate((4, 5)):
        weights = torch.softmax(q[:, :, i : i + 1].double() @ k[:, :, :seen].double().mT / math.sqrt(D), dim=-1)
        assert_close(y[:, :, i : i + 1].double(), weights @ v[:, :, :seen].double(), rtol=tolerance, atol=tolerance)


@pytest.mark.ex3
def test_attention_equals_a_softmax_written_out(gpt2):
    """softmax(q·k / √D) v with the mask as a loop: an absolute oracle, for a wrong scale would pass all relations."""
    x = torch.randn(1, 3, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    past = tuple(torch.randn(2, 1, H, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    attention = gpt2.h[0].attn
    y, (keys, values) = attention(x, past)
    q, k, v = attention.c_attn(x)[0].split(C, dim=1)
    expected = torch.zeros(3, C, dtype=torch.float64)
    for head in range(H):
        part = slice(head * D, (head + 1) * D)
        k_all, v_all = torch.cat([past[0][0, head], k[:, part]]), torch.cat([past[1][0, head], v[:, part]])
        assert_close(keys[0, head], k_all)
        assert_close(values[0, head], v_all)
        for t in range(3):
            scores = [math.exp(q[t, part] @ k_all[s] / math.sqrt(D)) for s in range(2 + t + 1)]
            expected[t, part] = sum(score * v_all[s] for s, score in enumerate(scores)) / sum(scores)
    assert_close(y[0], attention.c_proj(expected))


def test_the_logits_are_gpt2s():
    """Embeddings, pre-norm blocks with tanh-GELU, a last norm and the tied head, written out (attention: see above)."""
    model = GPT(GPTConfig(V, BLOCK, L, H, C, layer_norm_epsilon=0.1)).double()
    model.load_state_dict(random_model().state_dict())

    def norm(x, part):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 0.1).sqrt() * part.weight + part.bias

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    ids = random_ids(2, 5)
    x = model.wte.weight[ids] + model.wpe.weight[:5]
    for block in model.h:
        x = x + block.attn(norm(x, block.ln_1), None)[0]
        x = x + block.mlp.c_proj(gelu(block.mlp.c_fc(norm(x, block.ln_2))))
    assert_close(model(ids)[0], norm(x, model.ln_f) @ model.wte.weight.T)


def test_a_forward_pass_makes_what_it_needs_on_the_device_of_the_model(model):
    """Whatever torch's default device is: mask, positions and new tokens are where the weights are."""
    expected, tokens = model(random_ids(2, 5))[0], model.generate(random_ids(2, 5), 4)
    idx = random_ids(2, 5)
    with torch.device("meta"):
        assert_close(model(idx)[0], expected)
        assert model.generate(idx, 4).tolist() == tokens.tolist()


@pytest.mark.ex1
def test_the_mask_lets_a_query_see_the_past_and_itself():
    """Three queries behind a past of two: the triangle touches the lower right corner."""
    assert causal_mask(3, 5, torch.device("cpu")).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("n", [1, 3, 5])
def test_attention_in_bfloat16_is_the_same_attention(n):
    """What is written out for a CPU equals the fused kernel in float64, to bfloat16's 8 bits, gradients included."""
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, H, length, D, generator=generator).bfloat16() for length in (n, 5, 5)]  # n queries, 5 keys and values
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        parts = [part.to(dtype, copy=True).requires_grad_() for part in qkv]
        y = attend(*parts)
        y.square().sum().backward()
        results.append([y.detach().double(), *(part.grad.double() for part in parts)])
    for got, expected in zip(*results):
        assert_close(got, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_all_layers_share_one_mask(model):
    """What autograd keeps of a text's square is one mask, however many layers there are; even where inference had it first."""
    idx, past_kv, masks = random_ids(1, 11), model(random_ids(1, 3, seed=1))[1], set()
    score_mask.cache_clear()
    with torch.inference_mode():
        model(idx, past_kv)

    def note(tensor):
        if tensor.dim() == 2 and tensor.size(0) % 11 == 0 and tensor.size(1) == 14:
            masks.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(idx, [(k.clone().requires_grad_(), v) for k, v in past_kv])[0].square().sum()
    loss.backward()
    assert len(masks) == 1


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


def test_a_context_too_long_is_refused_in_one_sentence(model):
    _, past = model(random_ids(1, 5))
    with pytest.raises(ValueError, match=r"5 virtual or past \+ 28 new positions > block_size 32"):
        model(random_ids(1, 28), past)
    assert model(random_ids(1, 27), past)[0].shape == (1, 27, V)


@pytest.mark.ex5
def test_freezing_closes_every_weight_and_no_path(model):
    """A frozen model has no gradients of its own, and passes them on to its input and to its past."""
    assert model.requires_grad_().freeze() is model
    x = torch.randn(1, 3, C, dtype=torch.float64, requires_grad=True)
    past = [tuple(t.detach().requires_grad_() for t in kv) for kv in model(random_ids(1, 2))[1]]
    model.forward_embeddings(x, past)[0].sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert x.grad.abs().sum() > 0
    assert all(t.grad.abs().sum() > 0 for kv in past for t in kv)


# ---------------------------------------------------------------------------------------------------------- generation


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
        idx = torch.cat([idx, drawn if temperature else logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert got.tolist() == idx.tolist()


@pytest.mark.ex4
@pytest.mark.parametrize("T, n", [(4, 1), (4, 10), (1, 5)])
@pytest.mark.parametrize("with_past", [False, True])
def test_generation_reads_each_position_once(model, monkeypatch, with_past, T, n):
    """T tokens of prompt, then each new one but the last: T + n - 1 positions. Without its cache it would read far more."""
    past, read, forward_embeddings = model(random_ids(1, 3, seed=2))[1] if with_past else None, [], model.forward_embeddings

    def counted(x, past_kv=None):
        read.append(x.size(1))
        return forward_embeddings(x, past_kv)

    monkeypatch.setattr(model, "forward_embeddings", counted)
    model.generate(random_ids(2, T), n, past)
    assert read == [T] + [1] * (n - 1), f"{sum(read)} positions were read, {T + n - 1} suffice: is the cache handed on?"


@pytest.mark.ex4
def test_generation_leaves_the_past_as_it_was(model):
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
    """Each row ends at its own stop token; the batch ends when all have. Sampled, so that a row left alone would go on."""
    idx = random_ids(4, 3)
    free = model.generate(idx, 12, temperature=2.0, generator=seeded())
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
    """Frequencies of 4,000 draws lie within five standard errors of softmax(logits / temperature); top-k cuts the rest."""
    idx = random_ids(1, 4).repeat(4000, 1)
    logits = model(idx[:1])[0][0, -1]
    for top_k in (None, 3, V + 1):
        generator = torch.Generator().manual_seed(0)
        drawn = model.generate(idx, 1, temperature=2.0, top_k=top_k, generator=generator)[:, -1]
        allowed = logits if top_k != 3 else logits.masked_fill(logits < logits.topk(3).values[-1], -math.inf)
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
