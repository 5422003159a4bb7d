"""What bad input gets: success, or one sentence. No traceback, hang, gigabytes or changed file.

The cases are drawn by a seed. A failure prints its case, and running the test again shows it again.
"""

import json
import os
import random
import re
import runpy
import struct
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import C, H, random_ids
from safetensors.torch import load, save

import data
import generate
import train
from command.console import run_command
from command.examples import read_jsonl
from command.flags import RECIPES, generate_flags, train_flags
from model import GPT, GPTConfig
from prefix import Prefix
from small_base.pretrain import train_bpe
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter, save_adapter
from storage.base import fingerprint, load_base, save_base
from storage.checkpoints import Checkpoint
from storage.files import write_json
from storage.tokenizers import load_chat_template, load_tokenizer, read_two_files, save_tokenizer

try:
    import resource
except ImportError:  # on Windows
    resource = None

BLOCK = 40
CHAT = (
    "{% for message in messages %}{{ message.role + ': ' + message.content | trim }}"
    "{{ eos_token }}{% endfor %}"
)
ELSEWHERE = ["/etc/passwd", "../data.jsonl", "https://example.com/x", "__import__('os').abort()"]
NUMBERS = [0, 1, 2, 3, 7, 8, 16, 257, 2**31, 2**63 - 1, 2**64, 10**30]
NUMBERS += [-1, 1.5, 1e308, float("nan"), float("inf")]


def text(rng: random.Random) -> str:
    """Characters of every plane of Unicode, with control characters and halves of pairs."""
    starts = [0, 0, 0x80, 0x2000, 0xD7F0, 0xFFF0, *range(0x10000, 0x110000, 0x10000)]
    length = rng.choice([0, 1, 3, 20])
    return "".join(chr(rng.choice(starts) + rng.randrange(0x30)) for _ in range(length))


def anything(rng: random.Random, depth: int = 3):
    """-> a value that JSON can hold."""
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {text(rng): anything(rng, depth - 1) for _ in range(rng.randrange(4))}
    return [None, True, rng.choice(NUMBERS), rng.choice(ELSEWHERE), text(rng), "x" * 10**5][kind]


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Cut, extended, changed in places, repeated in part, emptied, nested without end, or whole."""
    a, b = sorted(rng.choices(range(len(content) + 1), k=2))
    some = bytes(rng.choices(range(256), k=rng.choice([1, 8, 100])))
    changed = bytearray(content)
    for _ in range(rng.choice([1, 5])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    pieces = [content[:a], content + some, content[:a] + some + content[b:]]
    pieces += [content[:b] + content[a:], bytes(changed)]
    return rng.choice([content, *pieces, b"", b"[" * 10**5])


def metadata_of(content: bytes) -> dict[str, str] | None:
    """-> what a safetensors file says beside its tensors."""
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]).get("__metadata__")


def changed_tensor(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with one tensor of another dtype, shape, numbers or name, or missing."""
    tensors = load(content)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    dtypes = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    dtype = rng.choice([*dtypes, torch.int64, torch.bool])
    changed = [tensor.to(dtype), tensor[None], tensor.flatten(), tensor * torch.nan, tensor * 1e38]
    new = rng.choice(changed + ([tensor[:-1], tensor[:0]] if tensor.dim() else [])).clone()
    new = rng.choice([{name: new}, {"other": tensor}, {"lm_head.weight": new, name: tensor}, {}])
    return save(tensors | new, metadata_of(content))


def changed_value(rng: random.Random, content: bytes) -> bytes:
    """A JSON object of which one value is anything, or missing."""
    found = json.loads(content)
    key = rng.choice(list(found))
    found[key] = anything(rng)
    if rng.random() < 0.2:
        del found[key]
    return json.dumps(found).encode()


WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1}  # bytes a number


def header(rng: random.Random, name: str) -> bytes:
    """A safetensors file that holds together, but for its numbers; or one that does not."""
    if rng.random() < 0.5:
        dtype, shape = rng.choice(list(WIDTHS)), rng.choice([(4, 16), (4, 96), (0, 96), (4, 0)])
        body = bytes(rng.choices([0, 60, 127, 128, 255], k=WIDTHS[dtype] * shape[0] * shape[1]))
        tensors = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(body)]}}
    else:
        body, tensors = bytes(rng.choice([0, 256, 1536])), {}
        for tensor in rng.sample([name, "other", text(rng)], rng.choice([1, 1, 2])):
            dtype = rng.choice([*WIDTHS, "I64", "U8", "BOOL", "F8_E5M2", "C64", "F4", "X"])
            sizes = [0, 1, 3, 4, 16, 96, 2**40, 2**63, -1]
            shape = rng.choices(sizes, k=rng.choice([0, 1, 2, 2, 3]))
            start = rng.choice([0, 0, 4, 256, 1536, 2**40, 2**64, -4])
            offsets = [start, rng.choice([0, 256, 1536, 2**40, 2**64])]
            tensors[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    head = json.dumps(tensors).encode()
    return struct.pack("<Q", rng.choice([len(head)] * 9 + [2**40])) + head + body


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A tiny base with ten merges, and an adapter of each kind."""
    directory = tmp_path_factory.mktemp("bad")
    model = GPT(GPTConfig(267, BLOCK, 3, H, C)).requires_grad_(False)
    save_base(model, directory / "base")
    save_tokenizer(directory / "base", train_bpe(["the cat sat on the mat"] * 9, 10))
    save_adapter(Prefix(torch.randn(model.kv_shape(4))), directory / "prefix", model)
    save_adapter(SoftPrompt(torch.randn(4, C)), directory / "soft_prompt", model)
    for kind in ("prefix", "soft_prompt"):  # as they were saved before there were two fingerprints
        named = {"base": "base", "fingerprint": fingerprint(model)}
        write_json(directory / kind / "base.json", named)
    newer = directory / "newer"
    write_json(newer / "config.json", {"model_type": "gpt2", "vocab_size": 267})
    write_json(newer / "tokenizer.json", read_two_files(directory / "base"))
    own = {"eos_token": "<|endoftext|>", "chat_template": CHAT}
    write_json(newer / "tokenizer_config.json", own)
    lines = [json.dumps({"input": letter, "target": "b"}) + "\n" for letter in "acd"]
    (directory / "data.jsonl").write_text("".join(lines))
    return directory


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Less than a GB more than before, where the platform can tell."""

    def peak() -> int:
        if resource is None:
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = peak()
    yield
    assert peak() - before < 2**30


@pytest.mark.parametrize("file", ["test_bad_input.py", "test_commands.py"])
def test_these_tests_are_collected_on_windows(monkeypatch, file):
    """Which has neither of these modules, and no fork."""
    for name in ("resource", "pwd", "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(os, "fork", raising=False)
    assert runpy.run_path(str(Path(__file__).with_name(file)))["train"] is train


def state_of(directory: Path) -> dict[str, tuple[int, int, int]]:
    """-> what a write would change of each file: which one it is, its time and its length."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            stat = os.stat(path)
            found[path] = stat.st_ino, stat.st_mtime_ns, stat.st_size
    return found


def check(action, directory: Path, case) -> bool:
    """-> whether it succeeded. Else it raised a ValueError of ours. No file has changed."""
    before, error = state_of(directory), None
    try:
        action()
    except BaseException as raised:
        error = raised
    said = f"{error!r:.1000} for {case!r:.2000}"
    assert error is None or type(error) is ValueError and len(str(error)) > 20, said
    assert state_of(directory) == before, case
    return error is None


class Watch:
    """What Python does to the world while this is on: files, imports, code, processes, sockets."""

    def __init__(self):
        self.on, self.seen = False, set()
        sys.addaudithook(self.note)  # for good: an audit hook cannot be removed

    def note(self, event: str, arguments: tuple) -> None:
        harmless = ("builtins.", "object.", "sys.", "gc.", "pathlib.Path.glob", "os.scandir")
        if self.on and not event.startswith(harmless):
            what = str(Path(arguments[0]).parent) if event == "open" else repr(arguments)
            self.seen.add((event, what))


WATCH = Watch()


def check_file(places: Path, file: str, make, use, n: int, inert: bool = True) -> None:
    """n drawn contents of one file, each loaded and used; some succeed and some do not.

    Whatever a file says, nothing is done but to read the files of its own directory, if `inert`.
    """
    rng, path = random.Random(file), places / file
    whole, outcomes = path.read_bytes(), set()
    use(path.parent)  # whatever Python imports on the first time is imported now

    def watched() -> None:
        WATCH.on, WATCH.seen = True, set()
        try:
            use(path.parent)
        finally:
            WATCH.on = False

    try:
        for i in range(n):
            content = make(rng, whole) if i else whole
            path.write_bytes(content)
            outcomes.add(check(watched, places, content))
            assert not inert or WATCH.seen <= {("open", str(path.parent))}, content
    finally:
        path.write_bytes(whole)
    assert outcomes == {True, False}


def use_base(directory: Path) -> None:
    model = load_base(directory).float()
    model(torch.zeros(1, 1, dtype=torch.long))
    fingerprint(model)


def use_tokenizer(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    said = "  a\n\x00é日本語🙂 <|endoftext|>"
    assert tokenizer.decode(data.source_ids(tokenizer, said)) == said + "\n"
    assert tokenizer.decode(tokenizer.encode(said, allowed_special="all")) == said


def row_of_data(rng: random.Random) -> dict:
    """-> a row in one of the formats that are read, some with a column too many."""
    source, target = text(rng), text(rng)
    user, answer = {"role": "user", "content": source}, {"role": "assistant", "content": target}
    rows = [{"input": source, "target": target}, {"prompt": source, "completion": target}]
    rows += [{"instruction": source, "input": text(rng), "output": target}, {"target": target}]
    rows += [{"messages": [user, answer]}, {"messages": [user, answer, user, answer]}]
    return rng.choice(rows) | rng.choice([{}, {}, {text(rng): anything(rng)}])


def test_bad_lines_of_data(places):
    """400 files of examples; those that are read come back from their ids as they were."""
    rng, path, outcomes = random.Random(0), places / "bad.jsonl", set()
    tokenizer, formats = load_tokenizer(places / "base"), set()

    def use() -> None:
        examples = read_jsonl(path, say=str)
        for row, example in zip(data.encode(tokenizer, examples, json.dumps), examples):
            given = example.input
            said = [{"role": "user", "content": given}] if isinstance(given, str) else given
            assert json.loads(tokenizer.decode(row.source)) == said
            assert tokenizer.decode(row.target[:-1]) == example.target
            formats.add(type(given))
        for row, example in zip(data.encode(tokenizer, examples), examples):
            assert tokenizer.decode(row.source) == example.input + "\n"

    for _ in range(400):
        lines = [json.dumps(row_of_data(rng), ensure_ascii=rng.random() < 0.5) for _ in range(3)]
        content = [line.encode(errors="surrogatepass") for line in lines]
        middle = [content[1], json.dumps(anything(rng)).encode(), changed_value(rng, content[1])]
        content[1] = rng.choice(middle)
        path.write_bytes(rng.choice([b"\n".join(content), damaged(rng, b"\n".join(content))]))
        outcomes.add(check(use, places, path.read_bytes()))
    assert outcomes == {True, False} and formats == {str, list}


@pytest.mark.parametrize("kind", ["prefix", "soft_prompt"])
def test_bad_adapters(places, kind):
    """What loads has a cache that the model can read."""
    model = load_base(places / "base")

    def use(directory: Path) -> None:
        model(random_ids(1, 3), load_adapter(directory, model).past_kv(model))

    def new_header(rng: random.Random, _) -> bytes:
        return header(rng, "prompt_embeddings")

    check_file(places, f"{kind}/adapter_config.json", changed_value, use, 100)
    check_file(places, f"{kind}/adapter_config.json", damaged, use, 50)
    check_file(places, f"{kind}/base.json", changed_value, use, 50)
    check_file(places, f"{kind}/base.json", damaged, use, 50)
    for make, n in ((damaged, 50), (changed_tensor, 50), (new_header, 100)):
        check_file(places, f"{kind}/adapter_model.safetensors", make, use, n)


def test_bad_bases(places):
    """What loads can read a token, and has a fingerprint."""
    check_file(places, "base/config.json", changed_value, use_base, 50)
    check_file(places, "base/config.json", damaged, use_base, 30)
    check_file(places, "base/model.safetensors", damaged, use_base, 30)
    check_file(places, "base/model.safetensors", changed_tensor, use_base, 60)


def test_bad_checkpoints(places):
    """Whatever is in one, a step can be made from there, or it is refused in a sentence."""
    model, settings = load_base(places / "base"), {"steps": 3}

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        trainee = torch.nn.ModuleList([SoftPrompt.zero(model, 2)])
        return trainee, torch.optim.AdamW(trainee.parameters())

    def step(trainee: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        trainee[0].vectors.grad = torch.ones(2, C)
        optimizer.step()

    def use(directory: Path) -> None:
        trainee, optimizer = fresh()
        checkpoint = Checkpoint(directory, settings, resume=True, keep_best=False)
        metrics = checkpoint.restore(trainee, optimizer)
        list(islice([], metrics[-1]["step"], None))  # as training goes on there
        assert trainee[0].vectors.shape == (2, C)
        step(trainee, optimizer)

    trainee, optimizer = fresh()
    step(trainee, optimizer)
    (places / "run").mkdir()
    metrics = [{"step": 0, "lr": 0.1, "validation": 1.0}, {"step": 1, "loss": 1.0}]
    Checkpoint(places / "run", settings, False, False).save(trainee, optimizer, metrics)
    check_file(places, "run/checkpoint.pt", damaged, use, 100)


def test_bad_tokenizers(places):
    """GPT-2's two files, and the one of newer models."""
    check_file(places, "base/vocab.json", changed_value, use_tokenizer, 100)
    check_file(places, "base/vocab.json", damaged, use_tokenizer, 50)
    check_file(places, "base/merges.txt", damaged, use_tokenizer, 50)
    check_file(places, "newer/tokenizer.json", changed_value, use_tokenizer, 100)
    check_file(places, "newer/tokenizer.json", damaged, use_tokenizer, 50)
    check_file(places, "newer/tokenizer_config.json", changed_value, use_tokenizer, 50)


def test_bad_chat_templates(places):
    """Whatever stands where a template belongs, or in it."""

    def use(directory: Path) -> None:
        load_chat_template(directory)([{"role": "user", "content": "a"}])

    (places / "newer" / "chat_template.jinja").write_text("")
    with pytest.raises(ValueError, match="it writes nothing"):
        use(places / "newer")
    (places / "newer" / "chat_template.jinja").unlink()
    # jinja2 makes Python of a template, which its sandbox then runs
    check_file(places, "newer/tokenizer_config.json", changed_value, use, 100, inert=False)
    check_file(places, "newer/tokenizer_config.json", damaged, use, 50, inert=False)
    (places / "newer" / "chat_template.jinja").write_text(CHAT)
    check_file(places, "newer/chat_template.jinja", damaged, use, 100, inert=False)


PROGRAMS = {train: train_flags, generate: generate_flags}


def flags(program, capsys) -> list[str]:
    """-> all that a program knows, but what sets the size of a run or names a place to write to."""
    with pytest.raises(SystemExit, match="0"):
        PROGRAMS[program](program.__doc__, ["--help"])
    found = set(re.findall(r"--[a-z]+[a-z-]*", capsys.readouterr().out))
    sizes, places = {"--steps", "--batch-size"}, {"--out", "--predict", "--export"}
    return sorted(found - {"--help"} - sizes - places)


def exits(action) -> None:
    """As a program does it: what is refused ends with status 2 and a sentence."""
    try:
        run_command(action)
    except SystemExit as error:
        assert error.code == 2
        raise ValueError("the sentence has been printed") from None


@pytest.mark.parametrize("program", PROGRAMS)
def test_bad_flags(places, capsys, program):
    """400 command lines of flags with a value, several or none."""
    rng, names, outcomes = random.Random(0), flags(program, capsys), set()
    words = ["1", "0", "-1", "8", "1e-3", "nan", "1e999", "9" * 30, "text", "zero", "chat", ""]
    words += ["none", *RECIPES]
    for _ in range(400):
        argv = []
        for name in rng.sample(names, rng.randrange(1, 6)):
            argv += [name, *rng.choices([*words, text(rng)], k=rng.choice([0, 1, 1, 1, 1, 2]))]
        parse = partial(PROGRAMS[program], program.__doc__, argv)
        outcomes.add(check(partial(exits, parse), places, argv))
    assert outcomes == {True, False}


@pytest.mark.parametrize("program", PROGRAMS)
def test_bad_runs(places, tmp_path, monkeypatch, capsys, program):
    """60 short runs with files, numbers and texts in the wrong places."""
    rng, names, outcomes = random.Random(0), flags(program, capsys), set()
    monkeypatch.chdir(tmp_path)
    inside = ("base", "data.jsonl", "prefix", "soft_prompt", "missing", ".", "base/vocab.json")
    files = [str(places / name) for name in inside]
    words = ["1", "2", "39", "40", "-1", "0.1", "text", "zero", "none", "chat", "cpu", "cpu:x"]
    words += ["", "9" * 30, "1e308", "1e38", *RECIPES, *files]
    for i in range(60):
        argv = ["--base", files[0], "--batch-size", "2"]
        if program is train:
            argv += ["--data", files[1], "--steps", "1", "--lr", "0.1", "--out", f"out/{i}"]
            argv += rng.choice([[], ["--init-text", text(rng)]])
        else:
            argv += rng.choice([["--data", files[1]], ["--prompt", text(rng)]])
            argv += rng.choice([[], ["--adapter", rng.choice(files)]])
        argv += [rng.choice(names), rng.choice([*words, text(rng)])]
        run = partial(program.main, argv)
        outcomes.add(check(partial(exits, run), places, argv))
    assert outcomes == {True, False}
