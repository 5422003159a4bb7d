"""What the scripts here share: the path to the project, attention made visible, the runs of an experiment, JSON and figures."""

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
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiktoken  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from command.process import pick_device, say, start_process  # noqa: E402
from lora import add_lora  # noqa: E402
from llama import Llama  # noqa: E402
from model import Decoder, KVCache, attend, causal_mask  # noqa: E402
from storage.base import load_base  # noqa: E402
from storage.checkpoints import Curve  # noqa: E402
from storage.files import read_json, replace_file  # noqa: E402
from storage.tokenizers import load_tokenizer  # noqa: E402

NAMES = {"none": "frozen base", "soft_prompt": "soft prompt", "prefix": "prefix", "both": "prefix + soft prompt"}
NAMES |= {"lora": "LoRA", "full": "full fine-tuning"}
RECIPES = train.RECIPES | {"lora": train.Recipe((), 4, 1e-2, 150)}  # its length is a rank
RESULTS, QUICK = Path(__file__).parent / "results", Path("out/quick")


def attention(model: Decoder, idx: Tensor, past_kv: KVCache | None = None) -> Tensor:
    """(B, T) ids -> (L, B, H, T, S) attention weights: what each new token looks at, the past included.

    Written out as in the textbook. The model itself hardly ever has these numbers: fused attention does not form them.
    """
    weights = []

    def noted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # heads of a Llama share their keys
        scores = q @ shared.transpose(2, 3) / q.size(3) ** 0.5  # (B, H, T, S)
        mask = causal_mask(q.size(2), k.size(2), q.device)
        weights.append(scores.masked_fill(~mask, -torch.inf).softmax(dim=-1))
        return attend(q, k, v)

    with mock.patch.object(sys.modules[type(model.h[0].attn).__module__], "attend", noted):
        model(idx, past_kv)
    return torch.stack(weights)


def n_trainable(model: nn.Module, adapters: list[nn.Module]) -> int:
    return sum(p.numel() for part in (model, *adapters) for p in part.parameters() if p.requires_grad)


def forward(model: Decoder, adapters: list[nn.Module], batch: data.Batch) -> Tensor:
    """-> the mean loss over the targets of a batch, by the line that train.tune has."""
    n_targets = int((batch.targets != data.IGNORE).sum())
    return train.loss_of(model, batch, train.stacked_past_kv(adapters, model), n_targets)


def kept_for_backward(model: Decoder, compute: Callable[[], object]) -> int:
    """-> the bytes that autograd keeps from a forward pass until the backward pass, the model's own weights left out."""
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
    """-> the README's estimate of `kept_for_backward` in float32: B rows of T positions that are read, P virtual tokens."""
    c, (_, L, _, K, D) = model.config, model.kv_shape(P)
    a_position = 4 * c.n_embd + 2 * K * D + 3 * c.n_inner if isinstance(model, Llama) else 10 * c.n_embd
    mask = T * (P + T) * c.n_head // K  # one for all layers
    return 4 * L * (B * (T * a_position + P * 2 * K * D) + (P * a_position if soft else 0)) + 4 * mask


def lowest(loss: Callable[[int], float]) -> int:
    """The loss at each power of a factor -> the power with the lowest: of -1, 0 and 1, and beyond an edge while it is better
    than all others by a hundredth."""
    losses = {power: loss(power) for power in (-1, 0, 1)}
    for direction in (-1, 1):
        edge = direction
        while losses[edge] < 0.99 * min(value for power, value in losses.items() if power != edge):
            edge += direction
            losses[edge] = loss(edge)
    return min(losses, key=losses.get)


def rate(middle: float, power: int) -> float:
    """-> the learning rate that lies so many factors of three from the middle, to two digits."""
    return float(f"{middle * 3.0**power:.2g}")


def machine(device: torch.device) -> str:
    """-> what computes, in its own words: figures hold for one kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    linux = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", linux.read_text()) if linux.exists() else None  # on Arm, it has no name
    name = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def interleaved(functions: dict[Any, Callable[[], object]], turns: int) -> dict[Any, list[float]]:
    """-> the seconds of each function in each turn. They take turns, so that a slow moment meets them all; two more warm up."""
    times = {name: [] for name in functions}
    for _ in range(2 + turns):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if torch.cuda.is_available():  # what a GPU still has to do
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: taken[2:] for name, taken in times.items()}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """-> the mean, and the range where there is one."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{statistics.mean(values):.{digits}f}" + (f" [{low}–{high}]" if low != high else "")


def write_json(path: Path, found: dict[str, Any]) -> None:
    """One key a line, and one run a line: so the file can be read, and a change shows as the lines that changed."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in value) + "\n ]"
        return json.dumps(value, ensure_ascii=False)

    lines = ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in found.items())
    replace_file(path, f"{{\n{lines}\n}}\n".encode())


def figure(path: Path, draw: Callable[[Any], None], columns: int) -> None:
    """Draws into a row of axes, writes a legend of the first below them, and saves it; or says how to get matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        say(f"no figure: pip install -r {Path(__file__).parent / 'requirements.txt'} for {path}")
        return
    figure, axes = pyplot.subplots(1, columns, figsize=(max(6, 4 * columns), 4), squeeze=False, layout="constrained")
    draw(axes)
    handles, labels = axes[0][0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles))  # each once
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=3 if columns > 1 else 2)
    figure.savefig(path, dpi=150)  # for a projector
    pyplot.close(figure)
    say(f"figure: {path}")


def colour(label: str) -> str:
    """-> the colour of the method that a label begins with, one and the same in every figure."""
    method = max((name for name in NAMES.values() if label.startswith(name)), key=len, default=NAMES["none"])
    return f"C{list(NAMES.values()).index(method)}"


def band(axis: Any, xs: list[float], columns: list[list[float]], label: str, style: str = ".-") -> None:
    """Draws a line through the mean of each column, and a band from its least value to its greatest."""
    axis.plot(xs, [statistics.mean(column) for column in columns], style, label=label, color=colour(label))
    axis.fill_between(xs, list(map(min, columns)), list(map(max, columns)), color=colour(label), alpha=0.2)


class Run(NamedTuple):
    """A training, ready to go or done, on a base of its own."""

    model: Decoder
    adapters: list[nn.Module]
    rows: dict[str, list[data.Row]]
    plan: train.Plan
    loss: float = 0.0  # on the validation data, after the last step
    exact: float = 0.0  # percentage of the validation rows that it then answers exactly


def quietly_tuned(model: Decoder, adapters: list[nn.Module], rows: dict[str, list[data.Row]], plan: train.Plan) -> Curve:
    """As train.tune, without a word; a loss that is no number counts as an infinite one."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return train.tune(model, adapters, rows, plan)
        except train.Diverged:
            return [(0, math.inf), (plan.steps, math.inf)]


def fit(run: Run) -> tuple[Curve, float]:
    """Trains as train.tune does, but ends when all validation answers are right -> validation losses, right ones in percent."""
    trainee, plan, curve = nn.ModuleList(run.adapters or [run.model]), run.plan, []
    optimizer = torch.optim.AdamW(trainee.parameters(), weight_decay=0.0)
    batches = islice(data.shuffled_batches(run.rows["train"], plan.batch_size, plan.seed), plan.steps)
    for step, rows in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = plan.rate(step)
        optimizer.zero_grad()
        forward(run.model, run.adapters, data.batch_of(rows, run.model.device)).backward()
        optimizer.step()
        if step % plan.eval_every == 0 or step == plan.steps:
            loss, hits = train.evaluate(run.model, run.adapters, run.rows["validation"], 50)
            curve.append((step, loss if math.isfinite(loss) else math.inf))
            if all(hits) or not math.isfinite(loss):
                break
    return curve, train.share(hits)


class Experiment:
    """The command line of an experiment, its runs, and its report: a JSON file, a table and a figure."""

    def __init__(
        self, file: str, doc: str, argv: list[str] | None, own_flags: Callable[[Callable], None] | None = None,
        out: Path = RESULTS,
    ):  # fmt: skip
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        add = parser.add_argument
        add("--base", default=train.DEFAULT_BASE, help=f"Hugging Face directory, or a name (default: {train.DEFAULT_BASE})")
        add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
        add("--quick", action="store_true", help="two steps, one seed, a grid of two: meaningless numbers, shows that it runs")
        add("--seeds", type=int, default=3, help="(default: 3)")
        add("--out", type=Path, help=f"(default: {'classroom/results' if out == RESULTS else out}; with --quick {QUICK})")
        if own_flags:
            own_flags(add)
        self.args = parser.parse_args(argv)
        self.out = self.args.out or (QUICK if self.args.quick else out)
        if self.args.seeds < 1:
            raise ValueError(f"--seeds {self.args.seeds}: give 1 or more")
        if self.args.quick and self.out.resolve() == RESULTS.resolve():
            raise ValueError(f"--quick measures nothing, and {self.out} holds what was measured: name another --out")
        self.name, self.question = Path(file).stem, doc.split("\n")[0]
        self.command = " ".join(["python", f"classroom/{self.name}.py", *(sys.argv[1:] if argv is None else argv)])
        self.seeds = range(1 if self.args.quick else self.args.seeds)
        self.at_most = 10 if self.args.quick else None  # rows of a split
        self.file = self.out / f"{self.name}.json"
        self.runs: list[dict[str, Any]] = read_json(self.file)["runs"] if self.file.exists() else []
        start_process()
        self.begin, self.device = time.perf_counter(), pick_device(self.args.device)
        self.base(0)

    def grid(self, values: list) -> list:
        return values[:2] if self.args.quick else values

    def steps(self, steps: int) -> int:
        return 2 if self.args.quick else steps

    def base(self, seed: int) -> Path:
        """-> the small base of a seed, made where it is not there; that of seed 0 is --base."""
        own = Path("out/bases", str(seed)) if seed else train.DEFAULT_BASE
        directory = Path(self.args.base) if seed == 0 or self.args.quick else own
        if directory == own and not (own / "config.json").exists():
            train.main(["--method", "pretrain", "--out", str(own), "--seed", str(seed), "--device", str(self.device)])
        return directory

    def load(self, base: str | Path | None = None) -> tuple[tiktoken.Encoding, Decoder]:
        base = base or self.args.base
        return load_tokenizer(base), load_base(base).to(self.device).freeze()

    def prepared(
        self, examples: dict[str, list[data.Example]], method: str, seed: int, base: str | Path | None = None,
        n_virtual: int | None = None, lr: float | None = None, steps: int | None = None, batch_size: int = 16, looks: int = 1,
    ) -> Run:  # fmt: skip
        """-> a run; what is not given is as in train.py. `looks` says how often the validation data are looked at."""
        recipe, (tokenizer, model) = RECIPES[method], self.load(base)
        model.requires_grad_(method == "full")
        examples = {split: some[: self.at_most] for split, some in examples.items()}
        rows = {split: data.encode(tokenizer, some) for split, some in examples.items()}
        P, steps = n_virtual or recipe.n_virtual, self.steps(steps or recipe.steps)
        if method == "lora":
            add_lora(model, rank=P, seed=seed)
        adapters = train.new_adapters(recipe.adapters, model, tokenizer, rows["train"], P, "text", seed=seed)
        for split in rows:
            data.check_lengths(examples[split], rows[split], model.config.block_size, len(adapters) * P)
        every = max(1, steps // looks)
        return Run(model, adapters, rows, train.Plan(steps, lr or recipe.lr, batch_size, seed, every, every))

    def tuned(self, task: str, method: str, seed: int, n_virtual: int | None = None) -> Run:
        """-> a run after its training, on 1000 examples of a task."""
        run = self.prepared(train.load_examples(task, None, None, seed), method, seed, n_virtual=n_virtual)
        (_, start), *_, (_, loss) = quietly_tuned(run.model, run.adapters, run.rows, run.plan)
        _, exact = train.evaluate(run.model, run.adapters, run.rows["validation"], 50)
        what = f"{task}, {method}, seed {seed}: validation loss {start:.3f} -> {loss:.4f}"
        say(f"{time.perf_counter() - self.begin:4.0f} s  {what}")
        return run._replace(loss=loss, exact=train.share(exact))

    def once(self, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """-> the run with these settings: a stored one, or one that is measured now, and stored."""
        for run in self.runs:
            if settings.items() <= run.items():
                return run
        say(f"{time.perf_counter() - self.begin:5.0f} s  " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        self.runs.append(settings | measure())
        self.store()
        return self.runs[-1]

    def store(self, **found: Any) -> None:
        head = {"question": self.question, "command": self.command, "seeds": list(self.seeds)}
        write_json(self.file, head | found | {"runs": self.runs})

    def report(self, header: list[str], rows: list[list[str]], draw: Callable[[Any], None], columns: int) -> None:
        """Writes the table and the runs to NAME.json, the table to NAME.md, prints it, draws NAME.png, a row of panels."""
        self.store(table=[dict(zip(header, row)) for row in rows])
        say(f"\n{self.question}\n\n{markdown(header, rows)}")
        replace_file(self.file.with_suffix(".md"), markdown(header, rows).encode())
        figure(self.out / f"{self.name}.png", draw, columns)
