"""What a soft prompt is: a text whose words need not exist."""

import json

import pytest
import torch
from conftest import C, L, V, random_ids, random_model
from torch.testing import assert_close

from prefix import Prefix
from soft_prompt import SoftPrompt


def random_prompt(P: int = 4) -> SoftPrompt:
    return SoftPrompt(torch.randn(P, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.ex10
def test_a_prompt_of_embeddings_equals_having_those_tokens_in_the_context(model):
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
    """They stand at positions 0 … P-1 and see each other: shuffled, they are another prompt. (A prefix is a set.)"""
    prompt, idx = random_prompt(), random_ids(1, 5)
    shuffled = SoftPrompt(prompt.vectors[[2, 0, 3, 1]])
    assert (model(idx, shuffled.past_kv(model))[0] - model(idx, prompt.past_kv(model))[0]).abs().max() > 0.01


def test_its_cache_is_a_prefix(model, tmp_path):
    """Run once, kept and saved as one: each soft prompt is a prefix, of 2·L times the numbers; so is any stack."""
    idx = random_ids(2, 5)
    prompt_cache = random_prompt().past_kv(model)
    for cache in (prompt_cache, SoftPrompt.text(model, random_ids(2)).past_kv(model, prompt_cache)):
        prefix = Prefix.from_cache(cache)
        assert_close(prefix.past_kv(model), cache, rtol=0, atol=0)
        prefix.save(tmp_path / "prefix", model)
        loaded = Prefix.load(tmp_path / "prefix", model)
        assert_close(model(idx, loaded.past_kv(model))[0], model(idx, cache)[0], rtol=1e-5, atol=1e-5)  # saved in float32
    assert Prefix.from_cache(prompt_cache).n_stored() == 2 * L * random_prompt().n_stored()


@pytest.mark.ex10
def test_prompts_stack_in_any_order(model):
    """Two prompts are one of both; a prompt behind a prefix sees it, and rows of a mixed batch each get it."""
    a, b, idx = random_prompt(3), SoftPrompt.text(model, random_ids(2, seed=3)), random_ids(2, 5)
    joined = SoftPrompt(torch.cat([a.vectors, b.vectors]))
    assert_close(b.past_kv(model, a.past_kv(model)), joined.past_kv(model))
    text = random_ids(4, seed=5)
    prefix = Prefix.text(model, text)
    assert_close(b.past_kv(model, prefix.past_kv(model)), b.past_kv(model, model(text[None])[1]))
    rows = [tuple(t.expand(2, -1, -1, -1) for t in kv) for kv in a.past_kv(model)]
    assert_close(model(idx, b.past_kv(model, rows))[0], model(idx, joined.past_kv(model))[0])
    b_then_prefix = prefix.past_kv(model, b.past_kv(model))
    assert b_then_prefix[0][0].shape[2] == 6
    assert_close(b_then_prefix[1][1][:, :, 2:], prefix.past_kv(model)[1][1])


@pytest.mark.ex10
def test_only_the_prompt_has_gradients(model):
    prompt = random_prompt()
    model(random_ids(2, 6), prompt.past_kv(model))[0].sum().backward()
    assert (prompt.vectors.grad != 0).all()
    assert all(p.grad is None for p in model.parameters())
    assert len(list(prompt.parameters())) == 1


def test_initialisations_are_what_they_say(model):
    """zero: zeros. random: uniform ±0.5. vocab: embeddings of given ids, none twice while there are enough. A seed fixes both."""
    drawn = SoftPrompt.random(model, 300, torch.Generator().manual_seed(0)).vectors
    assert_close(drawn, SoftPrompt.random(model, 300, torch.Generator().manual_seed(0)).vectors, rtol=0, atol=0)
    one, again = (SoftPrompt.vocab(model, random_ids(40), 9, torch.Generator().manual_seed(0)).vectors for _ in range(2))
    assert_close(one, again, rtol=0, atol=0)
    assert -0.5 <= drawn.min() < -0.49 and 0.49 < drawn.max() <= 0.5
    frequent = torch.tensor([7, 3, 11, 20])
    for seed in range(5):
        prompt = SoftPrompt.vocab(model, frequent, 4, torch.Generator().manual_seed(seed))
        assert sorted(prompt.nearest_tokens(model).flatten().tolist()) == [3, 7, 11, 20]
    assert len(SoftPrompt.vocab(model, frequent, 9).vectors) == 9
    assert_close(SoftPrompt.zero(model, 3).vectors.data, torch.zeros(3, C))


def test_on_a_bfloat16_base_the_vectors_stay_float32():
    """Half precision would round small updates away; only what the model reads is cast."""
    half = random_model().bfloat16()
    prompt = SoftPrompt.text(half, random_ids(4))
    assert prompt.vectors.dtype == torch.float32 and prompt.past_kv(half)[0][0].dtype == torch.bfloat16
    assert prompt.nearest_tokens(half)[:, 0].tolist() == random_ids(4).tolist()


def test_nearest_tokens_are_nearest_by_angle(model):
    """A vector a hundred times as long as an embedding still is nearest to it; k of them, the nearest first."""
    ids = torch.tensor([5, 17, 42])
    found = SoftPrompt(100 * model.wte.weight[ids]).nearest_tokens(model, k=V)
    assert found[:, 0].tolist() == ids.tolist()
    cosine = torch.cosine_similarity(model.wte.weight[ids][:, None], model.wte.weight[None], dim=-1)
    assert found.tolist() == cosine.argsort(dim=1, descending=True).tolist()


def test_a_prompt_for_another_model_is_refused(model):
    with pytest.raises(ValueError, match=r"vectors of 17 numbers, .* has n_embd 16"):
        SoftPrompt(torch.zeros(2, C + 1)).past_kv(model)


def test_its_files_are_pefts(gpt2, tmp_path):
    """adapter_config.json as PEFT 0.21.2 writes it; the vectors come back bit for bit, whatever their layout was."""
    prompt = SoftPrompt(torch.randn(C, 4, generator=torch.Generator().manual_seed(1)).T)
    prompt.save(tmp_path / "a", gpt2)
    config = {
        "auto_mapping": None, "base_model_name_or_path": "an unsaved model", "inference_mode": True, "modules_to_save": None,
        "num_attention_heads": 2, "num_layers": 3, "num_transformer_submodules": 1, "num_virtual_tokens": 4,
        "peft_type": "PROMPT_TUNING", "peft_version": "0.21.2", "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None,
        "revision": None, "task_type": "CAUSAL_LM", "token_dim": 16, "tokenizer_kwargs": None, "tokenizer_name_or_path": None,
    }  # fmt: skip
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == config
    assert_close(SoftPrompt.load(tmp_path / "a", gpt2).vectors, prompt.vectors, rtol=0, atol=0)
    prompt.save(tmp_path / "a")
    unknown = {"base_model_name_or_path": None, "num_layers": None, "num_attention_heads": None}
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == config | unknown
