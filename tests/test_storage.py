"""What storage promises: files are whole or not there, nothing of another's is replaced, and what
is broken or foreign gets one sentence that names it."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BLOCK, C, L, V, random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import storage.files
import storage.hub
from model import GPT, GPTConfig
from prefix import Prefix
from small_base.pretrain import train_bpe
from small_base.world import random_document
from soft_prompt import SoftPrompt
from storage.adapters import load_adapter, save_adapter
from storage.base import fingerprint, load_base, read_config, save_base
from storage.files import (
    OURS, TRAINING, check_place, check_predictions, check_writable, read_json, read_tensors,
    replace_file, write_json, write_tensors,
)  # fmt: skip
from storage.hub import base_directory
from storage.tokenizers import (
    copy_tokenizer, load_chat_template, load_tokenizer, read_two_files, save_tokenizer,
)  # fmt: skip

ROOT = Path(__file__).parent.parent
DIFFICULT = "  two  spaces\tand\n\nlines, don't, 1234567 ½ héllo 日本語 🙂👩‍👩‍👧 \x00\x1b  "


@pytest.fixture
def model(gpt2):
    """A GPT-2: what lies on disk differs by family, and the other's is in test_llama.py."""
    return gpt2


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def edit(path: Path, **changes) -> None:
    """Changes values of a JSON file, or makes one."""
    write_json(path, (read_json(path) if path.exists() else {}) | changes)


def soft_prompt(n: int = 2) -> SoftPrompt:
    return SoftPrompt(torch.randn(n, C, generator=torch.Generator().manual_seed(0)))


def prefix(model: GPT, n: int = 2) -> Prefix:
    return Prefix(torch.randn(model.kv_shape(n), generator=torch.Generator().manual_seed(0)))


# ---------------------------------------------------------------------------------- single files


def test_a_file_is_made_with_its_folders_and_replaced_in_one_go(tmp_path):
    """Nothing but the file is left in its folder."""
    path = tmp_path / "a" / "b" / "c.json"
    for content in (b"old", b"the new one"):
        replace_file(path, content)
        assert path.read_bytes() == content and names(path.parent) == {"c.json"}


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, step, error):
    """Whether the disk is full or the user stops it."""

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
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], cwd=ROOT)
    assert done.returncode == 9 and (tmp_path / "a.json").read_text() == "old"
    (left,) = names(tmp_path) - {"a.json"}
    assert left.startswith(".") and left.endswith(".new")
    replace_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "new" and names(tmp_path) == {"a.json", left}


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_file_has_the_permissions_of_an_ordinary_new_one(tmp_path):
    """What the umask leaves of 666: in a shared folder, a class can read it."""
    for umask in (0o022, 0o027, 0o002):
        before = os.umask(umask)
        try:
            replace_file(tmp_path / "a", b"")
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_makes_a_directory_loadable_is_written_last(model, tmp_path, monkeypatch):
    """So a save that dies on the way leaves nothing that loads as something else."""
    written = []
    monkeypatch.setattr(storage.files, "replace_file", lambda path, _: written.append(path.name))
    save_base(model, tmp_path)
    save_adapter(prefix(model), tmp_path, model)
    assert written[:3] == ["model.safetensors", "config.json", "adapter_model.safetensors"]
    assert written[3:] == ["base.json", "adapter_config.json"]


def test_tensors_come_back_bit_for_bit(tmp_path):
    """Whatever their dtype and layout; without their gradients."""
    numbers = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"a": numbers.T, "b": numbers[:, 1].bfloat16(), "c": torch.tensor(7)}
    tensors["d"] = numbers[1:].requires_grad_()
    write_tensors(tmp_path / "a", tensors)
    expected = {name: t.detach() for name, t in tensors.items()}
    assert_close(read_tensors(tmp_path / "a"), expected, rtol=0, atol=0)


NO_OBJECT = {
    b"[1]": "a holds list, not a JSON object",
    b"{": "a is not JSON",
    b"\xff": "a is not JSON",
    b"[" * 10**5: "a is not JSON",
    b"9" * 5000: "a is not JSON",
}


def test_what_is_no_json_object_is_refused(tmp_path):
    """Another value, and a broken file, be it nested a thousandfold."""
    for content, sentence in NO_OBJECT.items():
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            read_json(tmp_path / "a")


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_what_is_no_file_is_not_read(tmp_path, read):
    """Nothing, a folder, and a pipe, which would be waited on for ever."""
    (tmp_path / "folder").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    for kind in ("missing", "folder", "pipe"):
        with pytest.raises(ValueError, match=f"{kind} does not exist: .* not the directory that"):
            read(tmp_path / kind)


# ---------------------------------------------------------------------------------------- places

HERE = {"method": "prefix", "task": "sentence", "data": "embedded", "base": "out/base", "steps": 9}


def test_what_is_not_ours_is_left_alone(tmp_path):
    """A new place is made. In an old one, a thesis or another adapter's folder stays as it is."""
    check_place(tmp_path / "a" / "b", HERE)
    assert (tmp_path / "a" / "b").is_dir() and not names(tmp_path / "a" / "b")
    for name in ("thesis.tex", ".o.new", ".o.old", "soft_prompt/adapter_config.json"):
        replace_file(tmp_path / name, b"years of work")
    check_place(tmp_path, HERE)
    assert names(tmp_path) == {"a", "thesis.tex", ".o.new", ".o.old", "soft_prompt"}
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert names(tmp_path / "soft_prompt") == {"adapter_config.json"}


def test_a_base_or_an_adapter_of_unknown_training_is_not_overwritten(tmp_path):
    """Such as a GPT-2 of four files, or PEFT's own adapter; one file of it is enough."""
    for name in set(OURS) - {TRAINING}:
        write_json(tmp_path / name / name, {})
        with pytest.raises(ValueError, match=f"holds {name} of unknown training. It is not overwr"):
            check_place(tmp_path / name, HERE)
        assert names(tmp_path / name) == {name} and read_json(tmp_path / name / name) == {}


def test_what_another_training_left_is_not_overwritten(tmp_path):
    """Whatever setting differs: a good adapter is not lost to a bad one. The same run may."""
    write_json(tmp_path / "adapter_config.json", {})
    write_json(tmp_path / TRAINING, HERE)
    check_place(tmp_path, HERE)
    for key in HERE:
        write_json(tmp_path / TRAINING, HERE | {key: "other"})
        with pytest.raises(ValueError, match=f"another run: {key} other, not .* not overwritten"):
            check_place(tmp_path, HERE)
        assert read_json(tmp_path / TRAINING) == HERE | {key: "other"}
    assert names(tmp_path) == {TRAINING, "adapter_config.json"}


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    """A file, something below it, a loop of links, a name too long: and nothing is left behind."""
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
    """Data, another file, a folder or a device is refused; for a new file its folder is made."""
    line = {"input": "a", "target": "b"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "own.jsonl").write_text(json.dumps(line | {"prediction": "by hand"}) + "\n")
    others = [tmp_path / name for name in ("data.jsonl", "own.jsonl", "empty", ".")]
    for file in (*others, Path(os.devnull)):
        with pytest.raises(ValueError, match="holds no predictions, and is not overwritten: name"):
            check_predictions(file)
    (tmp_path / "p.jsonl").write_text(json.dumps(line | {"prediction": "c", "cut": False}) + "\n")
    check_predictions(tmp_path / "p.jsonl")
    check_predictions(tmp_path / "new" / "p.jsonl")
    with pytest.raises(ValueError, match="cannot be written to"):
        check_predictions(tmp_path / "empty" / "p.jsonl")
    assert names(tmp_path) == {"data.jsonl", "own.jsonl", "empty", "p.jsonl", "new"}
    assert not names(tmp_path / "new")


# ----------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_a_saved_model_comes_back_bit_for_bit(model, tmp_path, dtype, tolerance):
    """Its numbers do. Its logits to rounding: matrices lie transposed in the file, and sum so."""
    model = GPT(replace(model.config, layer_norm_epsilon=0.1)).to(dtype)
    save_base(model, tmp_path / "base")
    again = load_base(str(tmp_path / "base"))
    assert again.dtype == dtype and again.config == model.config
    assert again.name == str(tmp_path / "base")
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    logits = model(random_ids(2, 5))[0]
    atol = tolerance * logits.abs().max().item()
    assert_close(again(random_ids(2, 5))[0], logits, rtol=0, atol=atol)


def test_a_tuned_base_says_its_dtype_once(model, tmp_path):
    """By the newer of its two names: the base that was tuned may have had both, and another."""
    save_base(model, tmp_path, {"model_type": "gpt2", "torch_dtype": "float16", "dtype": "float16"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": "gpt2", "dtype": "float64"}


def test_the_fingerprint_is_of_the_weights_not_of_their_dtype(model):
    """Rounding goes by way of float32: from float64 at once, this one number would round up."""
    model.wte.weight.data[0, 0] = 1 + 2**-8 + 2**-40
    print_of_base = fingerprint(model)
    assert fingerprint(model.float()) == print_of_base
    assert fingerprint(model.bfloat16()) == print_of_base
    model.h[1].mlp.c_fc.bias.data[3] += 0.1
    assert fingerprint(model) != print_of_base


def test_the_fingerprint_stays_what_it_is():
    """Adapters on disk name their base by it. Equal weights in other heads are another base."""
    prints = []
    for n_head in (2, 4):
        model = GPT(GPTConfig(V, BLOCK, 1, n_head, C))
        for p in model.parameters():
            p.data = torch.arange(p.numel(), dtype=torch.float32).view(p.shape) / p.numel()
        prints.append(fingerprint(model))
    assert prints[0] == "b0b7f98960a76df5" != prints[1]


@pytest.mark.parametrize(
    "wrap", ["transformer.{}", "{}", "_orig_mod.transformer.{}", "transformer._orig_mod.{}"]
)
def test_files_of_older_and_newer_writers_load(model, tmp_path, wrap):
    """OpenAI's names without a prefix, a compiled model's; mask buffers and a copy of the head."""
    save_base(model, tmp_path)
    edit(tmp_path / "config.json", activation_function="gelu_pytorch_tanh", n_inner=4 * C)
    path = tmp_path / "model.safetensors"
    weights = {key.removeprefix("transformer."): t for key, t in load_file(path).items()}
    buffers = {"h.0.attn.bias": torch.ones(9).bool(), "h.0.attn.masked_bias": torch.zeros(1)}
    tensors = {wrap.format(key): t for key, t in (weights | buffers).items()}
    head = "_orig_mod.lm_head.weight" if wrap.startswith("_") else "lm_head.weight"
    save_file(tensors | {head: weights["wte.weight"].clone()}, path)
    assert_close(load_base(tmp_path).state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_base_is_stored_as_hugging_faces_gpt2(model, tmp_path):
    """Its names, its config, and the matrices of a block as (in, out), nn.Linear's transposed."""
    save_base(model, tmp_path)
    linear = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    expected = {}
    for name, t in model.state_dict().items():
        expected[f"transformer.{name}"] = t.T if name.endswith(linear) else t
    assert_close(load_file(tmp_path / "model.safetensors"), expected, rtol=0, atol=0)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = {
        "architectures": ["GPT2LMHeadModel"], "bos_token_id": 60, "eos_token_id": 60,
        "model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "vocab_size": 61, "n_positions": 32, "n_layer": 3,
        "n_head": 2, "n_embd": 16, "layer_norm_epsilon": 1e-5, "dtype": "float64",
    }  # fmt: skip
    assert read_json(tmp_path / "config.json") == config
    few = {key: config[key] for key in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")}
    write_json(tmp_path / "config.json", few)  # the rest are what GPT-2 has by default
    assert load_base(tmp_path).config == model.config
    with pytest.raises(AttributeError):
        model.config.n_layer = 4


OTHER_MODELS = [
    ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'; only gpt2, llama"),
    ({"model_type": ["gpt2"]}, "only gpt2, llama"),
    ({"activation_function": "relu"}, "activation_function is 'relu', and only 'gelu_new' can be"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by.* is True, and only False can be"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False, and only True can be loaded"),
    ({"add_cross_attention": True}, "add_cross_attention is True, and only False can be loaded"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False, and only True can be loaded"),
    ({"quantization_config": {"quant_method": "fp8"}}, "config is .*fp8.*, and only None can be"),
    ({"n_layer": "three"}, "n_layer is 'three', and only a size of a model can be loaded"),
    ({"n_layer": 10**12}, "n_layer is 1000000000000, and only a size"),
    ({"n_layer": 3.0}, "n_layer is 3.0, and only a size"),
    ({"vocab_size": None}, "vocab_size is None, and only a size"),
    ({"n_embd": 0}, "n_embd is 0, and only a size"),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small', and only a size"),
    ({"n_head": 3}, "'n_head': 3.* do not divide into heads"),
    ({"n_embd": 32}, "size mismatch for wte.weight"),
    ({"n_layer": 4}, 'Missing .* "h.3.ln_1.weight"'),
    ({"n_layer": 2}, 'Unexpected .* "h.2.'),
]


def test_what_a_llamas_config_leaves_out_follows_from_its_heads(tmp_path):
    """Each head of queries has keys of its own, and the width is divided among them."""
    sizes = {"vocab_size": 9, "max_position_embeddings": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "hidden_size": 12, "intermediate_size": 20}
    write_json(tmp_path / "config.json", {"model_type": "llama"} | sizes)
    config = read_config(tmp_path / "config.json")
    assert (config.n_kv_head, config.head_dim) == (3, 4)


@pytest.mark.parametrize("changes, sentence", OTHER_MODELS, ids=lambda given: str(given)[:40])
def test_a_config_of_another_model_is_refused_by_name(model, tmp_path, changes, sentence):
    """Another architecture, no sizes, sizes that the weights have not, quantised weights."""
    save_base(model, tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=sentence):
        load_base(tmp_path)


HEAD = "transformer.wte.weight"
OTHER_WEIGHTS = {
    'Missing .* "h.1.ln_1.bias"': lambda t: t.pop("transformer.h.1.ln_1.bias"),
    'Unexpected .* "other"': lambda t: t.update(other=torch.zeros(2)),
    "lm_head.weight differs from": lambda t: t.update({"lm_head.weight": t[HEAD] + 1}),
    "asks for .*wte.weight.* floating point": lambda t: t.update({HEAD: t[HEAD].char()}),
}


@pytest.mark.parametrize("sentence", OTHER_WEIGHTS)
def test_other_weights_are_refused(model, tmp_path, sentence):
    """Missing, unknown, untied, quantised: a sentence each."""
    save_base(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    OTHER_WEIGHTS[sentence](tensors)
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=sentence):
        load_base(tmp_path)


def test_a_missing_or_broken_file_of_weights_is_named(model, tmp_path):
    """With pytorch_model.bin alone, which is a program as well as weights, how to convert it."""
    save_base(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_base(tmp_path)
    path.rename(tmp_path / "pytorch_model.bin")
    said = "has no model.safetensors; pytorch_model.bin needs .*from_pretrained.*save_pretrained"
    with pytest.raises(ValueError, match=said):
        load_base(tmp_path)


# --------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A huggingface_hub that is asked and answers with a folder, or with `hub.error`."""

    def snapshot_download(repo, allow_patterns):
        fake.asked.append((repo, allow_patterns))
        if fake.error:
            raise fake.error
        return str(tmp_path / "cache" / repo)

    fake = SimpleNamespace(snapshot_download=snapshot_download, asked=[], error=None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    storage.hub.download.cache_clear()
    yield fake
    storage.hub.download.cache_clear()


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "someone/Tiny-1.5"])
def test_a_name_goes_through_huggingface_hub(hub, tmp_path, name):
    """Once a process; for the config, the tokenizer and safetensors, and no other weights."""
    assert base_directory(name) == base_directory(name) == tmp_path / "cache" / name
    ((asked, patterns),) = hub.asked
    assert asked == name and {"config.json", "tokenizer.json", "merges.txt"} < {*patterns}
    assert {"tokenizer_config.json", "chat_template.jinja", "generation_config.json"} < {*patterns}
    assert [pattern for pattern in patterns if "*" in pattern] == ["model*.safetensors"]


@pytest.mark.parametrize("name", ["gpt2", "out/base"])
def test_a_directory_wins_over_the_name(hub, tmp_path, name):
    """A folder gpt2 in the current directory is that folder; a path of three parts is a path."""
    (tmp_path / name).mkdir(parents=True)
    assert base_directory(name) == Path(name) and base_directory(tmp_path) == tmp_path
    assert base_directory("a/b/c") == Path("a/b/c") and not hub.asked


def test_what_cannot_be_downloaded_gets_one_sentence(hub):
    """With the hub's reason, and what to do."""
    hub.error = ConnectionError("no\nroute")
    said = "^someone/x is no directory here, and cannot be downloaded .no route.: check the name"
    with pytest.raises(ValueError, match=f"{said} and the network, or name a dir.*safetensors"):
        base_directory("someone/x")


def test_without_huggingface_hub_the_sentence_says_how_to_get_it(hub, monkeypatch):
    """It is no requirement: None in sys.modules is how Python says that a module is missing."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="gpt2 .*: pip install huggingface_hub, or name"):
        base_directory("gpt2")


# ------------------------------------------------------------------------------------ tokenizers


def tokenizer_files(directory: Path, merges: list[tuple[bytes, bytes]]) -> None:
    """A directory with a tokenizer, and a config.json of a model that it is for."""
    save_tokenizer(directory, merges)
    (directory / "config.json").write_text(json.dumps({"vocab_size": 257 + len(merges)}))


def test_any_text_survives_its_tokens(tmp_path):
    """With a vocabulary of one's own, bytes, emoji and control characters come back."""
    rng = random.Random(0)
    tokenizer_files(tmp_path, train_bpe(["\n".join(random_document(rng)) for _ in range(500)], 300))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(DIFFICULT, allowed_special="all")
    assert tokenizer.decode(ids) == DIFFICULT and tokenizer.eot_token not in ids
    assert tokenizer.encode_ordinary(DIFFICULT) == ids
    assert tokenizer.decode(tokenizer.encode("half a pair: \ud800")) == "half a pair: \ufffd"
    assert tokenizer.n_vocab == tokenizer.eot_token + 1


def test_the_files_are_gpt2s(tmp_path):
    """vocab.json counts bytes, then merges; merges.txt lists those; in GPT-2's characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # OpenAI's bytes_to_unicode
    others = [b for b in range(256) if b not in printable]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    tokenizer_files(tmp_path, [(b" ", b"a"), (b" a", "é".encode())])
    text = (tmp_path / "vocab.json").read_text(encoding="utf-8")
    vocab = [*characters, "Ġa", "ĠaÃ©", "<|endoftext|>"]
    assert "Ġ" in text and json.loads(text) == {token: i for i, token in enumerate(vocab)}
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == "#version: 0.2\nĠ a\nĠa Ã©\n"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(" aé<|endoftext|>", allowed_special="all") == [257, 258]
    assert tokenizer.encode_ordinary("a  a, don't")[:3] == [vocab.index("a"), vocab.index("Ġ"), 256]


OTHER_FILES = {  # vocab.json, what is added to merges.txt, the size of the model: the sentence
    "vocab.json is not JSON": ("", "", 300),
    "its merges do not make its tokens": ("{}", "", 300),
    "in the order of their ids": ({"ab": 257, "cd": 256}, "", 300),
    "its 259 tokens have not 259 ids of the model's 300": ({"<|endoftext|>": 0}, "", 300),
    "its 259 tokens have not 259 ids of the model's 258": ({}, "", 258),
    "do not make its tokens in the": ({}, "e f\n", 300),
    "日": ({"日": 259}, "", 300),
}


@pytest.mark.parametrize("sentence", OTHER_FILES)
def test_files_that_do_not_fit_together_are_refused(tmp_path, sentence):
    """Each other, or the model: a word would decode as another."""
    changes, more_merges, size = OTHER_FILES[sentence]
    tokenizer_files(tmp_path, [(b"a", b"b"), (b"c", b"d")])
    if isinstance(changes, dict):
        edit(tmp_path / "vocab.json", **changes)
    else:
        (tmp_path / "vocab.json").write_text(changes)
    with open(tmp_path / "merges.txt", "a") as file:
        file.write(more_merges)
    edit(tmp_path / "config.json", vocab_size=size)
    with pytest.raises(ValueError, match=sentence):
        load_tokenizer(tmp_path)


def test_ids_that_mean_nothing_decode_to_nothing(tmp_path):
    """In a gap of the vocabulary, or past its end, as where a model has more ids than names."""
    tokenizer_files(tmp_path, [(b"a", b"b")])
    vocab = read_json(tmp_path / "vocab.json") | {"<|endoftext|>": 280}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    edit(tmp_path / "config.json", vocab_size=300)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([256, 270, 257, 299, 10**6, 256]) == "abab"
    assert tokenizer.decode(range(257, 300)) == "<|endoftext|>" and tokenizer.eot_token == 280


def tokenizer_json(directory: Path, *added: str, **config) -> None:
    """A tokenizer of bytes alone, in the file of newer models; its added tokens begin at 256."""
    save_tokenizer(directory, [])
    found = read_two_files(directory)
    del found["model"]["vocab"]["<|endoftext|>"]
    found["added_tokens"] = [{"id": 256 + i, "content": token} for i, token in enumerate(added)]
    write_json(directory / "tokenizer.json", found)
    write_json(directory / "config.json", {"model_type": "gpt2", "vocab_size": 300} | config)


def test_added_tokens_in_a_text_are_single_ids(tmp_path):
    """As in transformers: special or not, the longest that fits, the end of text among them."""
    tokenizer_json(tmp_path, "<|end|>", "<a>", "<a><b>", "<b>", eos_token_id=256)
    tokenizer = load_tokenizer(tmp_path)
    for text, ids in {
        "<a><b><b>": [258, 259], "<a><a><b>": [257, 258], "<|end|><": [256, 27], "<a": [27, 64]
    }.items():  # fmt: skip
        assert tokenizer.encode(text, allowed_special="all") == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_ordinary("<b>") == [27, 65, 29]


ENDS = [  # what config.json and tokenizer_config.json say: the id
    ({"eos_token_id": 257}, {"eos_token": "<b>"}, 257),
    ({"eos_token_id": [258, 257]}, {}, 258),
    ({"eos_token_id": None}, {"eos_token": "<b>"}, 258),
    ({}, {"eos_token": {"content": "<b>", "lstrip": False}}, 258),
    ({}, {}, 256),
]


def test_the_end_of_text_is_what_the_files_say_first(tmp_path):
    """config.json, then tokenizer_config.json; else it is <|endoftext|>."""
    for config, other, end in ENDS:
        tokenizer_json(tmp_path, "<|endoftext|>", "<a>", "<b>", **config)
        write_json(tmp_path / "tokenizer_config.json", other)
        assert load_tokenizer(tmp_path).eot_token == end


def test_without_an_end_of_text_there_is_one_sentence(tmp_path):
    """It has to be an added token, or answers would never end."""
    for end in (None, 7, 299, "<b>"):
        tokenizer_json(tmp_path, "<a>", eos_token_id=end)
        with pytest.raises(ValueError, match="eos_token_id is .*: put the id that ends a text"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_is_copied_beside_another_model(tmp_path):
    """With its chat template, and what says where a text ends; without the model's config."""
    tokenizer_json(tmp_path / "a", "<|endoftext|>")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / "a" / name).write_text(name)
    copy_tokenizer(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "b") == names(tmp_path / "a") - {"config.json"}
    for copied in (tmp_path / "b").iterdir():
        assert copied.read_bytes() == (tmp_path / "a" / copied.name).read_bytes()


CHATML = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
MESSAGES = [{"role": "user", "content": " Is 1 < 2? "}]
SAID = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs 1 < 2?<|im_end|>\n"
SAID += "<|im_start|>assistant\n"


def test_a_chat_template_makes_a_text_of_messages(tmp_path):
    """From chat_template.jinja, else tokenizer_config.json, where there may be several by name."""
    several = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "no"}]
    for template in (CHATML, several, "no"):
        config = {"eos_token": {"content": "<|im_end|>"}, "chat_template": template}
        write_json(tmp_path / "tokenizer_config.json", config)
        if template == "no":
            (tmp_path / "chat_template.jinja").write_text(CHATML)
        assert load_chat_template(tmp_path)(MESSAGES) == SAID


FAILING = {  # each template: the sentence
    None: "has no chat template: give an instruct model, or no --chat",
    "{{ raise_exception('roles must alternate') }}": "fails .*roles must alternate",
    "{% for": "the chat template of .* fails .*TemplateSyntaxError",
    "{{ messages[0].content.split(1) }}": "the chat template of .* fails",
    "{{ messages.append(1) }}": "fails .*SecurityError",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "fails .*SecurityError",
}


def test_a_template_that_fails_gets_a_sentence(tmp_path):
    """It is a program of others, so it runs in a sandbox, where it reaches and changes nothing."""
    for template, sentence in FAILING.items():
        write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
        with pytest.raises(ValueError, match=sentence):
            load_chat_template(tmp_path)(MESSAGES)


# -------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING"])
def test_an_adapter_comes_back_as_its_directory_says(model, tmp_path, kind, with_model):
    """Bit for bit. A Cartridge of PEFT is a prefix by another name, without our base.json."""
    adapter = soft_prompt(4) if kind == "PROMPT_TUNING" else prefix(model, 4)
    save_adapter(adapter, tmp_path, model if with_model else None)
    if kind == "CARTRIDGE":
        edit(tmp_path / "adapter_config.json", peft_type=kind, num_frozen_tokens=1)
        (tmp_path / "base.json").unlink(missing_ok=True)
    again = load_adapter(tmp_path, model if with_model else None)
    assert type(again) is type(adapter)
    assert_close(again.state_dict(), adapter.state_dict(), rtol=0, atol=0)


def test_saved_without_a_base_it_names_none(model, tmp_path):
    """Nor the one of an adapter that was there before."""
    for given, there in ((model, True), (None, False)):
        save_adapter(soft_prompt(), tmp_path, given)
        assert (tmp_path / "base.json").exists() is there


def test_a_prefix_through_an_mlp_is_saved_baked(model, tmp_path):
    """Only what it says to the model is stored, in PEFT's (P, L·2·C)."""
    adapter = prefix(model, 4).reparametrise(5)
    adapter.mlp[2].bias.data += 0.5
    save_adapter(adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert_close(tensors, {"prompt_embeddings": adapter.kv().detach().flatten(1)}, rtol=0, atol=0)
    assert tensors["prompt_embeddings"].shape == (4, L * 2 * C)


def test_an_adapter_is_refused_on_other_weights(model, tmp_path):
    """By their fingerprint, in either dtype. Without one, as PEFT saves it, it loads."""
    halved = GPT(model.config).bfloat16()
    halved.load_state_dict(model.float().state_dict())
    known, other = fingerprint(model), GPT(model.config)
    for trained_on in (model, halved):
        save_adapter(soft_prompt(), tmp_path, trained_on)
        assert read_json(tmp_path / "base.json") == {"base": model.name, "fingerprint": known}
        for base in (model, halved):
            load_adapter(tmp_path, base)
        with pytest.raises(ValueError, match=f"on an unsaved model .fingerprint {known}.*or train"):
            load_adapter(tmp_path, other)
    (tmp_path / "base.json").unlink()
    load_adapter(tmp_path, other)


OTHER_ADAPTERS = [
    ({"peft_type": "LORA"}, "is a LORA .* only PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING for"),
    ({"peft_type": "P_TUNING"}, "is a P_TUNING .* only"),
    ({"peft_type": ["LORA"]}, "only PREFIX_TUNING"),
    ({"task_type": "SEQ_CLS"}, "for the task 'SEQ_CLS': only .* for 'CAUSAL_LM' can be loaded"),
    ({"num_virtual_tokens": 7}, "no prompt_embeddings of .*'num_virtual_tokens': 7"),
    ({"num_virtual_tokens": None}, "no prompt_embeddings of"),
    ({"num_layers": 4}, "no prompt_embeddings of .*'num_layers': 4"),
    ({"num_attention_heads": 0}, "no prompt_embeddings of"),
    ({"token_dim": "16"}, "no prompt_embeddings of"),
]


@pytest.mark.parametrize("changes, sentence", OTHER_ADAPTERS, ids=lambda given: str(given)[:40])
def test_an_adapter_of_another_kind_is_refused(model, tmp_path, changes, sentence):
    """The directory decides: a kind, a task or sizes that are not known get a sentence."""
    save_adapter(prefix(model), tmp_path)
    edit(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=sentence):
        load_adapter(tmp_path)


def test_a_file_without_prompt_embeddings_is_refused(tmp_path):
    """Such as that of another method, or quantised ones."""
    save_adapter(soft_prompt(), tmp_path)
    for tensors in ({"other": torch.zeros(2, C)}, {"prompt_embeddings": torch.zeros(2, 1)}):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="has no prompt_embeddings of .*: save it again"):
            load_adapter(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_diverged_elsewhere_is_refused(model, tmp_path, value):
    """It is named itself, and the base is not blamed for the losses behind it."""
    diverged = prefix(model)
    diverged.start.data[0, 0, 1, 0, 0] = value
    save_adapter(diverged, tmp_path)
    with pytest.raises(ValueError, match="safetensors holds numbers that are not finite: train"):
        load_adapter(tmp_path)
