"""What a prefix is: a text's cache without the text, a set, and never a no-op."""

import json
import math

import pytest
import torch
from conftest import BLOCK, C, D, H, L, V, random_ids, random_model
from torch.testing import assert_close

from model import GPT, GPTConfig, attend, causal_mask, rows_of
from prefix import Prefix
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter, save_adapter
from storage.base import fingerprint, load_base, save_base


def noise(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def random_prefix(P: int = 4, seed: int = 1) -> Prefix:
    return Prefix(noise(P, L, 2, H, D, seed=seed))


@pytest.mark.ex7
def test_a_prefix_of_a_text_equals_having_the_text_in_the_context(model):
    """The keys and values of real text act exactly as the text itself."""
    text, idx = random_ids(5, seed=1), random_ids(2, 6)
    both = torch.cat([text.expand(2, 5), idx], dim=1)
    assert_close(model(idx, Prefix.text(model, text).past_kv(model))[0], model(both)[0][:, 5:])


@pytest.mark.ex6
def test_every_row_lands_in_its_layer_head_and_place(model):
    """(P, L, 2, H, D): no axis is swapped on the way into the cache."""
    prefix = random_prefix(P=3)
    for layer, (k, v) in enumerate(prefix.past_kv(model)):
        assert k.shape == v.shape == (1, H, 3, D)
        for p in range(3):
            assert_close(k[0, :, p], prefix.start[p, layer, 0])
            assert_close(v[0, :, p], prefix.start[p, layer, 1])


@pytest.mark.ex6
def test_the_rows_are_a_set(model):
    """Shuffled, they change nothing: learned keys have no position. A soft prompt's have one."""
    prefix, idx = random_prefix(), random_ids(2, 6)
    shuffled = Prefix(prefix.start[[2, 0, 3, 1]])
    assert_close(model(idx, shuffled.past_kv(model))[0], model(idx, prefix.past_kv(model))[0])


@pytest.mark.ex6
def test_a_zero_prefix_is_not_a_no_op():
    """A zero key has the score 0, not minus infinity. It takes its share of the attention."""
    idx, logits = random_ids(1, 6), {}
    for P in (0, 3):
        model = random_model()
        model.wpe.weight.data = model.wpe.weight.roll(P, dims=0)  # the text stays where it was
        logits[P] = model(idx, Prefix.zero(model, P).past_kv(model))[0]
    assert (logits[3] - logits[0]).abs().max() > 0.01


def test_equal_rows_act_as_one_whose_score_is_larger_by_log_n():
    """n equal keys: e^s + … + e^s = e^(s + log n). Shown on one layer's attention."""
    q, k, v = (noise(1, H, length, D, seed=length) for length in (1, 6, 7))
    v, n = v[:, :, :6], 5
    k_n, v_n = (torch.cat([x[:, :, :1]] * n + [x[:, :, 1:]], dim=2) for x in (k, v))
    extra = torch.zeros(1, 6, dtype=torch.float64)
    extra[0, 0] = math.log(n)
    assert_close(attend(q, k_n, v_n, torch.zeros(1, n + 5).double()), attend(q, k, v, extra))


@pytest.mark.ex6
def test_rows_that_start_equal_never_part(model):
    """Their gradients are equal too, which is why zero initialisation trains P rows as one."""
    prefix = Prefix.zero(model, 4).double()
    logits, _ = model(random_ids(2, 6), prefix.past_kv(model))
    logits.logsumexp(dim=-1).sum().backward()
    assert prefix.start.grad[0].abs().sum() > 0
    assert_close(prefix.start.grad, prefix.start.grad[:1].expand_as(prefix.start.grad))


def test_under_a_prefix_the_attention_among_content_is_only_rescaled(gpt2):
    """A · (1 - a₀): the prefix takes its share, a₀, from all content alike (Petrov et al. 2024)."""
    q, k, p = (noise(H, n, D, seed=n) for n in (5, 6, 3))
    content = torch.softmax(q @ k.mT / math.sqrt(D), dim=-1)
    under = torch.softmax(q @ torch.cat([p, k], dim=1).mT / math.sqrt(D), dim=-1)
    a0 = under[..., :3].sum(dim=-1, keepdim=True)
    assert_close(under[..., 3:], content * (1 - a0))
    # The model's attention does so: with all values 0 but the prefix's, which are 1, it returns a₀
    attention = gpt2.h[0].attn
    attention.c_attn.weight.data[2 * C :] = 0.0
    attention.c_attn.bias.data[2 * C :] = 0.0
    attention.c_proj.weight.data = torch.eye(C).double()
    attention.c_proj.bias.data = torch.zeros(C).double()
    x = noise(1, 1, C, seed=7)
    q1, k1, _ = (t.view(H, 1, D) for t in attention.c_attn(x)[0, 0].split(C))
    mask = causal_mask(1, 4, x.dtype, x.device)
    y, _ = attention(x, mask, (p[None], torch.ones_like(p)[None]))
    weights = torch.softmax(q1 @ torch.cat([p, k1], dim=1).mT / math.sqrt(D), dim=-1)
    assert_close(y.view(H, D), weights[:, 0, :3].sum(dim=-1, keepdim=True).expand(H, D))


@pytest.mark.ex6
def test_only_the_prefix_has_gradients(model):
    """Each of its numbers has one, and the model is no part of it."""
    prefix = random_prefix()
    model(random_ids(2, 6), prefix.past_kv(model))[0].sum().backward()
    assert (prefix.start.grad != 0).all()
    assert all(p.grad is None for p in model.parameters())
    assert "model" not in dict(prefix.named_modules()) and len(list(prefix.parameters())) == 1


@pytest.mark.ex6
def test_where_there_is_an_mlp_the_cache_is_made_through_it(model):
    """Else only the start would act, which is held fixed then, and nothing would train."""
    prefix = random_prefix()
    prefix.inputs = torch.nn.Parameter(torch.ones(4, C).double())
    prefix.mlp = torch.nn.Linear(C, L * 2 * C).double()
    past = prefix.past_kv(model)
    model(random_ids(2, 6), past)[0].sum().backward()
    hint = "nothing came through the MLP: self.start where self.kv() belongs?"
    assert prefix.mlp.weight.grad is not None, hint
    assert_close(past[1][0][0, :, 2], prefix.kv()[2, 1, 0])


@pytest.mark.ex6
def test_stacking_is_associative(model):
    """A prefix behind a prefix is the prefix of both. Behind a past of many rows, each gets it."""
    a, b, idx = random_prefix(3), random_prefix(2, seed=2), random_ids(2, 5)
    joined = Prefix(torch.cat([a.start, b.start]))
    assert_close(b.past_kv(model, a.past_kv(model)), joined.past_kv(model))
    rows = [tuple(t.expand(2, -1, -1, -1) for t in kv) for kv in a.past_kv(model)]
    assert_close(model(idx, b.past_kv(model, rows))[0], model(idx, joined.past_kv(model))[0])


def test_a_mixed_batch_equals_its_rows_one_by_one(model):
    """Caches of different adapters of one length serve one batch, a row each. Generation too."""
    prompt, idx = SoftPrompt.text(model, random_ids(4, seed=3)), random_ids(2, 5)
    caches = [adapter.past_kv(model) for adapter in (random_prefix(), prompt)]
    mixed, alone = rows_of(caches), list(zip(idx.split(1), caches))
    logits = torch.cat([model(row, cache)[0] for row, cache in alone])
    assert_close(model(idx, mixed)[0], logits)
    answers = torch.cat([model.generate(row, 6, cache) for row, cache in alone])
    assert model.generate(idx, 6, mixed).tolist() == answers.tolist()
    with pytest.raises(ValueError, match="pasts of .4, 3. positions in one batch"):
        rows_of([caches[0], random_prefix(3).past_kv(model)])


# ---------------------------------------------------------------------------------- initialisations


def test_initialisations_are_what_they_say(model):
    """zero: zeros. random: N(0, 0.02²), by the generator. text: float32 even on a bfloat16 base."""
    assert (Prefix.zero(model, 2).start == 0).all()
    drawn = Prefix.random(model, 200, torch.Generator().manual_seed(0)).start
    assert drawn.std().item() == pytest.approx(0.02, rel=0.02)
    again = Prefix.random(model, 200, torch.Generator().manual_seed(0)).start
    assert_close(drawn, again, rtol=0, atol=0)
    half = random_model().bfloat16()
    prefix = Prefix.text(half, random_ids(4))
    assert prefix.start.dtype == torch.float32
    assert prefix.past_kv(half)[0][0].dtype == torch.bfloat16


@pytest.mark.ex9
def test_what_it_starts_from_is_copied(model):
    """Training a prefix never changes the tensor, or the prefix, that it was made from."""
    start = torch.zeros(2, L, 2, H, D)
    prefix = Prefix(start)
    prefix.bake().start.data += 1
    assert (prefix.start == 0).all()
    prefix.start.data += 1
    assert (start == 0).all()


def test_everything_is_made_on_the_device_of_the_model():
    """On the device without memory, a tensor left on the CPU would meet one that is not."""
    model, idx = random_model().to("meta"), torch.zeros(2, 5, dtype=torch.long, device="meta")
    for kind in (Prefix.zero, Prefix.random, SoftPrompt.random):
        adapter = kind(model, 3)
        assert {p.device.type for p in adapter.parameters()} == {"meta"}
        assert model(idx, adapter.past_kv(model))[0].device.type == "meta"


@pytest.mark.ex8
def test_the_mlp_starts_as_no_change_and_has_the_papers_size(model):
    """C → M → L·2·C with a tanh between (Li & Liang §4.3), added to a start that is held fixed."""
    plain, M = random_prefix(), 10
    through = random_prefix().reparametrise(M)
    assert_close(through.kv(), plain.kv())
    trained = {name: p.numel() for name, p in through.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 4 * C + (C * M + M) + (M * L * 2 * C + L * 2 * C)
    out = through.inputs @ through.mlp[0].weight.T + through.mlp[0].bias
    last = through.mlp[2]
    last.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    update = torch.tanh(out) @ last.weight.T + last.bias
    assert_close(through.kv(), plain.start + update.view_as(plain.start))


@pytest.mark.ex9
def test_baking_folds_the_mlp_into_plain_numbers(model):
    """The same logits with and without it, and P · L·2·C numbers are left."""
    through, idx = random_prefix().reparametrise(10), random_ids(2, 5)
    through.mlp[2].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    baked = through.bake()
    assert {name: p.numel() for name, p in baked.named_parameters()} == {"start": 4 * L * 2 * C}
    assert_close(model(idx, baked.past_kv(model))[0], model(idx, through.past_kv(model))[0])


def test_a_prefix_for_another_model_is_refused(model):
    """The sentence has both shapes and the remedy."""
    prefix = Prefix(torch.zeros(2, L + 1, 2, H, D))
    message = r"\(2, 4, 2, 2, 8\), .* needs \(2, 3, 2, 2, 8\): load it onto its own base"
    with pytest.raises(ValueError, match=message):
        prefix.past_kv(model)


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("n_layer, n_head", [(L, H), (1, 2), (2, 1), (1, 1)])
def test_a_saved_prefix_comes_back_bit_for_bit(tmp_path, n_layer, n_head):
    """On a model of any number of layers and heads, and behind another one, too."""
    save_base(GPT(GPTConfig(V, BLOCK, n_layer, n_head, C)), tmp_path / "base")
    model = load_base(tmp_path / "base")
    prefix = Prefix.random(model, 3)
    save_adapter(prefix, tmp_path / "a", model)
    again = load_adapter(tmp_path / "a", model)
    assert_close(again.start, prefix.start, rtol=0, atol=0)
    stacked = again.past_kv(model, prefix.past_kv(model))
    assert [k.shape for k, _ in stacked] == [(1, n_head, 6, C // n_head)] * n_layer
    stacked = SoftPrompt.random(model, 2).past_kv(model, stacked)
    assert model.generate(random_ids(2, 3), 4, stacked).shape == (2, 7)


def test_its_files_are_pefts(model, tmp_path):
    """adapter_config.json as PEFT reads it, keys sorted. Beside it is which base it was."""
    save_adapter(random_prefix(), tmp_path / "a", model)
    config = {
        "base_model_name_or_path": "an unsaved model", "inference_mode": True,
        "num_attention_heads": 2, "num_layers": 3, "num_virtual_tokens": 4,
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "token_dim": 16,
    }  # fmt: skip
    found = tmp_path / "a" / "adapter_config.json"
    assert found.read_text() == json.dumps(config, indent=2) + "\n"
    base = {"base": "an unsaved model", "fingerprint": fingerprint(model)}
    assert (tmp_path / "a" / "base.json").read_text() == json.dumps(base, indent=2) + "\n"
    save_adapter(random_prefix(), tmp_path / "a")
    assert json.loads(found.read_text()) == config | {"base_model_name_or_path": None}
    assert not (tmp_path / "a" / "base.json").exists()
