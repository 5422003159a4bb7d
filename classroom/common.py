"""What the scripts here share: the path to the project, attention made visible, an experiment's
runs, JSON and figures."""

import argparse
import contextlib
import io
import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiktoken  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from command.console import say  # noqa: E402
from command.examples import check_lengths, load_examples  # noqa: E402
from command.flags import DEFAULT_BASE, Recipe  # noqa: E402
from command.flags import RECIPES as TUNED  # noqa: E402
from command.models import ADAPTERS_OF, new_adapters  # noqa: E402
from command.process import pick_device, start_process  # noqa: E402
from llama import Llama  # noqa: E402
from lora import add_lora  # noqa: E402
from model import Decoder, KVCache, attend, stacked_past_kv  # noqa: E402
from small_base.pretrain import pretrain  # noqa: E402
from storage.base import load_base  # noqa: E402
from storage.checkpoints import Metrics  # noqa: E402
from storage.files import read_json, replace_file  # noqa: E402
from storage.tokenizers import load_chat_template, load_tokenizer  # noqa: E402

NAMES = {
    "none": "frozen base", "soft_prompt": "soft prompt", "prefix": "prefix",
    "both": "prefix + soft prompt", "lora": "LoRA", "full": "full fine-tuning",
}  # fmt: skip
RECIPES = TUNED | {
    "none": Recipe("train nothing", 0, 0.0, 0.0),
    "lora": Recipe("train small updates of the weights", 4, 1e-2, 1e-3),  # its length is a rank
}
STEPS = 150  # of a run, unless an experiment says otherwise: the stored results had as many
UNREPORTED = 100  # the seed of the base, data and start on which learning rates are chosen
RESULTS = Path(__file__).parent / "results"
QUICK = Path("out/quick")


def attention(model: Decoder, idx: Tensor, past_kv: KVCache | None = None) -> Tensor:
    """(B, T) ids -> (L, B, H, T, S) attention weights: what each token looks at, past included."""
    weights = []

    def noted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
        weights.append((scores + mask).softmax(dim=-1))
        return attend(q, k, v, mask)

    try:
        for block in model.h:
            block.attn.attend = noted
        model(idx, past_kv)
    finally:
        for block in model.h:
            block.attn.attend = attend
    # heads of a Llama that share their keys come as queries of one head
    return torch.stack(weights).unflatten(3, (-1, idx.size(1))).flatten(2, 3)


def n_trainable(model: nn.Module, adapters: list[nn.Module]) -> int:
    parts = [model, *adapters]
    return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)


def forward(model: Decoder, adapters: list[nn.Module], batch: data.Batch) -> Tensor:
    """-> the mean loss over the targets of a batch, by the line that train.tune has."""
    n_targets = int((batch.targets != data.IGNORE).sum())
    return train.loss_of(model, batch, stacked_past_kv(adapters, model), n_targets)


def kept_for_backward(model: Decoder, compute: Callable[[], object]) -> int:
    """-> the bytes that autograd keeps for the backward pass, the model's weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # several tensors may be views of one; it is kept once
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own operation holds would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()  # held, so that no address comes twice
    del result
    return sum(size for address, size in kept.items() if address not in weights)


def kept_by_formula(model: Decoder, P: int, B: int, T: int, soft: bool) -> int:
    """-> the estimate of `kept_for_backward` for B rows of T positions behind P virtual tokens.

    In float32, for texts that are short enough that attention is written out (see `attend`).
    """
    c, (_, L, _, K, D) = model.config, model.kv_shape(P)
    if isinstance(model, Llama):  # the inputs of two norms, q, k and v, three tensors of the MLP
        position = 3 * c.n_embd + 2 * K * D + 3 * c.n_inner
    else:  # the inputs of two norms, q, k and v, and the MLP's, which is four times as wide
        position = 9 * c.n_embd
    row = T * position + P * 2 * K * D + c.n_head * T * (P + T)  # the last are attention's weights
    prompt = P * position + c.n_head * P * P if soft else 0  # read once for all rows
    return 4 * L * (B * row + prompt)


def best_rate(middle: float, loss_at: Callable[[float], float]) -> float:
    """The loss of a training at a rate -> the best of the rates that train.search_rate tries.

    Each is the middle times a power of three, rounded once: stored runs are found by their rate.
    """

    def rounded(rate: float) -> float:
        return float(f"{middle * 3.0 ** round(math.log(rate / middle, 3)):.2g}")

    losses = train.search_rate(middle, lambda rate: loss_at(rounded(rate)))
    return rounded(min(losses, key=losses.get))


def machine(device: torch.device) -> str:
    """-> what computes, in its own words: figures hold for one kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    linux = Path("/proc/cpuinfo")
    text = linux.read_text() if linux.exists() else ""
    named = re.search(r"model name\s*: (.*)", text)  # on Arm, it has no name
    name = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def interleaved(functions: dict[Any, Callable[[], object]], turns: int) -> dict[Any, list[float]]:
    """-> the seconds of each function in each turn, after two turns to warm up.

    They take turns, so a slow moment meets them all.
    """
    times = {name: [] for name in functions}
    for _ in range(2 + turns):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if torch.cuda.is_available():  # what a GPU still has to do
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: seconds[2:] for name, seconds in times.items()}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """-> the mean, and the range where there is one."""
    mean, low, high = (f"{f(values):.{digits}f}" for f in (statistics.mean, min, max))
    return f"{mean} [{low}–{high}]" if low != high else mean


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a line for each key, and for each run: people read it, and changes are short."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entries = [f"  {json.dumps(entry, ensure_ascii=False)}" for entry in value]
            return "[\n" + ",\n".join(entries) + "\n ]"
        return json.dumps(value, ensure_ascii=False)

    lines = ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in record.items())
    replace_file(path, f"{{\n{lines}\n}}\n".encode())


def figure(
    path: Path, draw: Callable[[Any], None], columns: int, size: tuple[float, float] | None = None
) -> None:
    """Draws into a row of axes, with one legend below; or says how to get matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        needed = Path(__file__).parent / "requirements.txt"
        say(f"no figure: pip install -r {needed} for {path}")
        return
    size = size or (max(6, 4 * columns), 4)  # inches
    figure, axes = pyplot.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")
    draw(axes)
    handles, labels = axes[0][0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles))  # each once
    if by_label:
        n = 3 if columns > 1 else 2
        figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=n)
    figure.savefig(path, dpi=150)  # for a projector
    pyplot.close(figure)
    say(f"figure: {path}")


def colour(label: str) -> str:
    """-> the colour of the method that a label begins with, the same in every figure."""
    methods = [name for name in NAMES.values() if label.startswith(name)]
    method = max(methods, key=len, default=NAMES["none"])
    return f"C{list(NAMES.values()).index(method)}"


def band(
    axis: Any, xs: list[float], columns: list[list[float]], label: str, style: str = ".-"
) -> None:
    """Draws a line through the mean of each column, and a band from its lowest to its highest."""
    axis.plot(xs, list(map(statistics.mean, columns)), style, label=label, color=colour(label))
    low, high = list(map(min, columns)), list(map(max, columns))
    axis.fill_between(xs, low, high, color=colour(label), alpha=0.2)


class Run(NamedTuple):
    """A training, ready to go or done, on a base of its own."""

    model: Decoder
    adapters: list[nn.Module]
    rows: dict[str, list[data.Row]]
    plan: train.Plan
    loss: float = 0.0  # on the validation data, after the last step
    exact: float = 0.0  # percentage of the validation rows that it then answers exactly


def all_right(metrics: Metrics) -> bool:
    """-> whether the last look found every validation answer exact: a reason to stop."""
    return metrics[-1].get("exact_match") == 100


def looks_of(run: Run, is_done: Callable[[Metrics], bool] = lambda metrics: False) -> Metrics:
    """Trains as train.tune does, without a word -> its looks at the validation data, first and last
    included. A loss that is no number counts as infinite."""
    model, adapters, rows, plan, *_ = run
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            metrics = train.tune(model, adapters, rows, plan, is_done=is_done)
        except train.Diverged:
            lost = {"validation": math.inf, "exact_match": 0.0}
            metrics = [{"step": 0} | lost, {"step": plan.steps} | lost]
    looks = [entry for entry in metrics if "validation" in entry]
    for look in looks:
        if not math.isfinite(look["validation"]):
            look["validation"] = math.inf
    return looks


def curve_of(looks: Metrics) -> list[tuple[int, float]]:
    """-> (step, validation loss) of each look."""
    return [(look["step"], look["validation"]) for look in looks]


def how_soon(run: Run, most: int) -> dict[str, Any]:
    """Trains until all validation answers are right, or for so many steps -> what came of it."""
    looks = looks_of(run, lambda looks: all_right(looks) or looks[-1]["step"] >= most)
    scores = train.evaluate(run.model, run.adapters, run.rows["test"], 50)
    return {
        "steps": looks[-1]["step"], "solved": all_right(looks), "loss": looks[-1]["validation"],
        "test": scores.exact_match(), "trained": n_trainable(run.model, run.adapters),
        "curve": curve_of(looks)[:: 1 if all_right(looks) else 10],  # each tenth look of a long one
    }  # fmt: skip


def sooner_first(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(runs, key=lambda run: (not run["solved"], run["steps"]))


class Experiment:
    """The command line of an experiment, its runs, and its report: JSON, a table and a figure."""

    def __init__(
        self, file: str, doc: str, argv: list[str] | None,
        own_flags: Callable[[Callable], None] | None = None, out: Path = RESULTS,
    ):  # fmt: skip
        style = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(description=doc, formatter_class=style)
        add = parser.add_argument
        base = f"directory, or name on the hub (default: {DEFAULT_BASE})"
        add("--base", metavar="DIR", default=DEFAULT_BASE, help=base)
        add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
        quick = "two steps, one seed, two cells: shows that it runs, its numbers mean nothing"
        add("--quick", action="store_true", help=quick)
        add("--seeds", type=int, default=3, help="(default: 3)")
        usual = "classroom/results" if out == RESULTS else out
        add("--out", type=Path, help=f"(default: {usual}; with --quick {QUICK})")
        if own_flags:
            own_flags(add)
        self.args = parser.parse_args(argv)
        self.out = self.args.out or (QUICK if self.args.quick else out)
        if self.args.seeds < 1:
            raise ValueError(f"--seeds {self.args.seeds}: give 1 or more")
        if self.args.quick and self.out.resolve() == RESULTS.resolve():
            held = f"{self.out} holds what was measured"
            raise ValueError(f"--quick measures nothing, and {held}: name another --out")
        self.name, self.question = Path(file).stem, doc.split("\n")[0]
        given = sys.argv[1:] if argv is None else argv
        self.command = " ".join(["python", f"classroom/{self.name}.py", *given])
        self.seeds = range(1 if self.args.quick else self.args.seeds)
        self.at_most = 10 if self.args.quick else None  # rows of a split
        self.file = self.out / f"{self.name}.json"
        self.runs = self.stored_runs()
        start_process()
        self.begin = time.perf_counter()
        self.device = pick_device(self.args.device)
        self.base(0)

    def grid(self, values: list) -> list:
        return values[:2] if self.args.quick else values

    def steps(self, steps: int) -> int:
        return 2 if self.args.quick else steps

    def base(self, seed: int) -> Path:
        """-> the small base of a seed, made where it is not there; or the --base of the user."""
        if seed == 0 or self.args.quick or Path(self.args.base) != DEFAULT_BASE:
            directory = Path(self.args.base)
        else:
            directory = Path("out/bases", str(seed))
        own = directory == DEFAULT_BASE or directory.parent == Path("out/bases")
        if own and not (directory / "config.json").exists():
            pretrain(directory, seed=seed, device=self.device)
        return directory

    def load(self, base: str | Path | None = None) -> tuple[tiktoken.Encoding, Decoder]:
        """-> the tokenizer and the frozen model of a base, or of --base."""
        base = base or self.args.base
        return load_tokenizer(base), load_base(base).to(self.device).requires_grad_(False)

    def prepared(
        self, examples: dict[str, list[data.Example]], method: str, seed: int,
        base: str | Path | None = None, n_virtual: int | None = None, lr: float | None = None,
        steps: int | None = None, batch_size: int = 16, looks: int = 1, chat: bool = False,
    ) -> Run:  # fmt: skip
        """-> a run, by default as in train.py; `looks` at the validation data, evenly spaced."""
        recipe, base = RECIPES[method], base or self.args.base
        tokenizer, model = self.load(base)
        model.requires_grad_(method == "full")
        examples = {split: some[: self.at_most] for split, some in examples.items()}
        template = load_chat_template(base) if chat else None
        rows = {split: data.encode(tokenizer, some, template) for split, some in examples.items()}
        P = n_virtual or recipe.n_virtual
        steps = self.steps(steps or STEPS)
        if method == "lora":
            add_lora(model, rank=P, seed=seed)
        kinds = ADAPTERS_OF.get(method, [])
        adapters = new_adapters(kinds, model, tokenizer, rows["train"], P, "text", seed=seed)
        block_size = model.config.block_size
        for split in rows:
            check_lengths(examples[split], rows[split], block_size, len(adapters) * P)
        plan = train.Plan(steps, lr or recipe.lr, batch_size, seed, max(1, steps // looks))
        return Run(model, adapters, rows, plan)

    def tuned(self, task: str, method: str, seed: int, n_virtual: int | None = None) -> Run:
        """-> a run after its training, on 1000 examples of a task and the base of its seed."""
        examples = load_examples(task, None, None, seed)
        run = self.prepared(examples, method, seed, self.base(seed), n_virtual)
        looks = looks_of(run)
        start, loss = looks[0]["validation"], looks[-1]["validation"]
        what = f"{task}, {method}, seed {seed}: validation loss {start:.3f} -> {loss:.4f}"
        say(f"{time.perf_counter() - self.begin:4.0f} s  {what}")
        return run._replace(loss=loss, exact=looks[-1]["exact_match"])

    def once(
        self, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """-> the run with these settings: a stored one, or one that is measured and stored now."""
        for run in self.runs:
            if settings.items() <= run.items():
                return run
        words = ", ".join(f"{key} {value}" for key, value in settings.items())
        say(f"{time.perf_counter() - self.begin:5.0f} s  {words}")
        run = settings | measure()
        self.runs = [*self.stored_runs(), run]  # another process may have stored some meanwhile
        self.store()
        return run

    def soonest(
        self, cell: dict[str, Any], measure: Callable[..., dict[str, Any]], middle: float,
        steps: int, steps_of_search: int,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """-> the reported runs of a cell: what `measure(**cell, seed, lr, most)` says of each.

        Their learning rate is the soonest on another base, data and start. There, a rate ends where
        an earlier one was done. If none is done, the lowest loss counts.
        """
        most = steps_of_search

        def run(seed: int, lr: float, most: int) -> dict[str, Any]:
            settings = cell | {"seed": seed, "lr": lr, "most": most}
            return self.once(settings, lambda: measure(**settings))

        def lateness(lr: float) -> float:
            nonlocal most
            found = run(UNREPORTED, lr, most)
            if not found["solved"]:
                return 1e6 * found["loss"]  # later than all that are done
            most = found["steps"]
            return most / steps

        lr = best_rate(middle, lateness)
        return [run(seed, lr, steps) for seed in self.seeds]

    def stored_runs(self) -> list[dict[str, Any]]:
        return read_json(self.file)["runs"] if self.file.exists() else []

    def store(self, **results: Any) -> None:
        head = {"question": self.question, "command": self.command, "seeds": list(self.seeds)}
        write_json(self.file, head | results | {"runs": self.runs})

    def report(
        self, header: list[str], rows: list[list[str]], draw: Callable[[Any], None], columns: int,
        size: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """Writes NAME.json, and the table to NAME.md; prints it, and draws NAME.png."""
        self.store(table=[dict(zip(header, row)) for row in rows])
        say(f"\n{self.question}\n\n{markdown(header, rows)}")
        replace_file(self.file.with_suffix(".md"), markdown(header, rows).encode())
        figure(self.out / f"{self.name}.png", draw, columns, size)
