"""What the scripts here share: the path to the project, attention made visible, the runs of an experiment, JSON and figures."""

import argparse
import atexit
import contextlib
import copy
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402, F401  (it makes the sums of torch reproducible)
from model import GPT, KVCache, causal_mask, rows_of  # noqa: E402, F401
from prefix import Prefix  # noqa: E402, F401
from soft_prompt import SoftPrompt  # noqa: E402, F401


def attention(model: GPT, idx: Tensor, past_kv: KVCache | None = None) -> Tensor:
    """(B, T) ids -> (L, B, H, T, S) attention weights: what each new token looks at, the past included.

    Written out as in the textbook. The model itself hardly ever has these numbers: fused attention does not form them.
    """
    queries = []
    hooks = [block.attn.c_attn.register_forward_hook(lambda _, __, qkv: queries.append(qkv)) for block in model.h]
    _, cache = model(idx, past_kv)
    for hook in hooks:
        hook.remove()
    weights = []
    for qkv, (k, _) in zip(queries, cache):
        B, _, S, D = k.shape
        q = qkv[..., : model.config.n_embd].view(*idx.shape, -1, D).transpose(1, 2)  # (B, H, T, D)
        scores = q @ k.transpose(2, 3) / D**0.5  # (B, H, T, S)
        mask = causal_mask(idx.size(1), S, idx.device)
        weights.append(scores.masked_fill(~mask, -torch.inf).softmax(dim=-1))
    return torch.stack(weights)


@torch.no_grad()
def moved(model: GPT, n: int) -> GPT:
    """-> the model with its positions moved: a text with nothing in front is where n virtual tokens would have put it."""
    model = copy.deepcopy(model)
    model.wpe.weight.copy_(model.wpe.weight.roll(-n, dims=0))
    return model


def gradients(model: GPT, adapters: list[torch.nn.Module], batch: data.Batch) -> Tensor:
    """-> the mean loss over the targets of a batch; its gradients are computed, by the lines that train.tune has."""
    hidden, targets = train.target_hidden(model, batch, train.stacked_past_kv(adapters, model))
    return train.backward(model, hidden, targets, len(targets))


def forward(model: GPT, adapters: list[torch.nn.Module], batch: data.Batch) -> tuple[Tensor, Tensor]:
    """-> hidden states at the target positions, and the loss of the first part of them: when a training step holds most."""
    hidden, targets = train.target_hidden(model, batch, train.stacked_past_kv(adapters, model))
    logits, ids = next(train.logits_in_parts(model, hidden, targets))
    return hidden, torch.nn.functional.cross_entropy(logits, ids)


def kept_for_backward(model: GPT, compute: Callable[[], object]) -> int:
    """-> the bytes that autograd keeps from a forward pass until the backward pass, the model's own weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # several tensors may be views of one; it is kept once
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()  # held, so that no address comes twice
    del result
    return sum(size for address, size in kept.items() if address not in weights)


def finish() -> None:
    """Waits for what a GPU still has to do, so that a clock can be read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """-> the mean, and the range where there is one."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{statistics.mean(values):.{digits}f}" + (f" [{low}–{high}]" if low != high else "")


def write_json(path: Path, found: Any) -> None:
    with data.replaced_file(path) as new:
        new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def figure(path: Path, draw: Callable[[Any], None], columns: int, rows: int = 1) -> None:
    """Draws into a grid of axes and saves it, or says how to get matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"no figure: pip install -r {Path(__file__).parent / 'requirements.txt'} for {path}")
        return
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    draw(axes)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    print(f"figure: {path}")


def band(axis: Any, xs: list[float], columns: list[list[float]], label: str) -> None:
    """Draws a line through the mean of each column, and a band from its least value to its greatest."""
    (line,) = axis.plot(xs, [statistics.mean(column) for column in columns], marker=".", label=label)
    axis.fill_between(xs, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.2)


class Experiment:
    """The command line of an experiment, its runs, and its report: a table, a JSON file and a figure.

    What train.py understands goes to every run, except what the experiment itself varies.
    """

    def __init__(self, file: str, doc: str, argv: list[str] | None):
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="two steps, one seed, a grid of two: only shows that it runs")
        parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
        parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="(default: classroom/results)")
        self.args, self.flags = parser.parse_known_args(argv)
        if self.args.seeds < 1:
            raise ValueError(f"--seeds {self.args.seeds}: give 1 or more")
        self.name, self.question = Path(file).stem, doc.split("\n")[0]
        self.command = " ".join(["python", f"classroom/{self.name}.py", *(sys.argv[1:] if argv is None else argv)])
        self.seeds = range(1 if self.args.quick else self.args.seeds)
        self.at_most = 10 if self.args.quick else None  # rows of a split
        self.runs: list[dict[str, Any]] = []  # what was measured, seed by seed
        self.folder, self.begin = Path(tempfile.mkdtemp()), time.perf_counter()
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        train.make_base(self.parse())

    def grid(self, values: list) -> list:
        return values[:2] if self.args.quick else values

    def parse(self, *own: Any) -> argparse.Namespace:
        """-> the settings of a run: the experiment's own flags last, so that they hold."""
        return train.parse([*self.flags, *map(str, own), *(["--steps", "2"] if self.args.quick else [])])

    def tuned(self, *own: Any, seed: int) -> tuple[train.Run, list[tuple[int, float]]]:
        """-> a run after its training, and its validation loss at the start and at the end."""
        args = self.parse(*own, "--seed", seed)
        args.out, args.eval_every, args.save_every = self.folder / "run", args.steps, args.steps
        run = train.prepare(args, *train.load_base(args))
        run = run._replace(rows={split: rows[: self.at_most] for split, rows in run.rows.items()})
        with contextlib.redirect_stdout(io.StringIO()):
            curve = train.tune(run, args)
        seconds = time.perf_counter() - self.begin
        what = f"{run.task}, {args.method} of {args.n_virtual}, {len(run.rows['train'])} examples, rate {args.lr:g}, seed {seed}"
        print(f"{seconds:4.0f} s  {what}: validation loss {curve[0][1]:.3f} -> {curve[-1][1]:.4f}", flush=True)
        return run, curve

    def examples(self, task: str, n: int, subset: int) -> list[str]:
        """-> the flags for n training examples of an embedded task, and 200 of its validation split."""
        flags = []
        for flag, split, size, seed in [("--data", "train", n, subset), ("--val-data", "validation", 200, 0)]:
            path = self.folder / split / f"{task}.jsonl"
            path.parent.mkdir(exist_ok=True)
            lines = [json.dumps(example._asdict()) for example in data.task_examples(task, split, size, seed)]
            path.write_text("\n".join(lines), encoding="utf-8")
            flags += [flag, str(path)]
        return flags

    def measured(self, key: str, **where: Any) -> list[Any]:
        """-> one measured value of those runs that agree with `where`, a value a seed."""
        return [run[key] for run in self.runs if all(run[name] == value for name, value in where.items())]

    def report(self, header: list[str], rows: list[list[str]], draw: Callable[[Any], None], *grid: int) -> None:
        """Prints the table, writes it and the runs to NAME.json, and draws NAME.png, a grid of (columns, rows) panels."""
        print(f"\n{self.question}\n\n{markdown(header, rows)}")
        found = {"question": self.question, "command": self.command, "seeds": list(self.seeds)}
        found |= {"seconds": round(time.perf_counter() - self.begin), "table": [dict(zip(header, row)) for row in rows]}
        write_json(self.args.out / f"{self.name}.json", found | {"runs": self.runs})
        figure(self.args.out / f"{self.name}.png", draw, *grid)
