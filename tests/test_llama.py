"""The Llama family: what transformers and PEFT compute on it, this project computes too.

It is shown on miniatures of random weights. transformers takes norms and rotations in float32
whatever the dtype, so float64 agrees to float32's digits and no further.
"""

import json
import random

import pytest
import torch
from conftest import random_ids
from lora import add_lora
from safetensors.torch import load_file, save_file
from test_peers import their_tokens
from torch.testing import assert_close

import train
from data import Row, batch_of
from prefix import Prefix
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter, save_adapter
from storage.base import load_base, save_base
from storage.files import read_json, write_json
from storage.tokenizers import load_chat_template, load_tokenizer

transformers = pytest.importorskip("transformers", reason="a peer: see tests/requirements.txt")
peft = pytest.importorskip("peft", reason="a peer: see tests/requirements.txt")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = [  # what the peers say to each other
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

V, P, T, NEW = 61, 4, 7, 20
SIZES = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
KINDS = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama 3": (
        transformers.LlamaConfig, {"tie_word_embeddings": False, "rope_parameters": LLAMA_3}
    ),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True, "head_dim": 4}),
    "qwen3": (
        transformers.Qwen3Config,
        {"tie_word_embeddings": False, "head_dim": 16, "rms_norm_eps": 1e-3},
    ),
}  # fmt: skip


def peer_base(directory, kind="llama", dtype=torch.float64, **save):
    """-> transformers' model of random weights, and ours, read from where it was saved."""
    config, own = KINDS[kind]
    peer = transformers.AutoModelForCausalLM.from_config(config(**SIZES | own)).eval().double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peer.requires_grad_(False).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = 0.3 if parameter.dim() == 2 else 0.1  # attention is far from uniform
        parameter.copy_(float("norm" in name) + scale * noise)
    peer.to(dtype).save_pretrained(directory, **save)
    return peer, load_base(directory).requires_grad_(False)


def random_rows(n=3):
    """-> n examples of eight tokens, two or more of them a source."""
    return [Row(ids[: 2 + i], ids[2 + i :]) for i, ids in enumerate(random_ids(n, 8).tolist())]


TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers_gives_the_same_here(tmp_path, kind, dtype):
    """Logits, the gradient at the input, and greedy tokens are equal."""
    peer, model = peer_base(tmp_path, kind, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    idx, tolerance = random_ids(3, T), TOLERANCE[dtype]
    x, theirs = (model.wte(idx).clone().requires_grad_() for _ in range(2))
    logits = model.forward_embeddings(x)[0] @ model.head.T
    expected = peer(inputs_embeds=theirs).logits
    assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    for value in (logits, expected):
        value.logsumexp(dim=-1).sum().backward()
    assert_close(x.grad, theirs.grad, rtol=10 * tolerance, atol=10 * tolerance)
    assert model.generate(idx, NEW).tolist() == their_tokens(peer, idx, NEW).tolist()


def test_the_speed_of_rotation_may_stand_where_older_files_have_it(tmp_path):
    """By itself, before transformers 5."""
    peer_base(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    assert load_base(tmp_path).config.rope_theta == 500.0


@pytest.mark.parametrize("kind", KINDS)
def test_reading_in_two_parts_equals_reading_at_once(tmp_path, kind):
    """The keys of the past are turned once, by where they stood."""
    _, model = peer_base(tmp_path, kind)
    idx = random_ids(2, 9)
    whole, whole_cache = model(idx)
    rest, cache = model(idx[:, 4:], model(idx[:, :4])[1])
    assert_close(rest, whole[:, 4:], rtol=1e-9, atol=1e-9)
    assert_close(cache, whole_cache, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["prefix", "cartridge", "soft prompt"])
def test_adapters_go_both_ways_between_here_and_peft(tmp_path, kind, method):
    """The same logits and greedy tokens, whoever made it. A prefix has the fewer heads of keys."""
    peer, model = peer_base(tmp_path / "base", kind, torch.float32)
    ours, config = {
        "prefix": (Prefix, peft.PrefixTuningConfig),
        "cartridge": (Prefix, peft.CartridgeConfig),
        "soft prompt": (SoftPrompt, peft.PromptTuningConfig),
    }[method]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(peer, config(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs", model)
    assert type(adapter) is ours
    assert_same(model, adapter, theirs)
    for parameter in adapter.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape)
    save_adapter(adapter, tmp_path / "ours", model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert_same(model, adapter, peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval())


def test_lora_equals_pefts(tmp_path):
    """On queries and values: a new one, with A small and B zeros, and one of other numbers."""
    peer, model = peer_base(tmp_path)
    untouched = model(random_ids(2, T))[0]
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=32)
    theirs = peft.get_peft_model(peer, config).double().eval()
    add_lora(model, 2).double()
    assert_close(model(random_ids(2, T))[0], untouched, rtol=0, atol=0)
    ours = [p for name, p in model.named_parameters() if name.endswith((".A", ".B"))]
    peers = [p for name, p in theirs.named_parameters() if "lora_" in name]
    assert [p.shape for p in ours] == [p.shape for p in peers]
    assert len(ours) == 2 * 2 * SIZES["num_hidden_layers"]
    bound = SIZES["hidden_size"] ** -0.5
    assert all(p.abs().max() <= bound and p.std() > bound / 2 for p in (*ours[::2], *peers[::2]))
    for own, peer_own in zip(ours, peers):
        peer_own.data = 0.1 * torch.randn(peer_own.shape, dtype=torch.float64)
        own.data = peer_own.data.clone()
    with torch.no_grad():
        logits, expected = model(random_ids(2, T))[0], theirs(input_ids=random_ids(2, T)).logits
    assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits - untouched).abs().max() > 0.1


def assert_same(model, adapter, theirs):
    past_kv = adapter.past_kv(model)
    idx = random_ids(1, T)
    with torch.no_grad():
        expected = theirs(input_ids=idx).logits[:, -T:]
        assert_close(model(idx, past_kv)[0], expected, rtol=2e-5, atol=2e-5)
    assert model.generate(idx, NEW, past_kv).tolist() == their_tokens(theirs, idx, NEW).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_shards_load_as_one_file_does(tmp_path, kind):
    """Each tensor is in one of model-00001-of-0000N.safetensors. Without that, it is missing."""
    _, model = peer_base(tmp_path / "one", kind)
    peer_base(tmp_path / "many", kind, max_shard_size="20KB")
    assert not (tmp_path / "many" / "model.safetensors").exists()
    many = load_base(tmp_path / "many")
    assert_close(many.state_dict(), model.state_dict(), rtol=0, atol=0)
    next((tmp_path / "many").glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="lacks what its config.json asks for .*Missing"):
        load_base(tmp_path / "many")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_model_is_saved_as_it_came(tmp_path, kind):
    """With its base's own config, and the same to the bit. transformers loads it too."""
    peer, model = peer_base(tmp_path / "base", kind, torch.float32)
    save_base(model, tmp_path / "tuned", read_json(tmp_path / "base" / "config.json"))
    tuned = load_base(tmp_path / "tuned")
    assert_close(tuned.state_dict(), model.state_dict(), rtol=0, atol=0)
    load = transformers.AutoModelForCausalLM.from_pretrained
    again, info = load(tmp_path / "tuned", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert_close(again(random_ids(1, T)).logits, peer(random_ids(1, T)).logits)


@pytest.mark.parametrize("method", [Prefix, SoftPrompt])
def test_ten_steps_of_training_lower_the_loss_and_leave_the_base(tmp_path, method):
    """The base is bit for bit what it was."""
    _, model = peer_base(tmp_path, "llama 3", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter, rows = method.text(model, random_ids(P)), random_rows()
    plan = train.Plan(steps=10, lr=0.1, batch_size=3, seed=0, eval_every=10)
    metrics = train.tune(model, [adapter], {"train": rows, "validation": rows}, plan)
    assert metrics[-1]["validation"] < 0.9 * metrics[0]["validation"]
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_gradient_of_a_prefix_in_bfloat16_is_that_in_float64(tmp_path):
    """To a tenth of its largest number, with heads that share their keys."""
    _, model = peer_base(tmp_path)
    prefix, gradients = Prefix.text(model, random_ids(P)), []
    batch = batch_of(random_rows(), model.device)
    for dtype in (torch.float64, torch.bfloat16):
        same = model.to(dtype)
        prefix.zero_grad()
        train.loss_of(same, batch, prefix.past_kv(same), n_targets=10).backward()
        gradients.append(prefix.start.grad)
    assert (gradients[1] - gradients[0]).abs().max() < 0.1 * gradients[0].abs().max()


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'; only gpt2, llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' can be loaded"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotation .*yarn.* is not"),
        ({"num_key_value_heads": 4}, "config.json asks for"),
        ({"head_dim": 7}, "config.json asks for"),
        ({"hidden_size": "24"}, "hidden_size is '24', and only a size of a model can be loaded"),
        ({"hidden_size": 48}, "config.json asks for"),
        ({"tie_word_embeddings": False}, 'Missing .* "lm_head.weight"'),
    ],
)
def test_another_architecture_is_refused_by_name(tmp_path, changes, message):
    """What cannot be computed is named, with what was found."""
    peer_base(tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | changes)
    with pytest.raises(ValueError, match=message):
        load_base(tmp_path)


def test_a_head_that_should_be_tied_and_is_not_is_refused(tmp_path):
    """A stored head has to equal the embedding."""
    peer_base(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        load_base(tmp_path)


# -------------------------------------------------------------------------------------- tokenizers

LLAMA_3_SPLITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = {"model_type": "llama", "vocab_size": 600, "eos_token_id": [2, 1]}
CHARACTERS = "abc XYZ019  \n\t\r.,!?'`-_()éßñe\u0301日本한🙂👍½²٣\u200b\xa0ΔжstVEllmd<|>"


def trained_tokenizer(directory, splits, normalizer=None, end="<|end|>"):
    """A byte-level BPE that Hugging Face's library trains and saves, with a config beside it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = splits, normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|endoftext|>", end]  # the first ids, so that none is «the last»
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet
    )
    rng = random.Random(0)
    texts = ["".join(rng.choices(CHARACTERS, k=30)) for _ in range(500)]
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "config.json", CONFIG)
    return tokenizer


def split_by(pattern):
    pre = tokenizers.pre_tokenizers
    split = pre.Split(tokenizers.Regex(pattern), "isolated", invert=False)
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS = {
    "GPT-2": lambda pre: pre.ByteLevel(add_prefix_space=False),
    "SmolLM2": lambda pre: pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    ),
    "Llama 3": lambda pre: split_by(LLAMA_3_SPLITS),
    "Qwen": lambda pre: split_by(LLAMA_3_SPLITS.replace(r"\p{N}{1,3}", r"\p{N}")),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_a_tokenizer_gives_the_ids_of_hugging_faces(tmp_path, kind):
    """On 3,000 random strings with added tokens in them. Qwen's composes accents first."""
    normalizer = tokenizers.normalizers.NFC() if kind == "Qwen" else None
    theirs = trained_tokenizer(tmp_path, SPLITS[kind](tokenizers.pre_tokenizers), normalizer)
    added = ("<a>", "<a><b>", "<b>")
    theirs.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added])
    theirs.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", CONFIG | {"vocab_size": 603})
    ours, rng = load_tokenizer(tmp_path), random.Random(1)
    alphabet = [*CHARACTERS, "<a>", "<b>", "<|end|>", "<|endoftext|>", "\u0338"]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(3_000)]
    expected = [found.ids for found in theirs.encode_batch(texts, add_special_tokens=False)]
    assert [ours.encode(text, allowed_special="all") for text in texts] == expected
    assert ours.eot_token == 2 and ours.n_vocab == 603
    assert ours.decode(ours.encode("abc 019<a>")) == "abc 019<a>"


TEMPLATES = {  # written in the spirit of those of SmolLM2, Qwen3 and Llama 3
    "SmolLM2": """{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are brief<|im_end|>\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "Qwen3": """{%- if tools %}
    {{- '<|im_start|>system\\n' + tools | tojson }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and message.content is string %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + (' (last)' if loop.index0 == ns.last else '') + '\\n' }}
    {{- content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "Llama 3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n<|eot_id|>" }}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('no such role') }}
    {% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{% endfor %}
{{ unk_token }}{{ {'é': messages} | tojson(indent=2) }}
""",
}


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_says_what_transformers_has_it_say(tmp_path, kind, where):
    """Text for text: white space, tokens, JSON, dates, loops that break."""
    trained_tokenizer(tmp_path, SPLITS["Qwen"](tokenizers.pre_tokenizers))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    config |= {"bos_token": "<|pad|>", "unk_token": None, "eos_token": "<|end|>"}
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(TEMPLATES[kind], encoding="utf-8")
    else:
        config["chat_template"] = TEMPLATES[kind]
    write_json(tmp_path / "tokenizer_config.json", config)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    render = load_chat_template(tmp_path)
    said, messages = [" 1 < 2 & 'é' ", "<think>\nhm</think>\nyes", "why?\n", "so"], []
    for i, content in enumerate(said):
        messages.append({"role": ["user", "assistant"][i % 2], "content": content})
        expected = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render(messages) == expected


def test_a_byte_that_the_vocabulary_lacks_gets_a_sentence(tmp_path):
    """It names the byte and the text."""
    trained_tokenizer(tmp_path, SPLITS["Llama 3"](None))
    path = tmp_path / "tokenizer.json"
    found = read_json(path)
    vocab, merges = found["model"]["vocab"], found["model"]["merges"]
    found["model"]["vocab"] = {token: i for token, i in vocab.items() if token != "Q"}
    found["model"]["merges"] = [pair for pair in merges if "Q" not in "".join(pair)]
    write_json(path, found)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_ordinary("abc")) == "abc"
    with pytest.raises(ValueError, match="lacks the byte 0x51, which is in 'a Q'"):
        tokenizer.encode_ordinary("a Q")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda found: found["model"]["merges"].reverse(), "tokens in the order of their ids"),
        (lambda found: found["pre_tokenizer"].update(type="Metaspace"), "is .*Metaspace"),
        (lambda found: found["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
        (lambda found: found.update(normalizer={"type": "Lowercase"}), "normalizer is .*Lowercase"),
        (lambda found: found["model"].pop("merges"), "cannot be used .KeyError.'merges'"),
        (lambda found: found["model"].update(vocab={"日": 0}), "cannot be used .*日"),
        (lambda found: found["model"]["vocab"].update(a=1, b=1), "have not .* ids of"),
        (lambda found: found["model"]["vocab"].update(a=-1), "have not .* ids of"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path, change, message):
    """The sentence says what is foreign in it."""
    trained_tokenizer(tmp_path, SPLITS["GPT-2"](tokenizers.pre_tokenizers))
    found = read_json(tmp_path / "tokenizer.json")
    change(found)
    write_json(tmp_path / "tokenizer.json", found)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)
