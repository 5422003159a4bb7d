"""What storage promises: a file is whole or not there, nothing of another's is replaced, and a broken file gets a sentence."""

import json
import os
import random
import socketserver
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import BLOCK, C, L, V, random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import storage.hub
import storage.files
from model import GPT, GPTConfig
from prefix import Prefix
from small_base.pretrain import train_bpe
from small_base.world import random_document
from soft_prompt import SoftPrompt
from storage.adapters import adapter_kind
from storage.base import fingerprint, load_base, save_base
from storage.checkpoints import Checkpoint
from storage.files import (
    OURS, check_place, check_predictions, check_writable, read_json, read_tensors, replace_file, saved_file, write_json,
    write_tensors,
)  # fmt: skip
from storage.hub import base_directory
from storage.tokenizers import copy_tokenizer, load_tokenizer, save_tokenizer

ROOT = Path(__file__).parent.parent
DIFFICULT = "  two  spaces\tand\n\nlines, don't, 1234567 ½ héllo 日本語 🙂👩‍👩‍👧 \x00\x1b <|endoftext|>  "


@pytest.fixture
def model(gpt2):
    """A GPT-2: what lies on disk differs by family, and the other's is in test_llama.py."""
    return gpt2


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# --------------------------------------------------------------------------------------------------------- single files


def test_a_file_is_made_with_its_folders_and_replaced_in_one_go(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    for content in (b"old", b"the new one"):
        replace_file(path, content)
        assert path.read_bytes() == content and names(path.parent) == {"c.json"}


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    def fail(*_):
        raise error

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(*{"fsync": (os, "fsync"), "rename": (type(path), "replace")}[step], fail)
    with pytest.raises(type(error)):
        replace_file(path, b"new")
    monkeypatch.undo()
    assert path.read_text() == "old" and names(tmp_path) == {"a.json"}


def test_a_write_that_is_killed_leaves_the_old_file_whole(tmp_path):
    """And beside it at most a hidden `.….new`, which no later write stumbles over."""
    (tmp_path / "a.json").write_text("old")
    code = """
import os, sys
from pathlib import Path
from storage.files import replace_file
os.fsync = lambda _: os._exit(9)  # as SIGKILL would, when all is written and nothing renamed
replace_file(Path(sys.argv[1]), b"new" * 10**5)
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], cwd=ROOT)
        assert done.returncode == 9 and (tmp_path / "a.json").read_text() == "old"
    left = names(tmp_path) - {"a.json"}
    assert len(left) == 2 and all(name.startswith(".") and name.endswith(".new") for name in left)
    replace_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "new" and names(tmp_path) == {"a.json", *left}


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_a_file_has_the_permissions_of_an_ordinary_new_one(model, tmp_path, umask):
    """What the umask leaves of 666: in a shared folder, a class can read it."""
    before = os.umask(umask)
    try:
        save_base(model, tmp_path / "base")
        SoftPrompt.zero(model, 2).save(tmp_path / "adapter", model)
    finally:
        os.umask(before)
    files = [*(tmp_path / "base").iterdir(), *(tmp_path / "adapter").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask} and len(files) == 5


def test_what_makes_a_directory_loadable_is_written_last(model, tmp_path, monkeypatch):
    """So a save that dies on the way leaves nothing that loads as something else."""
    written = []
    monkeypatch.setattr(storage.files, "replace_file", lambda path, content: written.append(path.name))
    save_base(model, tmp_path)
    Prefix.zero(model, 2).save(tmp_path, model)
    assert written == ["model.safetensors", "config.json", "adapter_model.safetensors", "base.json", "adapter_config.json"]


def test_tensors_come_back_bit_for_bit(tmp_path):
    """Whatever their dtype and layout; without their gradients."""
    numbers = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"a": numbers.T, "b": numbers[:, 1].bfloat16(), "c": torch.tensor(7), "d": numbers[1:].requires_grad_()}
    write_tensors(tmp_path / "a", tensors, {"key": "value"})
    found = read_tensors(tmp_path / "a")
    assert_close(found, {name: t.detach() for name, t in tensors.items()}, rtol=0, atol=0)
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"key": "value"}


def test_what_is_no_json_object_is_refused(tmp_path):
    for content, message in [
        ("[1]", "a holds list, not a JSON object"),
        ("{", "a is not JSON"),
        ("[" * 10**5, "a is not JSON"),
        (b"\xff", "a is not JSON"),
    ]:
        (tmp_path / "a").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "a")
    write_json(tmp_path / "a", {"b": 1, "a": "é"}, sort_keys=True)
    assert list(read_json(tmp_path / "a").items()) == [("a", "é"), ("b", 1)]


def test_what_is_no_file_is_not_read(tmp_path):
    """A missing file, a folder and a pipe, which would be waited on for ever."""
    (tmp_path / "folder").mkdir()
    special = ["missing", "folder"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        special.append("pipe")
    for name in special:
        with pytest.raises(ValueError, match=f"{name} does not exist: .* is not the directory that was meant"):
            saved_file(tmp_path, name)


# --------------------------------------------------------------------------------------------------------------- places

HERE = {"method": "prefix", "task": "sentence", "data": "embedded", "base": "out/base", "steps": 150}


def test_a_new_place_is_made(tmp_path):
    check_place(tmp_path / "a" / "b", HERE)
    assert (tmp_path / "a" / "b").is_dir() and not names(tmp_path / "a" / "b")


def test_what_is_not_ours_is_left_alone(tmp_path):
    """Whatever its name: a thesis, another adapter's folder, or what once was a directory's old and new self."""
    for name in ("thesis.tex", ".o.new", ".o.old", "o"):
        (tmp_path / name).write_text("years of work")
    (tmp_path / "soft_prompt").mkdir()
    (tmp_path / "soft_prompt" / "adapter_config.json").write_text("{}")
    check_place(tmp_path, HERE)
    assert names(tmp_path) == {"thesis.tex", ".o.new", ".o.old", "o", "soft_prompt"}
    assert (tmp_path / "thesis.tex").read_text() == "years of work" and names(tmp_path / "soft_prompt") == {"adapter_config.json"}


@pytest.mark.parametrize("name", [name for name in OURS if name != "training.json"])
def test_a_base_or_an_adapter_of_unknown_training_is_not_overwritten(tmp_path, name):
    """Such as a GPT-2 of four files, or PEFT's own adapter; one file of it is enough."""
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"holds {name} of unknown training, which is not overwritten: name another --out"):
        check_place(tmp_path, HERE)
    assert names(tmp_path) == {name} and (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize("key", ["method", "task", "data", "base"])
def test_what_another_training_left_is_not_overwritten(tmp_path, key):
    """Of another task, other data, another method or base. Two files of one name in two folders are other data."""
    before = HERE | {key: "a/train"}
    write_json(tmp_path / "training.json", before)
    (tmp_path / "adapter_config.json").write_text("{}")
    who = "{method} trained for {task} \\({data}\\) on {base}".format(**before)
    with pytest.raises(ValueError, match=f"holds {who}, which is not overwritten: name another --out"):
        check_place(tmp_path, HERE)
    assert read_json(tmp_path / "training.json") == before


def test_the_same_training_may_be_repeated(tmp_path):
    """One that agrees in method, task, data and base is replaced; its length and rate may differ."""
    write_json(tmp_path / "training.json", HERE | {"steps": 10, "lr": 1.0})
    (tmp_path / "adapter_config.json").write_text("{}")
    check_place(tmp_path, HERE)
    assert names(tmp_path) == {"training.json", "adapter_config.json"}


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    """A file, something below a file, a loop of links, a name too long: a sentence before training, and nothing is left."""
    (tmp_path / "file").write_text("a user's")
    places = [tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)]
    try:
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        places.append(tmp_path / "loop")
    except OSError:  # Windows asks for a privilege
        pass
    before = names(tmp_path)
    for place in places:
        for check in (check_writable, lambda place: check_place(place, HERE)):
            with pytest.raises(ValueError, match="cannot be written to .*: name another place"):
                check(place)
    assert names(tmp_path) == before and (tmp_path / "file").read_text() == "a user's"


def test_only_predictions_are_replaced_by_predictions(tmp_path):
    """Data, any other file, a folder or a device is refused; a new file needs its folder made, and gets no content yet."""
    line = {"input": "a", "target": "b"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "empty").write_text("")
    for file in (tmp_path / "data.jsonl", tmp_path / "empty", tmp_path, Path(os.devnull)):
        with pytest.raises(ValueError, match="holds no predictions, and is not overwritten: name another file for them"):
            check_predictions(file)
    (tmp_path / "p.jsonl").write_text(json.dumps(line | {"prediction": "c"}) + "\n")
    check_predictions(tmp_path / "p.jsonl")
    check_predictions(tmp_path / "new" / "p.jsonl")
    with pytest.raises(ValueError, match="cannot be written to"):
        check_predictions(tmp_path / "empty" / "p.jsonl")
    assert names(tmp_path) == {"data.jsonl", "empty", "p.jsonl", "new"} and not names(tmp_path / "new")


# ---------------------------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_saved_model_comes_back_bit_for_bit(model, tmp_path, dtype, tolerance):
    """Its stored numbers do. Its logits are the same to rounding: matrices lie transposed in the file, and are summed so."""
    model = GPT(replace(model.config, layer_norm_epsilon=0.1)).to(dtype)
    save_base(model, tmp_path / "base")
    again = load_base(tmp_path / "base")
    assert again.dtype == dtype and again.config == model.config
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    logits = model(random_ids(2, 5))[0]
    assert_close(again(random_ids(2, 5))[0], logits, rtol=0, atol=tolerance * logits.abs().max().item())


def test_the_fingerprint_is_of_the_weights_not_of_their_dtype(model):
    """Every dtype is rounded by way of float32: from float64 at once, this one number would round up."""
    model.wte.weight.data[0, 0] = 1 + 2**-8 + 2**-40
    print_of_base = fingerprint(model)
    assert fingerprint(model.float()) == print_of_base
    assert fingerprint(model.bfloat16()) == print_of_base
    model.h[1].mlp.c_fc.bias.data[3] += 0.1
    assert fingerprint(model) != print_of_base


def test_the_fingerprint_stays_what_it_is():
    """Adapters on disk name their base by it. Sizes count too, since equal weights in other heads are another model."""
    prints = []
    for n_head in (2, 4):
        model = GPT(GPTConfig(V, BLOCK, 1, n_head, C))
        for p in model.parameters():
            p.data = torch.arange(p.numel(), dtype=torch.float32).view(p.shape) / p.numel()
        prints.append(fingerprint(model))
    assert prints[0] == "b0b7f98960a76df5" != prints[1]


@pytest.mark.parametrize("changes", [{"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 4 * C}, {"n_inner": None}])
def test_files_of_older_and_newer_writers_load(model, tmp_path, changes):
    """Other words for the same architecture; OpenAI's names without a prefix; the mask buffers that it once stored."""
    save_base(model, tmp_path / "base")
    edit(tmp_path / "base", **changes)
    path = tmp_path / "base" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    weights = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    buffers = {"h.0.attn.bias": torch.ones(1, 1, BLOCK, BLOCK), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(weights | buffers | {"lm_head.weight": weights["wte.weight"].clone()}, path)
    again = load_base(str(tmp_path / "base"))
    assert again.name == str(tmp_path / "base")
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_weights_are_stored_as_hugging_faces_gpt2_does(model, tmp_path):
    """Under its names, and the matrices of a block as (in, out), which is nn.Linear's transposed."""
    save_base(model, tmp_path / "base")
    linear = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    expected = {f"transformer.{name}": t.T if name.endswith(linear) else t for name, t in model.state_dict().items()}
    assert_close(load_file(tmp_path / "base" / "model.safetensors"), expected, rtol=0, atol=0)


def test_config_json_is_that_of_hugging_faces_gpt2(model, tmp_path):
    """Where it names no epsilon, it is GPT-2's. The default sizes are the small base's; none changes under a model."""
    save_base(model, tmp_path / "base")
    config = {
        "architectures": ["GPT2LMHeadModel"], "bos_token_id": 60, "eos_token_id": 60, "model_type": "gpt2",
        "activation_function": "gelu_new", "n_inner": None, "tie_word_embeddings": True, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "vocab_size": 61, "n_positions": 32,
        "n_layer": 3, "n_head": 2, "n_embd": 16, "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    path = tmp_path / "base" / "config.json"
    assert path.read_text() == json.dumps(config, indent=2) + "\n"
    del config["layer_norm_epsilon"], config["n_inner"], config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    assert load_base(path.parent).config == model.config
    assert GPTConfig(61) == GPTConfig(61, block_size=128, n_layer=4, n_head=4, n_embd=128, layer_norm_epsilon=1e-5)
    with pytest.raises(AttributeError):
        model.config.n_layer = 4


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt_neo"},
        {"activation_function": "relu"},
        {"n_inner": 32},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"n_head": 3},
        {"n_layer": "three"},
        {"n_layer": 10**12},
        {"n_layer": 1001},
        {"n_layer": 3.0},
        {"vocab_size": 10**7},
        {"n_embd": 0},
        {"n_positions": -1},
        {"vocab_size": None},
        {"layer_norm_epsilon": "small"},
    ],
)
def test_what_is_not_this_architecture_is_refused_by_name(model, tmp_path, changes):
    save_base(model, tmp_path / "base")
    edit(tmp_path / "base", **changes)
    with pytest.raises(ValueError, match=next(iter(changes)) + ".*(are not a GPT-2's|; this GPT-2 has| heads of one width|; only gpt2, llama)"):
        load_base(tmp_path / "base")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_embd": 32}, "size mismatch for wte.weight"),
        ({"vocab_size": 10**6 - 1}, "config.json asks for .* wte.weight: .* shape in current model is torch.Size.*999999, 16"),
        ({"n_layer": 4}, 'Missing .* "h.3.ln_1.weight"'),
        ({"n_layer": 1000}, 'Missing .* "h.3.ln_1.weight"'),
        ({"n_layer": 2}, 'Unexpected .* "transformer.h.2.'),
    ],
)
def test_weights_of_other_sizes_are_refused(model, tmp_path, changes, message):
    save_base(model, tmp_path / "base")
    edit(tmp_path / "base", **changes)
    with pytest.raises(ValueError, match=message):
        load_base(tmp_path / "base")


def test_broken_weights_are_refused(model, tmp_path):
    """Missing, unknown, untied, infinite or truncated weights: a sentence each."""
    save_base(model, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    whole = load_file(path)
    for tensors, message in [
        ({k: v for k, v in whole.items() if "h.1.ln_1.bias" not in k}, 'Missing .* "h.1.ln_1.bias"'),
        (whole | {"h.0.attn.extra": torch.zeros(2)}, "h.0.attn.extra"),
        (whole | {"lm_head.weight": whole["transformer.wte.weight"] + 1}, "tied"),
        (whole | {"transformer.ln_f.bias": torch.zeros(C, dtype=torch.int64)}, "ln_f.bias"),
        (whole | {"transformer.ln_f.bias": torch.full((C,), torch.nan)}, "ln_f.bias holds numbers that are not finite"),
        (whole | {"transformer.wte.weight": whole["transformer.wte.weight"] / 0}, "wte.weight holds numbers that are not"),
    ]:
        save_file({k: v.clone() for k, v in tensors.items()}, path)
        with pytest.raises(ValueError, match=message):
            load_base(tmp_path / "base")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_base(tmp_path / "base")
    path.unlink()
    with pytest.raises(ValueError, match="model.safetensors does not exist"):
        load_base(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map of file names"):
        load_base(tmp_path / "base")


# ------------------------------------------------------------------------------------------------------------ downloads

FILES = ["config.json", "vocab.json", "merges.txt", "model.safetensors"]


@pytest.mark.parametrize(
    "name, repository",
    [(name, f"openai-community/{name}") for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")]
    + [("distilgpt2", "distilbert/distilgpt2"), ("openai-community/gpt2", "openai-community/gpt2")],
)
def test_what_is_downloaded_and_where_it_lies(tmp_path, monkeypatch, capsys, name, repository):
    """Four files of a GPT-2 from the Hugging Face Hub, each said; those that are there are left alone, and need no network."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", str(tmp_path)))
    asked = []

    def urlretrieve(url, path):
        asked.append(url)
        path.write_text('{"model_type": "gpt2"}')

    monkeypatch.setattr(storage.hub.urllib.request, "urlretrieve", urlretrieve)
    directory = base_directory(name)
    assert directory == tmp_path / ".cache" / "prefix-tuning" / name.replace("/", "--")
    assert asked == [f"https://huggingface.co/{repository}/resolve/main/{file}" for file in FILES]
    assert capsys.readouterr().out.splitlines() == [f"downloading {url} to {directory}" for url in asked]
    assert names(directory) == set(FILES)
    (directory / "vocab.json").unlink()
    assert base_directory(name) == directory and len(asked) == 5
    monkeypatch.setattr(storage.hub.urllib.request, "urlretrieve", None)
    assert base_directory(name) == directory


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on this machine in place of the Hub; it answers with `hub.answer`, byte for byte, and hangs up."""

    class Answer(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            self.wfile.write(self.server.answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(storage.hub, "HUB", f"http://127.0.0.1:{server.server_address[1]}/{{repo}}/{{file}}")
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n0123456789",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n0123456789",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\ngarbage\r\n",
        b"\x00\xffgarbage\r\n\r\n",
        b"garbage" * 9000 + b"\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"",
    ],
    ids=["cut short", "cut in a chunk", "no chunk", "garbage", "much garbage", "not found", "nothing"],
)
def test_a_download_that_fails_leaves_nothing(hub, tmp_path, answer):
    """Cut short, garbage, an error or silence: one sentence, and no file that would be taken for a whole one."""
    hub.answer = answer
    said = r"(?s)^gpt2 is no directory here, and cannot be downloaded .{1,210}: put config.json, .* of openai-community/gpt2 into .{1,300}$"
    with pytest.raises(ValueError, match=said):
        base_directory("gpt2")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_download_that_is_whole_is_kept(hub, tmp_path):
    hub.answer = b'HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n{"model_type": "gpt2"}'
    directory = base_directory("gpt2")
    assert names(directory) == set(FILES) and {path.read_bytes() for path in directory.iterdir()} == {b'{"model_type": "gpt2"}'}


# ----------------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_files(directory, merges):
    """A directory with a tokenizer, and a config.json of a model that it is for."""
    save_tokenizer(directory, merges)
    (directory / "config.json").write_text(json.dumps({"vocab_size": 257 + len(merges)}))


def test_any_text_survives_its_tokens(tmp_path):
    rng = random.Random(0)
    tokenizer_files(tmp_path, train_bpe([random_document(rng) for _ in range(500)], 300))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode_ordinary(DIFFICULT)
    assert tokenizer.decode(ids) == DIFFICULT and tokenizer.eot_token not in ids
    assert tokenizer.n_vocab == tokenizer.eot_token + 1


def test_the_files_are_gpt2s(tmp_path):
    """vocab.json counts through the bytes and the merges, merges.txt lists those; each byte in GPT-2's character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # OpenAI's bytes_to_unicode
    others = [b for b in range(256) if b not in printable]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    tokenizer_files(tmp_path, [(b" ", b"a"), (b" a", "é".encode())])
    text = (tmp_path / "vocab.json").read_text(encoding="utf-8")
    vocab = [*characters, "Ġa", "ĠaÃ©", "<|endoftext|>"]
    assert "Ġ" in text and json.loads(text) == {token: i for i, token in enumerate(vocab)}
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == "#version: 0.2\nĠ a\nĠa Ã©\n"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.name == "gpt2" and tokenizer.encode(" aé<|endoftext|>", allowed_special="all") == [257, 258]
    assert tokenizer.encode_ordinary("a  a, don't 1234")[:3] == [vocab.index("a"), vocab.index("Ġ"), 256]


def test_a_tokenizer_read_again_is_read_anew(tmp_path):
    """No cache serves an older vocabulary of the same path."""
    tokenizer_files(tmp_path, train_bpe(["abc abc"], 2))
    assert load_tokenizer(tmp_path).n_vocab == 259
    tokenizer_files(tmp_path, [])
    assert load_tokenizer(tmp_path).n_vocab == 257


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", ["", "{}", "[]", '{"a": "b"}', "#v\na b c\nq q\n", "\x00" * 20])
def test_broken_tokenizer_files_are_refused(tmp_path, file, content):
    tokenizer_files(tmp_path, train_bpe(["abc abc abc"], 2))
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=file):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("end", [None, 0, 258, "258", []])
def test_the_end_of_text_is_the_last_token(tmp_path, end):
    tokenizer_files(tmp_path, [(b"a", b"b")])
    path = tmp_path / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    assert vocab.pop("<|endoftext|>") == 257
    path.write_text(json.dumps(vocab | ({"<|endoftext|>": end} if end is not None else {})))
    with pytest.raises(ValueError, match="not the two files of one GPT-2 tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [257, 1, None, "258", 258.0])
def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(tmp_path, size):
    """A model may know more tokens than its tokenizer, not fewer. Here are 258."""
    tokenizer_files(tmp_path, [(b"a", b"b")])
    for enough in (258, 300):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": enough}))
        assert load_tokenizer(tmp_path).n_vocab == 258
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    with pytest.raises(ValueError, match=f"a tokenizer of 258 tokens, a model of {size}: copy the files of one model again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("merge", ["a b", " b"])
def test_two_tokens_of_one_text_are_refused(tmp_path, merge):
    """A merge that repeats another, or makes a single byte: the end of text would get the number of a word."""
    tokenizer_files(tmp_path, [(b"a", b"b")])
    with open(tmp_path / "merges.txt", "a", encoding="utf-8") as file:
        file.write(merge + "\n")
    vocab = read_json(tmp_path / "vocab.json")
    for number in (257, 258):
        for repeated in ({}, {"ab": 257}, {"b": 257}):
            (tmp_path / "vocab.json").write_text(json.dumps(vocab | repeated | {"<|endoftext|>": number}))
            with pytest.raises(ValueError, match="not the two files of one GPT-2 tokenizer"):
                load_tokenizer(tmp_path)


def test_a_foreign_vocabulary_is_refused_without_asserts_too(tmp_path):
    """Under `python -O`, which skips every assert, tiktoken's among them, a wrong number would decode as another word."""
    tokenizer_files(tmp_path, [(b"a", b"b"), (b"c", b"d")])
    vocab = read_json(tmp_path / "vocab.json")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"ab": vocab["cd"], "cd": vocab["ab"]}))
    code = "import sys; from storage.tokenizers import load_tokenizer; load_tokenizer(sys.argv[1])"
    with pytest.raises(ValueError, match="not the two files of one GPT-2 tokenizer"):
        load_tokenizer(tmp_path)
    done = subprocess.run([sys.executable, "-O", "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "not the two files of one GPT-2 tokenizer: copy both again" in done.stderr.splitlines()[-1]


def test_a_tokenizer_is_copied_beside_another_model(tmp_path):
    save_tokenizer(tmp_path / "a", [(b"a", b"b")])
    copy_tokenizer(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "b") == {"vocab.json", "merges.txt"}
    assert all(path.read_bytes() == (tmp_path / "a" / path.name).read_bytes() for path in (tmp_path / "b").iterdir())


# ------------------------------------------------------------------------------------------------------------- adapters


def test_the_kind_of_an_adapter_is_in_its_config(model, tmp_path):
    Prefix.zero(model, 2).save(tmp_path)
    assert adapter_kind(tmp_path, ["PREFIX_TUNING", "PROMPT_TUNING"]) == "PREFIX_TUNING"
    with pytest.raises(ValueError, match="is an adapter of type PREFIX_TUNING: only LORA and IA3 can be loaded"):
        adapter_kind(tmp_path, ["LORA", "IA3"])


@pytest.mark.parametrize("kind", [Prefix, SoftPrompt])
def test_an_adapter_of_no_rows_is_refused(model, tmp_path, kind):
    """It would act as none, and a soft prompt would have the model read a text of no tokens."""
    kind.zero(model, 2).save(tmp_path)
    width = 2 * L * C if kind is Prefix else C
    save_file({"prompt_embeddings": torch.zeros(0, width)}, tmp_path / "adapter_model.safetensors")
    write_json(tmp_path / "adapter_config.json", read_json(tmp_path / "adapter_config.json") | {"num_virtual_tokens": 0})
    for given in (model, None):
        with pytest.raises(ValueError, match="holds no prompt_embeddings that are rows of numbers: train or save it again"):
            kind.load(tmp_path, given)


def sparse(path: Path, rows: int, width: int) -> None:
    """A file that says it holds so many zeros: where the file system allows, it takes no room on the disk."""
    size = 4 * rows * width
    header = json.dumps({"prompt_embeddings": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


@pytest.mark.parametrize("rows, width", [(BLOCK, 10**5), (10**5, C), (BLOCK + 1, C)])
def test_an_adapter_of_another_shape_is_refused_before_its_numbers_are_read(model, tmp_path, monkeypatch, rows, width):
    """A few bytes on the disk may claim gigabytes. Too many rows, or rows too wide, for the model that is given."""
    SoftPrompt.zero(model, 2).save(tmp_path)
    sparse(tmp_path / "adapter_model.safetensors", rows, width)
    write_json(tmp_path / "adapter_config.json", read_json(tmp_path / "adapter_config.json") | {"num_virtual_tokens": rows})
    monkeypatch.setattr(torch.Tensor, "isfinite", None)  # reads them all
    with pytest.raises(ValueError, match=f"has {rows} rows of {width} numbers, and .* needs rows of 16, at most 32"):
        SoftPrompt.load(tmp_path, model)


def test_as_many_rows_as_the_model_has_positions_are_read(model, tmp_path):
    SoftPrompt.zero(model, BLOCK).save(tmp_path, model)
    assert SoftPrompt.load(tmp_path, model).vectors.shape == (BLOCK, C)


# ---------------------------------------------------------------------------------------------------------- checkpoints

SETTINGS = {"method": "prefix", "lr": 0.3}


def trained(steps: int = 3):
    """-> a trainee of two layers, the first one frozen, its optimizer after so many steps, and the curve of them."""
    torch.manual_seed(0)
    trainee = torch.nn.Sequential(torch.nn.Linear(2, 3).requires_grad_(False), torch.nn.Linear(3, 5))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        trainee(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
    return trainee, optimizer, [(0, 2.5), (steps, 1.25)]


@pytest.fixture
def file(tmp_path):
    """A checkpoint after three steps."""
    trainee, optimizer, curve = trained()
    Checkpoint(tmp_path / "out" / "checkpoint.safetensors", SETTINGS, False).save(trainee, optimizer, 3, curve)
    return tmp_path / "out" / "checkpoint.safetensors"


def load(file: Path, resume: bool = True, settings=SETTINGS):
    trainee, optimizer, _ = trained(0)
    return Checkpoint(file, settings, resume).load(trainee, optimizer), trainee, optimizer


def test_a_checkpoint_comes_back_bit_for_bit(file):
    """Numbers, averages, step and curve; what is frozen has no averages."""
    (step, curve), trainee, optimizer = load(file)
    before, optimizer_before, curve_before = trained()
    assert (step, curve) == (3, curve_before)
    assert_close(trainee.state_dict(), before.state_dict(), rtol=0, atol=0)
    found, expected = optimizer.state_dict(), optimizer_before.state_dict()
    assert set(found["state"]) == {2, 3} and found["param_groups"] == expected["param_groups"]
    for i, averages in expected["state"].items():
        assert_close(found["state"][i], averages, rtol=0, atol=0)
    assert names(file.parent) == {"checkpoint.safetensors"}


def test_without_a_checkpoint_a_run_starts_at_step_0(tmp_path):
    for resume in (True, False):
        assert load(tmp_path / "none", resume)[0] == (0, [])


def test_a_checkpoint_that_is_not_to_be_resumed_is_not_lost(file):
    """Nor one of another run: it is refused with what differs, and stays."""
    before = file.read_bytes()
    with pytest.raises(ValueError, match="is of a run stopped after step 3: add --resume to go on, or delete it"):
        load(file, resume=False)
    for settings, differs in ((SETTINGS | {"lr": 0.5}, "lr 0.3, not 0.5"), (SETTINGS | {"seed": 1}, "seed None, not 1")):
        with pytest.raises(ValueError, match=f"is of a run with {differs}: repeat its flags, or delete it"):
            load(file, settings=settings)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": "null"},
        {"settings": "3"},
        {"settings": None},
        {"curve": "[]"},
        {"curve": "null"},
        {"curve": "[3]"},
        {"curve": '["step", "loss"]'},
        {"curve": '[["a", "b"]]'},
        {"curve": "[[1, 2, 3]]"},
        {"curve": "[[1e999, 1]]"},
        {"step": '"two"'},
        {"step": "null"},
        {"step": "1e999"},
        {"step": "NaN"},
        {"step": "-1"},
        {"step": "0"},
        {"step": "2"},
        {"step": "[" * 10**5},
        {"step": "{"},
    ],
    ids=lambda changes: " ".join(f"{key} {value:.20}" if value else f"no {key}" for key, value in changes.items()),
)
def test_a_checkpoint_with_crafted_metadata_gets_one_sentence(file, changes):
    """Whatever stands where step, curve and settings belong."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() | changes
    save_file(load_file(file), file, {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(ValueError, match="is not a whole checkpoint .*: delete it to start anew"):
        load(file)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {},
        lambda t: {k: v for k, v in t.items() if k != "1.weight"},
        lambda t: {k: v for k, v in t.items() if k != "2/exp_avg"},
        lambda t: {k: v for k, v in t.items() if k != "3/step"},
        lambda t: t | {"1.weight": t["1.weight"].T.contiguous()},
        lambda t: t | {"1.weight": t["1.weight"][:2]},
        lambda t: t | {"2/exp_avg": t["2/exp_avg"].T.contiguous()},  # as many numbers, in another shape
        lambda t: t | {"2/exp_avg_sq": t["2/exp_avg_sq"][:2]},
        lambda t: t | {"2/step": torch.ones(3)},
        lambda t: t | {"2/step": torch.tensor(-1.0)},
        lambda t: t | {"0/exp_avg": torch.ones(3, 2)},
        lambda t: t | {"other": torch.ones(3)},
    ],
    ids=["none", "no weight", "no average", "no step", "weight turned", "weight cut", "average turned", "average cut",
         "three steps", "before the first step", "averages of what is frozen", "one too many"],
)  # fmt: skip
def test_a_checkpoint_with_crafted_tensors_gets_one_sentence(file, change):
    """Missing, unknown, or of another shape than what is trained."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata)
    with pytest.raises(ValueError, match="is not a whole checkpoint .*: delete it to start anew"):
        load(file)


def test_a_checkpoint_cut_short_gets_one_sentence(file):
    content = file.read_bytes()
    for part in (content[:-9], content[:5], b"", b"[" * 10**5):
        file.write_bytes(part)
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            load(file)
