"""The same work here and in PEFT: same weights, same adapter, same batch, in one process, by turns.

    python tests/benchmark.py                         GPT-2 small and SmolLM2-135M, as this machine
    python tests/benchmark.py --sizes 124M --P 20     some of it; other rows of the file stay
    python tests/benchmark.py --draw tests/benchmark-AVX2.json      bars of stored rows
    python tests/benchmark.py --memory 135M --P 20 --tokens 2000    the peak of one training

Weights are random. It needs the peers: pip install -r tests/requirements.txt. A time is the median
of 5 turns, in each of which both methods and both sides take part. The *floor* is the time of the
matrix products that no step can avoid. The rest of a step is attention, norms, GELU, loss, AdamW
and Python. Rows go into tests/benchmark-KIND.json, with AVX2, AVX512 or the GPU's name as KIND, in
bfloat16 too where the processor multiplies it. On a GPU, batches have 32 rows.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MKL_CBWR"] = "AUTO"  # start_process asks for STRICT, which slows products of one row
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py has it
sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))

import torch  # noqa: E402
from common import forward, interleaved, kept_for_backward, machine, write_json  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import data  # noqa: E402
from command.models import ADAPTERS_OF  # noqa: E402
from command.process import pick_device, seconds_of_a_product  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from model import GPT, Decoder, GPTConfig, rows_of  # noqa: E402
from prefix import Prefix  # noqa: E402
from storage.base import LLAMA, load_base, save_base  # noqa: E402
from storage.files import read_json  # noqa: E402

SMOLLM2 = LlamaConfig(
    49152, 8192, 30, 9, 3, 576, 1536, 64, rope_theta=100000.0, rms_norm_eps=1e-5
)  # fmt: skip
SIZES = {
    "small": GPTConfig(612),
    "124M": GPTConfig(50257, 1024, 12, 12, 768),
    "135M": SMOLLM2,
    "1.5B": GPTConfig(50257, 1024, 48, 25, 1600),
}
COMPARED = ["124M", "135M"]
SOURCE, TARGET, NEW = 45, 30, 64  # tokens: the shape of the E2E benchmark; and how many to generate
TURNS = 5
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
DEVICE = pick_device(None)
CUDA = DEVICE.type == "cuda"
B = 32 if CUDA else 10

# -------------------------------------------------------------------------------- what is compared


def random_model(size: str) -> Decoder:
    torch.manual_seed(0)
    c = SIZES[size]
    if isinstance(c, GPTConfig):
        return GPT(c)
    model = Llama(c)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.04)
    return model


def make_base(root: Path, size: str, dtypes: list[torch.dtype]) -> None:
    """Random weights, in each dtype in which they are used."""
    c, model, config = SIZES[size], random_model(size), None
    if isinstance(c, LlamaConfig):
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        config |= {"tie_word_embeddings": True, "rope_theta": c.rope_theta}
        for key, value in LLAMA.items():
            config[key] = getattr(c, value) if isinstance(value, str) else value[0]
    for dtype in dtypes:
        save_base(model.to(dtype), root / f"{size}-{dtype}", config)


def ours(model: Decoder, method: str, P: int) -> tuple[Decoder, nn.Module]:
    """-> a model of ours, frozen, and an adapter of random numbers on it."""
    (kind,) = ADAPTERS_OF[method]
    model = model.to(DEVICE).requires_grad_(False)
    return model, kind.random(model, P, torch.Generator().manual_seed(0))


def theirs(directory: Path, method: str, P: int, adapter: nn.Module | None = None) -> nn.Module:
    """-> transformers' model of the same files in PEFT's adapter, of the same numbers if given."""
    import peft
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    base = base.to(DEVICE).eval()
    base.generation_config.eos_token_id = None  # so that it goes on to the last token
    kind = {"prefix": peft.PrefixTuningConfig, "soft_prompt": peft.PromptTuningConfig}[method]
    model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=P))
    if adapter:
        rows = next(adapter.parameters()).detach().flatten(1).clone()
        model.prompt_encoder["default"].embedding.weight.data = rows
    return model.to(DEVICE)


def random_rows(size: str, n: int, T: int = SOURCE + TARGET) -> list[data.Row]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SIZES[size].vocab_size, (n, T), generator=generator)
    return [data.Row(row[:-TARGET], row[-TARGET:]) for row in ids.tolist()]


def their_loss(model: nn.Module, rows: list[data.Row]) -> Callable[[], Tensor]:
    idx = torch.tensor([row.source + row.target for row in rows], device=DEVICE)
    labels = [[data.IGNORE] * len(row.source) + row.target for row in rows]
    labels = torch.tensor(labels, device=DEVICE)
    return lambda: model(input_ids=idx, labels=labels).loss


def step(trained: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    """-> one training step: forward, backward, AdamW on what is trainable."""
    trainable = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)

    def one() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    return one


def products(size: str, method: str, P: int) -> list[tuple[int, int, int]]:
    """-> (rows, in, out) of each product with weights in a forward pass. Backward has as many.

    Blocks work at all positions that are read, the vocabulary at the targets alone. A soft prompt
    counts once a batch.
    """
    c, n = SIZES[size], B * (SOURCE + TARGET - 1) + (P if method == "soft_prompt" else 0)
    C = c.n_embd
    if isinstance(c, LlamaConfig):
        Q, K, I = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_inner
        block = [(n, C, Q), (n, C, K), (n, C, K), (n, Q, C), (n, C, I), (n, C, I), (n, I, C)]
    else:
        block = [(n, C, 3 * C), (n, C, C), (n, C, 4 * C), (n, 4 * C, C)]
    return c.n_layer * block + [(B * TARGET, C, c.vocab_size)]


def floor(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> Callable[[], None]:
    """-> just these products, each with its own weight: x Wᵀ forward, g W backward."""
    new = partial(torch.randn, device=DEVICE, dtype=dtype)
    inputs = {(n, size): new(n, size) for n, i, o in shapes for size in (i, o)}
    weights = [new(o, i) for _, i, o in shapes]

    def one() -> None:
        for (n, i, o), weight in zip(shapes, weights):
            inputs[n, i] @ weight.T
            inputs[n, o] @ weight

    return one


# ------------------------------------------------------------------------------ how it is measured


def seconds(contestants: dict[Any, Callable[[], object]]) -> tuple[dict, dict]:
    """-> the median time of each, and the distance of its quartiles as a share of that."""
    times = interleaved(contestants, TURNS)
    quarters = {name: quantiles(taken, n=4) for name, taken in times.items()}
    spreads = {name: (high - low) / middle for name, (low, middle, high) in quarters.items()}
    return {name: median(taken) for name, taken in times.items()}, spreads


def peak_of_this_process(
    side: str, directory: str, size: str, method: str, P: int, tokens: int, n: int
) -> float:
    """-> MB at most, of the card or the machine, after three steps of training one side."""
    rows = random_rows(size, n, tokens)
    if side == "here":
        base = load_base(directory) if directory else random_model(size)
        model, trained = ours(base, method, P)
        one = step(trained, partial(forward, model, [trained], data.batch_of(rows, DEVICE)))
    else:
        trained = theirs(Path(directory), method, P)
        one = step(trained, their_loss(trained, rows))
    for _ in range(3):
        one()
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()  # Linux only; ru_maxrss counts the parent
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1e3


def peak(*what: object) -> float:
    """-> the peak of a process of its own, see `peak_of_this_process`."""
    command = [sys.executable, __file__, "--peak", *map(str, what)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(printed.split()[-1])


# ---------------------------------------------------------------------------------------- the rows


class Table:
    """Prints each row as it is measured, and keeps it in a file. It replaces an earlier one."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = {}
        self.about = {"device": machine(DEVICE), "torch": torch.__version__}
        if path.exists():
            stored = read_json(path)
            if self.about.items() <= stored.items():
                self.rows = {row["what"]: row for row in stored["comparison"]}
        print(f"{'':58}{'here':>9}{'PEFT':>9}{'floor':>9}   here/PEFT  here/floor")

    def add(
        self, what: str, unit: str, here: float, peft: float = 0, floor: float = 0, **more: float
    ) -> None:
        row = {"what": what, "unit": unit, "here": here, "peft": peft, "floor": floor} | more
        self.rows[what] = row
        write_json(self.path, self.about | {"comparison": list(self.rows.values())})
        cells = "".join(f"{value:9.1f}" if value else f"{'':9}" for value in (here, peft, floor))
        ratios = [f"{here / value:12.2f}" if value else f"{'':12}" for value in (peft, floor)]
        extra = "  ".join(f"{key} {value:.2f}" for key, value in more.items())
        print(f"{f'{what}, {unit}':58}{cells}{''.join(ratios)}  {extra}", flush=True)


def compare(
    table: Table, root: Path, size: str, methods: list[str], P: int, dtype: torch.dtype
) -> None:
    """A step of each method here and in PEFT, its products, and what each takes in memory."""
    rows, directory = random_rows(size, B), root / f"{size}-{dtype}"
    batch, model = data.batch_of(rows, DEVICE), load_base(directory)
    sides, steps = {}, {}
    for method in methods:
        model, adapter = ours(model, method, P)
        peer = theirs(directory, method, P, adapter)
        here, peft = partial(forward, model, [adapter], batch), their_loss(peer, rows)
        a, b, close = here().item(), peft().item(), 1e-4 if dtype == FLOAT32 else 2e-2
        assert abs(a - b) < close * b, f"losses: {a} here, {b} in PEFT"
        sides[method] = {"here": (model, here), "peft": (peer, peft)}
        steps[method, "here"], steps[method, "peft"] = step(adapter, here), step(peer, peft)
        steps[method, "floor"] = floor(products(size, method, P), dtype)
    if P == 20 and dtype == FLOAT32:
        whole = load_base(directory).to(DEVICE)
        steps["full"] = step(whole, partial(forward, whole, [], batch))
    taken, spreads = seconds(steps)
    for method in methods:
        name = f"{size} {method} P={P} {str(dtype).removeprefix('torch.')}"
        times = [1e3 * taken[method, side] for side in ("here", "peft", "floor")]
        more = {"/full": taken[method, "here"] / taken["full"]} if "full" in taken else {}
        table.add(f"{name} step", "ms", *times, **more, spread=spreads[method, "here"])
        kept = [kept_for_backward(*side) / 1e6 for side in sides[method].values()]
        table.add(f"{name} kept for backward", "MB", *kept)
        if P == 20:
            what = (directory, size, method, P, SOURCE + TARGET, B)
            table.add(f"{name} peak memory", "MB", *(peak(side, *what) for side in sides[method]))


def compare_generation(table: Table, root: Path, size: str, dtype: torch.dtype, P: int) -> None:
    """Greedy tokens a second behind a prefix, here and in PEFT; and with a prefix for each row."""
    directory = root / f"{size}-{dtype}"
    model, adapter = ours(load_base(directory), "prefix", P)
    peer = theirs(directory, "prefix", P, adapter)
    name = f"{size} prefix P={P} {str(dtype).removeprefix('torch.')} generation"
    for n in (1, 16):
        idx = torch.tensor([row.source for row in random_rows(size, n)], device=DEVICE)
        their = {"input_ids": idx, "attention_mask": torch.ones_like(idx), "do_sample": False}
        sides = {
            "here": lambda: model.generate(idx, NEW, adapter.past_kv(model)),
            "peft": lambda: peer.generate(**their, max_new_tokens=NEW),
        }
        assert sides["here"]().shape == sides["peft"]().shape == (n, SOURCE + NEW)
        taken, spreads = seconds(sides)
        speeds = [n * NEW / taken[side] for side in sides]
        table.add(f"{name}, {n} rows", "tokens/s", *speeds, spread=spreads["here"])
    prefixes = [Prefix.random(model, P, torch.Generator().manual_seed(i)) for i in range(n)]
    with torch.no_grad():
        one = prefixes[0].past_kv(model)
        many = rows_of([prefix.past_kv(model) for prefix in prefixes])
    ways = {"many": partial(model.generate, idx, NEW, many)}
    ways["one"] = partial(model.generate, idx, NEW, one)
    taken, spreads = seconds(ways)
    more = {"/one for all": taken["many"] / taken["one"], "spread": spreads["many"]}
    more["MB an adapter"] = 4 * prefixes[0].start.numel() / 1e6
    table.add(f"{name}, {n} rows with {n} prefixes", "tokens/s", n * NEW / taken["many"], **more)


def kind_of_machine() -> str:
    return machine(DEVICE).replace(" ", "-") if CUDA else torch.backends.cpu.get_cpu_capability()


def draw(rows: list[dict], path: Path) -> None:
    """Draws bars of here against PEFT: the time of a step, and the memory at its peak."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no figure: matplotlib is not installed")
    names = {"124M": "GPT-2 small", "135M": "SmolLM2-135M"}
    by_name = {row["what"]: row for row in rows}
    cases = [(size, method) for size in names for method in ("prefix", "soft_prompt")]
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


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=COMPARED, help="(default: 124M 135M)")
    methods = ["prefix", "soft_prompt"]
    add("--methods", nargs="+", choices=methods, default=methods, help="(default: both)")
    add("--P", nargs="+", type=int, default=[5, 20, 100], help="(default: 5 20 100)")
    memory = "the peak of one training with a prefix, in place of the comparison"
    add("--memory", choices=SIZES, metavar="SIZE", help=memory)
    add("--tokens", type=int, default=SOURCE + TARGET, help="of a row, with --memory (default: 75)")
    add("--rows", type=int, default=B, help=f"of a batch, with --memory (default: {B})")
    add("--draw", type=Path, metavar="FILE", help="measure nothing: draw the rows of a JSON file")
    add("--peak", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        side, directory, size, method, *numbers = args.peak
        return print(peak_of_this_process(side, directory, size, method, *map(int, numbers)))
    if args.draw:
        rows = read_json(args.draw)["comparison"]
        return draw(rows, Path(__file__).with_name("benchmark.png"))
    quicker = seconds_of_a_product(BFLOAT16) < seconds_of_a_product(FLOAT32)
    dtypes = [FLOAT32, BFLOAT16] if CUDA or quicker else [FLOAT32]
    table = Table(Path(__file__).with_name(f"benchmark-{kind_of_machine()}.json"))
    if args.memory:
        size, P = args.memory, args.P[0]
        what = f"{size} prefix P={P} float32, {args.rows} rows of {args.tokens} tokens"
        at_most = peak("here", "", size, "prefix", P, args.tokens, args.rows)  # of no file
        return table.add(f"{what} peak memory", "MB", at_most)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for size in args.sizes:
            make_base(root, size, dtypes)
            for dtype in dtypes:
                for P in args.P:
                    compare(table, root, size, args.methods, P, dtype)
                if "prefix" in args.methods and 20 in args.P:
                    compare_generation(table, root, size, dtype, P=20)


if __name__ == "__main__":
    main()
