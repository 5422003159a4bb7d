"""classroom/answers.md: what can be counted is counted right, what is quoted is in its table."""

import re
from pathlib import Path

import pytest

from model import GPT, GPTConfig
from prefix import Prefix
from soft_prompt import SoftPrompt

CLASSROOM = Path(__file__).parent.parent / "classroom"
PAGE = (CLASSROOM / "answers.md").read_text(encoding="utf-8")
ANSWERS = dict(re.findall(r"^\*\*(\w\d)\*\*(.*?)(?=^\*\*\w\d\*\*|^#|\Z)", PAGE, flags=re.M | re.S))


def trained(adapter) -> int:
    return sum(p.numel() for p in adapter.parameters() if p.requires_grad)


@pytest.fixture
def small() -> GPT:
    """As large as the small base."""
    return GPT(GPTConfig(vocab_size=10)).requires_grad_(False)


def test_the_numbers_of_p1_are_those_of_the_adapters(small):
    """A prefix of 8 and a prompt of 6 there, and of 10 each at the sizes of GPT-2 small."""
    gpt2 = GPT(GPTConfig(10, 20, n_layer=12, n_head=12, n_embd=768))
    adapters = Prefix.random(small, 8), SoftPrompt.random(small, 6)
    adapters += Prefix.random(gpt2, 10), SoftPrompt.random(gpt2, 10)
    for n in map(trained, adapters):
        assert f"= {n:,}" in ANSWERS["P1"]
    for adapter in adapters[2:]:
        assert f"{100 * trained(adapter) / 124_439_808:.3f} %" in ANSWERS["P1"]


def test_the_numbers_of_p5_are_those_of_the_mlp(small):
    """All that is trained, each part of it, and what is saved."""
    prefix = Prefix.random(small, 8).reparametrise(512)
    first, _, last = prefix.mlp
    for part in (prefix.inputs.numel(), trained(first), trained(last), trained(prefix)):
        assert f"{part:,}" in ANSWERS["P5"]
    assert f"{trained(prefix.bake()):,} are saved" in ANSWERS["P5"]


def test_what_l3_says_of_shifted_is_in_the_table():
    """A soft prompt gets none, full fine-tuning all, prefix and stack a few, LoRA both extremes."""
    table = (CLASSROOM / "results" / "compare.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| shifted \| (.+?) \|.* \| (.+?) \|$", table, flags=re.M)
    exact = {method: [float(n) for n in re.findall(r"[\d.]+", cell)] for method, cell in rows}
    assert exact["soft prompt"] == [0] and exact["full fine-tuning"] == [100]
    assert [round(n) for n in exact["prefix"][1:]] == [0, 7]
    assert [round(n) for n in exact["prefix + soft prompt"][1:]] == [1, 17]
    assert exact["LoRA"][1:] == [0, 100]
