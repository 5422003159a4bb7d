"""A model of a few thousand random weights, in float64: equal means equal to twelve digits.

And a small base that was trained for a moment, with short runs on it.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # the peers, too, may not look for anything outside
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))

from blank import EXERCISES  # noqa: E402

import command.answers  # noqa: E402
import command.models  # noqa: E402
import train  # noqa: E402
from command.answers import answers  # noqa: E402
from command.process import start_process  # noqa: E402
from data import Example  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from model import GPT, Decoder, GPTConfig  # noqa: E402
from small_base.pretrain import pretrain  # noqa: E402
from small_base.world import task_examples  # noqa: E402
from storage.checkpoints import Checkpoint  # noqa: E402

V, BLOCK, L, H, C = 61, 32, 3, 2, 16
D = C // H


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes ten seconds or more; only -m slow runs it")
    for number, exercise in EXERCISES.items():
        grades = f"grades exercise {number}, {exercise.title}: {exercise.function}"
        config.addinivalue_line("markers", f"ex{number}: {grades}")
    config.option.markexpr = config.option.markexpr or "not slow"
    if config.option.markexpr in [f"ex{number}" for number in EXERCISES]:
        config.option.maxfail = config.option.maxfail or 1  # the first hint, and nothing hides it
        config.option.tbstyle = config.option.tbstyle.replace("auto", "short")


def random_model(seed: int = 0, family: str = "gpt2") -> Decoder:
    """Weights an order larger than at GPT-2's start: attention is uneven, so a wrong score shows.

    Gains lie around 1, or the last norm would silence the content, and every text would go on with
    the same token. The Llama has twice as many heads of queries, so that a prefix has the shape
    (P, L, 2, H, D) on both.
    """
    generator = torch.Generator().manual_seed(seed)
    llama = LlamaConfig(V, BLOCK, L, 2 * H, H, C, 3 * C, D, rope_theta=100.0, rms_norm_eps=1e-5)
    model = (Llama(llama) if family == "llama" else GPT(GPTConfig(V, BLOCK, L, H, C))).double()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.3 * noise
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.RMSNorm):
            module.weight.data += 1
    return model.requires_grad_(False)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session", autouse=True)
def process() -> None:
    """torch as main sets it up."""
    start_process()


@pytest.fixture(autouse=True)
def quick_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run's end takes longer than its training: no curve, and answers of a few tokens."""
    if "curve" not in request.node.name:
        monkeypatch.setattr(command.models, "draw_curve", lambda *_: None)

    def few_tokens(*given) -> list[str]:
        *given, limit = given
        return answers(*given, min(limit, 5))

    monkeypatch.setattr(command.answers, "answers", few_tokens)


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Decoder:
    """What holds of the methods holds on both families."""
    return random_model(family=request.param)


@pytest.fixture
def gpt2() -> GPT:
    return random_model()


def write_jsonl(path: Path, examples: list[Example]) -> None:
    rows = [{"input": example.input, "target": example.target} for example in examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """A small base of thirty steps: it knows words. Beside it lie forty examples of a task."""
    directory = tmp_path_factory.mktemp("base")
    pretrain(directory / "mini", steps=30, batch_size=4)
    write_jsonl(directory / "forty.jsonl", task_examples("sentence", "train", 40, 0))
    return str(directory / "mini")


def forty(base: str) -> str:
    """-> the path of those examples."""
    return str(Path(base).with_name("forty.jsonl"))


def train_argv(base: str, *flags: object) -> list[str]:
    """-> flags of a short run on those examples. Each can be given anew."""
    data = [] if {"--data", "--task"} & set(flags) else ["--data", forty(base)]
    common = ["--base", base, "--device", "cpu", "--steps", "3", "--batch-size", "4", "--lr", "0.3"]
    return [*common, *data, *map(str, flags)]


def run(base: str, *flags: object) -> dict[str, Any]:
    """A short run of train.py -> what it returns."""
    return train.main(train_argv(base, *flags))


def files_in(folder: Path) -> dict[str, bytes]:
    """-> the contents of its files, pictures left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def without_lr(argv: list[str]) -> list[str]:
    """-> the same flags, so that a rate is searched."""
    at = argv.index("--lr")
    return argv[:at] + argv[at + 2 :]


def interrupted(step: int, argv: list[str]) -> None:
    """A run that Ctrl-C ends behind the checkpoint of this step."""
    save = Checkpoint.save

    def save_and_stop(self, trainee, optimizer, metrics) -> None:
        save(self, trainee, optimizer, metrics)
        if metrics[-1]["step"] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", save_and_stop)
        train.main(argv)


def raising(error: BaseException) -> Callable:
    """-> a function that does nothing else."""

    def function(*_, **__):
        raise error

    return function
