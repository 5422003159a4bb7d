"""What transformers and PEFT compute, this project computes too. Each reads the other's files.

Both sides get the same random weights, mostly in float64, and agree to rounding.
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
from command.models import load_adapters
from data import IGNORE, Row, batch_of, source_ids
from model import GPT, GPTConfig, stacked_past_kv
from prefix import Prefix
from small_base.pretrain import train_bpe
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter, save_adapter
from storage.base import load_base, save_base
from storage.tokenizers import END_OF_TEXT, load_tokenizer, save_tokenizer

transformers = pytest.importorskip("transformers", reason="a peer: see tests/requirements.txt")
peft = pytest.importorskip("peft", reason="a peer: see tests/requirements.txt")
pytestmark = [  # what the peers say to each other
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

P, T, NEW = 4, 7, 20
IDX = random_ids(3, T)

ADAPTERS = {
    "prefix": (Prefix, peft.PrefixTuningConfig, {}),
    "prefix with an MLP": (
        Prefix, peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 24}
    ),
    "soft prompt": (SoftPrompt, peft.PromptTuningConfig, {}),
}  # fmt: skip
SHAPES = {"prefix": (P, L, 2, H, D), "soft prompt": (P, C)}  # of our parameters


def random_rows(seed=0):
    """-> three examples of unequal length: a batch of them is padded."""
    ids = random_ids(24, seed=seed).tolist()
    return [Row(ids[:5], ids[5:9]), Row(ids[9:11], ids[11:17]), Row(ids[17:23], ids[23:])]


def randomised(model):
    """-> the model, frozen. Attention is far from uniform, and greedy answers vary by position."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.requires_grad_(False).named_parameters():
        scale = 1.0 if "wpe" in name else 0.3 if parameter.dim() == 2 else 0.1
        gain = float("ln" in name and "weight" in name)
        parameter.copy_(gain + scale * torch.randn(parameter.shape, generator=generator))
    return model


SIZES = {"n_layer": L, "n_head": H, "n_embd": C, "n_positions": BLOCK}


def peer_base(directory, sizes=SIZES, dtype=torch.float64, saved_as="GPT2LMHeadModel"):
    """-> transformers' GPT-2 of random weights, and ours, read from where it was saved."""
    others = {"layer_norm_epsilon": 1e-3, "bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(vocab_size=V, **sizes, **others)
    peer = randomised(transformers.GPT2LMHeadModel(config)).eval().to(dtype)
    (peer.transformer if saved_as == "GPT2Model" else peer).save_pretrained(directory)
    return peer, load_base(directory).requires_grad_(False)


def peer_adapter(peer, name):
    """-> PEFT's adapter of that name on the base, its numbers drawn as PEFT draws them."""
    _, config, own = ADAPTERS[name]
    torch.manual_seed(0)
    config = config(task_type="CAUSAL_LM", num_virtual_tokens=P, **own)
    return peft.get_peft_model(peer, config).eval()


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
    n_targets = sum(len(row.target) for row in rows)
    train.loss_of(model, batch, adapter.past_kv(model), n_targets).backward()


def their_loss(peer, rows):
    """The same of transformers and PEFT, which shift the labels themselves."""
    idx = pad_sequence([torch.tensor(row.source + row.target) for row in rows], batch_first=True)
    labels = [torch.tensor([-100] * len(row.source) + row.target) for row in rows]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    return peer(input_ids=idx, labels=labels).loss


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
    """Logits, loss and greedy tokens are equal. The loss to 1e-6: both sides take it in float32.

    In bfloat16, logits are equal to 3 % of the largest, and greedy tokens are not compared: a near
    tie may go either way.
    """
    past_kv = stacked_past_kv(adapters, model)
    logits, _ = model(IDX, past_kv)
    expected = peer(input_ids=IDX).logits[:, -T:]  # PEFT's soft prompt has P + T of them
    if model.dtype == torch.bfloat16:
        return assert_close(logits, expected, rtol=0, atol=0.03 * expected.abs().max().item())
    assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    loss = train.evaluate(model, adapters, random_rows(), batch_size=2).loss
    assert loss == pytest.approx(their_loss(peer, random_rows()).item(), rel=1e-6)
    answers = model.generate(IDX, NEW, past_kv, stop_token=peer.config.eos_token_id)
    assert answers.tolist() == their_tokens(peer, IDX, NEW).tolist()


# ----------------------------------------------------------------------------------------- the base


@pytest.mark.parametrize("sizes", [(L, H, C, BLOCK), (1, 1, 8, 27), (2, 8, 48, 64)])
def test_a_gpt2_of_transformers_gives_the_same_here(tmp_path, sizes):
    """Whatever its sizes, a base from there has equal logits, loss and greedy tokens here."""
    peer, model = peer_base(tmp_path, dict(zip(SIZES, sizes)))
    assert_same(model, peer)


@pytest.mark.parametrize("keys", ["GPT2LMHeadModel", "GPT2Model", "stored head", "old buffers"])
def test_every_naming_of_keys_loads(tmp_path, keys):
    """With and without `transformer.`, with the tied head or old mask buffers: the same base."""
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
    """The dtype and the values are the file's: in float64, they give equal logits."""
    peer, model = peer_base(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_same(model.double(), peer.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_base_from_here_loads_in_transformers(tmp_path, dtype):
    """Its weights are complete there. The dtype, the end of text and the logits are the same."""
    merges, directory = train_bpe(["to be or not to be"], n_merges=50), tmp_path / "base"
    config = GPTConfig(256 + len(merges) + 1, BLOCK, L, H, C, layer_norm_epsilon=1e-3)
    model = randomised(GPT(config)).to(dtype)
    save_base(model, directory)
    save_tokenizer(directory, merges)
    load = transformers.GPT2LMHeadModel.from_pretrained
    peer, info = load(directory, output_loading_info=True)
    assert not any(info.values()) and peer.dtype == dtype
    ours = load_tokenizer(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert ours.eot_token == theirs.eos_token_id == peer.generation_config.eos_token_id
    assert_same(model.double(), peer.eval().double())


# ------------------------------------------------------------------------------------ the tokenizer

PAGE = """  runs   of    spaces \t\ttabs\t \n\n\nlines \r\n trailing   \n   indented 0123456789 \
3.14159 1,000 1st ½ ² Ⅷ ٣٤٥
don't I'll we've DON'T they'd' ‘it’s’ __init__ a=b!=c ....!!!??? naïve café e\u0301 ß Straße \
हिन्दी ไทย العربية עברית
日本語のテキスト 中文，標點。 한국어 👩‍👩‍👧‍👦🏳️‍🌈👍🏽 🇩🇪 \0\1\x7f\x1b[0m \
\u200b\xa0\u2028\u3000\x85 \U0010ffff\ufffd\ufeff   """


@pytest.fixture
def tokenizers(tmp_path):
    """Ours and transformers', of the same files. Each word of the page is a token: splits show."""
    merges = train_bpe([PAGE, PAGE], n_merges=2000)
    save_tokenizer(tmp_path, merges)
    config = {"model_type": "gpt2", "vocab_size": 257 + len(merges)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_tokenizer(tmp_path), transformers.GPT2Tokenizer.from_pretrained(tmp_path)


def test_the_tokenizer_gives_the_same_ids(tokenizers):
    """A page of difficult text, or of its characters shuffled, has the same ids and comes back."""
    ours, theirs = tokenizers
    rng = random.Random(0)
    for text in [PAGE] + ["".join(rng.choices(PAGE, k=300)) for _ in range(100)]:
        ids = ours.encode_ordinary(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert len(ours.encode_ordinary(PAGE)) < len(PAGE) / 2  # merges were used


def test_a_special_token_in_a_text_is_one_id(tokenizers):
    """As there: it is the one id that it is, in a source and in a target."""
    ours, theirs = tokenizers
    text = f"a{END_OF_TEXT} b {END_OF_TEXT}"
    expected = theirs(text)["input_ids"]
    assert expected.count(ours.eot_token) == 2
    assert source_ids(ours, text) == expected + theirs("\n")["input_ids"]
    assert ours.encode_ordinary(text) == theirs(text, split_special_tokens=True)["input_ids"]


# -------------------------------------------------------------------------------- training adapters


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_pefts(tmp_path, name):
    """Every number of the adapter has the same gradient, to the float32 of the loss."""
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
        trained = [p for p in side.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.03, weight_decay=0.0)
        for step in range(10):
            optimizer.zero_grad()
            compute_gradients(random_rows(seed=step))
            optimizer.step()
    (got,) = ours.parameters()
    assert_close(got.flatten(1), weight_of(theirs), rtol=0, atol=1e-5)
    assert (got.flatten(1) - start).abs().median() > 0.05  # it did move


# -------------------------------------------------------------------------------- files of adapters


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_an_adapter_from_here_loads_in_peft(tmp_path, name, with_base, dtype):
    """It acts the same there, loads without a warning, and need not name its base."""
    peer, model = peer_base(tmp_path / "base", dtype=dtype)
    start = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1))
    ours = ADAPTERS[name][0](start)
    save_adapter(ours, tmp_path / "adapter", model if with_base else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, for keys that it does not know
        theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter")
    assert_same(model, theirs, [ours])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_from_peft_loads_here(tmp_path, name, dtype):
    """It acts the same here, and PEFT's MLP is baked into its file."""
    peer, model = peer_base(tmp_path / "base", dtype=dtype)
    theirs = peer_adapter(peer, name)
    theirs.save_pretrained(tmp_path / "adapter")
    (ours,) = load_adapters(tmp_path / "adapter", model)
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


OTHERS = {
    "LORA": (peft.LoraConfig, {"r": 2, "fan_in_fan_out": True}),
    "P_TUNING": (peft.PromptEncoderConfig, {"num_virtual_tokens": P, "encoder_hidden_size": C}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_of_peft_are_refused_by_name(tmp_path, kind):
    """The kind decides, not what the file holds: P-tuning has prompt_embeddings too."""
    peer, model = peer_base(tmp_path / "base")
    config, own = OTHERS[kind]
    theirs = peft.get_peft_model(peer, config(task_type="CAUSAL_LM", **own))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=kind):
        load_adapter(tmp_path / "adapter", model)


# --------------------------------------------------------------------- the reference of classroom/


def test_lora_equals_pefts(tmp_path):
    """The experiments' reference: the same A and B give the same logits, loss and gradients."""
    peer, model = peer_base(tmp_path)
    config = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 32}
    config |= {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    theirs = peft.get_peft_model(peer, peft.LoraConfig(**config)).double()
    pairs = same_lora(add_lora(model, 2).double(), theirs)
    assert len(pairs) == 2 * L
    assert_same(model, theirs)
    batch = batch_of(random_rows(), model.device)
    n_targets = int((batch.targets != IGNORE).sum())
    train.loss_of(model, batch, None, n_targets).backward()
    their_loss(theirs, random_rows()).backward()
    for got, expected in pairs:
        assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-8)
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"}


def same_lora(model, theirs):
    """Gives PEFT's LoRA random numbers, and ours the same -> pairs of parameters, ours first."""
    ours = [p for name, p in model.named_parameters() if name.endswith((".A", ".B"))]
    peers = [p for name, p in theirs.named_parameters() if "lora_" in name]
    for own, peer in zip(ours, peers, strict=True):
        generator = torch.Generator().manual_seed(peer.numel())
        peer.data = 0.1 * torch.randn(peer.shape, generator=generator).double()
        own.data = peer.data.clone()
    return list(zip(ours, peers))
