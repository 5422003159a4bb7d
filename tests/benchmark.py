"""The same work here and in PEFT: same weights, same adapter, same batch, in one process, by turns.

    python tests/benchmark.py                         the small base, GPT-2 small and SmolLM2-135M
    python tests/benchmark.py --sizes 124M --P 5 100  some of it; other rows of the JSON file stay
    python tests/benchmark.py --growth                how time and memory grow
    python tests/benchmark.py --draw                  the figure, of what is stored

Weights are random. It needs the peers: pip install -r tests/requirements.txt. On a GPU it takes
batches of 32, and writes tests/benchmark-<gpu>.json. A time is the median of 15 turns, in each of
which all that is compared takes part. For growth there are 5 turns, and 3 for texts above 1,000
tokens. The *floor* is the time of the matrix products that no step can avoid. The rest of a step is
attention, norms, GELU, loss, AdamW and Python.
"""

import argparse
import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MKL_CBWR"] = "AUTO"  # start_process asks for STRICT, which slows products of one row
sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))

import torch  # noqa: E402
from common import (  # noqa: E402
    forward,
    interleaved,
    kept_by_formula,
    kept_for_backward,
    machine,
    write_json,
)
from torch import Tensor, nn  # noqa: E402

import data  # noqa: E402
from command.models import ADAPTERS_OF  # noqa: E402
from command.process import pick_device  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from model import GPT, Decoder, GPTConfig, rows_of  # noqa: E402
from prefix import Prefix  # noqa: E402
from small_base.pretrain import pretrain  # noqa: E402
from storage.base import LLAMA, load_base, save_base  # noqa: E402
from storage.files import read_json  # noqa: E402

SIZES = {
    "small": GPTConfig(950),
    "124M": GPTConfig(50257, 1024, 12, 12, 768),
    "135M": LlamaConfig(
        49152, 8192, 30, 9, 3, 576, 1536, 64, rope_theta=100000.0, rms_norm_eps=1e-5
    ),  # SmolLM2
    "355M": GPTConfig(50257, 1024, 24, 16, 1024),
    "774M": GPTConfig(50257, 1024, 36, 20, 1280),
    "1.5B": GPTConfig(50257, 1024, 48, 25, 1600),
}
COMPARED = ["small", "124M", "135M"]
SOURCE, TARGET, NEW = 45, 30, 64  # tokens: the shape of the E2E benchmark; and how many to generate
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
DEVICE = pick_device(None)
CUDA = DEVICE.type == "cuda"

# -------------------------------------------------------------------------------- what is compared


def random_model(size: str) -> Decoder:
    torch.manual_seed(0)
    model = Llama(SIZES[size]) if isinstance(SIZES[size], LlamaConfig) else GPT(SIZES[size])
    for parameter in model.parameters() if isinstance(model, Llama) else []:
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.04)
    return model


def make_base(root: Path, size: str) -> None:
    """Random weights, in each dtype in which they are used."""
    c, model = SIZES[size], random_model(size)
    llama = isinstance(model, Llama)
    config = None
    if llama:
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        config |= {"tie_word_embeddings": True, "rope_theta": c.rope_theta}
        for key, value in LLAMA.items():
            config[key] = getattr(c, value) if isinstance(value, str) else value[0]
    for dtype in (FLOAT32, BFLOAT16):
        save_base(model.to(dtype), base_directory(root, size, dtype), config)


def base_directory(root: Path, size: str, dtype: torch.dtype) -> Path:
    return root / f"{size}-{dtype}"


def ours(model: Decoder, method: str, P: int) -> tuple[Decoder, nn.Module]:
    """-> a model of ours, frozen, and an adapter of random numbers on it."""
    (kind,) = ADAPTERS_OF[method]
    model = model.to(DEVICE).requires_grad_(False)
    return model, kind.random(model, P, torch.Generator().manual_seed(0))


def theirs(directory: Path, method: str, adapter: nn.Module | None = None, P: int = 0) -> nn.Module:
    """-> transformers' model of the same files in PEFT's adapter, of the same numbers if given."""
    import peft
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = (
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").to(DEVICE).eval()
    )
    base.generation_config.eos_token_id = None  # so that it goes on to the last token
    kind = {"prefix": peft.PrefixTuningConfig, "soft_prompt": peft.PromptTuningConfig}[method]
    P = P or len(next(adapter.parameters()))
    model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=P))
    if adapter:
        rows = next(adapter.parameters()).detach().flatten(1).clone()
        model.prompt_encoder["default"].embedding.weight.data = rows
    return model.to(DEVICE)


def random_rows(size: str, B: int, T: int = SOURCE + TARGET) -> list[data.Row]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SIZES[size].vocab_size, (B, T), generator=generator)
    return [data.Row(row[:-TARGET], row[-TARGET:]) for row in ids.tolist()]


def their_loss(model: nn.Module, rows: list[data.Row]) -> Callable[[], Tensor]:
    idx = torch.tensor([row.source + row.target for row in rows], device=DEVICE)
    labels = [[data.IGNORE] * len(row.source) + row.target for row in rows]
    labels = torch.tensor(labels, device=DEVICE)
    return lambda: model(input_ids=idx, labels=labels).loss


def step(trained: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], float]:
    """-> one training step: forward, backward, AdamW on what is trainable."""
    trainable = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)

    def one() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return one


def products(
    size: str, method: str, P: int, B: int, T: int = SOURCE + TARGET
) -> list[tuple[int, int, int]]:
    """-> (rows, in, out) of each product with weights in a forward pass. Backward has as many.

    Blocks work at all positions that are read, the vocabulary at the targets alone. A soft prompt
    counts once a batch.
    """
    c, n = SIZES[size], B * (T - 1) + (P if method == "soft_prompt" else 0)
    C = c.n_embd
    if isinstance(c, LlamaConfig):
        Q, K = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        block = [
            (n, C, Q),
            (n, C, K),
            (n, C, K),
            (n, Q, C),
            (n, C, c.n_inner),
            (n, C, c.n_inner),
            (n, c.n_inner, C),
        ]
    else:
        block = [(n, C, 3 * C), (n, C, C), (n, C, 4 * C), (n, 4 * C, C)]
    return c.n_layer * block + [(B * TARGET, C, c.vocab_size)]


def floor(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> Callable[[], None]:
    """-> just these products, each with its own weight: x Wᵀ forward, g W backward."""
    new = partial(torch.randn, device=DEVICE, dtype=dtype)
    others = {
        (n, size): new(n, size) for n, i, o in shapes for size in (i, o)
    }  # of long texts, more of them would not fit
    weights = [new(o, i) for _, i, o in shapes]

    def one() -> None:
        for (n, i, o), weight in zip(shapes, weights):
            others[n, i] @ weight.T
            others[n, o] @ weight

    return one


# ------------------------------------------------------------------------------ how it is measured


def seconds(
    contestants: dict[object, Callable[[], object]], turns: int = 15
) -> tuple[dict[object, float], float]:
    """-> the median time of each, and the first's distance of quartiles as a share of it."""
    times = interleaved(contestants, turns)
    low, middle, high = quantiles(next(iter(times.values())), n=4)
    return {name: median(taken) for name, taken in times.items()}, (high - low) / middle


def peak(side: str, directory: Path, size: str, method: str, P: int, B: int) -> float:
    """-> MB at most, of the card or the machine, in a process that trains one side three steps."""
    command = [
        sys.executable,
        __file__,
        "--peak",
        side,
        str(directory),
        size,
        method,
        str(P),
        str(B),
    ]
    return float(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    )


def peak_of_this_process(
    side: str, directory: str, size: str, method: str, P: str, B: str
) -> float:
    rows = random_rows(size, int(B))
    if side == "here":
        model, trained = ours(load_base(directory), method, int(P))
        one = step(trained, partial(forward, model, [trained], data.batch_of(rows, DEVICE)))
    else:
        trained = theirs(Path(directory), method, P=int(P))
        one = step(trained, their_loss(trained, rows))
    for _ in range(3):
        one()
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e6
    return (
        int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3
    )  # ru_maxrss counts the parent


# ---------------------------------------------------------------------------------------- the rows


class Table:
    """Prints each row as it is measured, and keeps it in a file. It replaces an earlier one."""

    def __init__(self, path: Path, device: str):
        self.path = path
        self.found = read_json(path) if path.exists() else {}
        if self.found.get("device") != device:
            self.found = {"device": device, "torch": torch.__version__}
        print(f"{'':58}{'here':>9}{'PEFT':>9}{'floor':>9}   here/PEFT  here/floor")

    def add(
        self,
        what: str,
        unit: str,
        here: float,
        peft: float = 0,
        floor: float = 0,
        **more: float | str,
    ) -> None:
        row = {"what": what, "unit": unit, "here": here, "peft": peft, "floor": floor} | more
        kind = "growth" if "axis" in row else "comparison"
        self.found[kind] = [
            other for other in self.found.get(kind, []) if other["what"] != what
        ] + [row]
        write_json(self.path, self.found)
        cells = "".join(f"{value:9.1f}" if value else f"{'':9}" for value in (here, peft, floor))
        ratios = "".join(
            f"{here / value:12.2f}" if value else f"{'':12}" for value in (peft, floor)
        )
        extra = "  ".join(
            f"{key} {value if isinstance(value, str) else round(value, 2)}"
            for key, value in more.items()
        )
        print(f"{f'{what}, {unit}':58}{cells}{ratios}  {extra}", flush=True)


def compare(
    table: Table, root: Path, size: str, method: str, P: int, B: int,
    peak_flops: dict[torch.dtype, float], compiling: bool,
) -> None:  # fmt: skip
    """One training step in both dtypes here and in PEFT, its floor, and what it keeps in memory."""
    rows, shapes = random_rows(size, B), products(size, method, P, B)
    batch, contestants, kept, compiled_in = data.batch_of(rows, DEVICE), {}, {}, {}
    for dtype in (FLOAT32, BFLOAT16):
        directory = base_directory(root, size, dtype)
        model, adapter = ours(load_base(directory), method, P)
        peer = theirs(directory, method, adapter)
        sides = partial(forward, model, [adapter], batch), their_loss(peer, rows)
        a, b = (loss_of().item() for loss_of in sides)
        assert abs(a - b) < (1e-4 if dtype == FLOAT32 else 2e-2) * b, (
            f"losses differ: {a} here, {b} in PEFT"
        )
        contestants["here", dtype], contestants["peft", dtype] = map(step, (adapter, peer), sides)
        contestants["floor", dtype] = floor(shapes, dtype)
        if compiling:
            compiled, its_adapter = ours(load_base(directory), method, P)
            for block in compiled.h:  # not the model, for so the code of one block serves them all
                block.compile()
            contestants["compiled", dtype] = step(
                its_adapter, partial(forward, compiled, [its_adapter], batch)
            )
            begin = time.perf_counter()
            contestants["compiled", dtype]()
            compiled_in[dtype] = time.perf_counter() - begin
        kept[dtype] = [kept_for_backward(*way) / 1e6 for way in zip((model, peer), sides)]
    taken, spread = seconds(contestants)
    if P == 20:
        whole = load_base(base_directory(root, size, FLOAT32)).to(DEVICE)
        pair = {
            "here": contestants["here", FLOAT32],
            "full": step(whole, partial(forward, whole, [], batch)),
        }
        against_full, _ = seconds(pair)
    for dtype in kept:
        name = f"{size} {method} P={P} {str(dtype).removeprefix('torch.')}"
        here, floor_seconds = taken["here", dtype], taken["floor", dtype]
        operations = sum(
            4 * n * i * o for n, i, o in shapes
        )  # a product and a sum, forward and backward
        more = {
            "tokens/s": B * (SOURCE + TARGET) / here,
            "share of peak": operations / here / peak_flops[dtype],
        }
        if dtype == BFLOAT16:
            more["/float32"] = here / taken["here", FLOAT32]
        elif P == 20:
            more["/full"] = against_full["here"] / against_full["full"]
        if compiling:
            more |= {
                "compiled, ms": 1e3 * taken["compiled", dtype],
                "s to compile": compiled_in[dtype],
            }
        more["spread"] = spread
        table.add(
            f"{name} step",
            "ms",
            1e3 * here,
            1e3 * taken["peft", dtype],
            1e3 * floor_seconds,
            **more,
        )
        table.add(f"{name} kept for backward", "MB", *kept[dtype])
        if P == 20:
            sides = (
                peak(side, base_directory(root, size, dtype), size, method, P, B)
                for side in ("here", "peft")
            )
            table.add(f"{name} peak memory", "MB", *sides)


def compare_generation(table: Table, root: Path, size: str, P: int) -> None:
    """Greedy tokens a second behind a prefix. Both dtypes are measured by PEFT in float32."""
    models = {
        dtype: ours(load_base(base_directory(root, size, dtype)), "prefix", P)
        for dtype in (FLOAT32, BFLOAT16)
    }
    peer = theirs(base_directory(root, size, FLOAT32), "prefix", models[FLOAT32][1])
    for B in (1, 16):
        idx = torch.tensor([row.source for row in random_rows(size, B)], device=DEVICE)
        own = {
            dtype: lambda m=m, a=a: m.generate(idx, NEW, a.past_kv(m))
            for dtype, (m, a) in models.items()
        }
        their = lambda: peer.generate(
            input_ids=idx, attention_mask=torch.ones_like(idx), max_new_tokens=NEW, do_sample=False
        )  # noqa: E731
        assert own[FLOAT32]().shape == their().shape == (B, SOURCE + NEW)
        taken, spread = seconds(own | {"peft": their})
        for dtype in own:
            name = f"{size} prefix P={P} {str(dtype).removeprefix('torch.')} generation, {B} rows"
            table.add(
                name, "tokens/s", B * NEW / taken[dtype], B * NEW / taken["peft"], spread=spread
            )


def compare_many(table: Table, root: Path, size: str, P: int, B: int = 32) -> None:
    """Generation with a prefix for each row against one for all, and the time to change one."""
    for dtype in (FLOAT32, BFLOAT16):
        model = ours(load_base(base_directory(root, size, dtype)), "prefix", P)[0]
        prefixes = [Prefix.random(model, P, torch.Generator().manual_seed(i)) for i in range(B)]
        idx = torch.tensor([row.source for row in random_rows(size, B)], device=DEVICE)
        with torch.no_grad():
            one, many = (
                prefixes[0].past_kv(model),
                rows_of([prefix.past_kv(model) for prefix in prefixes]),
            )
        sides = {
            name: partial(model.generate, idx, NEW, past_kv)
            for name, past_kv in (("one", one), ("many", many))
        }
        taken, spread = seconds(
            sides | {"switch": torch.no_grad()(partial(prefixes[1].past_kv, model))}
        )
        name = f"{size} prefix P={P} {str(dtype).removeprefix('torch.')} generation, {B} rows"
        more = {
            "/one for all": taken["many"] / taken["one"],
            "MB an adapter": 4 * prefixes[0].start.numel() / 1e6,
        }
        table.add(
            f"{name} with {B} prefixes", "tokens/s", B * NEW / taken["many"], **more, spread=spread
        )
        table.add(f"{name}: another prefix", "ms", 1e3 * taken["switch"], spread=spread)


def grow_to(table: Table, axis: str, value: int | str) -> None:
    """A step in float32 of SmolLM2's size with P 20, T 75 and B 10, but for one of these.

    Of long texts, the batch is one.
    """
    at = {"size": "135M", "P": 20, "T": SOURCE + TARGET, "B": 1 if axis == "T" else 10} | {
        axis.split(",")[0]: value
    }
    at["method"] = "soft_prompt" if "soft" in axis else "prefix"
    model, adapter = ours(random_model(at["size"]), at["method"], at["P"])
    batch = data.batch_of(random_rows(at["size"], at["B"], at["T"]), DEVICE)
    contestants = {
        "here": step(adapter, partial(forward, model, [adapter], batch)),
        "floor": floor(products(**at), FLOAT32),
    }
    taken, spread = seconds(contestants, turns=5 if at["T"] <= 1000 else 3)
    x = sum(p.numel() for p in model.parameters()) if axis == "size" else value
    kept = {"kept_mb": kept_for_backward(model, partial(forward, model, [adapter], batch)) / 1e6}
    kept["formula_mb"] = kept_by_formula(model, at["P"], at["B"], at["T"] - 1, "soft" in axis) / 1e6
    more = {"axis": axis, "x": x} | kept | {"spread": spread}
    table.add(
        f"growth, {axis} = {value}: step",
        "ms",
        1e3 * taken["here"],
        floor=1e3 * taken["floor"],
        **more,
    )


def grow(table: Table, root: Path, sizes: list[str]) -> None:
    """How a step grows along one axis at a time, and how fast the small base is made."""
    P = (1, 16, 64, 256, 1000)
    axes = {
        "P": P,
        "P, soft prompt": P,
        "B": (1, 4, 16, 64),
        "size": sizes,
        "T": (75, 300, 1000, 4000, 8000),
    }  # by memory
    for axis, value in ((axis, value) for axis, values in axes.items() for value in values):
        grow_to(table, axis, value)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pretrain(root / "pretrained", steps=40, device=DEVICE)
    speed = re.findall(r"([\d,]+) tokens/s", printed.getvalue())[-1]
    table.add("pretraining of the small base", "tokens/s", float(speed.replace(",", "")))


def draw(rows: list[dict], path: Path) -> None:
    """Draws bars of here against PEFT: the time of a step, and the memory at its peak."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no figure: matplotlib is not installed")
    by_name = {row["what"]: row for row in rows}
    cases = list(itertools.product(("124M", "135M"), ("prefix", "soft_prompt")))
    names = {"124M": "GPT-2 small", "135M": "SmolLM2-135M"}
    pictures = {"step": "milliseconds a step, float32", "peak memory": "MB at the peak, float32"}
    figure, subplots = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for subplot, (what, title) in zip(subplots, pictures.items()):
        found = [by_name[f"{size} {method} P=20 float32 {what}"] for size, method in cases]
        for side, key, colour in ((-0.2, "here", "C2"), (0.2, "peft", "silver")):
            places = [place + side for place in range(len(cases))]
            bars = subplot.barh(places, [row[key] for row in found], 0.4, color=colour, label=key)
            subplot.bar_label(bars, fmt="{:,.0f}", padding=3)
        labels = [f"{names[size]}\n{method.replace('_', ' ')} of 20" for size, method in cases]
        subplot.set_yticks(range(len(cases)), labels)
        subplot.invert_yaxis()
        subplot.margins(x=0.15)
        subplot.set_xticks([])
        subplot.spines[["top", "right", "bottom"]].set_visible(False)
        subplot.set_title(title)
    subplots[1].set_yticks([])
    figure.legend(["here", "PEFT"], loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def matmul_peak(dtype: torch.dtype) -> float:
    """-> the operations a second of a large square product: what a step could reach."""
    n = 8192 if CUDA else 2048
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / seconds({"product": lambda: a @ b})[0]["product"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, help=f"(default: {' '.join(COMPARED)}; for growth all)"
    )
    parser.add_argument(
        "--P", nargs="+", type=int, default=[20], help="virtual tokens (default: 20)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also with each block compiled by torch.compile"
    )
    parser.add_argument("--growth", action="store_true", help="growth in place of the comparison")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what is stored")
    parser.add_argument("--peak", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return print(peak_of_this_process(*args.peak))
    if args.draw:
        stored = Path(__file__).with_name("benchmark.json")
        return draw(read_json(stored)["comparison"], stored.with_suffix(".png"))
    name = machine(DEVICE)
    path = Path(__file__).with_name(
        f"benchmark-{name.replace(' ', '-')}.json" if CUDA else "benchmark.json"
    )
    table = Table(path, name)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.growth:
            grow(table, root, args.sizes or list(SIZES))
        else:
            peaks = {dtype: matmul_peak(dtype) for dtype in (FLOAT32, BFLOAT16)}
            for size in args.sizes or COMPARED:
                make_base(root, size)
                for method, P in itertools.product(("prefix", "soft_prompt"), args.P):
                    compare(table, root, size, method, P, 32 if CUDA else 10, peaks, args.compile)
                compare_generation(table, root, size, P=20)
                compare_many(table, root, size, P=20)


if __name__ == "__main__":
    main()
