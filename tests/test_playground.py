"""The page to play with, in a real browser: a second reading of the method, equal to torch's.

Chromium is spoken to over its debugging pipe, so no driver is needed. Without it, we skip.
"""

import json
import os
import random
import re
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import playground
import pytest
import torch
from common import attention
from conftest import random_model, write_jsonl
from playground import main, page_of
from torch import Tensor

from data import Example, source_ids
from model import GPT, GPTConfig, KVCache, causal_mask, past_length, stacked_past_kv
from prefix import Prefix
from small_base.pretrain import train_bpe
from soft_prompt import SoftPrompt
from storage.adapters import save_adapter
from storage.base import load_base, save_base
from storage.files import write_json, write_tensors
from storage.tokenizers import load_tokenizer, save_tokenizer

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
FLAGS += "--disable-background-networking --disable-component-update --remote-debugging-pipe"
WORDS = "The, Palace, serves, Thai,'s,'t,'ll,'ve,'re,eeeee,tt,é, ü,漢,字,🙂, 12,345, :,ﬁ,½,<,\\,|"
WORDS = WORDS.split(",") + ["\n", " ", "  ", "\t", "\u0085", "\ufeff", "\u00a0", "\u2028"]
WORDS += ["e\u0301", "<|endoftext|>"]


class Browser:
    """One Chromium with one page."""

    def __init__(self, profile: Path):
        its_input, self.output = os.pipe()
        self.input, its_output = os.pipe()
        start = f'exec "$@" 3<&{its_input} 4>&{its_output}'  # its pipe
        command = ["bash", "-c", start, "bash", CHROMIUM, *FLAGS.split()]
        command += [f"--user-data-dir={profile}"]
        pipes = {"pass_fds": (its_input, its_output), "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **pipes)
        os.close(its_input)
        os.close(its_output)
        self.sent, self.unread, self.events, self.session = 0, b"", [], {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol -> its result. Other reports go to `events`."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params} | self.session
        os.write(self.output, json.dumps(message).encode() + b"\0")
        found = self.receive()
        while found.get("id") != self.sent:
            self.events.append(found)
            found = self.receive()
        assert "error" not in found, found
        return found["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            assert select.select([self.input], [], [], 60)[0], "Chromium says nothing for a minute"
            some = os.read(self.input, 1 << 16)
            assert some, "Chromium has ended"
            self.unread += some
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def js(self, code: str) -> Any:
        how = {"returnByValue": True, "awaitPromise": True}
        found = self.send("Runtime.evaluate", expression=code, **how)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def settle(self) -> None:
        """Waits until the page has read anew what changed."""
        self.js("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")

    def open(self, path: Path) -> None:
        self.show(1280, 1000, "light")
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        self.js('$("stop").click()')
        self.settle()
        self.js('$("stop").click()')

    def turn(self, name: str, value: float) -> None:
        """Moves a slider or chooses in a list."""
        event = "change" if name in ("first", "second") else "input"
        self.js(f'$("{name}").value = {value}')
        self.js(f'$("{name}").dispatchEvent(new Event("{event}", {{ bubbles: true }}))')
        self.settle()

    def write(self, text: str) -> None:
        """Types a text in place of the one that is there."""
        self.js('$("text").select(); $("text").focus()')
        self.send("Input.insertText", text=text)
        self.settle()

    def logits(self, reader: str) -> Tensor:
        """-> (T, V) those of the text, of the reader "on" or "off"."""
        return torch.tensor(self.js(f"readers.{reader}.logits.slice(0, readers.{reader}.T)"))

    def complaints(self) -> list[dict[str, Any]]:
        """-> errors in the console, and whatever was asked of a network."""
        self.settle()
        printed = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        found = [event for event in self.events if event.get("method") in printed]
        for event in self.events:
            if event.get("method") == "Network.requestWillBeSent":
                local = event["params"]["request"]["url"].startswith("file:")
                found += [] if local else [event]
        return found

    def show(self, width: int, height: int, scheme: str) -> None:
        """Sets the size of the window, below 500 that of a phone, and the colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def close(self) -> None:
        self.send("Browser.close")
        self.process.wait(60)
        os.close(self.input)
        os.close(self.output)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


class World:
    """A base of random weights with a tokenizer, adapters on it, and pages of them."""

    def __init__(self, directory: Path):
        rng = random.Random(0)
        merges = train_bpe(["".join(rng.choices(WORDS, k=4000))], 60)
        self.directory, self.base = directory, directory / "base"
        model = GPT(GPTConfig(257 + len(merges), 64, 3, 2, 16))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            gain = float("ln_" in name and "weight" in name)
            parameter.data = gain + 0.3 * torch.randn(parameter.shape, generator=generator)
        model.wte.weight.data[-1] = 0  # never the likeliest: answers are as long as there is room
        save_tokenizer(self.base, merges)
        save_base(model, self.base)
        self.model = load_base(self.base).requires_grad_(False)
        self.tokenizer = load_tokenizer(self.base)
        self.prefix = Prefix(torch.randn(5, 3, 2, 2, 8, generator=generator))
        self.other = Prefix(torch.randn(2, 3, 2, 2, 8, generator=generator))
        self.prompt = SoftPrompt(torch.randn(4, 16, generator=generator))
        self.film = torch.randn(2, 5, 3, 2, 2, 8, generator=generator)
        save_adapter(self.prefix, directory / "prefix", self.model)
        frames = {"10": self.film[1], "9": self.film[0]}
        write_tensors(directory / "prefix" / "film.safetensors", frames)
        write_jsonl(directory / "mine.jsonl", [Example("The Palace serves </script>", "")])
        write_json(directory / "prefix" / "training.json", {"data": str(directory / "mine.jsonl")})
        save_adapter(self.prompt, directory / "prompt", self.model)
        save_adapter(self.other, directory / "both" / "prefix", self.model)
        save_adapter(self.prompt, directory / "both" / "soft_prompt", self.model)
        self.adapters = [str(directory / name) for name in ("prefix", "prompt", "both")]

    def page(self, dtype: torch.dtype = torch.float32) -> Path:
        path = self.directory / f"{dtype}.html"
        path.write_text(page_of(self.base, self.adapters, dtype))
        return path

    def logits(self, text: str, past_kv: KVCache | None) -> Tensor:
        """-> (T, V), by torch."""
        return self.model(torch.tensor([source_ids(self.tokenizer, text)]), past_kv)[0][0]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def page(browser: Browser, world: World) -> Iterator[Browser]:
    """The page in float32, opened. Whatever a test does with it, nothing may complain."""
    browser.open(world.page())
    yield browser
    assert browser.complaints() == []


def texts(n: int, words: int = 12) -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choices(WORDS, k=rng.randint(0, words))) for _ in range(n)]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return torch.allclose(a, b, rtol=0, atol=tolerance)


@needs_browser
def test_same_ids(page: Browser, world: World):
    """Any text has the ids that it has in Python, strange spaces and letters included."""
    some = texts(200, words=30)
    found = page.js(f"{json.dumps(some)}.map((text) => [...encode(text), ...encode('\\n')])")
    assert found == [source_ids(world.tokenizer, text) for text in some]


@needs_browser
def test_half_precision_unpacks_exactly(page: Browser):
    """Each finite number of float16 arrives as it is."""
    bits = torch.arange(2**16, dtype=torch.int32)
    halves = bits.to(torch.uint16).view(torch.float16)
    finite = halves.isfinite()
    found = page.js("Array.from({ length: 65536 }, (_, bits) => half(bits))")
    assert torch.equal(torch.tensor(found)[finite], halves.float()[finite])


@needs_browser
def test_same_gelu(page: Browser):
    """The activation is torch's, to the last digit of its constants."""
    x = torch.linspace(-5, 5, 101)
    found = torch.tensor(page.js(f"gelu([new Float32Array({x.tolist()})]).map((row) => [...row])"))
    assert close(found[0], torch.nn.functional.gelu(x, approximate="tanh"), tolerance=1e-6)


@needs_browser
@pytest.mark.parametrize("first, second", [(0, -1), (1, -1), (0, 1), (1, 0), (0, 0)])
def test_same_logits(page: Browser, world: World, first: int, second: int):
    """The logits are torch's, without an adapter, behind one, and behind two in either order."""
    page.turn("first", first)
    page.turn("second", second)
    chain = [(world.prefix, world.prompt)[i] for i in (first, second) if i >= 0]
    for text in texts(4):
        page.write(text)
        assert close(page.logits("off"), world.logits(text, None))
        assert close(page.logits("on"), world.logits(text, stacked_past_kv(chain, world.model)))


@needs_browser
def test_same_logits_in_half_precision(browser: Browser, world: World):
    """Rounded to float16, all numbers together move the logits by less than 1 % of their spread."""
    browser.open(world.page(torch.float16))
    for text in texts(4):
        browser.write(text)
        for reader, past_kv in {"off": None, "on": world.prefix.past_kv(world.model)}.items():
            exact = world.logits(text, past_kv)
            assert 0 < (browser.logits(reader) - exact).abs().max() < 0.01 * exact.std()
    assert browser.complaints() == []


@needs_browser
def test_a_stack_comes_as_one(page: Browser, world: World):
    """Who chooses the first adapter of a stack gets the second behind it."""
    page.turn("first", 2)
    page.write("The Palace")
    both = stacked_past_kv([world.other, world.prompt], world.model)
    assert close(page.logits("on"), world.logits("The Palace", both))


@needs_browser
def test_tokens_kept(page: Browser, world: World):
    """With two virtual tokens kept, only the first two act; with none, there is no adapter."""
    page.turn("kept", 2)
    first = Prefix(world.prefix.kv()[:2]).past_kv(world.model)
    assert close(page.logits("on"), world.logits(page.js('$("text").value'), first))
    page.turn("kept", 0)
    assert torch.equal(page.logits("on"), page.logits("off"))


@needs_browser
@pytest.mark.parametrize("keys, values", [(0, 1), (1, 0), (1.5, 0.5)])
def test_keys_and_values_scaled(page: Browser, world: World, keys: float, values: float):
    """The two sliders multiply the keys, and the values, of the virtual tokens alone."""
    page.turn("keys", keys)
    page.turn("values", values)
    past_kv = [(keys * k, values * v) for k, v in world.prefix.past_kv(world.model)]
    assert close(page.logits("on"), world.logits(page.js('$("text").value'), past_kv))


@needs_browser
def test_values_do_not_draw_attention(page: Browser):
    """Without values, the first layer looks at the prefix as before, later ones do not."""
    look = "range(readers.on.T).map((t) => look_of(t, l, null)[0])"
    shares = f"layers.map((l) => JSON.stringify({look}))"
    before = page.js(shares)
    page.turn("values", 0)
    assert [a == b for a, b in zip(before, page.js(shares))] == [True, False, False]


@needs_browser
def test_without_keys_all_virtual_tokens_are_alike(page: Browser):
    """Keys of zero score zero with every query, so each virtual token gets the same share of it."""
    page.turn("keys", 0)
    looks = "layers.flatMap((l) => range(readers.on.T).map((t) => look_of(t, l, 0)[0]))"
    for shares in page.js(looks):
        assert shares == [pytest.approx(shares[0])] * 5


@needs_browser
def test_two_prefixes_swap_places(page: Browser):
    """Which of two prefixes stands in front makes no difference."""
    page.turn("second", 2)
    before = page.logits("on")
    page.js('$("swap").click()')
    page.settle()
    assert page.js('[$("first").value, $("second").value]') == ["2", "0"]
    assert close(page.logits("on"), before)


@needs_browser
def test_no_layer(page: Browser):
    """In no layer at all, an adapter does nothing, and takes no positions either."""
    page.js('for (const box of $("layers").children) box.click()')
    page.settle()
    assert torch.equal(page.logits("on"), page.logits("off"))


@needs_browser
def test_a_layer_without(page: Browser, world: World):
    """A layer whose box is empty sees no virtual tokens. The text stays behind P positions."""
    page.js('$("layers").children[1].click()')
    page.settle()
    model = world.model
    ids = torch.tensor([source_ids(world.tokenizer, page.js('$("text").value'))])
    x, T = model.add_positions(model.wte(ids), 5), ids.size(1)
    for layer, (block, past) in enumerate(zip(model.h, world.prefix.past_kv(model))):
        P = 0 if layer == 1 else 5
        x, _ = block(x, causal_mask(T, P + T, x.dtype, x.device), past if P else None)
    assert close(page.logits("on"), (model.ln_f(x) @ model.head.T)[0])


@needs_browser
def test_shuffled(page: Browser, world: World):
    """Shuffled, a prefix is what it was, and a soft prompt is another sequence."""
    before = page.logits("on")
    page.js("Math.random = () => (seed = (seed * 5 + 3) % 16); var seed = 1")  # not in order
    page.js('$("shuffle").click()')
    page.settle()
    assert page.js("readers.on.rows") == [3, 0, 2, 1, 4]
    assert close(page.logits("on"), before)
    page.turn("first", 1)
    page.js('seed = 1; $("shuffle").click()')
    page.settle()
    order = page.js("readers.on.rows")
    assert order == [3, 0, 2, 1]
    shuffled = SoftPrompt(world.prompt.vectors[order]).past_kv(world.model)
    assert close(page.logits("on"), world.logits(page.js('$("text").value'), shuffled))


@needs_browser
def test_film(page: Browser, world: World):
    """The slider goes through the steps that were kept, up to the adapter as it was saved."""
    text = page.js('$("text").value')
    frames = {"step 9": world.film[0], "step 10": world.film[1], "as saved": world.prefix.kv()}
    assert page.js('$("frame").value') == "2"
    for i, (step, numbers) in enumerate(frames.items()):
        page.turn("frame", i)
        assert page.js('$("frame-is").textContent') == step
        assert close(page.logits("on"), world.logits(text, Prefix(numbers).past_kv(world.model)))


@needs_browser
def test_writes_the_greedy_answer(page: Browser, world: World):
    """«One token» adds the likeliest to both answers. They end as `generate` ends."""
    page.write("The Palace")
    T = page.js("readers.on.T")
    page.js('$("step").click(); $("step").click()')
    assert page.js("[readers.on.ids.length, readers.off.ids.length]") == [T + 2, T + 2]
    page.js("while (writing().length) write_token()")
    idx = torch.tensor([source_ids(world.tokenizer, "The Palace")])
    end = world.tokenizer.eot_token
    for reader, past_kv in {"off": None, "on": world.prefix.past_kv(world.model)}.items():
        n_new = 64 - past_length(past_kv) - T
        answer = world.model.generate(idx, n_new, past_kv, stop_token=end)[0].tolist()
        stop = answer.index(end) if end in answer else None
        assert page.js(f"readers.{reader}.ids") == answer[:stop]


@needs_browser
def test_plays_and_stops(page: Browser):
    """«Write» goes on by itself, until «Stop»."""
    page.write("The Palace")
    page.js('$("write").click()')
    page.js("new Promise((done) => setTimeout(done, 200))")
    page.js('$("stop").click()')
    n = page.js("readers.on.ids.length - readers.on.T")
    page.js("new Promise((done) => setTimeout(done, 200))")
    assert page.js("readers.on.ids.length - readers.on.T") == n > 1


@needs_browser
def test_who_looks_at_whom(page: Browser, world: World):
    """A token under the mouse says, for the head clicked on, how much torch gives the prefix."""
    page.write("The Palace serves")
    page.js('$("shares").children[2 * 3 + 1].click()')  # a layer has its mean and two heads
    corner = page.js('$("tokens").children[5 + 1].getBoundingClientRect().toJSON()')
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=corner["x"] + 3, y=corner["y"] + 3)
    ids = torch.tensor([source_ids(world.tokenizer, "The Palace serves")])
    shares = attention(world.model, ids, world.prefix.past_kv(world.model))[2, 0, 0, 1]  # (S,)
    said = page.js('$("reading").textContent')
    a0, most = (float(number) for number in re.findall(r"([\d.]+) %", said))
    assert "layer 3, head 1" in said
    assert a0 == pytest.approx(100 * shares[:5].sum().item(), abs=0.51)
    assert most == pytest.approx(100 * shares[5:7].max().item(), abs=0.51)


@needs_browser
def test_too_long_a_text(page: Browser):
    """A text that does not fit behind the virtual tokens is read without; a sentence says why."""
    page.write("|é" * 30)
    assert "shorten the text" in page.js('$("problem").textContent')
    assert page.js("[readers.on, readers.off.T]") == [None, page.js("readers.off.T")]
    page.write("short")
    assert page.js('$("problem").textContent') == ""


@needs_browser
def test_fits_a_phone(page: Browser):
    """On a width of 390, nothing sticks out."""
    page.show(390, 844, "light")
    assert page.js("document.documentElement.scrollWidth") == 390


def test_needs_no_network(world: World):
    """The page asks for nothing beyond itself."""
    html = world.page().read_text()
    assert not re.findall(r"https?://|\bsrc=|\bhref=|@import|fetch\(|url\(", html)


def test_what_no_page_can_hold(world: World, tmp_path: Path, monkeypatch):
    """A Llama and a base that is too large are refused in a sentence."""
    with pytest.raises(ValueError, match="is a Llama of .* numbers: give a GPT"):
        monkeypatch.setattr(playground, "load_base", lambda _: random_model(family="llama"))
        page_of(world.base, world.adapters)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="of at most 1,000"):
        monkeypatch.setattr(playground, "MOST", 1000)
        page_of(world.base, world.adapters)


def test_inputs(world: World, monkeypatch):
    """A page offers inputs of one's own data while it is there, or of a task."""
    assert playground.inputs_of(world.directory / "prefix", 3, 0) == ["The Palace serves </script>"]
    assert len(playground.inputs_of(world.directory / "prompt", 3, 0)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(playground, "training_of", lambda folder: {"data": "moved.jsonl"})
        assert playground.inputs_of(world.directory / "prefix", 3, 0) == [""]


def test_command(world: World, tmp_path: Path):
    """The command writes one file, in float16."""
    main([*world.adapters, "--base", str(world.base), "--out", str(tmp_path / "page.html")])
    assert '"bits": 16' in (tmp_path / "page.html").read_text()
    (tmp_path / "mine.py").write_text("mine")
    with pytest.raises(ValueError, match="mine.py is no such page, and is not overwritten"):
        main([*world.adapters, "--base", str(world.base), "--out", str(tmp_path / "mine.py")])
