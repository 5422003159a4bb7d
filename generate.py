"""Use what train.py trained: complete a prompt, evaluate on a file, or export for PEFT.

    python generate.py --adapter out/sentence/prefix --prompt "name : …"      complete one input
    python generate.py --adapter out/sentence/prefix --prompt -               a dialogue, or stdin
    python generate.py --adapter out/mine/prefix --data test.jsonl --predict got.jsonl
    python generate.py --adapter out/mine/both --export out/mine/one          a stack as one prefix
"""

if __name__ == "__main__":  # a wrong flag is answered before torch takes its seconds to load
    from command.console import before_torch
    from command.flags import generate_flags

    before_torch(generate_flags, __doc__)

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import nn

from command.answers import answers, check_frozen, report, show_examples, write_predictions
from command.console import prompts, run_command, say
from command.examples import check_lengths, read_jsonl
from command.flags import DEFAULT_BASE, generate_flags
from command.models import load_adapters, open_base, trained_on
from command.process import start_process
from data import Example, Row, encode, source_ids
from model import Decoder, past_length, stacked_past_kv
from prefix import Prefix
from small_base.world import task_examples
from storage.adapters import save_adapter
from storage.files import TRAINING, check_place, check_predictions, write_json
from train import evaluate


def complete(
    model: Decoder, adapters: list[nn.Module], tokenizer: tiktoken.Encoding,
    template: Callable | None, args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Prints the completion of each prompt -> the completions."""
    generator = torch.Generator(model.device).manual_seed(args.seed)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "generator": generator}
    completions, n_virtual = [], past_length(stacked_past_kv(adapters, model))
    for batch in prompts(args.prompt):
        sources = [source_ids(tokenizer, prompt, template) for prompt in batch]
        inputs = [Example(text, "", f"input {i}") for i, text in enumerate(batch, start=1)]
        rows = [Row(source, [tokenizer.eot_token]) for source in sources]
        check_lengths(inputs, rows, model.config.block_size, n_virtual)
        limit, size = args.max_new_tokens, args.batch_size
        for text in answers(model, adapters, tokenizer, sources, limit, size, **sampling):
            say(text)
            completions.append(text)
    return {"completions": completions}


def assess(
    model: Decoder, adapters: list[nn.Module], tokenizer: tiktoken.Encoding,
    template: Callable | None, args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates on a file, or the test data of a task, with and without adapters -> the scores."""
    task = args.task or "sentence"
    examples = read_jsonl(args.data) if args.data else task_examples(task, "test", 300, args.seed)
    rows = encode(tokenizer, examples, template)
    n_virtual = past_length(stacked_past_kv(adapters, model))
    check_lengths(examples, rows, model.config.block_size, n_virtual)
    tested = {"frozen": evaluate(model, [], rows, args.batch_size)}
    check_frozen(tested["frozen"], model)
    if adapters:
        tested["tuned"] = evaluate(model, adapters, rows, args.batch_size)
    numbers = report(tested)
    if args.predict:
        sources = [row.source for row in rows]
        got = answers(model, adapters, tokenizer, sources, args.max_new_tokens, args.batch_size)
        write_predictions(args.predict, examples, got)
        say(f"{len(got)} predictions in {args.predict}")
    else:
        exact = tested["tuned" if adapters else "frozen"].exact
        show_examples(model, adapters, tokenizer, examples, rows, exact)
    return numbers


def export(
    model: Decoder, adapters: list[nn.Module], directory: Path, names: list[str], chat: bool
) -> dict[str, Any]:
    """Saves whatever has a cache as one prefix: PEFT has no kind for a stack -> what was done."""
    names = [str(Path(name)) for name in names]  # without a slash at the end
    done = {"method": "export", "adapters": names, "base": model.name, "chat": chat}
    check_place(directory, done)
    write_json(directory / TRAINING, done)
    save_adapter(Prefix.from_cache(stacked_past_kv(adapters, model)), directory, model)
    say(f"saved to {directory}, as one prefix")
    return done


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command-line arguments -> what was done. Raises ValueError for what a user got wrong."""
    args = generate_flags(__doc__, argv)
    start_process()
    if args.predict:
        check_predictions(args.predict)
    known = [trained_on(name) for name in args.adapter] or [(DEFAULT_BASE, False)]
    base = args.base or known[0][0]
    if base is None:
        raise ValueError(f"{args.adapter[0]} does not name its base: give --base")
    if args.adapter and not args.base and Path(base) == DEFAULT_BASE and not Path(base).exists():
        where = f"{base}, on which {args.adapter[0]} was trained, is not in this folder"
        raise ValueError(f"{where}: give --base, or run this where train.py ran")
    chat = args.chat or any(was_chat for _, was_chat in known)
    model, tokenizer, template = open_base(base, chat, args.device, args.dtype)
    adapters = [adapter for name in args.adapter for adapter in load_adapters(name, model)]
    if args.export:
        return export(model, adapters, args.export, args.adapter, chat)
    act = assess if args.prompt is None else complete
    return act(model, adapters, tokenizer, template, args)


if __name__ == "__main__":
    run_command(main)
