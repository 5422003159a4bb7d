"""What the model promises: its cache is a faithful past, and its files are GPT-2's."""

import json
import math

import pytest
import torch
from conftest import BLOCK, C, D, H, V, random_ids, random_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from model import GPT, GPTConfig, attend, causal_mask, linear


@pytest.mark.parametrize("cut", range(1, 9))
def test_reading_in_two_parts_equals_reading_at_once(model, cut):
    """Cached equals uncached, wherever the text is cut, in logits and in the cache itself."""
    idx = random_ids(2, 9)
    whole, whole_cache = model(idx)
    _, past = model(idx[:, :cut])
    rest, cache = model(idx[:, cut:], past_kv=past)
    assert_close(rest, whole[:, cut:])
    assert_close(cache, whole_cache)


def test_a_past_of_batch_one_serves_every_row(model):
    """A batch-1 cache is broadcast: the same as a copy of it for each row."""
    _, past = model(random_ids(1, 4))
    copies = [(k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1)) for k, v in past]
    idx = random_ids(3, 5, seed=1)
    assert_close(model(idx, past)[0], model(idx, copies)[0])


def test_each_row_is_read_by_itself(model):
    """No row of a batch sees another, so right padding of one never shows in another, nor in what stands before it."""
    a, b = random_ids(1, 6), random_ids(1, 4, seed=1)
    padded = torch.cat([b, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    logits, _ = model(torch.cat([a, padded]))
    assert_close(logits[:1], model(a)[0])
    assert_close(logits[1:, :4], model(b)[0])


def test_attention_equals_a_softmax_written_out(model):
    """softmax(q·k / √D) v with the mask as a loop: an absolute oracle, for a wrong scale would pass all relations."""
    x = torch.randn(1, 3, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    past = tuple(torch.randn(2, 1, H, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    attention = model.h[0].attn
    y, (keys, values) = attention(x, past, 2, 3)
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


def test_one_row_is_multiplied_as_many_are(model):
    """The matrix-vector product that a single row takes is x Wᵀ + b as well, in value, shape and gradient."""
    x = torch.randn(1, 1, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = model.h[0].mlp.c_fc.weight
    for bias in (model.h[0].mlp.c_fc.bias, None):
        one, two = linear(x, weight, bias), linear(x.expand(1, 2, C), weight, bias)
        assert_close(one, two[:, :1])
        (gradient,), (expected,) = (torch.autograd.grad(y[:, 0].square().sum(), x) for y in (one, two))
        assert_close(gradient, expected)


@pytest.mark.parametrize("last", [1, 3, 5])
def test_asking_for_the_last_positions_changes_no_number(model, last):
    """The last block may skip the others' queries, for no position after it reads them; their keys are all there."""
    x, past = model.wte(random_ids(2, 5)), model(random_ids(1, 4))[1]
    whole, whole_cache = model.forward_embeddings(x, past)
    hidden, cache = model.forward_embeddings(x, past, last=last)
    assert_close(hidden, whole[:, -last:])
    assert_close(cache, whole_cache)


def test_new_tokens_stand_behind_the_past(model):
    """Position embeddings go on where the past ends."""
    _, past = model(random_ids(1, 4))
    moved = random_model()
    moved.wpe.weight.data[:4] = 7.0  # positions 0 … 3 are the past's, already read
    idx = random_ids(1, 3, seed=1)
    assert_close(moved(idx, past)[0], model(idx, past)[0])
    moved.wpe.weight.data[4, 0] += 1.0
    assert not torch.allclose(moved(idx, past)[0], model(idx, past)[0])


def test_the_head_is_the_embedding(model):
    """Logits are products with token embeddings, at every position or at those picked first."""
    idx = random_ids(2, 5)
    hidden, _ = model.forward_embeddings(model.wte(idx))
    assert_close(model(idx)[0], hidden @ model.wte.weight.T)
    assert_close(model.unembed(hidden[:, -1]), model(idx)[0][:, -1])


def test_a_context_too_long_is_refused_in_one_sentence(model):
    _, past = model(random_ids(1, 5))
    with pytest.raises(ValueError, match=r"5 virtual or past \+ 28 new positions > block_size 32"):
        model(random_ids(1, 28), past)
    assert model(random_ids(1, 27), past)[0].shape == (1, 27, V)


def test_freezing_closes_every_weight_and_no_path(model):
    """A frozen model has no gradients of its own, and passes them on to its input and to its past."""
    x = torch.randn(1, 3, C, dtype=torch.float64, requires_grad=True)
    past = [tuple(t.detach().requires_grad_() for t in kv) for kv in model(random_ids(1, 2))[1]]
    model.forward_embeddings(x, past)[0].sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert x.grad.abs().sum() > 0
    assert all(t.grad.abs().sum() > 0 for kv in past for t in kv)


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("with_past", [False, True])
def test_greedy_generation_equals_reading_everything_anew(model, with_past):
    """The preallocated cache changes the cost of a token and nothing else."""
    past = model(random_ids(1, 3, seed=2))[1] if with_past else None
    idx = random_ids(2, 4)
    got = model.generate(idx, 10, past)
    for _ in range(10):
        idx = torch.cat([idx, model(idx, past)[0][:, -1:].argmax(dim=-1)], dim=1)
    assert got.tolist() == idx.tolist()


def test_generation_leaves_the_past_as_it_was(model):
    past = model(random_ids(1, 3))[1]
    before = [tuple(t.clone() for t in kv) for kv in past]
    model.generate(random_ids(1, 4), 5, past)
    assert_close(past, before, rtol=0, atol=0)


def test_a_row_that_has_stopped_is_filled_with_the_stop_token(model):
    """Each row ends at its own stop token; the batch ends when all have."""
    idx = random_ids(4, 3)
    free = model.generate(idx, 12)
    stop = free[0, 5].item()
    got = model.generate(idx, 12, stop_token=stop)
    ends = []
    for row, unstopped in zip(got.tolist(), free.tolist()):
        new = unstopped[3:]
        end = new.index(stop) + 1 if stop in new else len(new)
        ends.append(end)
        width = got.size(1) - 3
        assert row[3:] == (new[:end] + [stop] * 12)[:width]
    assert got.size(1) == 3 + max(ends)


def test_the_context_may_be_filled_to_its_last_position(model):
    """The last token is predicted, not read: T + new may be block_size + 1, and no more."""
    assert model.generate(random_ids(1, 30), 3).shape == (1, BLOCK + 1)
    with pytest.raises(ValueError, match=r"30 positions \+ 4 new tokens > block_size 32"):
        model.generate(random_ids(1, 30), 4)


def test_sampling_follows_the_softmax(model):
    """Frequencies of 4,000 draws lie within five standard errors of softmax(logits / temperature); top-k cuts the rest."""
    idx = random_ids(1, 4).repeat(4000, 1)
    logits = model(idx[:1])[0][0, -1]
    for top_k in (None, 3):
        generator = torch.Generator().manual_seed(0)
        drawn = model.generate(idx, 1, temperature=2.0, top_k=top_k, generator=generator)[:, -1]
        allowed = logits if top_k is None else logits.masked_fill(logits < logits.topk(3).values[-1], -math.inf)
        p = torch.softmax(allowed / 2.0, dim=0)
        frequency = torch.bincount(drawn, minlength=V) / 4000
        assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-12).all()


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_bit_for_bit(model, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path / "base")
    again = GPT.from_pretrained(tmp_path / "base")
    assert again.dtype == dtype and again.config == model.config
    assert_close(again(random_ids(2, 5))[0], model(random_ids(2, 5))[0], rtol=0, atol=0)


def test_the_fingerprint_is_of_the_weights_not_of_their_dtype(model):
    print_of_base = model.float().fingerprint()
    assert model.bfloat16().fingerprint() == print_of_base
    model.h[1].mlp.c_fc.bias.data[3] += 0.1
    assert model.fingerprint() != print_of_base


def test_the_start_is_gpt2s():
    """N(0, 0.02²), what is added to the residual stream 1/√(2L) of it, biases zero, gains one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, BLOCK, n_layer=8, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.005 if "c_proj" in name else 0.02, rel=0.1), name
        else:
            assert (p == float(name.endswith("weight"))).all(), name


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"activation_function": "relu"},
        {"n_inner": 32},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"n_head": 3},
        {"n_layer": "three"},
        {"n_layer": 10**12},
        {"n_positions": -1},
        {"vocab_size": None},
        {"layer_norm_epsilon": "small"},
    ],
)
def test_what_is_not_this_architecture_is_refused_by_name(model, tmp_path, changes):
    model.save_pretrained(tmp_path / "base")
    edit(tmp_path / "base", **changes)
    with pytest.raises(ValueError, match=next(iter(changes))):
        GPT.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize(
    "changes, message",
    [({"n_embd": 32}, "wte.weight is"), ({"n_layer": 4}, "no h.3.ln_1.weight"), ({"n_layer": 2}, "h.2.")],
)
def test_weights_of_other_sizes_are_refused(model, tmp_path, changes, message):
    model.save_pretrained(tmp_path / "base")
    edit(tmp_path / "base", **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path / "base")


def test_broken_weights_are_refused(model, tmp_path):
    """Missing, truncated, unknown or untied weights: a sentence each."""
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    whole = load_file(path)
    for tensors, message in [
        ({k: v for k, v in whole.items() if "h.1.ln_1.bias" not in k}, "no h.1.ln_1.bias"),
        (whole | {"h.0.attn.extra": torch.zeros(2)}, "h.0.attn.extra"),
        (whole | {"lm_head.weight": whole["transformer.wte.weight"] + 1}, "tied"),
        (whole | {"transformer.ln_f.bias": torch.zeros(C, dtype=torch.int64)}, "ln_f.bias"),
    ]:
        save_file({k: v.clone() for k, v in tensors.items()}, path)
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path / "base")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        GPT.from_pretrained(tmp_path / "base")
    path.unlink()
    with pytest.raises(ValueError, match="model.safetensors does not exist"):
        GPT.from_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="sharded"):
        GPT.from_pretrained(tmp_path / "base")
