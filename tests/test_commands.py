"""train.py and generate.py as commands: what they say, answer and refuse."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import files_in, forty, raising, run, train_argv, write_jsonl

import command.models
import generate
import train
from command.answers import CUT, answers
from command.console import before_torch, run_command
from command.flags import generate_flags, train_flags
from command.process import pick_device, pick_dtype
from data import Example, encode, source_ids
from model import stacked_past_kv
from prefix import Prefix
from small_base.pretrain import pretrain
from small_base.world import task_examples
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter, save_adapter
from storage.base import load_base
from storage.tokenizers import load_tokenizer

ROOT = Path(train.__file__).parent


def use(base: str, *flags: object) -> dict:
    """generate.py -> what it returns."""
    return generate.main(["--base", base, "--device", "cpu", *map(str, flags)])


def completion(base: str, *flags: object) -> str:
    (text,) = use(base, "--max-new-tokens", 12, *flags)["completions"]
    return text


# ------------------------------------------------------------------------------------- refusals

TRAIN = {  # flags of train.py: the sentence that it ends with
    "--task haiku": "--task: invalid choice: 'haiku'",
    "--n-virtual 0": "--n-virtual: 0 is not a whole number from 1 to ",
    "--steps many": "--steps: many is not a whole number from 1 to ",
    "--lr nan": "--lr: nan is not a number from 1e-30 to 1e+38",
    "--seed -1": "--seed: -1 is not a whole number from 0 to ",
    "--task chat --data x.jsonl": "--data: not allowed with argument --task",
    "--task chat --val-data x.jsonl": "--val-data goes with --data",
    "--init zero --init-text x": "--init-text goes with --init text, and is not empty",
    "--init-text=": "--init-text goes with --init text, and is not empty",
    "--init . --n-virtual 3": "--n-virtual with --init .: a trained adapter keeps its length",
    "--out=": "--out: the name is empty",
    "--init Zero": "--init Zero is none of text, vocab, random, zero, and no folder",
    "--method full --mid-dim 4": "--mid-dim is for a prefix, and --method full has none",
    "--method full --film": "--film, --n-virtual, --init and --init-text are for adapters, and ",
    "--method full --n-virtual 3": "--film, --n-virtual, --init and --init-text are for adapters",
    "--method full --init zero": "--film, --n-virtual, --init and --init-text are for adapters",
    "--method full --init-text x": "--film, --n-virtual, --init and --init-text are for adapters",
    "--method none": "--method: invalid choice: 'none'",
    "--prompt x": "unrecognized arguments: --prompt x: see --help; train.py, generate.py and ",
}
GENERATE = {
    "": "give one of --data or --task (evaluate), --prompt (complete) and --export",
    "--prompt x --data y": "give one of --data or --task (evaluate), --prompt (complete) and --e",
    "--prompt x --predict y": "--predict writes the answers to --data or a --task: give one",
    "--predict y": "--predict writes the answers to --data or a --task: give one",
    "--export x": "--export saves an --adapter for PEFT: give one",
    "--adapter a --export=": "--export: the name is empty",
    "--prompt x --top-k 3": "--top-k samples, and needs a --temperature above 0",
    "--prompt x --top-k 0": "--top-k: 0 is not a whole number from 1 to ",
    "--prompt x --temperature -1": "--temperature: -1 is not a number from 0 to ",
}
RUNS = {  # found behind the flags: files, the base, and what has to fit together
    "--data nowhere.jsonl": "cannot read nowhere.jsonl: No such file",
    "--val-data nowhere.jsonl --data {data}": "cannot read nowhere.jsonl: No such file",
    "--base nowhere": "nowhere",
    "--base .": "config.json does not exist: . is not the directory that was meant",
    "--device toaster": "--device toaster is not there: this machine has ",
    "--device cuda:77": "--device cuda:77 is not there: this machine has ",
    "--init .": "adapter_config.json does not exist: . is not the directory that was meant",
    "--method full --dtype bfloat16": "--method full needs --dtype float32",
    "--n-virtual 100": "36 of 36 examples are too long: the longest, {data} line ",
    "--n-virtual 129": "129 new positions > block_size 128: shorten the input or lower --n-virtual",
    "--chat": "has no chat template: give an instruct model, or no --chat",
}


@pytest.mark.parametrize(
    "parse, flags, sentence",
    [(train_flags, *pair) for pair in TRAIN.items()]
    + [(generate_flags, *pair) for pair in GENERATE.items()],
)
def test_a_wrong_flag_gets_one_sentence(parse, flags, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        parse("", shlex.split(flags))


@pytest.mark.parametrize("flags, sentence", RUNS.items())
def test_what_does_not_fit_together_gets_one_sentence(base, tmp_path, monkeypatch, flags, sentence):
    """Before training, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "tune", None)
    with pytest.raises(ValueError, match=re.escape(sentence.format(data=forty(base)))):
        run(base, *flags.format(data=forty(base)).split())
    assert not files_in(tmp_path)


WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "argv, status", [("train.py --steps 0", 2), ("generate.py", 2), ("train.py --help", 0)]
)
def test_flags_are_answered_before_torch_is_imported(argv, status):
    """It takes seconds. A wrong flag ends with status 2 and one line."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *argv.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith(f"{status} False\n")
    name = argv.split()[0]
    assert re.fullmatch(rf"{name}: error: .*\n" if status else "", done.stderr)


@pytest.mark.slow
def test_a_training_does_not_wait_for_torch_compile(base, tmp_path):
    """Its import takes two seconds, and nothing here is compiled."""
    argv = train_argv(base, "--out", tmp_path / "out")
    code = f"import sys, train; train.main({argv}); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr


def test_the_help_names_each_methods_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_flags(train.__doc__, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert train.__doc__.splitlines()[0] in said
    assert "virtual tokens (default: prefix 8, soft_prompt 6, both 4)" in said
    assert "(default: prefix 0.3, soft_prompt 0.1, both 0.3, full 0.0015 on the small base;" in said


def test_a_base_that_overflows_says_so_and_prints_nothing(base, tmp_path, monkeypatch, capsys):
    """As float16 can. The answer is no text made from NaN; training ends before any step."""
    model = load_base(base)
    model.h[1].mlp.c_fc.weight.data *= 1e5
    monkeypatch.setattr(command.models, "pick_dtype", lambda *_: torch.float16)
    monkeypatch.setattr(command.models, "load_base", lambda _: model)
    sentence = "overflows in torch.float16.* give --dtype float32"
    few = tmp_path / "few.jsonl"
    few.write_text(Path(forty(base)).read_text().split("\n")[0])
    for flags in (["--prompt", "name"], ["--data", few]):
        with pytest.raises(ValueError, match=sentence):
            use(base, *flags)
    monkeypatch.setattr(train, "tune", None)
    with pytest.raises(ValueError, match=sentence):
        run(base, "--out", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"base", "task", "method"}


# --------------------------------------------------------------------------------------- output


def test_a_run_in_a_pipe_has_some_twenty_lines(base, tmp_path, capsys):
    """They say what the run returns. Three examples come with the frozen base's answers."""
    record = run(base, "--steps", "40", "--method", "soft_prompt", "--out", tmp_path)
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line and line[:1] != " "]  # answers go on
    names = ["base", "task", "method", *5 * ["step"], "saved", *2 * ["test"]]
    names += 3 * ["source", "expected", "got", "frozen"]
    assert [line.split()[0] for line in lines] == names and len(names) < 25
    for name in ("frozen", "tuned"):
        loss, tokens, exact = (record[f"{key}_{name}"] for key in ("loss", "tokens", "exact_match"))
        shares = f"tokens right {tokens:5.1f} %  exact match {exact:5.1f} %"
        assert f"test     {name:6}  loss {loss:.3f}  {shares}\n" in said
    assert "step   40/40  loss " in said and f"validation {record['curve'][-1][1]:.3f}" in said


def test_the_closing_hint_can_be_pasted(base, tmp_path, capsys):
    """Into a shell, wherever the adapter lies. The base is the adapter's own."""
    run(base, "--steps", "1", "--out", tmp_path / "my file" / "prefix")
    said = capsys.readouterr().out
    place = shlex.quote(str(tmp_path / "my file" / "prefix"))
    hint = f"use it with: python generate.py --adapter {place} --prompt "
    (line,) = [line for line in said.splitlines() if hint in line]
    program, *argv = shlex.split(line.partition("python ")[2])
    assert program == "generate.py"
    assert generate.main([*argv, "--max-new-tokens", "2", "--device", "cpu"])["completions"]


def test_control_characters_are_not_printed(base, tmp_path, monkeypatch, capsys):
    """From data, answers or messages: they could rewrite the screen. A program gets them."""
    raw = "\x1b\x07\x9b\b\r\x7f"
    examples = [Example(f"a{i}{raw}", f"b{raw}") for i in range(4)]
    write_jsonl(tmp_path / "mine.jsonl", examples)
    run(base, "--data", tmp_path / "mine.jsonl", "--steps", "1", "--out", tmp_path / "out")
    monkeypatch.setattr(generate, "answers", lambda *_, **__: [f"c{raw}\td\n"])
    assert completion(base, "--prompt", "x") == f"c{raw}\td\n"
    with pytest.raises(SystemExit, match="2"):
        run_command(raising(ValueError(raw + "x" * 10**5)))
    said = capsys.readouterr()
    assert not set(raw) & set(said.out + said.err)
    assert "source   a" in said.out and said.err.count("\n") == 1 and len(said.err) < 1100


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_does_not_suffice_gets_a_sentence(capsys, error):
    """Any other RuntimeError is a mistake of ours, and stays a traceback."""
    with pytest.raises(SystemExit, match="2"):
        run_command(raising(error))
    remedy = "error: out of memory: lower --batch-size, or train with --micro-batch 1 ("
    assert remedy in capsys.readouterr().err
    for mistake in ("shapes cannot be multiplied", "CUDA error: illegal memory access"):
        with pytest.raises(RuntimeError, match=mistake):
            run_command(raising(RuntimeError(mistake)))


def test_a_reader_that_leaves_costs_nothing():
    """As with `| head -1`: what is said to nobody is lost, and the program goes on."""
    read, write = os.pipe()
    os.close(read)
    code = "from command.console import say; say('a'); say('b'); assert False, 'it went on'"
    command, cwd = [sys.executable, "-c", code], Path(train.__file__).parent
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=cwd, text=True)
    assert done.stderr.endswith("AssertionError: it went on\n")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("sh"), reason="needs a POSIX shell")
def test_a_run_ends_well_on_any_console(base, tmp_path):
    """One that lacks characters, one whose reader leaves as `head` does, and none at all."""
    write_jsonl(tmp_path / "mine.jsonl", [Example(f"say {i} 🙂", "→ 🙂") for i in range(4)])
    for i, shell in enumerate(('exec "$@"', '"$@" | head -1', 'exec "$@" >&-')):
        argv = train_argv(base, "--data", tmp_path / "mine.jsonl", "--out", tmp_path / str(i))
        done = subprocess.run(
            ["sh", "-c", shell, "sh", sys.executable, train.__file__, *argv], timeout=300,
            capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"expected ? ?\n" in done.stdout or i > 0
        assert "loss_tuned" in json.loads((tmp_path / str(i) / "training.json").read_text())


@pytest.mark.slow
def test_the_first_run_makes_the_base_and_the_next_one_finds_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = lambda out, device: pretrain(out, steps=20, device=device)  # noqa: E731
    monkeypatch.setattr(command.models, "pretrain", quick)
    argv = ["--steps", "1", "--device", "cpu", "--task", "sentiment"]
    train.main(argv)
    made = files_in(tmp_path / "out" / "base")
    assert "pretraining the small base, once, into out" in capsys.readouterr().out
    train.main([*argv, "--method", "soft_prompt"])
    assert files_in(tmp_path / "out" / "base") == made


# -------------------------------------------------------------------------------- generate.py


def test_a_prompt_is_completed_as_the_adapter_in_memory_would(base, tmp_path, capsys):
    """After --adapter, its base need not be named. Several adapters stack, the foremost first."""
    model, tokenizer = load_base(base), load_tokenizer(base)
    kinds = {"a": Prefix.random(model, 2), "b": SoftPrompt.random(model, 3)}
    for name, adapter in kinds.items():
        save_adapter(adapter, tmp_path / name, model)
    sources = [source_ids(tokenizer, "name : Palace")]
    for order in ("a", "ab", "ba"):
        (expected,) = answers(model, [kinds[name] for name in order], tokenizer, sources, 12)
        argv = [word for name in order for word in ("--adapter", str(tmp_path / name))]
        argv += ["--prompt", "name : Palace", "--max-new-tokens", "12", "--device", "cpu"]
        capsys.readouterr()
        assert generate.main(argv)["completions"] == [expected]
        assert capsys.readouterr().out.endswith("\n" + expected + "\n")


def test_an_adapter_used_in_another_folder_gets_no_new_base(base, tmp_path, monkeypatch):
    """It would be another one: its own is named, as where train.py ran."""
    monkeypatch.chdir(tmp_path)
    model = load_base(base)
    model.name = "out/base"
    save_adapter(Prefix.random(model, 2), tmp_path / "prefix", model)
    monkeypatch.setattr(generate, "open_base", None)
    sentence = "out/base, on which .*prefix was trained, is not in this folder: give --base, or run"
    with pytest.raises(ValueError, match=sentence):
        generate.main(["--adapter", str(tmp_path / "prefix"), "--prompt", "a"])


def test_an_adapter_that_names_no_base_is_not_tried_on_the_small_one(base, tmp_path, monkeypatch):
    save_adapter(Prefix.random(load_base(base), 2), tmp_path)
    monkeypatch.setattr(generate, "open_base", None)
    with pytest.raises(ValueError, match="does not name its base: give --base"):
        generate.main(["--adapter", str(tmp_path), "--prompt", "a"])


def test_an_answer_that_ran_into_its_limit_is_marked(base):
    """The flag's, or the context's, adapters included. One that ended by itself is not."""
    model, tokenizer = load_base(base), load_tokenizer(base)
    assert completion(base, "--prompt", "name", "--max-new-tokens", 3).endswith(CUT)
    model.wte.weight.data[tokenizer.eot_token] = 0  # it never ends
    (text,) = answers(model, [], tokenizer, [[5] * 120], 256)
    assert text.endswith(CUT) and len(tokenizer.encode(text.removesuffix(CUT))) <= 9
    (text,) = answers(model, [SoftPrompt.random(model, 6)], tokenizer, [[5] * 120], 256)
    assert text.endswith(CUT) and len(tokenizer.encode(text.removesuffix(CUT))) <= 3
    end = torch.tensor([[tokenizer.eot_token]])
    model.generate = lambda idx, *_, **__: torch.cat([idx, end], dim=1)  # it ends at once
    assert answers(model, [], tokenizer, [[5]], 5) == [""]


def test_answers_are_what_each_source_gives_alone(base):
    """Sources of all lengths, in their order; none is touched by its neighbours."""
    model, tokenizer = load_base(base).double(), load_tokenizer(base)  # no ties by rounding
    sources = [source_ids(tokenizer, text) for text in ("a", "Thai food", "b", "I had a meal")]
    alone = [answers(model, [], tokenizer, [source], 12)[0] for source in sources]
    assert answers(model, [], tokenizer, sources, 12, batch_size=2) == alone


def test_sampling_follows_the_seed(base):
    """The likeliest token alone is what greedy decoding takes."""
    flags = ["--prompt", "name : Palace", "--temperature", 1.5]
    texts = {seed: completion(base, *flags, "--seed", seed) for seed in (0, 1, 2)}
    assert len(set(texts.values())) == 3 and completion(base, *flags) == texts[0]
    greedy = completion(base, "--prompt", "name : Palace")
    assert completion(base, *flags, "--top-k", 1) == greedy
    assert completion(base, *flags[:2], "--temperature", 1e-40) == greedy


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_prompts_may_come_from_stdin(base, monkeypatch, terminal, newline):
    """Each line is one, an empty one too, whatever ends it: at once from a pipe, one by one in a
    dialogue."""
    lines, batches = ["name : Palace", "", "a"], []
    expected = [completion(base, "--prompt", line) for line in lines]
    stdin = io.StringIO("".join(line + newline for line in lines), newline="")
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(stdin, "isatty", lambda: terminal, raising=False)

    def counted(*given, **sampling):
        batches.append(len(given[3]))
        return answers(*given, **sampling)

    monkeypatch.setattr(generate, "answers", counted)
    assert use(base, "--prompt", "-", "--max-new-tokens", 12)["completions"] == expected
    assert batches == ([1, 1, 1] if terminal else [3])
    monkeypatch.setattr(sys, "stdin", None)  # as where a program is started without one
    assert use(base, "--prompt", "-")["completions"] == []


def test_an_adapter_is_evaluated_on_a_file_and_predictions_are_written(base, tmp_path, capsys):
    """All of the file, with and without it, a line each. The adapter's files stay as they are."""
    run(base, "--out", tmp_path / "out")
    before, examples = files_in(tmp_path / "out"), task_examples("sentence", "test", 7, 0)
    write_jsonl(tmp_path / "new.jsonl", examples)
    flags = ["--adapter", tmp_path / "out", "--data", tmp_path / "new.jsonl", "--max-new-tokens", 9]
    scores = use(base, *flags, "--predict", tmp_path / "p.jsonl")
    model, tokenizer = load_base(base), load_tokenizer(base)
    rows, adapters = encode(tokenizer, examples), [load_adapter(tmp_path / "out", model)]
    for key, some in (("loss_frozen", []), ("loss_tuned", adapters)):
        assert scores[key] == pytest.approx(train.evaluate(model, some, rows, 3).loss, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    got = answers(model, adapters, tokenizer, [row.source for row in rows], 9)
    assert lines == [
        {"input": example.input, "target": example.target, "cut": text.endswith(CUT)}
        | {"prediction": text.removesuffix(CUT)}
        for example, text in zip(examples, got)
    ]
    assert "7 predictions in " in capsys.readouterr().out and files_in(tmp_path / "out") == before
    use(base, *flags)  # without --predict it shows three
    assert capsys.readouterr().out.count("\nexpected ") == 3
    use(base, "--data", tmp_path / "new.jsonl")  # the base alone, which is frozen anyway
    printed = capsys.readouterr().out
    assert printed.count("\nexpected ") == 3 and "\nfrozen " not in printed


def test_an_input_that_is_too_long_is_named(base, monkeypatch):
    """Before any is answered."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("short\n" + "long " * 200))
    with pytest.raises(ValueError, match="1 of 2 examples are too long: the longest, input 2, tak"):
        use(base, "--prompt", "-")


def test_predictions_replace_no_data(base, monkeypatch):
    """This is looked at before the model is loaded."""
    monkeypatch.setattr(generate, "open_base", None)
    with pytest.raises(ValueError, match="holds no predictions, and is not overwritten"):
        use(base, "--data", forty(base), "--predict", forty(base))


def test_adapters_exported_are_one_prefix(base, tmp_path):
    """For PEFT, which has no stack. Another adapter's export does not replace it."""
    run(base, "--method", "both", "--out", tmp_path / "out")
    flags = ["--adapter", tmp_path / "out", "--export"]
    use(base, *flags, tmp_path / "one")
    use(base, *flags, tmp_path / "one")  # again: it is the same
    model = load_base(base).requires_grad_(False)
    stack = command.models.load_adapters(tmp_path / "out", model)
    one = load_adapter(tmp_path / "one", model)
    for got, expected in zip(one.past_kv(model), stacked_past_kv(stack, model)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
    with pytest.raises(ValueError, match="holds another run: adapters .* It is not overwritten"):
        use(base, "--adapter", tmp_path / "out" / "prefix", "--export", tmp_path / "one")


def test_chat_gives_the_same_ids_in_training_and_use(base, tmp_path, monkeypatch):
    """An adapter remembers it, alone and exported; the hint of a tuned base says it."""
    place, seen = tmp_path / "chatty", []
    shutil.copytree(base, place)
    template = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}A:"
    (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(base)
    monkeypatch.setattr(
        generate, "answers", lambda *given, **_: seen.append(given[3]) or ["x"] * len(given[3])
    )
    write_jsonl(tmp_path / "mine.jsonl", [Example(f"hello {i}", "you") for i in range(4)])
    trained, encoded = train.encode, []
    monkeypatch.setattr(
        train, "encode", lambda *given: encoded.append(trained(*given)) or encoded[-1]
    )
    flags = ["--data", tmp_path / "mine.jsonl", "--chat", "--steps", "1", "--out", tmp_path / "out"]
    run(str(place), *flags)
    sources = [row.source for rows in encoded for row in rows]
    expected = tokenizer.encode("<|endoftext|>user: hello 2\nA:", allowed_special="all")
    assert expected in sources and expected[0] == tokenizer.eot_token
    common = ["--device", "cpu", "--prompt", "hello 2", "--adapter"]
    generate.main([*common, str(tmp_path / "out")])
    use(str(place), "--adapter", tmp_path / "out", "--export", tmp_path / "e")
    generate.main([*common, str(tmp_path / "e")])
    generate.main([*common[:-1], "--base", str(place), "--chat"])
    run(str(place), *flags[:2], "--steps", "1", "--out", tmp_path / "plain")
    generate.main([*common, str(tmp_path / "plain"), str(tmp_path / "out")])  # one is enough
    assert seen == 4 * [[expected]]


# ----------------------------------------------------------------------------------- begin and end


def test_the_device_is_the_best_there_is_or_the_one_asked_for(monkeypatch):
    """torchrun's processes take a GPU each. One that is not there gets a sentence."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    devices = {None: "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}
    assert {name: str(pick_device(name)) for name in devices} == devices
    with pytest.raises(ValueError, match="^--device cuda:2 is not .* has cuda:0, cuda:1, cpu$"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert str(pick_device(None)) == "cpu"


def test_before_torch_threads_are_told_to_sleep_while_they_wait(monkeypatch):
    """And the flags are read, with the program's description. Whoever set a policy keeps it."""
    read = []
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for policy in ("passive", "active"):
        before_torch(read.append, "what it does")
        assert os.environ["OMP_WAIT_POLICY"] == policy
        monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert read == ["what it does"] * 2


@pytest.mark.parametrize("program", ["train.py", "generate.py"])
def test_an_interrupted_program_ends_with_status_130_and_one_line(program, monkeypatch, capsys):
    """Only train.py can go on. While torch is imported, the system ends the program. One that was
    started to ignore Ctrl-C, as with nohup, still does."""
    monkeypatch.setattr(sys, "argv", [f"some/{program}"])
    handler = signal.getsignal(signal.SIGINT)
    try:
        for now, meanwhile in (
            (signal.SIG_IGN, signal.SIG_IGN), (signal.default_int_handler, signal.SIG_DFL),
        ):  # fmt: skip
            signal.signal(signal.SIGINT, now)
            before_torch(lambda description: None, "")
            assert signal.getsignal(signal.SIGINT) is meanwhile
            with pytest.raises(SystemExit, match="130"):
                run_command(raising(KeyboardInterrupt()))
            assert signal.getsignal(signal.SIGINT) is now
    finally:
        signal.signal(signal.SIGINT, handler)
    said = capsys.readouterr()
    assert said.out == "" and said.err.strip().startswith("interrupted")
    assert said.err.count("--resume goes on") == (2 if program == "train.py" else 0)


def test_a_processor_that_emulates_bfloat16_says_what_it_costs(monkeypatch, capsys):
    """It is not chosen there, and taken with a sentence if asked for; elsewhere without one."""
    model, cpu = torch.nn.Linear(4000, 4000, device="meta"), torch.device("cpu")
    for slow, chosen in ((7.0, torch.float32), (0.5, torch.bfloat16)):
        seconds = {torch.bfloat16: slow, torch.float32: 1.0}
        monkeypatch.setattr("command.process.seconds_of_a_product", seconds.get)
        assert pick_dtype(None, model, cpu, full=False) == chosen
        assert pick_dtype("bfloat16", model, cpu, full=False) == torch.bfloat16
        sentence = "--dtype bfloat16: this processor emulates it, and takes 7 times as long"
        assert (sentence in capsys.readouterr().out) == (slow > 1)


@pytest.mark.parametrize("flags", ["--task chat", "--data a.jsonl", "--prompt hi"])
def test_one_thing_to_do_is_enough_for_generate(flags):
    """A task, a file, or a prompt: each stands alone."""
    name, value = flags.split()
    given = vars(generate_flags("", [name, value]))
    assert str(given[name.removeprefix("--")]) == value
