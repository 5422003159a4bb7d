"""What a soft prompt is: a text whose words need not exist."""

import json

import pytest
import torch
from conftest import C, L, random_ids, random_model
from torch.testing import assert_close

from command.models import drawn_tokens, sizes_of
from prefix import Prefix
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter, save_adapter


def random_prompt(P: int = 4) -> SoftPrompt:
    generator = torch.Generator().manual_seed(1)
    return SoftPrompt(torch.randn(P, C, dtype=torch.float64, generator=generator))


@pytest.mark.ex10
def test_a_prompt_of_embeddings_equals_having_those_tokens_in_the_context(model):
    """It acts exactly as the text whose embeddings it holds."""
    text, idx = random_ids(5, seed=1), random_ids(2, 6)
    both = torch.cat([text.expand(2, 5), idx], dim=1)
    assert_close(model(idx, SoftPrompt.text(model, text).past_kv(model))[0], model(both)[0][:, 5:])


@pytest.mark.ex10
def test_running_it_once_equals_concatenating_it_to_each_row(model):
    """In values and in gradients. The peers concatenate: B·P positions of work where P do."""
    once, each, idx = random_prompt(), random_prompt(), random_ids(3, 6)
    logits, _ = model(idx, once.past_kv(model))
    rows = torch.cat([each.vectors.expand(3, 4, C), model.wte(idx)], dim=1)
    expected = model.forward_embeddings(rows)[0][:, 4:] @ model.head.T
    assert_close(logits, expected)
    for value in (logits, expected):
        value.logsumexp(dim=-1).sum().backward()
    assert_close(once.vectors.grad, each.vectors.grad)


@pytest.mark.ex10
def test_the_vectors_are_a_sequence(model):
    """They stand at positions 0 … P-1 and see each other: shuffled, they are another prompt."""
    prompt, idx = random_prompt(), random_ids(1, 5)
    shuffled = SoftPrompt(prompt.vectors[[2, 0, 3, 1]])
    change = model(idx, shuffled.past_kv(model))[0] - model(idx, prompt.past_kv(model))[0]
    assert change.abs().max() > 0.01


def test_its_cache_is_a_prefix(model, tmp_path):
    """Run once, a soft prompt can be kept and saved as a prefix of 2·L times the numbers.

    So can any stack.
    """
    prompt, idx = random_prompt(), random_ids(2, 5)
    alone = prompt.past_kv(model)
    stack = SoftPrompt.text(model, random_ids(2)).past_kv(model, alone)
    for cache in (alone, stack):
        prefix = Prefix.from_cache(cache)
        assert_close(prefix.past_kv(model), cache, rtol=0, atol=0)
        save_adapter(prefix, tmp_path / "prefix", model)
        loaded = load_adapter(tmp_path / "prefix", model).past_kv(model)  # saved in float32
        assert_close(model(idx, loaded)[0], model(idx, cache)[0], rtol=1e-5, atol=1e-5)
    stored = [sizes_of(model, [a])["n_stored"] for a in (prompt, Prefix.from_cache(alone))]
    assert stored == [4 * C, 2 * L * 4 * C]


@pytest.mark.ex10
def test_prompts_stack_in_any_order(model):
    """Two prompts are one of both. A prompt behind a prefix sees it, and each row gets it."""
    a, b = random_prompt(3), SoftPrompt.text(model, random_ids(2, seed=3))
    text, idx = random_ids(4, seed=5), random_ids(2, 5)
    joined = SoftPrompt(torch.cat([a.vectors, b.vectors]))
    assert_close(b.past_kv(model, a.past_kv(model)), joined.past_kv(model))
    prefix = Prefix.text(model, text)
    assert_close(b.past_kv(model, prefix.past_kv(model)), b.past_kv(model, model(text[None])[1]))
    rows = [tuple(t.expand(2, -1, -1, -1) for t in kv) for kv in a.past_kv(model)]
    assert_close(model(idx, b.past_kv(model, rows))[0], model(idx, joined.past_kv(model))[0])
    b_then_prefix = prefix.past_kv(model, b.past_kv(model))
    assert b_then_prefix[0][0].shape[2] == 6
    assert_close(b_then_prefix[1][1][:, :, 2:], prefix.past_kv(model)[1][1])


@pytest.mark.ex10
def test_only_the_prompt_has_gradients(model):
    """Each of its numbers has one, and the model is no part of it."""
    prompt = random_prompt()
    model(random_ids(2, 6), prompt.past_kv(model))[0].sum().backward()
    assert (prompt.vectors.grad != 0).all()
    assert all(p.grad is None for p in model.parameters())
    assert len(list(prompt.parameters())) == 1


def test_initialisations_are_what_they_say(model):
    """zero: zeros. random: uniform in ±0.5, by the generator."""
    drawn, again = (
        SoftPrompt.random(model, 300, torch.Generator().manual_seed(0)).vectors for _ in range(2)
    )
    assert_close(drawn, again, rtol=0, atol=0)
    assert -0.5 <= drawn.min() < -0.49 and 0.49 < drawn.max() <= 0.5
    assert_close(SoftPrompt.zero(model, 3).vectors.data, torch.zeros(3, C))


def test_drawn_tokens_come_once_each_while_there_are_enough():
    """--init vocab begins with such tokens. The generator decides which."""
    ids, orders = [7, 3, 11, 20], set()
    for seed in range(5):
        one, again = (
            drawn_tokens(ids, 4, torch.Generator().manual_seed(seed)).tolist() for _ in range(2)
        )
        assert one == again and sorted(one) == [3, 7, 11, 20]
        orders.add(tuple(one))
    assert len(orders) > 1
    assert set(drawn_tokens(ids, 90, torch.Generator().manual_seed(0)).tolist()) == set(ids)


def test_on_a_bfloat16_base_the_vectors_stay_float32():
    """Half precision would round small updates away. Only what the model reads is cast."""
    half = random_model().bfloat16()
    prompt = SoftPrompt.text(half, random_ids(4))
    assert prompt.vectors.dtype == torch.float32
    assert prompt.past_kv(half)[0][0].dtype == torch.bfloat16


def test_a_prompt_for_another_model_is_refused(model):
    """The sentence has both widths and the remedy."""
    with pytest.raises(ValueError, match="vectors of 17 numbers, .* 16: load it onto its own base"):
        SoftPrompt(torch.zeros(2, C + 1)).past_kv(model)


def test_its_files_are_pefts(gpt2, tmp_path):
    """adapter_config.json as PEFT reads it. The vectors come back in any layout."""
    prompt = SoftPrompt(torch.randn(C, 4, generator=torch.Generator().manual_seed(1)).T)
    save_adapter(prompt, tmp_path / "a", gpt2)
    config = {
        "base_model_name_or_path": "an unsaved model", "inference_mode": True,
        "num_attention_heads": 2, "num_layers": 3, "num_virtual_tokens": 4,
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "token_dim": 16,
    }  # fmt: skip
    found = tmp_path / "a" / "adapter_config.json"
    assert json.loads(found.read_text()) == config
    assert_close(load_adapter(tmp_path / "a", gpt2).vectors, prompt.vectors, rtol=0, atol=0)
    save_adapter(prompt, tmp_path / "a")
    unknown = {"base_model_name_or_path": None, "num_layers": None, "num_attention_heads": None}
    assert json.loads(found.read_text()) == config | unknown
