"""A model of a few thousand random weights, in float64, so that equal means equal to twelve digits; and a tiny base."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # the peers, too, may not look for anything outside
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))

from blank import EXERCISES  # noqa: E402

from command.process import start_process  # noqa: E402
from data import Example  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from model import GPT, Decoder, GPTConfig  # noqa: E402
from small_base import pretrain  # noqa: E402
from small_base.world import task_examples  # noqa: E402

V, BLOCK, L, H, C = 61, 32, 3, 2, 16
D = C // H


def pytest_configure(config: pytest.Config) -> None:
    for number, exercise in EXERCISES.items():
        config.addinivalue_line("markers", f"ex{number}: grades exercise {number}, {exercise.title}: {exercise.function}")
    if config.option.markexpr in [f"ex{number}" for number in EXERCISES]:  # the first hint, and nothing that hides it
        config.option.maxfail = config.option.maxfail or 1
        config.option.tbstyle = config.option.tbstyle.replace("auto", "short")


def random_model(seed: int = 0, family: str = "gpt2") -> Decoder:
    """Weights an order larger than at GPT-2's start: attention is far from uniform, so a wrong score shows.

    Gains lie around 1, or the last norm would silence the content, and every text would go on with the same token. The
    Llama has twice as many heads of queries, so that a prefix has the shape (P, L, 2, H, D) on both.
    """
    generator = torch.Generator().manual_seed(seed)
    llama = LlamaConfig(V, BLOCK, L, 2 * H, H, C, 3 * C, D, rope_theta=100.0, rms_norm_eps=1e-5)
    model = (Llama(llama) if family == "llama" else GPT(GPTConfig(V, BLOCK, L, H, C))).double()
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.RMSNorm)):
        norm.weight.data += 1
    return model.requires_grad_(False)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session", autouse=True)
def process() -> None:
    """torch as main sets it up."""
    start_process()


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Decoder:
    """What holds of the methods holds on both families."""
    return random_model(family=request.param)


@pytest.fixture
def gpt2() -> GPT:
    return random_model()


def write_jsonl(path: Path, examples: list[Example]) -> None:
    path.write_text("".join(json.dumps({"input": e.input, "target": e.target}) + "\n" for e in examples))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """A miniature of the pretrained base: forty steps, enough to know words. Beside it, forty examples of a task."""
    directory = tmp_path_factory.mktemp("base")
    pretrain.main(["--steps", "40", "--device", "cpu", "--out", str(directory / "mini")])
    write_jsonl(directory / "forty.jsonl", task_examples("sentence", "train", 40, 0))
    return str(directory / "mini")
