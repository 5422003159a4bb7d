"""The flags of train.py: a line each, with unit and default; which numbers they take; and what does not go together.

A new flag is a line in `table`. If it takes a number it has a line in `RANGES`, if it needs another flag one in `check_flags`.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from small_base.world import TASKS
from storage.hub import HUB_REPOS

DEFAULT_BASE = Path("out/base")
STARTS = ("text", "vocab", "random", "zero")  # what --init knows, besides directories
METHODS = {
    "prefix": "train keys and values for every layer (the default)",
    "soft_prompt": "train input vectors",
    "both": "train a prefix and a soft prompt behind it",
    "full": "train all weights",
    "none": "train nothing, evaluate the frozen base",
    "pretrain": "make a small base from texts",
}
PRETRAINING = ("method", "corpus", "sizes", "steps", "lr", "batch_size", "seed", "device", "out")  # all that it looks at
RANGES = {
    "n_virtual": (1, 10**5),
    "mid_dim": (1, 10**4),
    "steps": (1, 10**9),
    "lr": (1e-30, 1e38),
    "batch_size": (1, 10**5),
    "seed": (0, 2**63 - 1),
    "eval_every": (1, 10**9),
    "save_every": (1, 10**9),
    "temperature": (0, 1e6),
    "top_k": (1, 10**9),
    "patience": (1, 10**9),
}


def parse(argv: list[str] | None, description: str, recipes: Mapping[str, Any]) -> argparse.Namespace:
    """Arguments, and a recipe for each method -> flags, a method's defaults filled in.

    Raises ValueError for what is out of range, or does not go together.
    """
    parser = table(description, recipes)
    args = parser.parse_args(argv)
    check_flags(args)
    others = [name for name, value in vars(args).items() if name not in PRETRAINING and value != parser.get_default(name)]
    if args.method == "pretrain" and others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise ValueError(f"--method pretrain makes a base of a --corpus, and takes no {flags}")
    recipe = recipes[args.method]
    args.n_virtual = args.n_virtual or (recipe.n_virtual if args.init in STARTS else None)
    args.steps = 0 if args.method == "none" else args.steps or recipe.steps
    args.lr = args.lr or recipe.lr
    args.eval_every = args.eval_every or math.ceil(args.steps / 10) or 1
    args.save_every = args.save_every or math.ceil(args.steps / 10) or 1
    args.task = Path(args.data).stem if args.data else args.task or "sentence"
    args.out = args.out or (DEFAULT_BASE if args.method == "pretrain" else Path("out", args.task, args.method))
    return args


def table(description: str, recipes: Mapping[str, Any]) -> argparse.ArgumentParser:
    """-> the parser of all flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def by_method(what: str) -> str:
        """-> the default of each method that has one."""
        values = {method: getattr(recipe, what) for method, recipe in recipes.items()}
        return "default: " + ", ".join(f"{method} {value:g}" for method, value in values.items() if value)

    bases = f"Hugging Face directory, OWNER/NAME on their hub, or {', '.join(HUB_REPOS)} (default: {DEFAULT_BASE})"
    add = parser.add_argument_group("what to do").add_argument
    add("--method", choices=recipes, default="prefix", help="; ".join(f"{name}: {what}" for name, what in METHODS.items()))
    add("--task", choices=TASKS, metavar="TASK", help=f"{', '.join(TASKS)} (default: sentence)")
    add("--data", metavar="FILE", help='JSONL, {"input": …, "target": …} a line, instead of a --task')
    add("--val-data", metavar="FILE", help="JSONL to evaluate on (default: a seeded tenth of --data, held out)")
    add("--base", metavar="DIR", default=DEFAULT_BASE, help=bases)
    add("--corpus", metavar="FILE", nargs="+", default=[], help="pretrain on these texts (default: the restaurant world)")
    sizes = "layers, heads, width and context of what is pretrained (default: 4 4 128 128)"
    add("--sizes", metavar=("L", "H", "C", "BLOCK"), nargs=4, type=int, default=[], help=sizes)

    add = parser.add_argument_group("the adapter").add_argument
    add("--n-virtual", metavar="P", type=int, help=f"virtual tokens an adapter ({by_method('n_virtual')})")
    add("--init", default="text", help=f"start: {', '.join(STARTS)}, or the directory of a trained adapter (default: text)")
    add("--init-text", metavar="TEXT", help="for --init text (default: the end of the first training example)")
    add("--mid-dim", metavar="M", type=int, help="train the prefix through an MLP of this width (default: directly)")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, help=f"optimizer steps ({by_method('steps')})")
    add("--lr", type=float, help=f"peak learning rate ({by_method('lr')})")
    add("--batch-size", metavar="B", type=int, default=16, help="examples a step (default: 16)")
    add("--seed", type=int, default=0, help="of the data, the order, the initialisation and sampling (default: 0)")
    add("--eval-every", metavar="STEPS", type=int, help="between looks at the validation data (default: a tenth of --steps)")
    add("--save-every", metavar="STEPS", type=int, help="between two checkpoints (default: a tenth of --steps)")
    add("--patience", metavar="LOOKS", type=int, help="end after so many without a new best, and save it (default: never)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    add("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    add("--dtype", choices=["float32", "bfloat16"], help="of the frozen base (default: that of its file)")

    add = parser.add_argument_group("saving and using").add_argument
    add("--out", metavar="DIR", type=Path, help=f"where to save (default: out/TASK/METHOD; pretrain: {DEFAULT_BASE})")
    add("--predict", metavar="FILE", type=Path, help="write input, target and prediction of the test data as JSONL")
    add("--adapter", metavar="DIR", nargs="+", action="extend", help="evaluate these on --data or --task, foremost first")
    add("--prompt", metavar="TEXT", help="print the completion of this input instead; -: of every line that comes in")
    add("--export", metavar="DIR", type=Path, help="save the --adapter instead, several as one, as a prefix that PEFT loads")
    add("--temperature", type=float, help="sample the completion of --prompt (default: take the likeliest tokens)")
    add("--top-k", metavar="K", type=int, help="sample among the K likeliest tokens (default: among all)")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers out of range, and flags that would be ignored."""
    for name, (low, high) in RANGES.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give {low} to {high}")
    method, init, sampling = args.method, args.init, args.temperature is not None or args.top_k is not None
    for wrong, sentence in [
        (args.export and not args.adapter, "--export saves an --adapter for PEFT: give one"),
        (args.export and args.prompt is not None, "--export saves, and --prompt completes: give one of them"),
        (args.adapter and (args.resume or args.patience), "--adapter is used as it is; to train on, use --init"),
        (args.adapter and args.val_data is not None, "--adapter is evaluated on --data: give that, without --val-data"),
        (args.prompt is not None and args.predict, "--predict writes what an evaluation answers, and --prompt is none"),
        (args.sizes and method != "pretrain", f"--sizes goes with --method pretrain, not {method}"),
        (
            args.sizes and (min(args.sizes) < 1 or args.sizes[2] % args.sizes[1] > 0),
            f"--sizes {args.sizes}: give 1 or more of each, and a width that is a multiple of the heads",
        ),
        (sampling and args.prompt is None, "--temperature and --top-k sample the completion of a --prompt: give one"),
        (args.top_k and not args.temperature, "--top-k samples, and needs a --temperature above 0"),
        (args.data is not None and args.task, "--task is an embedded task, and --data your own: give one of them"),
        (args.val_data is not None and args.data is None, "--val-data goes with --data"),
        (args.init_text is not None and init != "text", f"--init-text goes with --init text, not {init}"),
        (args.init_text == "", "--init-text is empty: give a text"),
        (args.n_virtual and init not in STARTS, f"--n-virtual with --init {init}: a trained adapter keeps its length"),
        (args.mid_dim and method not in ("prefix", "both"), f"--mid-dim goes with a prefix, not with --method {method}"),
        (args.corpus and method != "pretrain", f"--corpus goes with --method pretrain, not {method}"),
        (args.patience and method == "none", "--patience ends the tuning of an adapter or a model: --method none has none"),
    ]:
        if wrong:
            raise ValueError(sentence)
