"""README.md and docs/: what they say is what was measured, and what they name exists."""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch

import train
from command.examples import read_jsonl
from command.flags import RECIPES, generate_flags, train_flags
from model import past_length
from prefix import Prefix
from small_base.pretrain import pretrain
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter, save_adapter
from storage.base import load_base

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "classroom" / "results"
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in FILES}
README, SPEED = PAGES["README.md"], PAGES["speed.md"]
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in (".", "command", "storage", "small_base", "classroom", "tests")
    for path in (ROOT / folder).glob("*.py")
    if path != Path(__file__)
}
CODE = "\n".join(SOURCES.values())
every_page = pytest.mark.parametrize("name", PAGES)


def prose_of(page: str) -> list[str]:
    """-> the sentences of a page, without code, tables, headings and addresses."""
    page = re.sub(r"```.*?```|<picture>.*?</picture>", "", page, flags=re.DOTALL)
    page = re.sub(r"^(    .*|\|.*|#.*|!\[.*)$", "", page, flags=re.MULTILINE)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)
    paragraphs = re.split(r"\n\s*\n|\n(?=- |\d+\. )", page)
    sentences = sum((re.split(r"(?<=[.!?:])\**\s+", part) for part in paragraphs), [])
    return [sentence for sentence in sentences if re.search(r"\w", sentence)]


def one_line(page: str) -> str:
    return " ".join(page.split())


# -------------------------------------------------------------------- short, and in plain sentences


def test_the_readme_is_short():
    """At most 180 lines and 2,000 words."""
    assert len(README.splitlines()) <= 180 and len(README.split()) <= 2000


@every_page
def test_no_page_is_longer_than_250_lines(name):
    assert len(PAGES[name].splitlines()) <= 250


@every_page
def test_sentences_are_short(name):
    """Below 16 words on average."""
    lengths = [len(sentence.split()) for sentence in prose_of(PAGES[name])]
    assert len(lengths) > 20 and mean(lengths) < 16


@every_page
def test_nothing_on_a_page_is_left_to_do(name):
    assert "TODO" not in PAGES[name]


# --------------------------------------------------------------------- what the pages name is there


@every_page
def test_what_a_page_links_to_exists(name):
    """Files and pictures."""
    folder = ROOT if name == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\(([^)#]+)|(?:src|srcset)=\"([^\"]+)", PAGES[name])
    files = [link or source for link, source in links]
    assert not [f for f in files if not f.startswith("http") and not (folder / f).exists()]


FOREIGN = set(  # words between backticks that are others'
    """PrefixTuningConfig PromptTuningConfig PromptEncoderConfig CartridgeConfig LoraConfig
    AdaptionPromptConfig PeftModel FutureWarning IndexError prompt_embeds save_prompt_cache
    load_prompt_cache nan inf u n --enable-prompt-embeds --slot-save-path
    --extra-index-url""".split()
)


@every_page
def test_what_a_page_names_exists(name):
    """Words and flags between backticks occur in the sources. Python files lie where it says."""
    page = re.sub(r"```.*?```", "", PAGES[name], flags=re.DOTALL)
    words = [word for word in re.findall(r"`([^`\n]+)`", page) if not word.endswith(".jsonl")]
    files = {word for word in words if re.fullmatch(r"[\w/]+\.py", word)} - {"jsonl.py"}
    assert not files - set(SOURCES)
    flags = {flag for word in words for flag in re.findall(r"--[a-z][a-z-]+", word)}
    assert not flags - set(re.findall(r"--[a-z][a-z-]+", CODE)) - FOREIGN
    names = {word for word in words if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", word)} - files
    parts = {part for word in names for part in re.findall(r"\w+", word)} - {"jsonl"}
    assert not parts - set(re.findall(r"\w+", CODE)) - FOREIGN


def commands_of(page: str) -> list[list[str]]:
    """-> the commands of a page, in blocks and between backticks, without `python`."""
    alone = re.findall(r"^ *((?:python|torchrun) .+)$", page, flags=re.MULTILINE)
    quoted = re.findall(r"`((?:python|torchrun) [^`]+)`", page)
    found = [shlex.split(command) for command in alone + quoted]
    return [words[words.index("train.py") if words[0] == "torchrun" else 1 :] for words in found]


class Parsed(Exception):
    """Raised where a program would start to work."""


def parse_only(*given, parse=argparse.ArgumentParser.parse_args):
    parse(*given)
    raise Parsed


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises whatever the program says of its flags, and of how they go together."""
    program, *argv = words
    if words[:2] == ["-m", "pdb"]:
        return check_command(words[words.index("train.py") :], monkeypatch)
    if program == "-m":
        program, argv = argv[0].replace(".", "/") + ".py", argv[1:]
    assert program in SOURCES
    if program == "train.py":
        train_flags("", argv)
    elif program == "generate.py":
        generate_flags("", argv)
    elif program.startswith("tests/"):  # one of them sets up its process when it is imported
        assert {word for word in argv if word[:2] == "--"} <= set(re.findall(r"--\w+", CODE))
    else:
        module = program.removesuffix(".py").removeprefix("classroom/").replace("/", ".")
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr("argparse.ArgumentParser.parse_args", parse_only)
            importlib.import_module(module).main(argv)


@every_page
def test_every_command_of_a_page_parses(name, monkeypatch):
    """By the program's own flags."""
    for words in commands_of(PAGES[name]):
        check_command(words, monkeypatch)


def test_the_readme_counts_the_lines_of_the_code():
    """Of the files that are to be read, in this order."""
    table = re.findall(r"^\| \[([\w.]+)\]\(\1\) \| (\d+) \|", README, flags=re.MULTILINE)
    names = ("model.py", "prefix.py", "soft_prompt.py", "data.py", "train.py")
    assert table == [(name, str(len(SOURCES[name].splitlines()))) for name in names]


def test_the_readme_asks_for_the_torch_that_pip_asks_for():
    """The lowest version."""
    lowest = re.search(r"^torch>=([\d.]+)", (ROOT / "requirements.txt").read_text())[1]
    assert f"| torch {lowest} or newer already |" in README


def test_messages_that_a_page_explains_are_ours():
    """Each is in the sources, and on the page."""
    page = PAGES["why-does-it-not-learn.md"]
    parts = "the loss became|before any step|examples are too long|was trained on|[cut]"
    assert all(part in page and part in CODE for part in parts.split("|"))


# ------------------------------------------------------------------------- what the pages show runs


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Path:
    """A folder with a base of four steps in out/base. It knows nothing, and need not."""
    folder = tmp_path_factory.mktemp("docs")
    pretrain(folder / "out" / "base", steps=4, batch_size=4)
    return folder


def test_the_readme_shows_what_is_printed(mini, monkeypatch, capsys):
    """The first command prints each line that stands there, but for numbers and texts."""
    load = train.load_examples
    few = lambda *given: {split: some[:8] for split, some in load(*given).items()}  # noqa: E731
    monkeypatch.setattr(train, "load_examples", few)
    monkeypatch.chdir(mini)
    train.main(["--method", "prefix", "--steps", "1", "--device", "cpu"])
    printed = capsys.readouterr().out
    (block,) = re.findall(r"```\n(base .*?)```", README, flags=re.DOTALL)
    shown = [line for line in block.splitlines() if line]
    assert len(shown) == 10
    for line in shown:
        if line[:8] in ("source  ", "expected", "got     ", "frozen  "):
            assert f"\n{line[:9]}" in printed
        else:
            pattern = re.sub(r"(\\ )+", r"\\s+", re.escape(line))
            pattern = re.sub(r"'.*'", "'.*", pattern).replace("…", ".*")
            pattern = re.sub(r"\d[\d,]*(\\\.\d+)?", r"[\\d,.]+", pattern)
            assert re.search(pattern, printed), line


def test_the_python_of_the_page_runs(mini, monkeypatch):
    """And what it saves acts as what it was made of."""
    monkeypatch.chdir(mini)
    base = load_base("out/base")
    save_adapter(Prefix.random(base, 8), "out/sentence/prefix", base)
    save_adapter(SoftPrompt.random(base, 6), "out/sentence/soft_prompt", base)
    blocks = re.findall(r"```python\n(.*?)```", PAGES["your-data.md"], flags=re.DOTALL)
    (code,) = (block for block in blocks if "rows_of" in block)
    found = {}
    exec(code, found)
    idx, model = torch.tensor([[5, 6, 7]]), found["model"]
    pasts = {"as_prefix": found["prompt"].past_kv(model), "stack_as_prefix": found["stack"]}
    for name, past_kv in pasts.items():
        kept = load_adapter(Path("out/sentence", name), model)
        logits, _ = model(idx, kept.past_kv(model))
        torch.testing.assert_close(logits, model(idx, past_kv)[0], rtol=1e-4, atol=1e-4)
    assert past_length(found["stack"]) == 8 + 6 and found["mixed"][0][0].size(0) == 2


def test_the_formats_of_the_page_are_read(tmp_path):
    """All five, with no column left over."""
    (block,) = re.findall(r"```json\n(.*?)```", PAGES["your-data.md"], flags=re.DOTALL)
    (tmp_path / "five.jsonl").write_text(block, encoding="utf-8")
    said = []
    examples = read_jsonl(tmp_path / "five.jsonl", said.append)
    assert [example.target for example in examples] == ["…"] * 5 and not said


def test_the_converter_of_the_page_makes_jsonl(tmp_path, monkeypatch):
    """Of a line in the format of Li & Liang."""
    block = re.search(r"^    import json, sys\n(    .*\n)+", PAGES["your-data.md"], flags=re.M)
    code = "\n".join(line[4:] for line in block[0].splitlines())
    source, made = tmp_path / "src.txt", tmp_path / "made.jsonl"
    source.write_text("name : A | area : B||A is in B .\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["jsonl.py", str(source), str(made)])
    exec(code, {})
    (example,) = read_jsonl(made)
    assert example[:2] == ("name : A | area : B", "A is in B .")


@pytest.mark.slow
def test_the_recipe_for_pdb_stops_where_a_prefix_is_in_the_past(mini):
    """In `attend`, with P more keys than queries. VS Code gets the same condition."""
    (recipe,) = re.findall(r"^    python (-m pdb .+)$", README, flags=re.MULTILINE)
    condition = "k.size(2) > q.size(2)"
    assert condition in recipe and f"type `{condition}`" in one_line(README)
    lines = '{"input": "a", "target": "b"}\n{"input": "c", "target": "d"}\n'
    (mini / "two.jsonl").write_text(lines)
    argv = shlex.split(recipe.replace("train.py", f"'{ROOT / 'train.py'}'"))
    argv += ["--data", "two.jsonl", "--steps", "1", "--device", "cpu", "--out", "out/pdb"]
    typed = "p 'sizes', q.size(2), k.size(2)\nwhere\nquit\n"
    pipes = {"input": typed, "capture_output": True, "text": True, "timeout": 300, "cwd": mini}
    printed = subprocess.run([sys.executable, *argv], **pipes).stdout
    queries, keys = map(int, re.search(r"'sizes', (\d+), (\d+)", printed).groups())
    assert keys == queries + RECIPES["prefix"].n_virtual
    assert re.search(r"model\.py\(\d+\)attend\(\)", printed)


# ---------------------------------------------------------- what the pages say is what was measured


def stored(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def rows_in(table: str) -> dict[str, dict[str, str]]:
    """A markdown table, or a page with one -> its cells by the first cell and the heading."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(heads, row)) for row in rows}


def between(numbers: list[float], digits: str = ".2f") -> str:
    return f"{min(numbers):{digits}} to {max(numbers):{digits}}"


LAPTOP, SERVER, GPU = (
    {row["what"]: row for row in stored(f"tests/benchmark-{kind}.json")["comparison"]}
    for kind in ("AVX2", "AVX512", "NVIDIA-H200")
)
SIZES = {"GPT-2 small": "124M", "SmolLM2-135M": "135M", "1.5 billion": "1.5B"}


def test_the_readme_has_the_verdicts_of_the_findings():
    """Claim, verdict, number and place. test_claims.py holds them to the runs."""
    readme = rows_in(README.split("## What is claimed")[1].split("\n## ")[0])
    assert readme == rows_in(PAGES["findings.md"].split("\n\nEvery number")[0])


# ---------------------------------------------------------------------------------------- speed


MACHINES = {
    "laptop": (LAPTOP, "float32"), "server": (SERVER, "float32"),
    "GPU": (GPU, "float32"), "GPU, bfloat16": (GPU, "bfloat16"),
}  # fmt: skip


def test_the_page_shows_the_stored_benchmark():
    """Each row: a step here, in PEFT, their ratio, its products; and memory at the peak."""
    pattern = rf"^\| ({'|'.join(MACHINES)}) \| (.+), ([a-z ]+) of (\d+) \| (.+) \|$"
    table = re.findall(pattern, SPEED, flags=re.MULTILINE)
    assert len(table) == 12 + 4 + 10
    for machine, size, method, P, cells in table:
        rows, dtype = MACHINES[machine]
        name = f"{SIZES[size]} {method.replace(' ', '_')} P={P} {dtype}"
        step, peak = rows[f"{name} step"], rows.get(f"{name} peak memory")
        shown = [f"{step['here']:,.0f}", f"{step['peft']:,.0f}"]
        shown += [f"{step['here'] / step['peft']:.2f}", f"{step['floor']:,.0f}"]
        shown += [f"{peak['here']:,.0f}", f"{peak['peft']:,.0f}"] if peak else ["–", "–"]
        assert cells == " | ".join(shown), name


def test_what_the_page_says_of_speed_was_measured():
    """Sentence by sentence, to the digits shown."""

    def ratios(size: str, over: str) -> str:
        names = [(rows, name) for rows in (LAPTOP, SERVER) for name in rows]
        steps = [rows[name] for rows, name in names if re.match(f"{size} .* float32 step", name)]
        if over == "floor":
            return between([step["here"] / step["floor"] for step in steps])
        return between([step["/full"] for step in steps if "/full" in step])

    many = [row for name, row in GPU.items() if "with 32 prefixes" in name]
    full = [
        GPU[f"{size} {method} P=20 float32 step"]["/full"]
        for method in ("soft_prompt", "prefix")
        for size in ("124M", "135M")
    ]
    peaks = [
        LAPTOP[f"{size} prefix P=20 float32, {n} rows of {T} tokens peak memory"]["here"] / 1000
        for size, n, T in (("135M", 1, 2000), ("135M", 2, 2000), ("1.5B", 10, 75))
    ]
    floors = [ratios(size, "floor") for size in ("124M", "135M")]
    shares = [ratios(size, "full") for size in ("124M", "135M")]
    sentences = [
        "takes {} times as long as its products on GPT-2 small, and {} times".format(*floors),
        "it takes {} of a full fine-tuning step on GPT-2 small, and {} on".format(*shares),
        "generates in {} of the time".format(between([row["/one for all"] for row in many])),
        "takes {:.2f} of a full fine-tuning step on GPT-2 small in float32, and {:.2f} on "
        "SmolLM2-135M. A prefix takes {:.2f} and {:.2f}.".format(*full),
        f"takes {many[0]['MB an adapter']:.1f} MB there",
        f"one row of 2,000 tokens takes {peaks[0]:.1f} GB at the peak, and two take "
        f"{peaks[1]:.1f} GB",
        f"takes {peaks[2]:.1f} GB with ten rows of 75 tokens",
    ]
    assert not [sentence for sentence in sentences if sentence not in one_line(SPEED)]
