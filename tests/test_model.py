"""What the model promises: its cache is a faithful past, and its files are GPT-2's."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import BLOCK, C, D, H, L, V, random_ids, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from model import GPT, GPTConfig, attend, causal_mask, linear


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
        x = x + block.attn(norm(x, block.ln_1), None, n_past=0, last=5)[0]
        x = x + block.mlp.c_proj(gelu(block.mlp.c_fc(norm(x, block.ln_2))))
    assert_close(model(ids)[0], norm(x, model.ln_f) @ model.wte.weight.T)


def test_a_forward_pass_makes_what_it_needs_on_the_device_of_the_model(model):
    """Whatever torch's default device is: mask, positions and buffers are where the weights are."""
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
    """The preallocated cache changes the cost of a token and nothing else, greedy or sampled."""
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
    with pytest.raises(ValueError, match=r"30 positions \+ 4 new tokens > block_size 32"):
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
    hidden, _ = model.forward_embeddings(model.wte(idx), last=1)
    p = torch.softmax(model.unembed(hidden[:, 0]).float(), dim=-1)
    assert got.tolist() == torch.multinomial(p, 1, generator=seeded()).tolist()


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_bit_for_bit(model, tmp_path, dtype):
    model = GPT(replace(model.config, layer_norm_epsilon=0.1)).to(dtype)
    model.save_pretrained(tmp_path / "base")
    again = GPT.from_pretrained(tmp_path / "base")
    assert again.dtype == dtype and again.config == model.config
    assert_close(again(random_ids(2, 5))[0], model(random_ids(2, 5))[0], rtol=0, atol=0)


def test_the_fingerprint_is_of_the_weights_not_of_their_dtype(model):
    """Every dtype is rounded by way of float32: from float64 at once, this one number would round up."""
    model.wte.weight.data[0, 0] = 1 + 2**-8 + 2**-40
    print_of_base = model.fingerprint()
    assert model.float().fingerprint() == print_of_base
    assert model.bfloat16().fingerprint() == print_of_base
    model.h[1].mlp.c_fc.bias.data[3] += 0.1
    assert model.fingerprint() != print_of_base


def test_the_fingerprint_stays_what_it_is():
    """Adapters on disk name their base by it. Sizes count too, since equal weights in other heads are another model."""
    prints = []
    for n_head in (2, 4):
        model = GPT(GPTConfig(V, BLOCK, 1, n_head, C))
        for p in model.parameters():
            p.data = torch.arange(p.numel(), dtype=torch.float32).view(p.shape) / p.numel()
        prints.append(model.fingerprint())
    assert prints[0] == "b0b7f98960a76df5" != prints[1]


@pytest.mark.parametrize("changes", [{"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 4 * C}, {"n_inner": None}])
def test_files_of_older_and_newer_writers_load(model, tmp_path, changes):
    """Other words for the same architecture; OpenAI's names without a prefix; the mask buffers that it once stored."""
    model.save_pretrained(tmp_path / "base")
    edit(tmp_path / "base", **changes)
    path = tmp_path / "base" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    weights = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    buffers = {"h.0.attn.bias": torch.ones(1, 1, BLOCK, BLOCK), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(weights | buffers | {"lm_head.weight": weights["wte.weight"].clone()}, path)
    again = GPT.from_pretrained(str(tmp_path / "base"))
    assert again.name == str(tmp_path / "base")
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_start_is_gpt2s():
    """N(0, 0.02²), what is added to the residual stream 1/√(2L) of it, biases zero, gains one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, BLOCK, n_layer=8, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.005 if "c_proj" in name else 0.02, rel=0.1), name
        else:
            assert (p == float(name.endswith("weight"))).all(), name


def test_the_weights_are_stored_as_hugging_faces_gpt2_does(model, tmp_path):
    """Under its names, and the matrices of a block as (in, out), which is nn.Linear's transposed."""
    model.save_pretrained(tmp_path / "base")
    linear = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    expected = {f"transformer.{name}": t.T if name.endswith(linear) else t for name, t in model.state_dict().items()}
    assert_close(load_file(tmp_path / "base" / "model.safetensors"), expected, rtol=0, atol=0)


def test_config_json_is_that_of_hugging_faces_gpt2(model, tmp_path):
    """Where it names no epsilon, it is GPT-2's. The default sizes are the small base's; none changes under a model."""
    model.save_pretrained(tmp_path / "base")
    config = {
        "architectures": ["GPT2LMHeadModel"], "bos_token_id": 60, "eos_token_id": 60, "model_type": "gpt2",
        "activation_function": "gelu_new", "n_inner": None, "tie_word_embeddings": True, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "vocab_size": 61, "n_positions": 32,
        "n_layer": 3, "n_head": 2, "n_embd": 16, "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    path = tmp_path / "base" / "config.json"
    assert path.read_text() == json.dumps(config, indent=2) + "\n"
    del config["layer_norm_epsilon"], config["n_inner"], config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    assert GPT.from_pretrained(path.parent).config == model.config
    assert GPTConfig(61) == GPTConfig(61, block_size=128, n_layer=4, n_head=4, n_embd=128, layer_norm_epsilon=1e-5)
    with pytest.raises(AttributeError):
        model.config.n_layer = 4


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
        {"n_layer": 1001},
        {"n_layer": 3.0},
        {"vocab_size": 10**6},
        {"n_embd": 0},
        {"n_positions": -1},
        {"vocab_size": None},
        {"layer_norm_epsilon": "small"},
    ],
)
def test_what_is_not_this_architecture_is_refused_by_name(model, tmp_path, changes):
    model.save_pretrained(tmp_path / "base")
    edit(tmp_path / "base", **changes)
    with pytest.raises(ValueError, match=next(iter(changes)) + ".*(are not a GPT-2's|; this GPT-2 has| heads of one width)"):
        GPT.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_embd": 32}, "wte.weight is"),
        ({"vocab_size": 10**6 - 1}, "asks for .999999, 16."),
        ({"n_layer": 4}, "no h.3.ln_1.weight"),
        ({"n_layer": 1000}, "no h.3.ln_1.weight"),
        ({"n_layer": 2}, "h.2."),
    ],
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
