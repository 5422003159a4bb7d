"""The flags of the three programs, with their units and defaults.

Nothing here imports torch, so a wrong flag is answered at once: by a ValueError of one sentence.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DEFAULT_BASE = Path("out/base")
TASKS = ("sentence", "table", "sentiment", "reply", "chat", "verdict", "shifted")  # of small_base
STARTS = ("text", "vocab", "random", "zero")  # what --init knows, besides directories
DEVICES = "cuda, mps or cpu (default: the first of them that is there)"
PRETRAIN_STEPS, PRETRAIN_LR = 120, 3e-2


class Recipe(NamedTuple):
    """What a method trains with unless told otherwise."""

    help: str
    n_virtual: int  # of each adapter
    lr: float  # chosen on validation data, for the small base
    middle: float  # where the search of a rate begins on any other base


RECIPES = {
    "prefix": Recipe("train keys and values for every layer", 8, 3e-1, 3e-2),
    "soft_prompt": Recipe("train input vectors", 6, 1e-1, 3e-2),
    "both": Recipe("train a prefix and a soft prompt behind it", 4, 3e-1, 3e-2),
    "full": Recipe("train all weights", 0, 1.5e-3, 1e-4),
}


class Parser(argparse.ArgumentParser):
    """argparse's, which raises ValueError and leaves it to the program how to end."""

    def __init__(self, description: str):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=style, allow_abbrev=False)

    def error(self, message: str) -> None:
        if message.startswith("unrecognized"):  # a flag of another program, perhaps
            programs = "train.py, generate.py and small_base.pretrain"
            message += f": see --help; {programs} have flags of their own"
        raise ValueError(message.removeprefix("argument "))


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """-> a type for argparse: a number from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted} from {low} to {high}")
        return value

    return parse


def place(text: str) -> Path:
    """A type for argparse: where to write. Path("") would be the folder one is in."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


count, seed = number(int, 1, 10**9), number(int, 0, 2**63 - 1)
rate, heat = number(float, 1e-30, 1e38), number(float, 0, 1e6)


def train_flags(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments -> the flags of train.py, a method's defaults filled in."""
    parser = Parser(description)
    add = parser.add_argument_group("what to train").add_argument
    methods = "; ".join(f"{name}: {recipe.help}" for name, recipe in RECIPES.items())
    add("--method", choices=RECIPES, default="prefix", help=f"{methods} (default: prefix)")
    add_data(parser)
    add("--val-data", metavar="FILE", help="JSONL to validate on (default: a tenth of --data)")
    add_base(add, DEFAULT_BASE)

    add = parser.add_argument_group("the adapter").add_argument
    add("--n-virtual", metavar="P", type=count, help=f"virtual tokens ({defaults('n_virtual')})")
    add("--init", default="text", help=f"{', '.join(STARTS)}, or an adapter (default: text)")
    add("--init-text", metavar="TEXT", help="to start from (default: a training example's end)")
    add("--mid-dim", metavar="M", type=count, help="train the prefix through an MLP of this width")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=count, default=100, help="optimizer steps (default: 100)")
    rates = f"{defaults('lr')} on the small base; elsewhere a search finds one"
    add("--lr", type=rate, help=f"peak learning rate ({rates})")
    add("--batch-size", metavar="B", type=count, default=16, help="examples a step (default: 16)")
    add("--micro-batch", metavar="B", type=count, help="examples at once, if memory is short")
    add("--seed", type=seed, default=0, help="of data, order and initialisation (default: 0)")
    looks = "steps between looks at the validation data, and checkpoints (default: a tenth)"
    add("--eval-every", metavar="STEPS", type=count, help=looks)
    patience = "end after so many looks without a new best, and save the best (default: never)"
    add("--patience", metavar="LOOKS", type=count, help=patience)
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--film", action="store_true", help="keep the adapter of every look, for the playground")
    add("--out", metavar="DIR", type=place, help="where to save (default: out/TASK/METHOD)")

    args = parser.parse_args(argv)
    recipe = RECIPES[args.method]
    if args.val_data is not None and args.data is None:
        parser.error("--val-data goes with --data")
    if args.init_text is not None and (args.init != "text" or not args.init_text):
        parser.error("--init-text goes with --init text, and is not empty")
    if args.init not in STARTS and not Path(args.init).is_dir():
        parser.error(f"--init {args.init} is none of {', '.join(STARTS)}, and no folder")
    if args.n_virtual and args.init not in STARTS:
        parser.error(f"--n-virtual with --init {args.init}: a trained adapter keeps its length")
    if args.mid_dim and args.method not in ("prefix", "both"):
        parser.error(f"--mid-dim is for a prefix, and --method {args.method} has none")
    for_adapters = args.film or args.n_virtual or args.init_text or args.init != "text"
    if for_adapters and args.method == "full":
        names = "--film, --n-virtual, --init and --init-text"
        parser.error(f"{names} are for adapters, and --method full has none")
    if args.init in STARTS:
        args.n_virtual = args.n_virtual or recipe.n_virtual
    if Path(args.base) == DEFAULT_BASE:
        args.lr = args.lr or recipe.lr
    args.micro_batch = args.micro_batch or args.batch_size
    args.eval_every = args.eval_every or math.ceil(args.steps / 10)
    args.task = Path(args.data).stem if args.data else args.task or "sentence"
    args.out = args.out or Path("out", args.task, args.method)
    return args


def generate_flags(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments -> the flags of generate.py."""
    parser = Parser(description)
    add = parser.add_argument_group("what to use").add_argument
    adapters = "saved adapters, the foremost first (default: none, the frozen base)"
    add("--adapter", metavar="DIR", nargs="+", action="extend", default=[], help=adapters)
    add_base(add, None)

    add_data(parser)
    add = parser.add_argument_group("what else to do").add_argument
    add("--predict", metavar="FILE", type=place, help="with --data or --task: write all answers")
    add("--prompt", metavar="TEXT", help="complete this input; -: each line that comes in")
    add("--export", metavar="DIR", type=place, help="save the adapters as one prefix, for PEFT")

    add = parser.add_argument_group("how to answer").add_argument
    add("--temperature", type=heat, default=0.0, help="more makes answers vary (default: 0)")
    add("--top-k", metavar="K", type=count, help="sample among the K likeliest (default: all)")
    add("--max-new-tokens", metavar="N", type=count, default=256, help="(default: 256)")
    add("--batch-size", metavar="B", type=count, default=16, help="inputs at once (default: 16)")
    add("--seed", type=seed, default=0, help="of sampling, and of a task's examples (default: 0)")

    args = parser.parse_args(argv)
    evaluates = args.data is not None or args.task is not None
    if args.predict is not None and not evaluates:
        parser.error("--predict writes the answers to --data or a --task: give one")
    if evaluates + (args.prompt is not None) + (args.export is not None) != 1:
        parser.error("give one of --data or --task (evaluate), --prompt (complete) and --export")
    if args.export and not args.adapter:
        parser.error("--export saves an --adapter for PEFT: give one")
    if args.top_k and not args.temperature:
        parser.error("--top-k samples, and needs a --temperature above 0")
    return args


def pretrain_flags(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments -> the flags of small_base.pretrain."""
    parser = Parser(description)
    add = parser.add_argument
    texts = "UTF-8 texts to train on (default: the restaurant world)"
    add("--corpus", metavar="FILE", type=Path, nargs="+", default=[], help=texts)
    sizes = {"nargs": 4, "metavar": ("L", "H", "C", "BLOCK"), "default": [4, 4, 128, 128]}
    add("--sizes", type=count, **sizes, help="layers, heads, width, context (4 4 128 128)")
    steps = "optimizer steps (default: %(default)s)"
    add("--steps", type=count, default=PRETRAIN_STEPS, help=steps)
    add("--lr", type=rate, default=PRETRAIN_LR, help="peak learning rate (default: %(default)s)")
    add("--batch-size", metavar="B", type=count, default=16, help="windows a step (default: 16)")
    add("--seed", type=seed, default=0, help="of texts, order and start (default: 0)")
    add("--device", help=DEVICES)
    new = "a new directory (default: %(default)s)"
    add("--out", metavar="DIR", type=place, default=DEFAULT_BASE, help=new)
    args = parser.parse_args(argv)
    if args.sizes[2] % args.sizes[1]:
        parser.error(f"--sizes {args.sizes}: give a width that is a multiple of the heads")
    return args


def add_data(parser: Parser) -> None:
    add = parser.add_mutually_exclusive_group().add_argument
    add("--task", choices=TASKS, metavar="TASK", help=f"embedded: {', '.join(TASKS)}")
    add("--data", metavar="FILE", help="JSONL of inputs and targets, for a task of your own")


def add_base(add: Callable, default: Path | None) -> None:
    small = f"default: {default}" if default else "default: the adapter's"
    add("--base", metavar="DIR", default=default, help=f"directory, or name on the hub ({small})")
    add("--chat", action="store_true", help="put inputs through the model's chat template")
    add("--device", help=DEVICES)
    quick = "of the frozen base (default: the one that the processor is quicker in)"
    add("--dtype", choices=["float32", "bfloat16"], help=quick)


def defaults(field: str) -> str:
    """-> what each recipe has in a field."""
    values = {method: getattr(recipe, field) for method, recipe in RECIPES.items()}
    return "default: " + ", ".join(f"{name} {value:g}" for name, value in values.items() if value)
