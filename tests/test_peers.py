"""What transformers and PEFT compute, this project computes too, and each side reads the other's files.

Both sides get the same random weights, in float64 where nothing else is said, and agree to rounding.
"""

import json
import random
import warnings

import pytest
import torch
from conftest import BLOCK, C, D, H, L, V, random_ids
from lora import add_lora
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

import train
from data import Row, batch_of, source_ids
from model import GPT, GPTConfig
from prefix import Prefix
from small_base.pretrain import train_bpe
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter
from storage.base import load_base, save_base
from storage.tokenizers import END_OF_TEXT, load_tokenizer, save_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers, a peer, is not installed: see tests/requirements.txt")
peft = pytest.importorskip("peft", reason="PEFT, a peer, is not installed: see tests/requirements.txt")
pytestmark = [  # what the peers say to each other
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # from 5.24 on
]

P, T, NEW = 4, 7, 20
IDX = random_ids(3, T)

ADAPTERS = {
    "prefix": (Prefix, peft.PrefixTuningConfig, {}),
    "prefix with an MLP": (Prefix, peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 24}),
    "soft prompt": (SoftPrompt, peft.PromptTuningConfig, {}),
}
SHAPES = {"prefix": (P, L, 2, H, D), "soft prompt": (P, C)}  # of our parameters; PEFT's MLP has none here


def random_rows(seed=0):
    """-> three examples of unequal length, so that a batch of them is padded."""
    ids = random_ids(24, seed=seed).tolist()
    return [Row(ids[:5], ids[5:9]), Row(ids[9:11], ids[11:17]), Row(ids[17:23], ids[23:])]


def randomised(model):
    """-> the model, frozen; attention is far from uniform, and positions count enough that greedy answers vary."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.requires_grad_(False).named_parameters():
        scale = 1.0 if "wpe" in name else 0.3 if parameter.dim() == 2 else 0.1
        parameter.copy_(float("ln" in name and "weight" in name) + scale * torch.randn(parameter.shape, generator=generator))
    return model


def peer_base(directory, n_layer=L, n_head=H, n_embd=C, n_positions=BLOCK, dtype=torch.float64, saved_as="GPT2LMHeadModel"):
    """-> transformers' GPT-2 of random weights, and ours, read from the directory that it was saved to."""
    sizes = {"vocab_size": V, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": n_positions}
    config = transformers.GPT2Config(**sizes, layer_norm_epsilon=1e-3, bos_token_id=None, eos_token_id=None)
    peer = randomised(transformers.GPT2LMHeadModel(config)).eval().to(dtype)
    (peer.transformer if saved_as == "GPT2Model" else peer).save_pretrained(directory)
    return peer, load_base(directory).freeze()


def peer_adapter(peer, name):
    """-> PEFT's adapter of that name on the base, its numbers drawn as PEFT draws them."""
    _, config, own = ADAPTERS[name]
    torch.manual_seed(0)
    return peft.get_peft_model(peer, config(task_type="CAUSAL_LM", num_virtual_tokens=P, **own)).eval()


def same_adapters(directory, name):
    """-> our base, our adapter, and PEFT's, all in float64: the same numbers, ready to train."""
    peer, model = peer_base(directory)
    theirs = peer_adapter(peer, name).double()
    return model, ADAPTERS[name][0](weight_of(theirs).view(SHAPES[name])), theirs


def weight_of(theirs):
    return theirs.prompt_encoder["default"].embedding.weight


def backward(model, adapter, rows):
    """The gradients of our loss on one batch."""
    batch = batch_of(rows, model.device)
    train.loss_of(model, batch, adapter.past_kv(model), sum(len(row.target) for row in rows)).backward()


def their_loss(peer, rows):
    """The same of transformers and PEFT, which shift the labels themselves."""
    idx = pad_sequence([torch.tensor(row.source + row.target) for row in rows], batch_first=True)
    labels = [torch.tensor([-100] * len(row.source) + row.target) for row in rows]
    return peer(input_ids=idx, labels=pad_sequence(labels, batch_first=True, padding_value=-100)).loss


@torch.no_grad()
def their_tokens(peer, idx, n_new):
    """(B, T) ids -> (B, T + n_new), the greedy tokens of transformers or PEFT.

    Of PEFT by its forward pass alone: its `generate` loses the adapter with transformers 5.24.0.
    """
    if not isinstance(peer, peft.PeftModel):
        every = torch.ones_like(idx)
        return peer.generate(idx, attention_mask=every, max_new_tokens=n_new, do_sample=False)
    for _ in range(n_new):
        new = peer(input_ids=idx).logits[:, -1:].argmax(dim=-1)  # (B, 1)
        idx = torch.cat([idx, new], dim=1)
    return idx


@torch.no_grad()
def assert_same(model, peer, adapters=()):
    """Logits, loss and greedy tokens are equal; the loss to 1e-6, for both sides take it in float32.

    In bfloat16, logits are equal to 3 % of the largest, and greedy tokens are not compared: a near tie may go either way.
    """
    past_kv = train.stacked_past_kv(adapters, model)
    logits, expected = model(IDX, past_kv)[0], peer(input_ids=IDX).logits[:, -T:]  # PEFT's soft prompt has P + T of them
    if model.dtype == torch.bfloat16:
        return assert_close(logits, expected, rtol=0, atol=0.03 * expected.abs().max().item())
    assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    loss, _ = train.evaluate(model, adapters, random_rows(), batch_size=2)
    assert loss == pytest.approx(their_loss(peer, random_rows()).item(), rel=1e-6)
    for idx in IDX.split(1):
        answer = model.generate(idx, NEW, past_kv, stop_token=peer.config.eos_token_id)
        assert answer.tolist() == their_tokens(peer, idx, NEW).tolist()


# ------------------------------------------------------------------------------------------------------------- the base


@pytest.mark.parametrize("n_layer, n_head, n_embd, n_positions", [(L, H, C, BLOCK), (1, 1, 8, 27), (2, 8, 48, 64)])
def test_a_gpt2_of_transformers_gives_the_same_here(tmp_path, n_layer, n_head, n_embd, n_positions):
    """Whatever its sizes, a base from there has equal logits, loss and greedy tokens here."""
    peer, model = peer_base(tmp_path, n_layer, n_head, n_embd, n_positions)
    assert_same(model, peer)


@pytest.mark.parametrize("keys", ["GPT2LMHeadModel", "GPT2Model", "stored head", "old buffers"])
def test_every_naming_of_keys_loads(tmp_path, keys):
    """With and without `transformer.`, with the tied head stored, with the mask buffers of old: it is the same base."""
    peer, _ = peer_base(tmp_path, saved_as=keys)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert ("wte.weight" if keys == "GPT2Model" else "transformer.wte.weight") in tensors
    if keys == "stored head":
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    if keys == "old buffers":
        for layer in range(L):
            tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, BLOCK, BLOCK).tril()
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path, metadata={"format": "pt"})
    assert_same(load_base(tmp_path), peer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_loads_in_the_dtype_of_its_file(tmp_path, dtype):
    """The dtype is the file's, and the values too: computed with in float64, they give equal logits."""
    peer, model = peer_base(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_same(model.double(), peer.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_base_from_here_loads_in_transformers(tmp_path, dtype):
    """No weight is missing or left over there, the dtype, the end of text and the logits are the same."""
    merges = train_bpe(["to be or not to be"], n_merges=50)
    model = randomised(GPT(GPTConfig(256 + len(merges) + 1, BLOCK, L, H, C, layer_norm_epsilon=1e-3))).to(dtype)
    save_base(model, tmp_path / "base")
    save_tokenizer(tmp_path / "base", merges)
    peer, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values()) and peer.dtype == dtype
    ours, theirs = load_tokenizer(tmp_path / "base"), transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    assert ours.eot_token == theirs.eos_token_id == peer.generation_config.eos_token_id
    assert_same(model.double(), peer.eval().double())


# -------------------------------------------------------------------------------------------------------- the tokenizer

PAGE = """  runs   of    spaces \t\ttabs\t \n\n\nlines \r\n trailing   \n   indented 0123456789 3.14159 1,000 1st ½ ² Ⅷ ٣٤٥
don't I'll we've DON'T they'd' ‘it’s’ __init__ a=b!=c ....!!!??? naïve café e\u0301 ß Straße हिन्दी ไทย العربية עברית
日本語のテキスト 中文，標點。 한국어 👩‍👩‍👧‍👦🏳️‍🌈👍🏽 🇩🇪 \0\1\x7f\x1b[0m \u200b\xa0\u2028\u3000\x85 \U0010ffff\ufffd\ufeff   """


@pytest.fixture
def tokenizers(tmp_path):
    """Ours and transformers', of the same vocab.json and merges.txt: each word of the page is a token, so its splits show."""
    merges = train_bpe([PAGE, PAGE], n_merges=2000)
    save_tokenizer(tmp_path, merges)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 257 + len(merges)}))
    return load_tokenizer(tmp_path), transformers.GPT2Tokenizer.from_pretrained(tmp_path)


def test_the_tokenizer_gives_the_same_ids(tokenizers):
    """A page of difficult text, and its characters shuffled, have the same ids on both sides and come back unchanged."""
    ours, theirs = tokenizers
    rng = random.Random(0)
    for text in [PAGE] + ["".join(rng.choices(PAGE, k=300)) for _ in range(100)]:
        ids = ours.encode_ordinary(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert len(ours.encode_ordinary(PAGE)) < len(PAGE) / 2  # merges were used


def test_a_special_token_in_a_text_is_text(tokenizers):
    """What a user writes never ends a document here; there, it takes split_special_tokens."""
    ours, theirs = tokenizers
    text = f"a{END_OF_TEXT} b {END_OF_TEXT}"
    assert source_ids(ours, text) == theirs(text, split_special_tokens=True)["input_ids"] + theirs("\n")["input_ids"]
    assert theirs(text)["input_ids"].count(ours.eot_token) == 2 and ours.eot_token not in ours.encode_ordinary(text)


# --------------------------------------------------------------------------------------------------- training adapters


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_pefts(tmp_path, name):
    """One batch, one loss: every number of the adapter has the same gradient, to the float32 of the loss."""
    model, ours, theirs = same_adapters(tmp_path, name)
    backward(model, ours, random_rows())
    their_loss(theirs, random_rows()).backward()
    (got,) = (parameter.grad for parameter in ours.parameters())
    assert_close(got.flatten(1), weight_of(theirs).grad, rtol=1e-5, atol=1e-8)
    assert (got != 0).all()


@pytest.mark.parametrize("name", SHAPES)
def test_ten_steps_of_training_equal_pefts(tmp_path, name):
    """From one start, over the same batches, AdamW takes both to the same place."""
    model, ours, theirs = same_adapters(tmp_path, name)
    start = weight_of(theirs).clone()
    sides = {
        ours: lambda rows: backward(model, ours, rows),
        theirs: lambda rows: their_loss(theirs, rows).backward(),
    }
    for side, compute_gradients in sides.items():
        optimizer = torch.optim.AdamW([p for p in side.parameters() if p.requires_grad], lr=0.03, weight_decay=0.0)
        for step in range(10):
            optimizer.zero_grad()
            compute_gradients(random_rows(seed=step))
            optimizer.step()
    (got,) = ours.parameters()
    assert_close(got.flatten(1), weight_of(theirs), rtol=0, atol=1e-5)
    assert (got.flatten(1) - start).abs().median() > 0.05  # it did move


# ------------------------------------------------------------------------------------------------- files of adapters


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_an_adapter_from_here_loads_in_peft(tmp_path, name, with_base, dtype):
    """It acts the same there, loads without a warning, and need not name its base."""
    peer, model = peer_base(tmp_path / "base", dtype=dtype)
    ours = ADAPTERS[name][0](torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1)))
    ours.save(tmp_path / "adapter", model if with_base else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT gives one for keys of the config that it does not know
        theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter")
    assert_same(model, theirs, [ours])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_from_peft_loads_here(tmp_path, name, dtype):
    """It acts the same here, and PEFT's MLP is baked into its file."""
    peer, model = peer_base(tmp_path / "base", dtype=dtype)
    theirs = peer_adapter(peer, name)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = train.load_adapters(tmp_path / "adapter", model)[0]
    assert type(ours) is ADAPTERS[name][0]
    assert_same(model, theirs, [ours])


@pytest.mark.parametrize("n_frozen", [0, 1, P])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cartridge_of_peft_loads_as_a_prefix(tmp_path, dtype, n_frozen):
    """However many of its first tokens PEFT keeps frozen, all of them are in the file."""
    peer, model = peer_base(tmp_path / "base", dtype=dtype)
    sizes = {"num_virtual_tokens": P, "num_frozen_tokens": n_frozen}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(peer, peft.CartridgeConfig(task_type="CAUSAL_LM", **sizes)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(tmp_path / "adapter", model)
    assert type(ours) is Prefix
    assert_same(model, theirs, [ours])


@pytest.mark.parametrize(
    "kind, config",
    [
        ("LORA", peft.LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True)),
        ("P_TUNING", peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_hidden_size=C)),
    ],
)
def test_other_adapters_of_peft_are_refused_by_name(tmp_path, kind, config):
    """P-tuning has prompt_embeddings too, so it is the kind that decides, not what the file holds."""
    peer, model = peer_base(tmp_path / "base")
    peft.get_peft_model(peer, config).save_pretrained(tmp_path / "adapter")
    for load in (train.load_adapters, Prefix.load, SoftPrompt.load):
        with pytest.raises(ValueError, match=kind):
            load(tmp_path / "adapter", model)


# --------------------------------------------------------------------------------------------- the reference of classroom/


def test_lora_equals_pefts(tmp_path):
    """The experiments' reference: the same numbers in A and B give the same logits, and the same gradients to A and B."""
    peer, model = peer_base(tmp_path)
    config = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 32, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    theirs = peft.get_peft_model(peer, peft.LoraConfig(**config)).double()
    pairs = same_lora(add_lora(model, 2).double(), theirs)
    assert len(pairs) == 2 * L
    assert_same(model, theirs)
    train.loss_of(model, batch_of(random_rows(), model.device), None, sum(len(row.target) for row in random_rows())).backward()
    their_loss(theirs, random_rows()).backward()
    for got, expected in pairs:
        assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-8)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}


def same_lora(model, theirs):
    """Gives PEFT's LoRA random numbers, and ours the same -> pairs of parameters, ours and theirs."""
    ours = [p for name, p in model.named_parameters() if name.endswith((".A", ".B"))]
    peers = [p for name, p in theirs.named_parameters() if "lora_" in name]
    for own, peer in zip(ours, peers, strict=True):
        peer.data = 0.1 * torch.randn(peer.shape, generator=torch.Generator().manual_seed(peer.numel())).double()
        own.data = peer.data.clone()
    return list(zip(ours, peers))
