"""The docs' lines for using an adapter without this project, taken out of the page and run.

They give the tokens that we give.
"""

import re
from pathlib import Path

import pytest
import torch

from prefix import Prefix
from small_base.pretrain import train_bpe
from soft_prompt import SoftPrompt
from storage.adapters import save_adapter
from storage.base import load_base
from storage.tokenizers import load_tokenizer, save_tokenizer

DOCS = Path(__file__).parent.parent / "docs" / "your-data.md"

transformers = pytest.importorskip("transformers", reason="a peer: see tests/requirements.txt")
pytestmark = [  # what the peers say to each other
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

P, BLOCK = 4, 48
SIZES = {
    "gpt2": {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": BLOCK},
    "llama": {
        "num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 40, "head_dim": 8,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": BLOCK,
    },
}  # fmt: skip
TEXTS = {
    "one row": ["a table for two"],
    "three rows": ["a table", "by the river, for two or for three", "no"],
}
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}reply:{% endif %}"
)


@pytest.fixture(params=SIZES)
def base(request, tmp_path):
    """A base of random weights. Its tokenizer has a chat template, its config says to sample."""
    directory = tmp_path / "base"
    save_tokenizer(directory, train_bpe(TEXTS["three rows"], n_merges=30))
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    end = tokenizer.eos_token_id
    common = {"vocab_size": len(tokenizer), "eos_token_id": end, "tie_word_embeddings": True}
    config = transformers.AutoConfig.for_model(request.param, **SIZES[request.param], **common)
    peer = transformers.AutoModelForCausalLM.from_config(config).double()
    generator = torch.Generator().manual_seed(0)
    for name, weight in peer.requires_grad_(False).named_parameters():
        scale = 1.0 if "wpe" in name else 0.3 if weight.dim() == 2 else 0.1
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        weight.copy_(float(name.endswith("weight") and weight.dim() == 1) + scale * noise)
    peer.generation_config = transformers.GenerationConfig(
        do_sample=True, repetition_penalty=1.5, eos_token_id=end
    )
    peer.save_pretrained(directory)
    return directory


def random_adapter(method, base, directory):
    """-> an adapter of random numbers, which is also saved to the directory."""
    model = load_base(base)
    torch.manual_seed(1)
    if method == "cartridge":
        peft = pytest.importorskip("peft", reason="a peer: see tests/requirements.txt")
        peer = transformers.AutoModelForCausalLM.from_pretrained(base)
        config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
        theirs = peft.get_peft_model(peer, config)
        theirs.save_pretrained(directory)
        return Prefix(theirs.get_prompt_embedding_to_save("default").view(model.kv_shape(P)))
    if method == "prefix":
        adapter = Prefix(torch.randn(model.kv_shape(P)))
    else:
        adapter = SoftPrompt(torch.randn(P, model.config.n_embd))
    save_adapter(adapter, directory, model)
    return adapter


def page_code(base, adapter, texts, n_new, chat=False):
    """-> the page's code with these values in it. With chat, its commented lines count."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if "transformers" in block)
    changes = {
        r'^base = ".*"$': f"base = {str(base)!r}",
        r'^adapter = ".*"$': f"adapter = {str(adapter)!r}",
        r"^texts = \[.*\]$": f"texts = {texts!r}",
        r'"max_new_tokens": \d+': f'"max_new_tokens": {n_new}',
    }
    if chat:
        changes[r"(?<=with --chat:\n)(# .*\n)+"] = lambda lines: lines[0].replace("# ", "")
    for pattern, value in changes.items():
        code, n = re.subn(pattern, value, code, flags=re.MULTILINE)
        assert n == 1, f"{pattern} is {n} times in {DOCS}"
    return code


def assert_our_tokens(base, adapter, directory, texts, sources, chat=False):
    """The page answers the texts as we answer each alone, up to the model's last position."""
    model, end = load_base(base).requires_grad_(False), load_tokenizer(base).eot_token
    n_new = BLOCK + 1 - P - max(map(len, sources))  # the last token is never read
    found = {}
    exec(page_code(base, directory, texts, n_new, chat), found)
    answers = found["answers"][:, found["ids"].shape[1] :].tolist()
    assert len(set(sum(answers, []))) > 10  # no model that repeats one token
    for source, answer in zip(sources, answers, strict=True):
        idx = torch.tensor([source])
        ours = model.generate(idx, n_new, adapter.past_kv(model), stop_token=end)
        ours = ours[0, len(source) :].tolist()
        assert answer == ours + [end] * (len(answer) - len(ours))


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("method", ["prefix", "soft prompt", "cartridge"])
def test_the_pages_code_gives_our_tokens(tmp_path, base, method, texts):
    """On GPT-2 and a Llama, for one text and for three of unequal length."""
    adapter = random_adapter(method, base, tmp_path / "adapter")
    encode = load_tokenizer(base).encode_ordinary
    sources = [encode(text) + encode("\n") for text in texts]
    assert_our_tokens(base, adapter, tmp_path / "adapter", texts, sources)


def test_with_its_chat_lines_the_page_uses_the_template(tmp_path, base):
    """Then a text is what the user says, and the answer starts where the template ends."""
    adapter = random_adapter("prefix", base, tmp_path / "adapter")
    texts, encode = TEXTS["three rows"], load_tokenizer(base).encode_ordinary
    sources = [encode(f"user: {text}\nreply:") for text in texts]
    assert_our_tokens(base, adapter, tmp_path / "adapter", texts, sources, chat=True)
